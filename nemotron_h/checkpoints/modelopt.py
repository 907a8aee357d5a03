"""NVIDIA ModelOpt's quantised folders (FP8, NVFP4), read and written.

A folder is the published one with, of each quantised module,

    x.weight          FP8: float8_e4m3fn (N, K)           NVFP4: uint8 (N, K/2), two e2m1 a byte, the even input low
    x.weight_scale    FP8: float32 (), of the matrix      NVFP4: float8_e4m3fn (N, K/16), of 16 inputs of a row
    x.weight_scale_2  -                                   NVFP4: float32 (), of the matrix
    x.input_scale     float32 (): of the activations; nothing here quantises those
    k_proj.k_scale    float32 (): of an FP8 cache of keys (v_proj.v_scale: of values); the cache here is not in FP8

and a word on it: `quantization_config` in config.json (quant_method "modelopt", quant_algo, ignore, kv_cache_scheme),
or `hf_quant_config.json` alone, as in Nemotron 3 Nano's release (quantization: quant_algo, group_size, exclude_modules,
kv_cache_quant_algo). quant_algo is FP8, NVFP4, W4A16_NVFP4 (activations stay as they are) or MIXED_PRECISION, which
has `quantized_layers`: one of the others by the name of a module, or of what contains it. A weight that is there
in full precision, without scales, is taken as it is, whatever the list of exclusions forgot (the router, mostly).

Written: scales from the largest magnitude, weights only: quant_algo FP8 or W4A16_NVFP4, which is what ModelOpt and
vLLM call NVFP4 without scales of activations (under "NVFP4" a server would look for those). The three projections of a
layer's attention share a scale, as servers fuse them. In full precision stay: embeddings, head, norms, convolutions,
the router, A_log, D, dt_bias, multi-token prediction; for NVFP4 also attention's projections, as in NVIDIA's own
release of Nemotron 3 Nano, and weights whose inputs are no multiple of 16.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..ops import fp8_nvfp4 as low_precision
from ..ops.fp8_nvfp4 import FP8, GROUP, NVFP4
from . import published
from .foreign import read_json
from .published import PublishedFolder
from .tensors import Entry, Plan, Shape, Spec
from .writing import SHARD_BYTES, Conversion, into_folder

SIDECAR = "hf_quant_config.json"
QUANT_METHOD = "modelopt"
ALGORITHMS = {"FP8": FP8, "NVFP4": NVFP4, "W4A16_NVFP4": NVFP4}
MIXED = "MIXED_PRECISION"
_WEIGHTS_ALONE = {FP8: "FP8", NVFP4: "W4A16_NVFP4"}
OPTIONS = {
    "dtype": "to huggingface: bfloat16, float16 or float32 for the weights that were quantised",
    "exclude": "from huggingface: more modules to leave in full precision, between commas: names, or '*.o_proj'",
    "shard_bytes": "the largest size of a file, in bytes",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

WEIGHT_SCALE, WEIGHT_SCALE_2, INPUT_SCALE = "weight_scale", "weight_scale_2", "input_scale"
KV_SCALES = {"k_proj": "k_scale", "v_proj": "v_scale"}
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# What no recipe means, as the published names have it: no matrix that a linear layer multiplies by.
_NEVER = ("*embeddings", "*mixer.gate", "*conv1d")
_KEPT = {FP8: ("lm_head", "mtp*"), NVFP4: ("lm_head", "mtp*", "*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj")}


def canonical(name: str) -> str:
    """A module's or a tensor's name as it is in every class of the family, on disk and in memory."""
    return re.sub(r"^(model\.|backbone\.)", "", name)


@dataclass(frozen=True)
class Recipe:
    """Which modules are quantised, and how: `quantization_config` or hf_quant_config.json, understood.

    Raises (from `read`):
        ValueError: a quant_algo that is not known, groups of another size than 16, or nothing about the method at all.
    """

    algorithm: str | None  # None: by module
    layers: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    @staticmethod
    def read(fields: Mapping[str, Any], source: Any) -> Recipe:
        inner = fields.get("quantization", fields)
        name = str(inner.get("quant_algo") or "").upper()
        exclude = tuple(inner.get("exclude_modules") or inner.get("ignore") or ())
        _check_group(inner, source)
        if name != MIXED:
            return Recipe(_algorithm(name, source), {}, exclude)
        layers = {}
        for module, how in (inner.get("quantized_layers") or {}).items():
            _check_group(how, f"{source} ({module})")
            layers[module] = _algorithm(str(how.get("quant_algo")).upper(), f"{source} ({module})")
        return Recipe(None, layers, exclude)

    def of(self, module: str) -> str | None:
        """ "fp8", "nvfp4", or None: how the module of this name (without `.weight`) is stored."""
        name = canonical(module)
        if _match(_NEVER, name) or self._excluded.match(name):
            return None
        if self.algorithm is not None:
            return self.algorithm
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if found := self._exact.get(".".join(parts[:end])):
                return found
        return next((found for pattern, found in self._patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return _patterns(self.exclude)

    @cached_property
    def _exact(self) -> dict[str, str]:
        return {canonical(name): found for name, found in self.layers.items() if "*" not in name}

    @cached_property
    def _patterns(self) -> dict[str, str]:
        return {canonical(name): found for name, found in self.layers.items() if "*" in name}


def _algorithm(name: str, source: Any) -> str:
    if name not in ALGORITHMS:
        raise ValueError(
            f"{source} is quantised with quant_algo {name or 'missing'!r}, which this package cannot read: use a "
            f"checkpoint in one of {', '.join((*ALGORITHMS, MIXED))}, or the one that it was made from."
        )
    return ALGORITHMS[name]


def _check_group(fields: Mapping[str, Any], source: Any) -> None:
    sizes = [fields.get("group_size")]
    for group in (fields.get("config_groups") or {}).values():
        sizes.append((group.get("weights") or {}).get("group_size"))
    for size in sizes:
        if size not in (None, GROUP):
            raise ValueError(
                f"{source} has group_size {size!r} where NVFP4 has {GROUP}: use a checkpoint with groups of {GROUP}, "
                "or the one that it was made from."
            )


def _patterns(patterns: Iterable[str]) -> re.Pattern[str]:
    """One expression for a list of exclusions: a name, what is inside the module of that name, or a wildcard."""
    branches = [
        f"{re.escape(canonical(p))}(?:\\.|$)" if "*" not in p else fnmatch.translate(canonical(p)) for p in patterns
    ]
    return re.compile("|".join(f"(?:{branch})" for branch in branches) or r"(?!)")


def _match(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its quantisation by ModelOpt: config.json's word, or else hf_quant_config.json's."""
    stored = _json(folder / "config.json").get("quantization_config")
    if isinstance(stored, dict):
        return stored if str(stored.get("quant_method", "")).startswith(QUANT_METHOD) else None
    return sidecar(_json(folder / SIDECAR))


def sidecar(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """hf_quant_config.json as a `quantization_config`; None where it is no such file."""
    inner = fields.get("quantization")
    if not isinstance(inner, dict) or not inner.get("quant_algo"):
        return None
    return {**fields, "quant_method": QUANT_METHOD}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


_SCALAR = Spec((), torch.float32)


def _stored(shape: Shape, how: str) -> dict[str, Spec]:
    """A weight's tensors, by the end of their names."""
    n, k = shape
    if how == FP8:
        return {"weight": Spec((n, k), torch.float8_e4m3fn), WEIGHT_SCALE: _SCALAR}
    blocks = Spec((n, k // GROUP), torch.float8_e4m3fn)
    return {"weight": Spec((n, k // 2), torch.uint8), WEIGHT_SCALE: blocks, WEIGHT_SCALE_2: _SCALAR}


def layout(module: str, shape: Shape, how: str, specs: Mapping[str, Spec], source: Any) -> dict[str, Spec]:
    """The tensors of one quantised module, by the end of their names: those that must be there, then those that are.

    Args:
        module: its name in `specs`.
        shape: (N, K) of the weight.
        how: "fp8" or "nvfp4".
        specs: what is there, by the same names.

    Raises: ValueError for a tensor that is missing, of another shape, or of another dtype.
    """
    if how == NVFP4 and shape[1] % GROUP:
        raise ValueError(
            f"{source} has {module} in NVFP4, whose {shape[1]} inputs are no multiple of {GROUP}: correct the config, "
            "or fetch the checkpoint again."
        )
    wanted = _stored(shape, how)
    optional = [INPUT_SCALE, *([KV_SCALES[leaf]] if (leaf := module.rpartition(".")[2]) in KV_SCALES else [])]
    wanted |= {end: _SCALAR for end in optional if f"{module}.{end}" in specs}
    found = {}
    for end, spec in wanted.items():
        name = f"{module}.{end}"
        if name not in specs:
            raise ValueError(
                f"{source} lacks the tensor {name}, without which the {how.upper()} weight means nothing: fetch the "
                "checkpoint again."
            )
        there = specs[name]
        if there.shape != spec.shape and not (spec is _SCALAR and there.shape == (1,)):
            raise ValueError(
                f"{source} has {name} with shape {there.shape} where its config asks for {spec.shape}: correct the "
                "config, or fetch the checkpoint again."
            )
        if there.dtype != spec.dtype and not (spec is _SCALAR and there.dtype in _PLAIN):
            raise ValueError(
                f"{source} has {name} as {_dtype(there.dtype)} where {how.upper()} has {_dtype(spec.dtype)}: correct "
                "the quantization config, or fetch the checkpoint again."
            )
        found[end] = there
    return found


def modules(
    shapes: Mapping[str, Shape], specs: Mapping[str, Spec], recipe: Recipe, source: Any
) -> dict[str, tuple[str, dict[str, Spec]]]:
    """The quantised modules among `shapes` (tensors, with the shapes that they would have in full precision): how, and
    which tensors they have, by the end of their names.

    Raises: ValueError, see `layout`, and for a quantised weight that the recipe excludes.
    """
    found = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or name not in specs or specs[name].dtype in _PLAIN:
            if leaf == "weight" and name in specs and f"{module}.{WEIGHT_SCALE}" in specs:
                raise ValueError(
                    f"{source} has the scale {module}.{WEIGHT_SCALE} of a weight that is {_dtype(specs[name].dtype)}: "
                    "take the scale out, or fetch the checkpoint again."
                )
            continue
        how = recipe.of(module)
        if how is None:
            raise ValueError(
                f"{source} has {name} as {_dtype(specs[name].dtype)}, but its quantization config leaves {module} out: "
                "correct its list of exclusions, or fetch the checkpoint again."
            )
        found[module] = how, layout(module, shape, how, specs, source)
    return found


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dequantize(how: str, parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """The weight of `weight`, `weight_scale` (and `weight_scale_2`), rounded once."""
    if how == FP8:
        q, scale = parts
        return low_precision.dequantize_fp8(q, scale, dtype)
    q, block_scale, scale = parts
    return low_precision.dequantize_nvfp4(q, block_scale, scale, dtype)


def recognises(path: Path) -> bool:
    """A folder whose config.json or hf_quant_config.json has ModelOpt's quantisation."""
    return Path(path).is_dir() and stored_recipe(Path(path)) is not None


def to_huggingface(path: Path, dtype: str = "bfloat16", shard_bytes: int = SHARD_BYTES) -> Conversion:
    """The plain folder: quantised weights in `dtype`, rounded once; all others as they are. Memory holds one tensor.

    Raises:
        ValueError: see `Recipe`, `modules`, `PublishedFolder`, and an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: write one of {', '.join(DTYPES)}.")
    folder = PublishedFolder(path)
    stored = stored_recipe(folder.path)
    if stored is None:
        raise ValueError(f"{path} has no quantisation by ModelOpt in config.json or {SIDECAR}: name a folder that has.")
    remarks = folder.without_absent_mtp()
    shapes = published.tensors(folder.config)
    quantised = modules(shapes, folder.specs, Recipe.read(stored, path), path)
    entries, unused = [], {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        for end in (INPUT_SCALE, *KV_SCALES.values()):
            if leaf == "weight" and f"{module}.{end}" in folder.specs:
                unused[f"{module}.{end}"] = "a scale of activations, which the plain folder has in full precision"
        if leaf == "weight" and module in quantised:
            how, parts = quantised[module]
            weights = {end: spec for end, spec in parts.items() if end.startswith("weight")}
            sources = {f"{module}.{end}": spec.shape for end, spec in weights.items()}
            entries.append(Entry(name, Spec(shape, DTYPES[dtype]), sources, _Dequantize(how, DTYPES[dtype], name)))
        else:
            entries.append(_as_it_is(folder, name, shape, DTYPES[dtype]))
    plan = Plan(folder, entries, unused)
    if hasattr(folder.config, "quantization_config"):
        del folder.config.quantization_config
    save = published.saver(folder.config, DTYPES[dtype])
    return into_folder(plan, save, shard_bytes, [dtype], beside=[folder.path], remarks=remarks)


@dataclass(frozen=True)
class _Dequantize:
    how: str
    dtype: torch.dtype
    name: str

    def __call__(self, *parts: Tensor) -> Tensor:
        value = dequantize(self.how, parts, self.dtype)
        if self.dtype == torch.float16 and bool(value.isinf().any()):
            raise ValueError(f"{self.name} has values that float16 cannot hold; write bfloat16 or float32.")
        return value


def from_huggingface(
    path: Path, to: str, exclude: str | Iterable[str] = (), shard_bytes: int = SHARD_BYTES
) -> Conversion:
    """A folder in FP8 or NVFP4, made from a plain one; what is left out is at the top of this module.

    Every weight is read two or three times, for its scale and for itself; memory holds the largest (of attention, three
    together) and what a tile of it is worked with.

    Args:
        to: "fp8" or "nvfp4".
        exclude: more modules to leave in full precision, as ModelOpt writes them: names, or patterns with `*`.

    Raises:
        ValueError: a format that is neither, a folder that is quantised already, an exclusion that means no module, and
            what `Plan.check` finds when it is written.
    """
    if to not in (FP8, NVFP4):
        raise ValueError(f"ModelOpt's formats here are {FP8} and {NVFP4}, not {to!r}.")
    folder = PublishedFolder(path)
    if stored := _json(folder.path / "config.json").get("quantization_config") or stored_recipe(folder.path):
        raise ValueError(
            f"{path} is quantised already ({stored.get('quant_method')}): name the checkpoint that it was made from."
        )
    more = tuple(exclude.replace(" ", "").split(",") if isinstance(exclude, str) else exclude)
    more = tuple(pattern for pattern in more if pattern)
    remarks = folder.without_absent_mtp()
    shapes = published.tensors(folder.config)
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    for pattern in more:
        if not any(_patterns([pattern]).match(canonical(module)) for module in matrices):
            raise ValueError(f"exclude has {pattern!r}, which no module of {path} is called: correct it.")
    kept = _patterns((*_KEPT[to], *more))
    ignored, odd = [], []
    for module, shape in matrices.items():
        left = kept.match(canonical(module)) or _match(_NEVER, module)
        if to == NVFP4 and shape[-1] % GROUP and not left:
            odd.append(module)
        if left or len(shape) > 2 or module in odd:
            ignored.append(module)
    quantised = {module: shape for module, shape in matrices.items() if module not in ignored}
    ignore = _summary(ignored)
    folder.config.quantization_config = quantization_config(to, ignore)
    if odd:
        remarks.append(
            f"{len(odd)} weights whose inputs are no multiple of {GROUP} stay in full precision, {odd[0]} first."
        )
    return into_folder(
        Plan(folder, list(_quantised_entries(folder, shapes, quantised, to))),
        published.saver(folder.config),
        shard_bytes,
        more,
        to=to,
        beside=[folder.path],
        files={SIDECAR: json.dumps(_sidecar(to, ignore), indent=2) + "\n"},
        remarks=remarks,
    )


def _quantised_entries(
    folder: PublishedFolder, shapes: Mapping[str, Shape], quantised: Mapping[str, Shape], to: str
) -> Iterator[Entry]:
    quantise = _Quantize(to)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module not in quantised:
            yield _as_it_is(folder, name, shape, torch.bfloat16)
            continue
        # Servers fuse the three projections: one scale for all.
        fused = [re.sub(r"[qkv]_proj$", f"{letter}_proj", module) for letter in "qkv"]
        together = dict.fromkeys((module, *(one for one in fused if one in quantised)))
        sources = {f"{one}.weight": quantised[one] for one in together}
        for index, (end, spec) in enumerate(_stored(shape, to).items()):
            yield Entry(f"{module}.{end}", spec, sources, _Part(quantise, tuple(sources), index))


def _as_it_is(folder: PublishedFolder, name: str, shape: Shape, dtype: torch.dtype) -> Entry:
    """One in full precision; `dtype` stands for that of one that is missing."""
    return Entry(name, Spec(shape, folder.specs[name].dtype if name in folder.specs else dtype), {name: shape})


class _Quantize:
    """Quantises one weight at a time and remembers the last, for its scales are asked for one by one; and of all the
    largest magnitude, which is asked for first."""

    def __init__(self, to: str) -> None:
        self.to, self.peaks = to, dict[str, float]()
        self.last: tuple[str, tuple[Tensor, ...]] = ("", ())

    def peak(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> float:
        for name, weight in zip(names, weights, strict=True):
            if name not in self.peaks:
                try:
                    self.peaks[name] = low_precision.largest(weight)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return max(self.peaks[name] for name in names)

    def __call__(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.last[0] != names[0]:
            self.last = ("", ())
            quantise = low_precision.quantize_fp8 if self.to == FP8 else low_precision.quantize_nvfp4
            self.last = (names[0], quantise(weights[0], self.peak(names, weights)))
        return self.last[1]


@dataclass(frozen=True)
class _Part:
    """One of the tensors that a weight becomes. `names[0]` is the weight's, the others share its scale."""

    quantise: _Quantize
    names: tuple[str, ...]
    index: int

    def __call__(self, *weights: Tensor) -> Tensor:
        to = self.quantise.to
        if self.index == (1 if to == FP8 else 2):
            scale = low_precision.fp8_scale if to == FP8 else low_precision.nvfp4_scale
            return scale(self.quantise.peak(self.names, weights))
        return self.quantise(self.names, weights)[self.index]


def _summary(ignored: list[str]) -> list[str]:
    """The list of exclusions as ModelOpt writes it: the names, multi-token prediction in one pattern."""
    names = [module for module in ignored if not module.startswith("mtp.")]
    return names + (["mtp*"] if len(names) < len(ignored) else [])


def quantization_config(to: str, ignore: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config` for weights alone in "fp8" or "nvfp4"."""
    weights: dict[str, Any] = {"dynamic": False, "num_bits": 8 if to == FP8 else 4, "type": "float"}
    group = {} if to == FP8 else {"group_size": GROUP}
    return {
        "config_groups": {"group_0": {"weights": {**weights, **group}, "targets": ["Linear"]}},
        "ignore": ignore,
        "quant_algo": _WEIGHTS_ALONE[to],
        **group,
        "producer": _producer(),
        "quant_method": QUANT_METHOD,
    }


def _sidecar(to: str, exclude: list[str]) -> dict[str, Any]:
    group = {} if to == FP8 else {"group_size": GROUP}
    inner = {"quant_algo": _WEIGHTS_ALONE[to], "kv_cache_quant_algo": None, **group, "exclude_modules": exclude}
    return {"producer": _producer(), "quantization": inner}


def _producer() -> dict[str, str]:
    return {"name": QUANT_METHOD, "version": f"nemotron_h {__version__}"}  # readers look for the name
