"""The small models that llama.cpp was asked about (tests/data/gguf), made anew from a seed wherever needed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemotron_h import NemotronHConfig, NemotronHForCausalLM

VOCAB = 320
LENGTH = 300
_CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    # d_inner = 64: llama.cpp's own converter takes multiples of 64 alone
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "max_position_embeddings": 512,
    "layer_norm_epsilon": 1e-5,
}
_MOE = {
    "hybrid_override_pattern": "MEM*EME",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"hybrid_override_pattern": "M-M*-M-"},
    "widths": {"hybrid_override_pattern": "-M*-", "intermediate_size": [48, 64], "mlp_bias": True},
    "moe": _MOE,
    "groups": {**_MOE, "n_group": 4, "topk_group": 2},
    "latent": {**_MOE, "moe_latent_size": 20},
    "mtp": {**_MOE, "moe_latent_size": 32, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
    "tied": {
        "hybrid_override_pattern": "M*-",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "use_conv_bias": False,
    },
}
TEMPLATE = "{%- for message in messages -%}{%- generation -%}{{ message.content }}{%- endgeneration -%}{%- endfor -%}"


def make(name: str, **settings: Any) -> NemotronHForCausalLM:
    """In float32, with time steps from 1e-5 to 1. Rows of most matrices are multiples of 32, some experts' are not."""
    model = NemotronHForCausalLM(NemotronHConfig(**{**_CONFIG, **MODELS[name], **settings})).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            # By its name, so that no other tensor moves it.
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key.endswith("dt_bias"):
                value = uniform * 13 - 12
            elif key.endswith("A_log"):
                value = uniform * 3.5 - 1
            elif key.endswith((".D", "norm.weight", "norm_f.weight")):
                value = uniform + 0.5
            elif key.endswith("e_score_correction_bias"):
                value = uniform * 0.6 - 0.3
            else:
                value = normal * (0.5 if "conv1d" in key else 0.25)
            tensor.copy_(value)
    return model


def ids(length: int = LENGTH, vocab: int = VOCAB) -> torch.Tensor:
    """(length,)"""
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(11))


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: three special tokens, the 256 bytes, a word of its own and a few merges; 270 of 320 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("1", "2"), ("Ġ", "1"), ("Ġ", "an"), ("Ġan", "d")]
    words = ["<unk>", "<s>", "</s>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<think>"])
    tokenizer.add_tokens(["Nemotron"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> NemotronHForCausalLM:
    model = make(name).to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 267]}))
    return model
