"""Writes quantised folders of a tiny model and what it answers; run on the version whose folders are to be kept.

    PYTHONPATH=FOLDER:FOLDER/tests python record.py

int8, int4: `from_pretrained(..., quantize=)` and saved. fp8, nvfp4: converted, loaded packed and saved.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from families import small_model, tokens
from safetensors.torch import save_file

from nemotron_h import NemotronHForCausalLM
from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.writing import convert

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 4,
    "hybrid_override_pattern": "M*-E",
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}


def keep(path: Path, name: str, logits: dict[str, torch.Tensor], **how: str) -> None:
    model = NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32, **how)
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    with torch.no_grad():
        logits[name] = model(tokens(1, 9, vocab=24)).logits


if __name__ == "__main__":
    logits: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        small_model("moe", torch.float32, **SIZES).save_pretrained(plain)
        for quantize in ("int8", "int4"):
            keep(plain, quantize, logits, quantize=quantize)
        for to in ("fp8", "nvfp4"):
            convert(formats.conversion(plain, to), Path(folder) / to)
            keep(Path(folder) / to, to, logits, quantized="packed")
    save_file(logits, HERE / "logits.safetensors")
    print(json.dumps({name: value.norm().item() for name, value in logits.items()}))
