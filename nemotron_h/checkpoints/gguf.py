"""GGUF files, as llama.cpp reads them: architectures `nemotron_h` (dense) and `nemotron_h_moe` (any `E` layer).

| published | GGUF | there |
|---|---|---|
| backbone.embeddings, backbone.norm_f, lm_head | token_embd, output_norm, output | no output where it is tied |
| backbone.layers.N.norm | blk.N.attn_norm | |
| mixer.in_proj, out_proj | ssm_in, ssm_out | rows z, x, B, C, dt, as here |
| mixer.conv1d.weight (C, 1, K), .bias | ssm_conv1d.weight (C, K), .bias | the bias is zeros where there is none |
| mixer.A_log (H,) | ssm_a (H, 1) | **-exp(A_log)** |
| mixer.D (H,), mixer.dt_bias (H,) | ssm_d (H, 1), ssm_dt.bias (H,) | |
| mixer.norm (d_inner,) | ssm_norm (n_groups, d_inner / n_groups) | |
| mixer.q_proj, k_proj, v_proj, o_proj | attn_q, attn_k, attn_v, attn_output | **q and k reordered**, see below |
| mixer.up_proj, down_proj | ffn_up, ffn_down | |
| mixer.gate.weight, .e_score_correction_bias | ffn_gate_inp.weight, exp_probs_b.bias | |
| mixer.experts.E.up_proj, down_proj | ffn_up_exps (E, ., .), ffn_down_exps | stacked |
| mixer.shared_experts.up_proj, down_proj | ffn_up_shexp, ffn_down_shexp | |
| mixer.fc1_latent_proj, fc2_latent_proj | ffn_latent_down, ffn_latent_up | |
| mtp.layers.0.*, mtp.layers.1.* | blk.{number of layers}.*: one block more | see `_MTP` |

A layer's kind is told by two lists: heads of keys (0: no attention) and width of the MLP (0: none); both 0 is Mamba.
Matrices are stored as asked for (f32, f16, bf16, q8_0); vectors, norms, the convolution, the router, A and D in f32.

Of each head of q and k, the rows 0, 1, ... d-1 are stored as 0, d/2, 1, d/2 + 1, ...: a habit of llama.cpp's converter
for rotary models. Without a position encoding it changes no product of q and k, but adapters that llama.cpp's
converter made expect it, and files that it wrote have it.

What llama.cpp does not compute is refused: MLP and MoE layers in one model, a clamp of the time step, biases of
`in_proj` or of experts. Of MTP it knows one depth of `*E`, and subtracts a mean in its last norm (llama.cpp 0c1e5709):
other drafts than here, the same text. Files of other quantisations are read, dequantised.

The tokenizer is in `gguf_tokenizer`. `config.json` and its neighbours travel in keys `huggingface.*` that llama.cpp
passes over, so that a file comes back as the folder it was; without them the config is read off llama.cpp's own keys.
f32, f16 and bf16 come back exactly, except `A_log`: -exp of it is rounded to float32, so a float32 `A_log` may come
back a step of float32 (of its own or of 1.0, whichever is larger) beside what it was; a bfloat16 one is exact.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config_values import check_layers
from ..configuration import NemotronHConfig
from ..files import atomic_write
from . import gguf_tokenizer, huggingface, published
from .foreign import plain, shown
from .gguf_header import check_header
from .tensors import Entry, Plan, Shape, Spec, Tensors, narrowed
from .writing import SHARD_BYTES, Conversion, Done, convert, tensor_bytes, write_safetensors

OPTIONS = {
    "outtype": "f32, f16, bf16 (the default) or q8_0 for the matrices",
    "pre": "llama.cpp's name for how the tokenizer splits text, where it cannot be told",
    "mtp": "False leaves the multi-token-prediction layers out",
    "dtype": "the folder's dtype; as stored without it, float32 for what was quantised",
    "shard_bytes": "the largest size of a file of the folder, in bytes",
}
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

_MODEL = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
}
# These have a weight and, where the config says so, a bias.
_LINEARS = {
    "mixer.in_proj": "ssm_in",
    "mixer.out_proj": "ssm_out",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "mixer.experts.up_proj": "ffn_up_exps",
    "mixer.experts.down_proj": "ffn_down_exps",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
}
# The two layers of an MTP depth in llama.cpp's one block, where their names are not those of other layers.
_MTP = {
    "mtp.layers.0.enorm.weight": "nextn.enorm.weight",
    "mtp.layers.0.hnorm.weight": "nextn.hnorm.weight",
    "mtp.layers.0.eh_proj.weight": "nextn.eh_proj.weight",
    "mtp.layers.1.norm.weight": "post_attention_norm.weight",
    "mtp.layers.1.final_layernorm.weight": "nextn.shared_head_norm.weight",
}
_MTP_LAYERS = ["attention", "moe"]
_EXPERT = re.compile(r"(.*mixer\.experts)\.\d+\.(.*)")
# Always in float32, as llama.cpp's converter keeps them; all that is no .weight as well.
_FLOAT32 = ("norm.weight", "ssm_conv1d.weight", "ffn_gate_inp.weight")

_ELEMENTS = 8 << 20  # at a time: what is widened or quantised is small beside the tensor

_CONFIG, _DTYPES = "huggingface.config", "huggingface.dtypes"
_COMPANIONS = {"huggingface.generation_config": "generation_config.json"}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"GGUF files need the package gguf ({error}); pip install 'nemotron-h[gguf]' brings it."
        ) from error
    return gguf


def recognises(path: Path) -> bool:
    """A GGUF file, by its first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


# -- the table, which both directions read -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One tensor of the file: its shape there, and the published tensors in it. Several are experts, stacked."""

    name: str
    shape: Shape
    published: Mapping[str, Shape]
    heads: int = 0  # of q and k, whose rows are reordered

    @property
    def is_matrix(self) -> bool:
        return self.name.endswith(".weight") and len(self.shape) > 1 and not self.name.endswith(_FLOAT32)

    @property
    def is_a(self) -> bool:
        return self.name.endswith(".ssm_a")


def table(config: NemotronHConfig, mtp: bool = False) -> list[Row]:
    """Every tensor of a file of this config, in the order of the layers. See the top of this file.

    Raises:
        ValueError: the model has a tensor that llama.cpp does not read.
    """
    rows: dict[str, dict[str, Shape]] = {}
    for name, shape in published.tensors(config).items():
        if not name.startswith("mtp.") or mtp:
            rows.setdefault(_name(name, config.num_hidden_layers), {})[name] = shape
    if not config.use_conv_bias:  # llama.cpp adds it unasked
        for index, kind in enumerate(config.layers_block_type):
            if kind == "mamba":
                rows[f"blk.{index}.ssm_conv1d.bias"] = {}
    return [Row(name, _shape(name, parts, config), parts, _heads(name, config)) for name, parts in rows.items()]


def _heads(name: str, config: NemotronHConfig) -> int:
    if config.head_dim % 2:
        return 0
    kind = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind, 0)


def _halves_interleaved(part: Tensor, heads: int, back: bool = False) -> Tensor:
    """(heads * d, ...) with the rows of each head in the order 0, d/2, 1, d/2 + 1, ..., or back from that."""
    half = part.shape[0] // heads // 2
    sizes = (half, 2) if back else (2, half)
    return part.reshape(heads, *sizes, *part.shape[1:]).transpose(1, 2).reshape(part.shape)


def _name(name: str, layers: int) -> str:
    if name in _MODEL:
        return _MODEL[name]
    if name in _MTP:
        return f"blk.{layers}.{_MTP[name]}"
    index, suffix = name.split(".layers.", 1)[1].split(".", 1)
    block = layers if name.startswith("mtp.") else int(index)
    if match := _EXPERT.fullmatch(suffix):
        suffix = f"{match[1]}.{match[2]}"
    if suffix in _LAYER:
        return f"blk.{block}.{_LAYER[suffix]}"
    module, leaf = suffix.rsplit(".", 1)
    if module not in _LINEARS:
        raise ValueError(f"llama.cpp has no place for the tensor {name}; keep this model in its Hugging Face folder.")
    return f"blk.{block}.{_LINEARS[module]}.{leaf}"


def _shape(name: str, parts: Mapping[str, Shape], config: NemotronHConfig) -> Shape:
    if not parts:
        return (config.conv_dim,)
    shape = next(iter(parts.values()))
    if "_exps." in name:
        return (len(parts), *shape)
    if name.endswith("ssm_conv1d.weight"):
        return (shape[0], shape[2])
    if name.endswith((".ssm_a", ".ssm_d")):
        return (*shape, 1)
    if name.endswith("ssm_norm.weight"):
        return (config.n_groups, shape[0] // config.n_groups)
    return shape


def _check(config: NemotronHConfig, path: Path) -> None:
    """Raises `ValueError` where llama.cpp would compute something else than this model, or nothing."""
    kinds = set(config.layers_block_type)
    low, high = config.time_step_limit
    problem = None
    if {"mlp", "moe"} <= kinds:
        problem = f"has MLP and MoE layers in one model ({config.hybrid_override_pattern})"
    elif "mamba" in kinds and (low, high) != (0.0, math.inf):
        problem = f"clamps its time steps (time_step_limit is {[low, high]})"
    elif {"mlp", "moe"} & kinds and config.mlp_hidden_act != "relu2":
        problem = f"has MLPs with {config.mlp_hidden_act!r} (mlp_hidden_act)"
    elif "mamba" in kinds and config.mamba_proj_bias:
        problem = "has biases in in_proj and out_proj (mamba_proj_bias)"
    elif "moe" in kinds and config.mlp_bias:
        problem = "has biases in its experts (mlp_bias)"
    if problem:
        raise ValueError(f"{path} {problem}, which llama.cpp does not compute; keep it in its Hugging Face folder.")


# -- to a file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored(Entry):
    """A row as it is stored: a part's rows put in order, then a few at a time turned into their dtype in the file."""

    encode: Callable[[Tensor], Tensor] = lambda part: part
    heads: int = 0

    def pieces(self, source: Tensors) -> Iterator[Tensor]:
        """The value from its first row to its last, one expert at a time, and of that a few rows."""
        if not self.sources:
            yield torch.zeros(self.spec.shape, dtype=self.spec.dtype)
        for name in self.sources:
            part = source.read(name)
            if self.heads:
                part = _halves_interleaved(part, self.heads)
            part = part.reshape(-1, part.shape[-1])
            for some in part.split(max(1, _ELEMENTS // part.shape[-1])):
                yield self.encode(some)

    def read(self, source: Tensors) -> Tensor:
        return torch.cat([piece.flatten() for piece in self.pieces(source)]).reshape(self.spec.shape)


def from_huggingface(path: str | Path, outtype: str = "bf16", pre: str | None = None, mtp: bool = True) -> Conversion:
    """One GGUF file of the Hugging Face folder at `path`; memory holds its largest tensor.

    With `outtype="q8_0"`, matrices whose rows are no multiple of 32 are stored in f16, as llama.cpp's converter does.

    Raises:
        ValueError: no such folder; an unknown outtype; a model that llama.cpp does not compute; a tokenizer that is not
            byte-level BPE, or splits text in a way that has no name in `gguf_tokenizer.SPLITS` (say it with `pre`).
        ImportError: the package gguf is not there.
    """
    source = published.PublishedFolder(path)
    return _to_file(source, source.config, source.path, outtype, pre, mtp)


def export(
    model: Any,
    tokenizer: Any,
    dest: str | Path,
    outtype: str = "bf16",
    pre: str | None = None,
    done: Done = lambda nbytes: None,
) -> list[str]:
    """A model in memory, a fine-tune say, as a GGUF file with its tokenizer. Returns the conversion's remarks.

    Args:
        model: a `NemotronHForCausalLM`, without adapters (`merge_and_unload` first).
        tokenizer: as `AutoTokenizer` gives it; None writes a file without a vocabulary.
        dest: the file, absent until it is whole.

    Raises:
        ValueError: as `from_huggingface`; `dest` is there already; the model is wrapped or quantised.
    """
    with tempfile.TemporaryDirectory() as companions:
        if tokenizer is not None:
            tokenizer.save_pretrained(companions)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(companions)
        source = _Model(model)
        conversion = _to_file(source, model.config, Path(companions), outtype, pre, True)
        convert(conversion, dest, done)
    return conversion.remarks


class _Model:
    """A model in memory as `Tensors`, in published names. Files of it are written anew, not gone on with."""

    def __init__(self, model: Any) -> None:
        self.path, self.files = Path("the model"), ()
        config = getattr(model, "config", None)
        if not isinstance(config, NemotronHConfig) or not hasattr(model, "lm_head"):
            raise ValueError(
                f"{type(model).__name__} is no NemotronHForCausalLM; give the causal language model itself."
            )
        if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("The model has adapters beside its weights; give model.merge_and_unload().")
        self._tensors: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            name = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
            if match := re.fullmatch(r"(.*mixer\.experts)\.(up_proj|down_proj)", name):
                self._tensors |= {f"{match[1]}.{i}.{match[2]}.weight": part for i, part in enumerate(value)}
            else:
                self._tensors[name] = value
        if config.tie_word_embeddings:
            self._tensors.pop("lm_head.weight", None)
        self.specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()


def _to_file(
    source: Tensors, config: NemotronHConfig, companions: Path, outtype: str, pre: str | None, mtp: bool
) -> Conversion:
    if outtype not in OUTTYPES:
        raise ValueError(f"There is no outtype {outtype!r}; write one of {', '.join(OUTTYPES)}.")
    gguf = _package()
    _check(config, source.path)
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ValueError(f"{source.path} is quantised ({method}); name the checkpoint that it was made from.")
    remarks = []
    if not {"mamba", "attention"} <= set(config.layers_block_type):
        remarks.append("llama.cpp (0c1e5709) loads no model of this family without both Mamba and attention layers.")
    kept, reason = _mtp(source, config, mtp)
    if reason:
        remarks.append(f"Multi-token prediction is left out: {reason}.")
    unused = {name: reason for name in source.specs if name.startswith("mtp.") and not kept}
    vocabulary = gguf_tokenizer.Vocabulary.of(companions, config, pre)
    remarks += vocabulary.remarks

    rows = table(config, kept)
    types = {row.name: _type(row, outtype) for row in rows}
    if halves := [row.name for row in rows if row.is_matrix and types[row.name] != outtype.upper()]:
        remarks.append(
            f"{len(halves)} tensors are stored in f16, {halves[0]} first: q8_0 takes rows of a multiple of 32."
        )
    plan = Plan(source, [_entry(row, types[row.name]) for row in rows], unused)

    def metadata(writer: Any) -> None:
        _add_config(writer, config, kept, outtype)
        vocabulary.add(writer)
        writer.add_string(_CONFIG, json.dumps(config.to_dict()))
        for key, file in _COMPANIONS.items():
            if (companions / file).exists():
                writer.add_string(key, (companions / file).read_text(encoding="utf-8"))
        dtypes = {row.name: str(source.specs[next(iter(row.published))].dtype) for row in rows if row.published}
        writer.add_string(_DTYPES, json.dumps({name: dtype.removeprefix("torch.") for name, dtype in dtypes.items()}))

    def write(folder: Path, done: Done) -> None:
        header = folder / "header.gguf"
        writer = gguf.GGUFWriter(header, _architecture(config))
        metadata(writer)
        for row in rows:
            kind = gguf.GGMLQuantizationType[types[row.name]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(row.shape) // block * size
            writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        _write_data(plan, header.read_bytes(), folder / "model.gguf", writer.data_alignment, done)

    options = (outtype, pre, kept, json.dumps(config.to_dict(), default=str))
    return Conversion("gguf", plan, write, options, file="model.gguf", remarks=remarks)


def _mtp(source: Tensors, config: NemotronHConfig, wanted: bool) -> tuple[bool, str]:
    """Whether the file has the MTP layers, and where it does not although the model does, why."""
    if not config.has_mtp or not any(name.startswith("mtp.") for name in source.specs):
        return False, ""
    if not wanted:
        return False, "mtp=False"
    depths, layers = config.num_nextn_predict_layers, config.mtp_layers_block_type
    if depths != 1 or layers != _MTP_LAYERS or "moe" not in config.layers_block_type:
        return False, f"llama.cpp knows it in MoE models, one depth of '*E', and this has {depths} of {layers}"
    return True, ""


def _architecture(config: NemotronHConfig) -> str:
    return "nemotron_h_moe" if "moe" in config.layers_block_type else "nemotron_h"


def _type(row: Row, outtype: str) -> str:
    if not row.is_matrix:
        return "F32"
    return "F16" if outtype == "q8_0" and row.shape[-1] % 32 else outtype.upper()


def _entry(row: Row, kind: str) -> _Stored:
    def encode(part: Tensor) -> Tensor:
        if row.is_a:
            return -part.double().exp().float()  # rounded once
        if kind == "Q8_0":
            gguf = _package()
            return torch.from_numpy(gguf.quants.quantize(part.float().numpy(), gguf.GGMLQuantizationType.Q8_0))
        stored = part.to(_TORCH[kind])
        if kind == "F16" and bool((stored.isinf() & part.isfinite()).any()):
            raise ValueError(f"{row.name} has values that f16 cannot hold; write outtype bf16 or f32.")
        return stored

    if kind == "Q8_0":
        spec = Spec((*row.shape[:-1], row.shape[-1] // 32 * 34), torch.uint8)
    else:
        spec = Spec(row.shape, _TORCH[kind])
    return _Stored(row.name, spec, row.published, encode=encode, heads=row.heads)


def _add_config(writer: Any, config: NemotronHConfig, mtp: bool, outtype: str) -> None:
    gguf = _package()
    writer.add_type(gguf.GGUFType.MODEL)
    if name := Path(config.name_or_path or "").name:
        writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in _keys(config, mtp).items():
        # By type, not by the writer's methods of these names, which older versions of the package do not have all of.
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{writer.arch}.{key}", value)


def _keys(config: NemotronHConfig, mtp: bool) -> dict[str, Any]:
    """llama.cpp's name of each setting, without the architecture before it."""
    kinds = config.layers_block_type
    widths = [
        config.mlp_intermediate_size(index) if kind == "mlp" else config.moe_intermediate_size if kind == "moe" else 0
        for index, kind in enumerate(kinds)
    ]
    heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in kinds]
    if mtp:
        widths, heads = [*widths, config.moe_intermediate_size], [*heads, config.num_key_value_heads]
    keys = {
        "block_count": len(heads),
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": widths,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
        "rope.dimension_count": config.head_dim,  # read, not used: there is no position encoding
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.d_inner,
        "ssm.state_size": config.ssm_state_size,
        "ssm.time_step_rank": config.mamba_num_heads,
        "ssm.group_count": config.n_groups,
    }
    if "moe" in kinds:
        keys |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
            "expert_gating_func": 2,  # sigmoid
        }
        if config.moe_latent_size:
            keys["moe_latent_size"] = config.moe_latent_size
    if mtp:
        keys["nextn_predict_layers"] = 1
    return keys


_SAFE_BYTES = 1 << 30  # so much is written between two marks that an interrupted run goes on from


def _write_data(plan: Plan, header: bytes, path: Path, alignment: int, done: Done) -> None:
    """The file, tensor by tensor. A run that was cut off goes on behind the last tensor that is surely on the disk."""
    part, mark = path.with_name("unfinished"), path.with_name("written")
    head = header + bytes(-len(header) % alignment)
    ends = [len(head)]
    for entry in plan.entries:
        ends.append(ends[-1] + entry.spec.nbytes + -entry.spec.nbytes % alignment)
    first = 0
    if part.exists() and mark.exists():
        with open(part, "rb") as file:
            same = file.read(len(head)) == head
        if same and (safe := int(mark.read_text())) in ends and part.stat().st_size >= safe:
            first = ends.index(safe)
    with open(part, "r+b" if first else "wb") as file:
        file.truncate(ends[first] if first else 0)
        file.seek(0, os.SEEK_END)
        if not first:
            file.write(head)
        else:
            done(sum(entry.spec.nbytes for entry in plan.entries[:first]))
        safe = ends[first]
        for index, entry in enumerate(plan.entries[first:], first):
            assert isinstance(entry, _Stored)
            for piece in entry.pieces(plan.source):
                file.write(tensor_bytes(piece.contiguous()))
                done(piece.nbytes)
            file.write(bytes(ends[index + 1] - file.tell()))
            if ends[index + 1] - safe >= _SAFE_BYTES:
                file.flush()
                os.fsync(file.fileno())
                safe = ends[index + 1]
                with atomic_write(mark) as temporary:
                    temporary.write_text(str(safe))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# -- from a file -------------------------------------------------------------------------------------------------------


class GGUFFile:
    """The tensors and the metadata of a GGUF file, or of all parts of a split one.

    Raises:
        ValueError: it is cut short (names the first tensor that is gone with it), of another architecture or byte
            order, or no GGUF file; a part of it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = _package()
        self.files = self._parts()
        self.specs: dict[str, Spec] = {}
        self._where: dict[str, tuple[Path, Any]] = {}
        self.metadata: dict[str, Any] = {}
        for file in self.files:
            reader = self._open(file)
            for tensor in reader.tensors:
                shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
                dtype = _TORCH.get(tensor.tensor_type.name, torch.float32)
                self.specs[tensor.name] = Spec(shape, dtype)
                # The reader's own view of the data would keep the file mapped, and every page that was read.
                self._where[tensor.name] = (file, tensor._replace(data=None, field=None))
            self.metadata = {name: field.contents() for name, field in reader.fields.items()} | self.metadata
        architecture = self.metadata.get("general.architecture")
        if architecture not in ("nemotron_h", "nemotron_h_moe"):
            raise ValueError(
                f"{self.path} is a {architecture!r} model; this package knows nemotron_h and nemotron_h_moe."
            )

    def _parts(self) -> list[Path]:
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", self.path.name)
        if not match:
            return [self.path]
        parts = [self.path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[2]}.gguf") for i in range(int(match[2]))]
        for part in parts:
            plain(part)
        if missing := [part.name for part in parts if not part.exists()]:
            raise ValueError(
                f"{self.path} is one of {len(parts)} parts, and {missing[0]} is not there: fetch it again."
            )
        return parts

    def _open(self, file: Path) -> Any:
        gguf = self._gguf

        class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
            # The library notices a file that is cut short, and does not say where.
            def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
                for field in fields:
                    _, name, _, dims, kind, offset = field.parts
                    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                    if start_offs + int(offset[0]) + math.prod(dims.tolist()) // block * size > len(self.data):
                        raise _Cut(bytes(name).decode())
                super()._build_tensors(start_offs, fields)

        try:
            check_header(file)
            reader = Reader(file)
        except _Cut as cut:
            raise ValueError(f"{file} is cut short, from the tensor {cut} on: fetch or write it again.") from None
        except (ValueError, IndexError, KeyError, OSError, struct.error, RecursionError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({shown(str(error), 200)}): fetch or write it again.") from error
        if reader.byte_order != "I":
            raise ValueError(f"{file} has the byte order of another machine; convert it with gguf-convert-endian.")
        return reader

    def is_quantised(self, name: str) -> bool:
        return self._where[name][1].tensor_type.name not in _TORCH

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or only its `index`-th part along the first dimension; float32 where it was quantised."""
        file, tensor = self._where[name]
        shape, count, offset = self.specs[name].shape, tensor.n_bytes, tensor.data_offset
        if index is not None:
            shape, count = shape[1:], count // shape[0]
            offset += index * count
        kind = tensor.tensor_type
        if kind.name in _TORCH:
            data = np.fromfile(file, np.uint8, count, offset=offset)
            return torch.from_numpy(data).view(_TORCH[kind.name]).reshape(shape)
        value = torch.empty(math.prod(shape[:-1]), shape[-1])
        width, some = count // len(value), max(1, _ELEMENTS // shape[-1])
        for start in range(0, len(value), some):
            rows = min(some, len(value) - start)
            data = np.fromfile(file, np.uint8, rows * width, offset=offset + start * width).reshape(rows, width)
            value[start : start + rows] = torch.from_numpy(self._gguf.quants.dequantize(data, kind))
        return value.reshape(shape)


class _Cut(Exception):
    pass


@dataclass(frozen=True)
class _Published(Entry):
    """A published tensor out of a row: an expert of a stack is read alone."""

    index: int | None = None
    heads: int = 0

    def read(self, source: Tensors) -> Tensor:
        assert isinstance(source, GGUFFile)
        (name,) = self.sources
        value = source.read(name, self.index)
        if name.endswith(".ssm_a"):
            value = _a_log(value)
        if self.heads:
            value = _halves_interleaved(value, self.heads, back=True)
        return narrowed(value.reshape(self.spec.shape), self.spec.dtype, self.name).contiguous()


def _a_log(a: Tensor) -> Tensor:
    """float32 A_log of A = -exp(A_log), in bfloat16's steps where A was made of such."""
    exact = (-a.double()).log()
    rounded = exact.bfloat16().double()
    step = 2.0**-22 * a.double().abs()  # of float32; other exporters exponentiate in float32
    return (rounded if bool((rounded.exp() + a.double()).abs().le(step).all()) else exact).float()


def to_huggingface(path: str | Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """The published folder of a GGUF file, ours or llama.cpp's, whole or split; memory holds its largest tensor.

    The tokenizer comes back where the file has it whole (ours do) or names a way of splitting text that is known here.

    Raises:
        ValueError: see `GGUFFile`; an unknown dtype; a key is missing that the config needs.
        ImportError: the package gguf is not there.
    """
    if dtype is not None and dtype not in huggingface.TARGETS:
        raise ValueError(f"There is no dtype {dtype!r} for a folder; write one of {', '.join(huggingface.TARGETS)}.")
    wanted = None if dtype is None else huggingface.TARGETS[dtype]
    source = GGUFFile(path)
    remarks = []
    if _CONFIG in source.metadata:
        config = NemotronHConfig.from_dict(json.loads(source.metadata[_CONFIG]))
    else:
        config = _config(source)
        remarks.append(
            "The file has no huggingface.config: chunk_size and what only training needs are this package's defaults."
        )
    mtp = any(".nextn." in name for name in source.specs)
    if config.has_mtp and not mtp:
        config.num_nextn_predict_layers = 0
        remarks.append("The file has no multi-token prediction: the folder does without it.")
    rows = table(config, mtp)
    was = json.loads(source.metadata.get(_DTYPES, "{}"))
    entries: list[Entry] = []
    quantised = 0
    for row in rows:
        if row.name in source.specs:
            stored = _original(source, row, was)
            quantised += source.is_quantised(row.name)
        else:
            stored = torch.float32  # missing: Plan.check says so
        for index, (name, shape) in enumerate(row.published.items()):
            spec = Spec(shape, huggingface.target_dtype(name, stored, wanted))
            part = index if len(row.published) > 1 or "_exps." in row.name else None
            entries.append(_Published(name, spec, {row.name: row.shape}, index=part, heads=row.heads))
    unused = {row.name: "zeros, for a model without that bias" for row in rows if not row.published}
    order = {name: i for i, name in enumerate(published.tensors(config))}
    entries.sort(key=lambda entry: order[entry.name])
    if quantised:
        into = dtype or "float32"
        remarks.append(
            f"{quantised} tensors were quantised: {into} holds what they stand for, not what they were made of."
        )
    head = next(entry for entry in entries if entry.name == "backbone.embeddings.weight")
    config.dtype = wanted or head.spec.dtype
    if not config.architectures:
        config.architectures = ["NemotronHForCausalLM"]
    files, said = gguf_tokenizer.files(source.metadata, config)
    for key, file in _COMPANIONS.items():
        if key in source.metadata:
            files[file] = source.metadata[key]
    remarks += said
    plan = Plan(source, entries, unused)

    def write(folder: Path, done: Done) -> None:
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        config.save_pretrained(folder)
        write_safetensors(plan, folder, done, shard_bytes)

    return Conversion("huggingface", plan, write, (dtype, shard_bytes), remarks=remarks)


def _original(source: GGUFFile, row: Row, was: Mapping[str, str]) -> torch.dtype:
    """What a row's tensors come back in: as stored, or where that is wider than what it was made of, as that."""
    stored = source.specs[row.name].dtype
    before = getattr(torch, was.get(row.name, ""), None)
    if stored == torch.float32 and before in (torch.bfloat16, torch.float16) and not source.is_quantised(row.name):
        return before
    return stored


def _config(source: GGUFFile) -> NemotronHConfig:
    """The config, from llama.cpp's keys and the tensors that are there."""
    keys, specs = source.metadata, source.specs
    architecture = keys["general.architecture"]
    missing = object()

    def get(key: str, default: Any = missing) -> Any:
        value = keys.get(f"{architecture}.{key}", default)
        if value is missing:
            raise ValueError(f"{source.path} lacks the key {architecture}.{key}: fetch or write it again.")
        return value

    def each(key: str, count: int) -> list[int]:
        value = get(key)
        return list(value) if isinstance(value, Sequence) else [value] * count

    def one(key: str, default: Any = missing) -> Any:
        value = get(key, default)
        values = {v for v in value if v} if isinstance(value, Sequence) else {value}
        if len(values) != 1:
            raise ValueError(
                f"{source.path} has {sorted(values)} for {architecture}.{key}; a config has one for all layers."
            )
        return values.pop()

    blocks, depths = get("block_count"), get("nextn_predict_layers", 0)
    check_layers(f"{architecture}.block_count of {source.path}", blocks)
    layers = blocks - depths
    widths, heads = each("feed_forward_length", blocks)[:layers], each("attention.head_count_kv", blocks)[:layers]
    feed_forward = "E" if architecture == "nemotron_h_moe" else "-"
    pattern = "".join(
        feed_forward if width else "*" if head else "M" for width, head in zip(widths, heads, strict=True)
    )
    fields: dict[str, Any] = {
        "hybrid_override_pattern": pattern,
        "vocab_size": specs["token_embd.weight"].shape[0] if "token_embd.weight" in specs else get("vocab_size"),
        "hidden_size": get("embedding_length"),
        "max_position_embeddings": get("context_length"),
        "layer_norm_epsilon": _short(
            get("attention.layer_norm_rms_epsilon", None) or get("attention.layer_norm_epsilon")
        ),
        "tie_word_embeddings": "output.weight" not in specs,
        "use_conv_bias": "M" not in pattern or any(name.endswith("ssm_conv1d.bias") for name in specs),
        "attention_bias": any(name.endswith("attn_q.bias") for name in specs),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in specs),
        "bos_token_id": keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": keys.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": keys.get("tokenizer.ggml.padding_token_id"),
    }
    if "*" in pattern:
        fields["num_attention_heads"] = one("attention.head_count")
        fields["num_key_value_heads"] = one("attention.head_count_kv")
        fields["head_dim"] = get("attention.key_length")
    if "M" in pattern:
        fields["mamba_num_heads"] = get("ssm.time_step_rank")
        fields["mamba_head_dim"] = get("ssm.inner_size") // get("ssm.time_step_rank")
        fields["n_groups"] = get("ssm.group_count")
        fields["ssm_state_size"] = get("ssm.state_size")
        fields["conv_kernel"] = get("ssm.conv_kernel")
    if "-" in pattern:
        sizes = [width for width in widths if width]
        fields["intermediate_size"] = sizes[0] if len(set(sizes)) == 1 else sizes
    if "E" in pattern:
        fields["n_routed_experts"] = get("expert_count")
        fields["num_experts_per_tok"] = one("expert_used_count")
        fields["moe_intermediate_size"] = one("expert_feed_forward_length", None) or one("feed_forward_length")
        fields["n_shared_experts"] = get("expert_shared_count", 1)
        fields["moe_shared_expert_intermediate_size"] = get("expert_shared_feed_forward_length")
        fields["norm_topk_prob"] = get("expert_weights_norm", False)
        fields["routed_scaling_factor"] = _short(get("expert_weights_scale", 1.0))
        fields["n_group"] = get("expert_group_count", 1) or 1
        fields["topk_group"] = get("expert_group_used_count", 1) or 1
        fields["moe_latent_size"] = get("moe_latent_size", 0) or None
    if depths:
        fields |= {"num_nextn_predict_layers": depths, "mtp_layers_block_type": _MTP_LAYERS}
    return NemotronHConfig(**fields)


def _short(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 for 9.99999974737875e-06."""
    return float(str(np.float32(value)))
