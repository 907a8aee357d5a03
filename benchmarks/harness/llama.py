"""llama.cpp as a peer: the dense model as a GGUF file, and `llama_decode` timed through llama-cpp-python's C API.

Tensor map (published name -> GGUF), layer kinds by `head_count_kv` and `feed_forward_length` (both 0: Mamba):
A_log -> ssm_a = -exp(A_log); norm as (groups, d_inner / groups); conv1d squeezed; all else by name.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemotron_h import NemotronHForCausalLM

from .measure import seconds

TYPES = ("bf16", "q8_0", "q4_0")
REMEDY = "pip install 'nemotron-h[bench-llama]' brings llama-cpp-python and gguf"


def missing() -> str | None:
    """What keeps llama.cpp out of the table, or None."""
    for name in ("llama_cpp", "gguf"):
        try:
            __import__(name)
        except (ImportError, OSError, RuntimeError) as error:
            return f"llama.cpp is left out: {name} cannot be imported ({type(error).__name__}); {REMEDY}"
    return None


def _tensors(model: NemotronHForCausalLM) -> Any:
    """(GGUF name, tensor, is a matrix) for every tensor of a dense model."""
    config, state = model.config, model.state_dict()
    yield "token_embd.weight", state["model.embeddings.weight"], True
    yield "output_norm.weight", state["model.norm_f.weight"], False
    yield "output.weight", state["lm_head.weight"], True
    renamed = {
        "mamba": {"in_proj.weight": "ssm_in.weight", "out_proj.weight": "ssm_out.weight"},
        "attention": {
            f"{name}_proj.weight": f"attn_{gguf}.weight"
            for name, gguf in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()
        },
        "mlp": {"up_proj.weight": "ffn_up.weight", "down_proj.weight": "ffn_down.weight"},
    }
    for index, kind in enumerate(config.layers_block_type):
        ours, gguf = f"model.layers.{index}.", f"blk.{index}."
        yield f"{gguf}attn_norm.weight", state[f"{ours}norm.weight"], False
        for name, new in renamed[kind].items():
            yield gguf + new, state[f"{ours}mixer.{name}"], True
        if kind == "mamba":
            mixer = {name: state[f"{ours}mixer.{name}"] for name in ("A_log", "D", "dt_bias", "norm.weight")}
            yield f"{gguf}ssm_a", -torch.exp(mixer["A_log"].float())[:, None], False
            yield f"{gguf}ssm_d", mixer["D"][:, None], False
            yield f"{gguf}ssm_dt.bias", mixer["dt_bias"], False
            yield f"{gguf}ssm_norm.weight", mixer["norm.weight"].view(config.n_groups, -1), False
            yield f"{gguf}ssm_conv1d.weight", state[f"{ours}mixer.conv1d.weight"].squeeze(1), False
            yield f"{gguf}ssm_conv1d.bias", state[f"{ours}mixer.conv1d.bias"], False


def write_gguf(model: NemotronHForCausalLM, path: Path) -> None:
    """The model as a GGUF file with a tokenizer of nonsense: matrices in the model's dtype (bfloat16 or float32), the
    rest in float32."""
    import gguf

    config = model.config
    half = model.dtype == torch.bfloat16
    matrix = gguf.GGMLQuantizationType.BF16 if half else gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, "nemotron_h")
    kinds = config.layers_block_type
    writer.add_block_count(len(kinds))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([config.intermediate_size if k == "mlp" else 0 for k in kinds])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([config.num_key_value_heads if k == "attention" else 0 for k in kinds])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["< 0"])  # an empty list is not written, and none is refused
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    tensors = list(_tensors(model))
    for name, tensor, is_matrix in tensors:
        kind = matrix if is_matrix else gguf.GGMLQuantizationType.F32
        nbytes = tensor.numel() * (2 if is_matrix and half else 4)
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _name, tensor, is_matrix in tensors:
        tensor = tensor.detach().contiguous()
        writer.write_tensor_data((tensor.view(torch.uint16) if is_matrix and half else tensor.float()).numpy())
    writer.close()


def quantise(source: Path, target: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantiser; every matrix in `kind`, the embedding and the head too."""
    import llama_cpp

    _quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    parameters.nthread, parameters.pure = threads, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise RuntimeError(f"llama.cpp does not quantise the file to {kind}")


def matrix_bytes(path: Path) -> int:
    """Bytes of the matrices that one token reads: all but the embedding, of which it is a row."""
    import gguf

    vectors = gguf.GGMLQuantizationType.F32
    tensors = gguf.GGUFReader(path).tensors
    return sum(int(t.n_bytes) for t in tensors if t.tensor_type != vectors and t.name != "token_embd.weight")


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _keep_errors(level: int, text: bytes, _data: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        print(text.decode(errors="replace"), end="")


def _quiet() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))


class Llama:
    """A loaded GGUF file with one context: n_batch = n_ubatch = 512, KV in float16, flash attention as it chooses."""

    def __init__(self, path: Path, name: str, n_ctx: int, threads: int, exact: bool = False):
        import llama_cpp

        self.name, self.api, self.threads = name, llama_cpp, threads
        _quiet()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load the {name} file")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.exact, self.context, self.n_ctx = exact, None, 0
        self.resize(n_ctx)

    def resize(self, n_ctx: int) -> None:
        """A context of another length; what was in the old one is gone."""
        if n_ctx == self.n_ctx:
            return
        if self.context:
            self.api.llama_free(self.context)
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = self.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.no_perf = True
        if self.exact:
            parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
            parameters.flash_attn_type = 0
        self.context = self.api.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {n_ctx} tokens of the {self.name} file")
        self.position = 0

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0

    def feed(self, ids: list[int], all_logits: bool = False) -> None:
        """Decode these tokens in batches of up to 512; logits for the last one only, or for all of one batch."""
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            batch = self.api.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = all_logits or start + i == len(ids) - 1
            code = self.api.llama_decode(self.context, batch)
            self.api.llama_batch_free(batch)
            if code:
                raise RuntimeError(f"llama_decode returned {code}")
            self.position += len(part)

    def logits(self, ids: list[int]) -> np.ndarray:
        """(len(ids), vocab) after an empty memory; at most 512 tokens."""
        self.clear()
        self.feed(ids, all_logits=True)
        rows = [
            np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), shape=(self.vocab,))
            for i in range(len(ids))
        ]
        return np.stack(rows).copy()

    def prefill(self, length: int) -> float:
        ids = torch.randint(3, self.vocab, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        self.resize(max(self.n_ctx, length + 64))
        self.clear()
        return seconds(lambda: self.feed(ids))

    def decode(self, count: int) -> list[float]:
        return [seconds(lambda: self.feed([7])) for _ in range(count)]

    def state(self) -> tuple[bytes, int]:
        """The sequence as it is: keys, values, windows and states. Any file of the same cache shapes takes it."""
        size = self.api.llama_state_seq_get_size(self.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, buffer, size, 0)
        return bytes(buffer), self.position

    def take(self, state: tuple[bytes, int]) -> None:
        data, position = state
        self.clear()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if not self.api.llama_state_seq_set_data(self.context, buffer, len(data), 0):
            raise RuntimeError(f"llama.cpp does not take a state of {position} tokens in the {self.name} file")
        self.position = position

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
        self.context = self.model = None
