"""The published layout: what NVIDIA's `model.safetensors` files call the tensors, and checks on reading them.

    backbone.embeddings.weight   backbone.layers.N.{norm,mixer.*}   backbone.norm_f.weight   lm_head.weight   mtp.*

In memory the tree has the names of `transformers`' own class (`model.*`, experts stacked into 3-D parameters), so that
adapters and tools interchange; the table below is applied on loading and, reversed, on saving.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

logger = logging.getLogger(__name__)


def conversion_mapping() -> list[WeightRenaming | WeightConverter]:
    """Published names -> names in memory; `*` stands for the number of the expert."""
    stacked = (
        WeightConverter(
            source_patterns=[f"mixer.experts.*.{projection}.weight"],
            target_patterns=f"mixer.experts.{projection}",
            operations=[MergeModulelist(dim=0)],
        )
        for projection in ("up_proj", "down_proj")
    )
    return [WeightRenaming("backbone.", "model."), *stacked]


def register() -> None:
    """Make `transformers` apply the table to this package's classes (it skips the models that it does not ship)."""
    register_checkpoint_conversion_mapping("nemotron_h", conversion_mapping(), overwrite=True)


_EXPERT = re.compile(r"(.*mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")


def in_memory(state_dict: Mapping[str, Any], model: torch.nn.Module) -> Mapping[str, Any]:
    """A state dict in published names under the names in memory; one that has those already is returned as it is."""
    if not any(name.startswith("backbone.") or _EXPERT.fullmatch(name) for name in state_dict):
        return state_dict
    prefix = "model." if hasattr(model, "model") else ""
    renamed: dict[str, Any] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        name = prefix + name.removeprefix("backbone.") if name.startswith("backbone.") else name
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        else:
            renamed[name] = tensor
    for name, tensors in experts.items():
        renamed[name] = torch.stack([tensors[expert] for expert in sorted(tensors)])
    return renamed


def unreadable_file(folder: str | Path) -> tuple[str, str] | None:
    """The first safetensors file in a folder that cannot be opened, and why."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return path.name, str(error)
    return None


def check_nothing_missing(model: Any, missing: Iterable[str], source: Any) -> None:
    """Refuse a checkpoint that lacks tensors: `transformers` would go on with random numbers in their place.

    A head that the checkpoint cannot have (classification) may be missing, and so may the whole multi-token-prediction
    module, which `transformers`' own class drops on saving; it is then taken off the model.

    Raises:
        ValueError: names the first missing tensor and counts them.
    """
    missing = set(missing)
    mtp = {name for name in missing if name.startswith("mtp.")}
    if mtp and all(name in missing for name, _ in model.named_parameters() if name.startswith("mtp.")):
        logger.warning(
            "%s has no mtp.* tensors although its config announces num_nextn_predict_layers=%d: "
            "the model is loaded without multi-token prediction.",
            source,
            model.config.num_nextn_predict_layers,
        )
        model.mtp = None
        missing -= mtp
    if type(model).__name__ not in (model.config.architectures or ()):
        missing = {name for name in missing if not name.startswith("score.")}
    if missing:
        first = sorted(missing)[0]
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise ValueError(
            f"{source} lacks the tensor {first}{others}: fetch the checkpoint again, or build an untrained model with "
            f"{type(model).__name__}(config)."
        )


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]], source: Any) -> None:
    """Refuse a checkpoint whose shapes are not the config's.

    Raises:
        ValueError: names the first tensor and both shapes.
    """
    for name, found, expected in sorted(mismatched, key=lambda entry: entry[0]):
        raise ValueError(
            f"{source} has {name} with shape {tuple(found)} where its config asks for {tuple(expected)}: correct "
            "config.json, fetch the checkpoint again, or pass ignore_mismatched_sizes=True to start that tensor anew."
        )
