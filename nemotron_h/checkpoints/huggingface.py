"""Hugging Face folders of this family, rewritten: other names, another dtype, other shards, a config that all can read.

| read | written |
|---|---|
| `backbone.*`, or `model.*` as in memory; `backbone.embedding.weight`, as some merges write it | `backbone.*` |
| routed experts one by one, or stacked in 3-D parameters | one by one |
| any dialect of `config.json` | the one that `NemotronHConfig.to_dict` describes |

Values are kept bit for bit unless another dtype is asked for. `A_log`, `D`, `dt_bias`, the router's weight and its
correction bias are then written in float32, as the model keeps them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import published
from .tensors import Entry, Plan, Spec
from .writing import SHARD_BYTES, Conversion, into_folder

OPTIONS = {
    "dtype": "bfloat16, float16, float32 or float64; without it, every tensor keeps its own",
    "shard_bytes": "the largest size of a file, in bytes",
}
TARGETS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_FLOAT32 = (".A_log", ".D", ".dt_bias", ".gate.weight", ".gate.e_score_correction_bias")


def recognises(path: Path) -> bool:
    return (path / "config.json").exists()


def target(dtype: str | None) -> torch.dtype | None:
    """The dtype of a folder by its name; None for as it is stored. Raises `ValueError` where there is none."""
    if dtype is not None and dtype not in TARGETS:
        raise ValueError(f"There is no dtype {dtype!r} for a folder; write one of {', '.join(TARGETS)}.")
    return None if dtype is None else TARGETS[dtype]


def target_dtype(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a published tensor is written in where its folder is asked for in the dtype `wanted` (None: as stored)."""
    if wanted is None or not stored.is_floating_point:
        return stored
    return torch.promote_types(wanted, torch.float32) if name.endswith(_FLOAT32) else wanted


def from_huggingface(path: str | Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """The folder at `path`, in published names; memory holds its largest tensor.

    Raises:
        ValueError: no such folder, another model type, an unknown dtype, quantised weights.
    """
    wanted = target(dtype)
    source = published.PublishedFolder(path)
    config = source.config
    published.check_full_precision(config, path)
    remarks = source.without_absent_mtp()
    entries = [
        Entry(name, Spec(shape, target_dtype(name, source.specs[name].dtype, wanted)), {name: shape})
        if name in source.specs
        else Entry(name, Spec(shape, wanted or torch.bfloat16), {name: shape})  # missing: Plan.check says so
        for name, shape in published.tensors(config).items()
    ]
    save = published.saver(config, wanted)
    return into_folder(Plan(source, entries), save, shard_bytes, [dtype], beside=[source.path], remarks=remarks)
