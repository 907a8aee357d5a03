"""PEFT LoRA adapters of this family under other names: for PEFT, for vLLM, for llama.cpp's converter.

Names are `base_model.model.` + prefix + module + `.lora_A.weight` (r, in) and `.lora_B.weight` (out, r); the prefix of
`layers`, `embeddings` and `norm_f` is `model.` (in memory) or `backbone.` (as published). Routed experts are either

| experts  | module                          | lora_A                       | lora_B                          |
|----------|---------------------------------|------------------------------|---------------------------------|
| stacked  | ...mixer.experts[.base_layer]   | (E r, in), row e r + j       | (out, r E), column j E + e      |
| separate | ...mixer.experts.e.up_proj      | (r, in)                      | (out, r)                        |

with E experts, e the expert's number and j < r. Stacked is what PEFT makes of `target_parameters`: one wrapper for
each 3-D parameter, `experts.base_layer` for up_proj and `experts` for down_proj around it, or `experts` alone where
only one of the two is adapted. PEFT before 0.20 took (E, out, in) for (E, in, out); its adapters have A (E r, out) and
B (in, r E), are read as such, and become those of 0.20.

PEFT reads either prefix. llama.cpp's converter looks for `backbone.` and separate experts; vLLM takes these as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from packaging.version import Version
from torch import Tensor

from ..configuration import NemotronHConfig
from . import published
from .foreign import read_json
from .tensors import Entry, Plan, SafetensorsFolder, Shape, Spec, concatenated
from .writing import Conversion, Done, convert, copy_companions, write_safetensors, write_text

PREFIXES = ("model", "backbone")
EXPERTS = ("stacked", "separate")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_ROOT = "base_model.model."
_PREFIXED = re.compile(r"(?:model|backbone)\.(?=(?:layers|embeddings|norm_f)\.)")
_STACKED = re.compile(r"(.*mixer\.experts)(\.base_layer)?\.lora_[AB]\.weight")
_SEPARATE = re.compile(r"(.*mixer\.experts)\.(\d+)\.(up_proj|down_proj)")
_LORA = re.compile(r"(.*)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_EXPERT_TARGET = re.compile(r"((?:.*\.)?experts)\.(?:\d+\.)?(up_proj|down_proj)")
_PROJECTIONS = ("up_proj", "down_proj")
_UNTRANSPOSED = "0.20.0"


def convert_adapter(
    path: str | Path,
    dest: str | Path,
    prefix: str = "model",
    experts: str = "stacked",
    base: str | Path | None = None,
    done: Done = lambda nbytes: None,
) -> None:
    """Write the adapter folder `path` to `dest` under other names; the same function of the same base model.

    Args:
        prefix: "model" or "backbone".
        experts: "stacked" for PEFT (and `target_parameters`), "separate" for llama.cpp and vLLM.
        base: folder of the base model; its config says which shapes to expect. Left out, it is the adapter's
            `base_model_name_or_path` where that is a folder, and otherwise shapes are only held against each other.
        done: called with the bytes written since its last call.

    Raises:
        ValueError: see `conversion`, `Plan.check` and `writing.convert`. Nothing is written then.
    """
    convert(conversion(path, prefix, experts, base), dest, done)


def conversion(
    path: str | Path, prefix: str = "model", experts: str = "stacked", base: str | Path | None = None
) -> Conversion:
    """What `convert_adapter` writes; its plan can be looked at first.

    Raises:
        ValueError: no LoRA adapter, a setting that the layout cannot have, experts of several ranks in one stack.
    """
    if prefix not in PREFIXES:
        raise ValueError(f"There is no prefix {prefix!r}; use one of {', '.join(PREFIXES)}.")
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}; use one of {', '.join(EXPERTS)}.")
    source = Adapter(path, base)
    table = _Table(source, prefix, experts == "stacked")
    plan = Plan(source, table.entries)
    fields, remarks = table.config()

    def write(folder: Path, done: Done) -> None:
        if (folder / WEIGHTS).exists():
            done(plan.nbytes)
        else:
            write_safetensors(plan, folder, done, shard_bytes=1 << 62)
            (folder / "model.safetensors").rename(folder / WEIGHTS)
        copy_companions(source.path, folder)
        if (source.path / "README.md").exists():
            (folder / "README.md").write_bytes((source.path / "README.md").read_bytes())
        write_text(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")

    return Conversion("adapter", plan, write, [prefix, experts], remarks=remarks)


class Adapter(SafetensorsFolder):
    """An adapter folder: `config`, and its tensors under their own names.

    Raises:
        ValueError: it is no folder of a LoRA adapter, or its file cannot be read.
    """

    def __init__(self, path: str | Path, base: str | Path | None = None) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).exists():
            raise ValueError(f"{self.path} has no {CONFIG}; name the folder of a PEFT adapter.")
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        if (kind := self.config.get("peft_type")) != "LORA":
            raise ValueError(f"{self.path} has peft_type {kind!r}; only LORA adapters can be converted.")
        super().__init__(path)
        self.files = [self.path / CONFIG, *self.files]
        self.base = self._base(base)
        self._last: tuple[str, Tensor] | None = None

    def _files(self) -> list[Path]:
        if not (self.path / WEIGHTS).exists():
            raise ValueError(f"{self.path} has no {WEIGHTS}; save the adapter with safe_serialization=True.")
        return [self.path / WEIGHTS]

    def _base(self, base: str | Path | None) -> NemotronHConfig | None:
        path = Path(base or self.config.get("base_model_name_or_path") or "") / "config.json"
        if not path.exists():
            if base is not None:
                raise ValueError(f"{base} has no config.json; name the folder of the base model.")
            return None
        return published.read_config(path)

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """As in `SafetensorsFolder`; the last tensor is kept, since every expert's part is taken of it in turn."""
        if index is not None:
            return super().read(name, index)
        if self._last is None or self._last[0] != name:
            self._last = (name, super().read(name))
        return self._last[1]


@dataclass
class _Module:
    """A LoRA of the result: name without prefix (of experts: that of the parameter), with its scaling."""

    name: str
    rank: int
    alpha: float
    parameter: bool = False
    """Stacked experts."""


@dataclass
class _Table:
    """The entries of the result and what its config must say of them."""

    source: Adapter
    prefix: str
    stacked: bool
    entries: list[Entry] = field(default_factory=list)
    modules: list[_Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fields = self.source.config
        self.names: dict[str, str] = {}
        """Without the prefix -> as in the file."""
        for name in self.source.specs:
            if not name.startswith(_ROOT):
                self._refuse(f"has the tensor {name}, which does not begin with {_ROOT!r}", "save it with PEFT")
            bare = _PREFIXED.sub("", name.removeprefix(_ROOT), count=1)
            if bare in self.names:
                self._refuse(f"has {name} and {self.names[bare]}, which are one tensor", "take one of them out")
            self.names[bare] = name
        prefixed = (name.removeprefix(_ROOT) for name in self.source.specs)
        self.written_prefix = next((match[0] for name in prefixed if (match := _PREFIXED.match(name))), "model.")
        self.shapes: dict[str, Shape] | None = None
        if self.source.base is not None:
            self.shapes = {_PREFIXED.sub("", n): s for n, s in published.tensors(self.source.base).items()}
        self._fill()

    def _refuse(self, problem: str, remedy: str) -> NoReturn:
        raise ValueError(f"{self.source.path} {problem}; {remedy}.")

    # -- entries ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        plain: dict[str, None] = {}
        stacks: dict[str, set[str]] = {}
        separate: dict[str, set[str]] = {}
        numbers: dict[str, set[int]] = {}
        for bare in self.names:
            if match := _STACKED.fullmatch(bare):
                stacks.setdefault(match[1], set()).add(match[2] or "")
            elif not (lora := _LORA.fullmatch(bare)):
                if self._kept_whole(bare):
                    self._entry(bare, [(bare, self._given(bare))])
            elif match := _SEPARATE.fullmatch(lora[1]):
                separate.setdefault(match[1], set()).add(match[3])
                numbers.setdefault(match[1], set()).add(int(match[2]))
            elif self._targeted(lora[1]):
                plain[lora[1]] = None
        for module in plain:
            self._linear(module)
        count = self.source.base.n_routed_experts if self.source.base else 0
        count = count or 1 + max((max(of_layer) for of_layer in numbers.values()), default=0)
        for group, wrappers in stacks.items():
            self._from_stack(group, wrappers)
        for group, projections in separate.items():
            ordered = [projection for projection in _PROJECTIONS if projection in projections]
            for projection in ordered:
                self._from_experts(group, projection, count, ordered)

    def _linear(self, module: str) -> None:
        rank, alpha = self._scaling(module if not self._parameter(module) else module + ".weight")
        self.modules.append(_Module(module, rank, alpha))
        shape = None if self.shapes is None else self.shapes.get(module + ".weight", ())
        if shape == ():
            return  # the base model has no such module: its tensors are left over
        if f"{module}.lora_embedding_A" in self.names or f"{module}.lora_embedding_B" in self.names:
            first, second = f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
            shape = shape and shape[::-1]
        else:
            first, second = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        outputs, inputs = shape or (self._given(second)[0], self._given(first)[-1])
        self._entry(first, [(first, (rank, inputs))])
        self._entry(second, [(second, (outputs, rank))])

    def _from_stack(self, group: str, wrappers: set[str]) -> None:
        matching = [p for p in _PROJECTIONS if self._parameter(group, p)]
        if "" not in wrappers or len(matching) != len(wrappers):
            self._refuse(
                f"has {len(wrappers)} stacked LoRA of {group} but target_parameters "
                f"{self.fields.get('target_parameters')!r} name {len(matching)} parameters of it",
                f"correct target_parameters in {CONFIG}",
            )
        for projection, wrapper in zip(matching, sorted(wrappers, reverse=True), strict=True):
            A, B = (f"{group}{wrapper}.lora_{letter}.weight" for letter in "AB")
            parameter = f"{group}.{projection}"
            rank, alpha = self._scaling(parameter)
            a, b = self._given(A), self._given(B)
            # Either of the two may be missing.
            count = self.source.base.n_routed_experts if self.source.base else (a[0] or b[-1]) // rank
            outputs, inputs = self._expert_shape(parameter) or (b[0], a[-1])
            old = Version(str(self.fields.get("peft_version") or "0.18")) < Version(_UNTRANSPOSED)
            if self.shapes is not None:
                # The shapes say it where they can.
                old = (a[-1], b[0]) == (outputs, inputs) and (old or outputs != inputs)
            elif old:
                outputs, inputs = inputs, outputs
            sides = (outputs, inputs) if old else (inputs, outputs)
            in_A, in_B = (A, (count * rank, sides[0])), (B, (sides[1], rank * count))
            of_A, of_B = partial(_of_A, rank=rank, flip=old), partial(_of_B, rank=rank, flip=old)
            parts = {"A": (in_B, of_B) if old else (in_A, of_A), "B": (in_A, of_A) if old else (in_B, of_B)}
            for letter, (part, experts_of) in parts.items():
                shape = (rank, inputs) if letter == "A" else (outputs, rank)
                if self.stacked:
                    make = partial(_restacked, experts_of, _to_A if letter == "A" else _to_B) if old else None
                    stacked = (count * rank, inputs) if letter == "A" else (outputs, rank * count)
                    self._entry(f"{group}{wrapper}.lora_{letter}.weight", [part], make, stacked)
                    continue
                for expert in range(count):
                    name = f"{group}.{expert}.{projection}.lora_{letter}.weight"
                    self._entry(name, [part], partial(_expert, experts_of, expert), shape)
            if self.stacked:
                self.modules.append(_Module(parameter, rank, alpha, True))
            else:
                self.modules += [_Module(f"{group}.{expert}.{projection}", rank, alpha) for expert in range(count)]

    def _from_experts(self, group: str, projection: str, count: int, projections: Sequence[str]) -> None:
        names = [f"{group}.{expert}.{projection}" for expert in range(count)]
        if not self.stacked:
            for name in names:
                self._linear(name)
            return
        scaling = {name: self._scaling(name) for name in names}
        (rank, alpha), first = scaling[names[0]], names[0]
        if other := [name for name in names if scaling[name] != (rank, alpha)]:
            self._refuse(
                f"has rank and alpha {scaling[other[0]]} for {other[0]} and {(rank, alpha)} for {first}",
                "stacked experts have one of each, write them with experts='separate'",
            )
        for setting in ("use_dora", "lora_bias"):
            if self.fields.get(setting):
                self._refuse(
                    f"has {setting}, which PEFT cannot do on stacked experts", "write them with experts='separate'"
                )
        parameter = f"{group}.{projection}"
        known = [f"{name}.lora_A.weight" for name in names if f"{name}.lora_A.weight" in self.names]
        shape = self._expert_shape(parameter)
        outputs, inputs = shape or (
            next((self._given(k.replace("lora_A", "lora_B"))[0] for k in known), 0),
            next((self._given(k)[-1] for k in known), 0),
        )
        wrapper = ".base_layer" if projection == "up_proj" and len(projections) == 2 else ""
        A = [(f"{name}.lora_A.weight", (rank, inputs)) for name in names]
        B = [(f"{name}.lora_B.weight", (outputs, rank)) for name in names]
        self._entry(f"{group}{wrapper}.lora_A.weight", A, concatenated, (count * rank, inputs))
        self._entry(f"{group}{wrapper}.lora_B.weight", B, _interleave, (outputs, rank * count))
        self.modules.append(_Module(parameter, rank, alpha, True))

    def _expert_shape(self, parameter: str) -> Shape | None:
        group, _, projection = parameter.rpartition(".")
        return None if self.shapes is None else self.shapes.get(f"{group}.0.{projection}.weight")

    def _given(self, bare: str) -> Shape:
        """The shape of a tensor; of one that is not there, which the plan says, nothing."""
        name = self.names.get(bare)
        return self.source.specs[name].shape if name else (0, 0)

    def _entry(
        self,
        bare: str,
        parts: Sequence[tuple[str, Shape]],
        make: Callable[..., Tensor] | None = None,
        shape: Shape | None = None,
    ) -> None:
        sources = {self.names.get(part, _ROOT + self._prefixed(part, self.written_prefix)): s for part, s in parts}
        dtypes = [self.source.specs[name].dtype for name in sources if name in self.source.specs]
        spec = Spec(shape or parts[0][1], dtypes[0] if dtypes else torch.float32)
        self.entries.append(Entry(_ROOT + self._prefixed(bare, f"{self.prefix}."), spec, sources, make))

    @staticmethod
    def _prefixed(bare: str, prefix: str) -> str:
        return prefix + bare if bare.startswith(("layers.", "embeddings.", "norm_f.")) else bare

    # -- what the config says of a module --------------------------------------------------------------------------

    def _kept_whole(self, bare: str) -> bool:
        """Whether the adapter may hold a tensor that is no factor: a trained bias, a module that was saved whole."""
        module = bare.rpartition(".")[0]
        saved = [*(self.fields.get("modules_to_save") or ()), "embeddings", "lm_head"]
        return (
            any(_ends_with(module, name) or f".{name}." in f".{module}." for name in saved)
            or (bare.endswith(".bias") and self.fields.get("bias", "none") != "none")
            or (bare.endswith("lora_B.bias") and bool(self.fields.get("lora_bias")))
            or (".lora_magnitude_vector" in bare and bool(self.fields.get("use_dora")))
        )

    def _targeted(self, module: str) -> bool:
        targets = self.fields.get("target_modules")
        if targets is None or targets == "all-linear" or self._parameter(module):
            return True
        names = [module, *(self._prefixed(module, f"{prefix}.") for prefix in PREFIXES)]
        if isinstance(targets, str):
            return any(re.fullmatch(targets, name) for name in names)
        return any(_ends_with(name, target) for name in names for target in targets)

    def _parameter(self, module: str, parameter: str = "") -> bool:
        """Whether `target_parameters` name a parameter (or this one) of a module."""
        for target in self.fields.get("target_parameters") or ():
            of, _, name = _PREFIXED.sub("", target).rpartition(".")
            if _ends_with(module, of) and parameter in ("", name):
                return True
        return False

    def _scaling(self, module: str) -> tuple[int, float]:
        names = [module, *(self._prefixed(module, f"{prefix}.") for prefix in PREFIXES)]
        return (
            _by_pattern(self.fields.get("rank_pattern"), names, self.fields["r"]),
            _by_pattern(self.fields.get("alpha_pattern"), names, self.fields["lora_alpha"]),
        )

    # -- the config of the result ----------------------------------------------------------------------------------

    def config(self) -> tuple[dict[str, Any], list[str]]:
        """The `adapter_config.json` of the result, whose names have no prefix and fit both, and what to know of it."""
        fields, remarks = dict(self.fields), []
        fields["target_modules"], fields["target_parameters"] = self._targets()
        if not isinstance(self.fields.get("target_modules"), list) or self._by_rule():
            # The list of every module says the same, also of experts, whose numbers PEFT would take for layers.
            for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
                if key in fields:
                    fields[key] = None
        for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            fields[key] = self._pattern(key, default)
        parameters = any(module.parameter for module in self.modules)
        if parameters:
            version = str(fields.get("peft_version") or "0")
            fields["peft_version"] = version if Version(version) >= Version(_UNTRANSPOSED) else _UNTRANSPOSED
            if fields.get("lora_dropout"):
                remarks.append(
                    f"lora_dropout {fields['lora_dropout']} becomes 0, which PEFT wants for stacked experts."
                )
                fields["lora_dropout"] = 0.0
        elif any(".experts." in module.name for module in self.modules):
            remarks.append("PEFT opens separate experts only on a model that has a module per expert.")
        if fields["rank_pattern"] or fields["alpha_pattern"]:
            remarks.append("rank_pattern and alpha_pattern are read by PEFT; vLLM and llama.cpp have one lora_alpha.")
        return fields, remarks

    def _by_rule(self) -> bool:
        """Whether modules are chosen by more than the list of their names."""
        return any(self.fields.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))

    def _targets(self) -> tuple[Any, list[str] | None]:
        linear = [module.name for module in self.modules if not module.parameter and not self._parameter_of(module)]
        given = self.fields.get("target_modules")
        was = [_PREFIXED.sub("", target) for target in self.fields.get("target_parameters") or ()]
        parameters = [target for target in was if not _EXPERT_TARGET.fullmatch(target)]
        stacks = [module.name for module in self.modules if module.parameter]
        experts = [target for target in was if _EXPERT_TARGET.fullmatch(target)]
        parameters += experts if self.stacked and experts else stacks
        if not isinstance(given, list) or self._by_rule():
            return _shortest(linear), parameters or None
        names = list(dict.fromkeys(_PREFIXED.sub("", target) for target in given))
        # What is left has no module to match once its experts are stacked.
        names = [name for name in names if any(_ends_with(module, name) for module in linear)]
        names += _shortest(m for m in linear if not any(_ends_with(m, name) for name in names))
        return names, parameters or None

    def _parameter_of(self, module: _Module) -> bool:
        """A 2-D parameter: wrapped as such before and after."""
        return not _SEPARATE.fullmatch(module.name) and self._parameter(module.name)

    def _pattern(self, key: str, default: str) -> dict[str, Any]:
        """A pattern that gives every module of the result what the source's gave it."""
        kept = {self._renamed(pattern): value for pattern, value in (self.fields.get(key) or {}).items()}
        added: dict[str, Any] = {}
        for module in self.modules:
            name = module.name + (".weight" if self._parameter_of(module) else "")
            value = module.rank if key == "rank_pattern" else module.alpha
            if _by_pattern({**added, **kept}, [name], self.fields[default]) != value:
                expert = _SEPARATE.fullmatch(name)
                added[re.escape(name) if not expert else rf"{re.escape(expert[1])}\.\d+\.{expert[3]}"] = value
        return {**added, **kept}

    def _renamed(self, pattern: str) -> str:
        pattern = re.sub(r"^\^?(model|backbone)\\?\.(?=layers|embeddings|norm_f)", "", pattern)
        one = r"(?<![a-z_])experts\\?\.(?:\\d\+\\?\.)?(up_proj|down_proj)$"
        return re.sub(one, r"experts\.\1" if self.stacked else r"experts\.\\d+\.\1", pattern)


def _ends_with(name: str, target: str) -> bool:
    """PEFT's rule for entries of a list."""
    return name == target or name.endswith(f".{target}")


def _by_pattern(patterns: Mapping[str, Any] | None, names: Iterable[str], default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    names = list(names)
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default


def _shortest(modules: Iterable[str]) -> list[str]:
    """The names of modules, those of experts without the layer where every layer has them."""
    modules = list(dict.fromkeys(modules))
    experts = [match for module in modules if (match := _SEPARATE.fullmatch(module))]
    groups = {match[1] for match in experts}
    ends: dict[str, set[str]] = {}
    for match in experts:
        ends.setdefault(f"experts.{match[2]}.{match[3]}", set()).add(match[1])
    short = [end for end, of in ends.items() if of == groups]
    return [m for m in modules if not any(_ends_with(m, end) for end in short)] + short


# -- layouts: (E, r, in) and (E, out, r) in between ----------------------------------------------------------------


def _of_A(stacked: Tensor, rank: int, flip: bool = False) -> Tensor:
    """(E r, n) -> (E, r, n), or flipped (E, n, r)."""
    experts = stacked.reshape(-1, rank, stacked.shape[-1])
    return experts.mT if flip else experts


def _of_B(stacked: Tensor, rank: int, flip: bool = False) -> Tensor:
    """(n, r E) -> (E, n, r), or flipped (E, r, n)."""
    experts = stacked.reshape(stacked.shape[0], rank, -1).permute(2, 0, 1)
    return experts.mT if flip else experts


def _to_A(experts: Tensor) -> Tensor:
    """(E, r, n) -> (E r, n)"""
    return experts.reshape(-1, experts.shape[-1])


def _to_B(experts: Tensor) -> Tensor:
    """(E, n, r) -> (n, r E)"""
    return experts.permute(1, 2, 0).reshape(experts.shape[1], -1)


def _restacked(experts_of: Callable[[Tensor], Tensor], stack: Callable[[Tensor], Tensor], stacked: Tensor) -> Tensor:
    return stack(experts_of(stacked))


def _expert(experts_of: Callable[[Tensor], Tensor], expert: int, stacked: Tensor) -> Tensor:
    return experts_of(stacked)[expert]


def _interleave(*parts: Tensor) -> Tensor:
    """E times (out, r) -> (out, r E), column j E + e."""
    return torch.stack(parts, dim=2).reshape(parts[0].shape[0], -1)
