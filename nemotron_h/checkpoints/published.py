"""The published layout: what NVIDIA's `model.safetensors` files call the tensors, and checks on reading them.

    backbone.embeddings.weight   backbone.layers.N.{norm,mixer.*}   backbone.norm_f.weight   lm_head.weight   mtp.*

In memory the tree has the names of `transformers`' own class (`model.*`, experts stacked into 3-D parameters), so that
adapters and tools interchange; the table below is applied on loading and, reversed, on saving.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from .. import sizes
from ..configuration import NemotronHConfig
from .foreign import check_folder, read_json
from .tensors import SafetensorsFolder, Shape, Spec
from .torch_files import check_archive

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


_EXPERT = re.compile(r"(.*mixer\.experts)\.(\d+)\.(up|down)_proj\.(?:weight(_scale(?:_2)?)?|(input_scale))")


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
            stacked = f"{match[3]}_{match[5]}" if match[5] else f"{match[3]}_proj{match[4] or ''}"
            experts.setdefault(f"{match[1]}.{stacked}", {})[int(match[2])] = tensor
        else:
            renamed[name] = tensor
    for name, tensors in experts.items():
        renamed[name] = torch.stack([tensors[expert] for expert in sorted(tensors)])
    return renamed


def tensors(config: NemotronHConfig) -> dict[str, Shape]:
    """Every tensor of a published checkpoint with this config, `mtp.*` included, in the order of the layers.

    A head that is tied to the embeddings is not stored.
    """
    h, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"backbone.embeddings.weight": (vocab, h)}
    for index, kind in enumerate(config.layers_block_type):
        shapes |= _layer(
            config, f"backbone.layers.{index}.", kind, config.mlp_intermediate_size(index) if kind == "mlp" else 0
        )
    shapes["backbone.norm_f.weight"] = (h,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, h)
    if config.has_mtp:
        depth = config.mtp_layers_block_type
        for index, kind in enumerate(depth * config.num_nextn_predict_layers):
            prefix = f"mtp.layers.{index}."
            if index % len(depth) == 0:
                shapes |= {prefix + "enorm.weight": (h,), prefix + "hnorm.weight": (h,)}
                shapes[prefix + "eh_proj.weight"] = (h, 2 * h)
            shapes |= _layer(config, prefix, kind, _width(config) if kind == "mlp" else 0)
            if index % len(depth) == len(depth) - 1:
                shapes[prefix + "final_layernorm.weight"] = (h,)
    return shapes


def _width(config: NemotronHConfig) -> int:
    """Of an MLP in an MTP depth; the config refuses a list of sizes there."""
    assert isinstance(config.intermediate_size, int)
    return config.intermediate_size


def _layer(config: NemotronHConfig, prefix: str, kind: str, inner: int) -> dict[str, Shape]:
    layer = sizes.layer_tensors(config, kind, inner)
    expert = {name: shape for name, shape in layer.items() if "*" in name}
    shapes: dict[str, Shape] = {}
    for name, shape in layer.items():
        if name not in expert:
            shapes[prefix + name] = shape
        elif name == next(iter(expert)):  # one expert after the other
            for index in range(config.n_routed_experts):
                shapes |= {prefix + one.replace("*", str(index)): of_one for one, of_one in expert.items()}
    return shapes


_STACKED = re.compile(r"(.*mixer\.experts)\.(up_proj|down_proj)")
_RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}


def parts(name: str, spec: Spec) -> dict[str, tuple[Spec, int | None]]:
    """The published tensors in one of these names or of those in memory; of stacked experts each with its number."""
    if name.startswith("model."):
        name = "backbone." + name.removeprefix("model.")
    match = _STACKED.fullmatch(name)
    if not match or len(spec.shape) != 3 or not spec.nbytes:
        return {_RENAMED.get(name, name): (spec, None)}
    part = Spec(spec.shape[1:], spec.dtype)
    return {f"{match[1]}.{expert}.{match[2]}.weight": (part, expert) for expert in range(spec.shape[0])}


def read_fields(path: Path) -> dict[str, Any]:
    """What a config.json of this family says. Raises `ValueError` where it is not there or another model's."""
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}; name the folder of a model.")
    fields = read_json(path)
    if (kind := fields.get("model_type")) != "nemotron_h":
        raise ValueError(f"{path.parent} is a {kind!r} model; this package knows nemotron_h alone.")
    return fields


def read_config(path: Path) -> NemotronHConfig:
    """The config in a config.json of this family. Raises `ValueError` where it is none."""
    fields = read_fields(path)
    config: NemotronHConfig = NemotronHConfig.from_dict(fields)
    return config


def saver(config: NemotronHConfig, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    """What writes the config of a converted folder, whose weights are in `dtype` (None: in what it says)."""
    config.dtype = dtype or config.dtype
    config.architectures = config.architectures or ["NemotronHForCausalLM"]
    save: Callable[[Path], None] = config.save_pretrained
    return save


def check_full_precision(config: NemotronHConfig, path: str | Path) -> None:
    """Raises `ValueError` where the weights are quantised."""
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ValueError(f"{path} is quantised ({method}); name the checkpoint that it was made from.")


class PublishedFolder:
    """A Hugging Face folder of this family, its tensors in published names whatever names its files have.

    `model.*` is read as `backbone.*`, `embedding.weight` (which transformers before 5.16 wrote) as `embeddings.weight`,
    and experts that are stacked in 3-D parameters one at a time.

    Raises:
        ValueError: no config, another model type, files that cannot be read, a tensor under two names, a head that
            the config ties and that is another than the embeddings.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path / "config.json")
        self._folder = SafetensorsFolder(self.path)
        _check_room(self.path, self.config, self._folder.files)
        self.files = [self.path / "config.json", *self._folder.files]
        self._where: dict[str, tuple[str, int | None]] = {}
        self.specs: dict[str, Spec] = {}
        for name, spec in self._folder.specs.items():
            for part_name, (part_spec, expert) in parts(name, spec).items():
                if part_name in self.specs:
                    other = self._where[part_name][0]
                    raise ValueError(f"{self.path} has {part_name} twice, as {other} and as {name}: take one out.")
                self._where[part_name], self.specs[part_name] = (name, expert), part_spec
        if self.config.tie_word_embeddings and "backbone.embeddings.weight" in self.specs:
            if "lm_head.weight" in self.specs and not self._same("lm_head.weight", "backbone.embeddings.weight"):
                raise ValueError(
                    f"{self.path} has a lm_head.weight that differs from the embeddings although tie_word_embeddings "
                    "is true: set it to false in config.json, or take lm_head.weight out."
                )
            self.specs.pop("lm_head.weight", None)  # a copy that some tools write

    def _same(self, one: str, other: str) -> bool:
        if self.specs[one].shape != self.specs[other].shape:
            return False
        one, other = self._where[one][0], self._where[other][0]
        spec = self._folder.specs[one]
        some = max(1, (32 << 20) * spec.shape[0] // max(1, spec.nbytes))
        slices = [slice(start, start + some) for start in range(0, spec.shape[0], some)]
        return all(torch.equal(self._folder.read(one, part), self._folder.read(other, part)) for part in slices)

    def without_absent_mtp(self) -> list[str]:
        """Takes multi-token prediction off the config where the folder has nothing of it, and says so."""
        if not self.config.has_mtp or any(name.startswith("mtp.") for name in self.specs):
            return []
        self.config.num_nextn_predict_layers = 0
        return [f"{self.path} has no mtp.* tensors, which its config announces: the result does without them."]

    def read(self, name: str) -> torch.Tensor:
        return self._folder.read(*self._where[name])

    def stored_name(self, name: str) -> str:
        """What the folder's files call a tensor; `name[3]` is an expert's part of a stacked one."""
        stored, index = self._where.get(name, (name, None))
        return stored if index is None else f"{stored}[{index}]"


def check_source(source: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a folder, given with these arguments to `from_pretrained`, before `transformers` opens it: that follows an
    index anywhere, waits for a pipe, and makes room for all that a config asks for.

    Raises:
        ValueError: see `check_folder` and `check_archive`; or the config asks for more than the files can hold.
    """
    folder = Path(source, arguments.get("subfolder") or "") if isinstance(source, str | os.PathLike) else None
    if folder is None or not (folder / "config.json").exists():
        return
    check_folder(folder)
    files = list(folder.glob("*.safetensors"))
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        for file in files:
            check_archive(file)
    config = arguments.get("config")
    if not isinstance(config, NemotronHConfig):
        config = NemotronHConfig.from_dict(read_json(folder / "config.json"))
    if files and not arguments.get("ignore_mismatched_sizes"):
        _check_room(folder, config, files)


_SMALL = 1 << 24  # so many parameters are no matter; which of them are missing is said in detail


def _check_room(folder: Path, config: NemotronHConfig, files: Iterable[Path]) -> None:
    """Raises `ValueError` where a config asks for more than its files can hold: a bit for a parameter is the least."""
    parameters, size = sizes.count_parameters(config).total, sum(file.stat().st_size for file in files)
    if parameters > 8 * size + _SMALL:
        raise ValueError(
            f"{folder / 'config.json'} asks for {parameters} parameters, and the files beside it have {size} bytes: "
            "correct config.json, or fetch the checkpoint again."
        )


def unreadable_file(folder: str | Path) -> tuple[str, str] | None:
    """The first safetensors file in a folder that cannot be opened, and why."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return path.name, str(error)
    return None


_OF_THE_HUB = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def architectures(source: Any, config: NemotronHConfig, options: Mapping[str, Any]) -> list[str]:
    """The classes that a checkpoint's own config.json names; the config that it was loaded with may be another's."""
    try:
        fields, _ = NemotronHConfig.get_config_dict(
            source, **{name: options[name] for name in _OF_THE_HUB if name in options}
        )
    except (OSError, ValueError):  # an adapter's folder has none
        return config.architectures or []
    return fields.get("architectures") or []


def check_nothing_missing(model: Any, missing: Iterable[str], source: Any, saved_from: type) -> None:
    """Refuse a checkpoint that lacks tensors: `transformers` would go on with random numbers in their place.

    What `saved_from`, the class that the checkpoint names, would not have either may be missing, and so may the whole
    multi-token-prediction module, which `transformers`' own class drops on saving; it is then taken off the model.

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
    if missing and saved_from is not type(model) and any(name not in missing for name, _ in model.named_parameters()):
        missing -= _new(model, missing, saved_from)
    if missing:
        first = sorted(missing)[0]
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        remedy = f"build an untrained model with {type(model).__name__}(config)"
        if all(name.startswith("lm_head.") for name in missing):
            remedy = 'write "architectures": ["NemotronHModel"] into its config.json if it is a backbone alone'
        raise ValueError(f"{source} lacks the tensor {first}{others}: fetch the checkpoint again, or {remedy}.")


def _new(model: Any, missing: Iterable[str], saved_from: type) -> set[str]:
    """Those of the missing tensors that a model of the class `saved_from` would not have."""
    with torch.device("meta"):
        reference = saved_from(type(model.config).from_dict(model.config.to_dict()))
    prefix = f"{model.base_model_prefix}."
    tensors = {name.removeprefix(prefix) for name in reference.state_dict()}
    modules = {name.removeprefix(prefix) for name, _ in reference.named_modules() if name}
    new = {name for name in missing if name.removeprefix(prefix) not in tensors and not name.startswith("mtp.")}
    if getattr(model, "hf_quantizer", None) is not None:  # the scales of a packed weight are the checkpoint's
        new = {name for name in new if name.removeprefix(prefix).rpartition(".")[0] not in modules}
        for module in sorted(name.removesuffix(".weight_scale") for name in new if name.endswith(".weight_scale")):
            raise ValueError(
                f"{module} is new, and a layer that has no weights yet cannot be quantised: write "
                f"modules_to_not_convert=[{module!r}] into the quantization_config."
            )
    return new


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
