"""Who reads a Hugging Face folder of this family, and what each stumbles on: a static check, nothing is loaded.

| reader | layers from | names of layers in the list | tensor names | needs besides |
|---|---|---|---|---|
| NVIDIA's remote code | pattern | (up to Nano 2: no list) | published | num_hidden_layers, numbers in time_step_limit |
| vLLM | list, pattern | all | published, `model.*` | |
| SGLang | list, pattern | old | published, `model.*` | head_dim |
| TensorRT-LLM | list, pattern | old, without mlp | published, `model.*` | |
| llama.cpp's converter | pattern, list | old, without mlp | published | num_hidden_layers, no MoE keys without MoE |
| mlx-lm | pattern, list | old | published | 20 keys, numbers in time_step_limit, lm_head.weight |
| transformers 5.3 to 5.5 | list, pattern | old, without mlp | published, in memory | no MLP layers |
| transformers 5.6 to 5.12 | list, pattern | old | published, in memory | |
| transformers 5.13 to 5.19 | list, pattern | all, old ones not beside a pattern | published, in memory | |
| transformers 5.20 on | list, pattern | all | published, in memory | |
| this package | either, if they agree | all | published, in memory | |

"Pattern" is `hybrid_override_pattern`, "list" is `layers_block_type`; where both are there, the first named is read.
Old names are mamba, attention, mlp, moe; transformers 5.13 renamed the first two to linear_attention and
full_attention. What is said of each reader was read in its source: transformers' in its releases, the others' of 2026.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints import published
from ..checkpoints.foreign import read_json, sound
from ..checkpoints.tensors import SafetensorsFolder, Shape, Spec
from ..configuration import NemotronHConfig, parse_layers

_STACKED = re.compile(r"(backbone|model|mtp)\.layers\.\d+\.mixer\.experts\.(up_proj|down_proj)")
_LETTERS = frozenset("M*-E")
_OLD = frozenset({"mamba", "attention", "mlp", "moe"})
_NEW = frozenset({"linear_attention", "full_attention", "mlp", "moe"})
_CONVERT = "`nemotron-h convert FOLDER NEW --to huggingface` writes it for all readers"


@dataclass(frozen=True)
class Finding:
    """What a reader stumbles on: the key, value or tensor, and what to do. A remark does not keep it from reading."""

    what: str
    remedy: str
    remark: bool = False


@dataclass(frozen=True)
class Verdict:
    """`older`: a version that is superseded; that it does not read a folder counts for less."""

    reader: str
    findings: tuple[Finding, ...]
    older: bool = False

    @property
    def reads(self) -> bool:
        return all(finding.remark for finding in self.findings)


class Folder:
    """A folder as its readers find it: the raw config, and the tensors under the names that its files have.

    Raises:
        ValueError: no config.json, or another model type.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise ValueError(f"{self.path} has no config.json; name the folder of a model.")
        self.fields = read_json(self.path / "config.json")
        if (kind := self.fields.get("model_type")) != "nemotron_h":
            raise ValueError(f"{self.path} is a {kind!r} model; this package knows nemotron_h alone.")
        self.config: NemotronHConfig | None = None
        self.stored: dict[str, Spec] = {}
        self.config_error = self.files_error = ""
        try:
            self.config = NemotronHConfig.from_dict(dict(self.fields))
        except (ValueError, TypeError) as error:
            self.config_error = " ".join(str(error).split())
        try:
            self.stored = SafetensorsFolder(self.path).specs
        except ValueError as error:
            self.files_error = str(error)

    def json(self, name: str) -> Any:
        """A JSON file of the folder; None where it is not there. Raises `ValueError` where it is no JSON."""
        file = self.path / name
        return read_json(file) if file.exists() else None

    @property
    def pattern(self) -> str | None:
        return self.fields.get("hybrid_override_pattern")

    @property
    def listed(self) -> list[str] | None:
        return self.fields.get("layers_block_type")

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of layer of the model, in old names; empty where its config does not say them."""
        layers = self.pattern.partition("/")[0] if isinstance(self.pattern, str) else self.listed
        try:
            return set(parse_layers(layers or ""))
        except ValueError:
            return set()

    @property
    def quantised(self) -> str | None:
        """The method of its quantised weights."""
        stored = self.fields.get("quantization_config")
        return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None

    @cached_property
    def expected(self) -> dict[str, Shape]:
        """Every tensor of its config; none where the config cannot be read."""
        return published.tensors(self.config) if self.config else {}


Check = Callable[[Folder], Iterator[Finding]]


def _nothing(folder: Folder) -> Iterator[Finding]:
    yield from ()


@dataclass(frozen=True)
class Reader:
    """A row of the table at the top. The config must have `keys` ("a|b": one of them), and `moe_keys` with experts."""

    name: str
    letters: frozenset[str] = _LETTERS
    names: frozenset[str] = _OLD | _NEW  # empty: it does not read the list
    pattern_first: bool = False
    keys: tuple[str, ...] = ()
    moe_keys: tuple[str, ...] = ()
    numbers_as_limit: bool = False
    in_memory_names: bool = False
    model_prefix: bool = True
    singular_embedding: bool = False
    quantised: frozenset[str] = frozenset()
    also: Check = _nothing
    remedy: str = _CONVERT  # for layers that it does not know
    older: bool = False

    def verdict(self, folder: Folder) -> Verdict:
        checks = (self._layers, self._keys, self._tensors, self._quantisation, self.also)
        return Verdict(self.name, tuple(finding for check in checks for finding in check(folder)), self.older)

    def _layers(self, folder: Folder) -> Iterator[Finding]:
        pattern, listed = folder.pattern, folder.listed
        if pattern is not None and (self.pattern_first or not self.names or listed is None):
            if unknown := sorted(set(pattern) - self.letters):
                yield Finding(f"hybrid_override_pattern has {unknown[0]!r}, which it does not know", self.remedy)
        elif listed is not None and self.names:
            if unknown := sorted(set(listed) - self.names):
                yield Finding(
                    f"layers_block_type has {', '.join(map(repr, unknown))}, which it does not know", _CONVERT
                )
        else:
            wanted = "hybrid_override_pattern" + (" or layers_block_type" if self.names else "")
            yield Finding(f"config.json has no {wanted}", _CONVERT)

    def _keys(self, folder: Folder) -> Iterator[Finding]:
        for key in self.keys + (self.moe_keys if "moe" in folder.kinds else ()):
            if all(folder.fields.get(name) is None for name in key.split("|")):
                yield Finding(f"config.json has no {key.replace('|', ' or ')}", _CONVERT)
        limit = folder.fields.get("time_step_limit")
        if self.numbers_as_limit and limit is not None and not _two_numbers(limit):
            yield Finding(f"time_step_limit is {json.dumps(limit)}, not two numbers", _CONVERT)

    def _tensors(self, folder: Folder) -> Iterator[Finding]:
        if self.in_memory_names:
            odd = [
                name for name in folder.stored if name == "backbone.embedding.weight" and not self.singular_embedding
            ]
        else:
            odd = [
                name
                for name, spec in folder.stored.items()
                if (name.startswith("model.") and not self.model_prefix)
                or (_STACKED.fullmatch(name) and len(spec.shape) == 3)
                or (name == "backbone.embedding.weight" and not self.singular_embedding)
            ]
        if odd:
            others = f" (and {len(odd) - 1} others)" if len(odd) > 1 else ""
            yield Finding(f"it does not look for the tensor {odd[0]}{others}", _CONVERT)

    def _quantisation(self, folder: Folder) -> Iterator[Finding]:
        if (method := folder.quantised) and method not in self.quantised:
            remedy = "dequantise it: load it with this package, model.dequantize(), save it"
            if method == "modelopt":
                remedy = "`nemotron-h convert FOLDER NEW --to huggingface` dequantises it"
            yield Finding(f"it does not read weights quantised by {method!r}", remedy)


def _two_numbers(limit: Any) -> bool:
    return isinstance(limit, list) and len(limit) == 2 and all(type(bound) in (int, float) for bound in limit)


# -- what does not fit the table -------------------------------------------------------------------------------------


def _remote(folder: Folder) -> Iterator[Finding]:
    number = folder.fields.get("num_hidden_layers")
    if folder.pattern is not None and number is not None and number != len(folder.pattern):
        yield Finding(
            f"num_hidden_layers is {number} and hybrid_override_pattern has {len(folder.pattern)} layers", _CONVERT
        )
    if folder.pattern is not None and folder.listed is not None:
        yield _list_refused("the code that came up to Nano 2 refuses")


def _vllm(folder: Folder) -> Iterator[Finding]:
    if folder.pattern is not None and folder.listed is not None:
        yield _list_refused("versions with a config class of their own (before transformers 5's) refuse")
    if (depths := folder.fields.get("num_nextn_predict_layers") or 0) > 1:
        yield Finding(f"num_nextn_predict_layers is {depths}: it predicts with one depth alone", "", remark=True)


def _list_refused(who: str) -> Finding:
    return Finding(
        f"{who} the key layers_block_type, a property without a setter",
        "delete it from config.json there: hybrid_override_pattern says the same",
        remark=True,
    )


def _sglang(folder: Folder) -> Iterator[Finding]:
    for key, default in (("head_dim", 128), ("layer_norm_epsilon", 1e-5)):
        value = getattr(folder.config, key, default)
        if folder.fields.get(key) is None and value != default:
            yield Finding(f"config.json has no {key}, for which it takes {default} instead of {value}", _CONVERT)


def _tensorrt(folder: Folder) -> Iterator[Finding]:
    if folder.pattern is None and "mlp" in folder.kinds:
        yield Finding("config.json has no hybrid_override_pattern, from which alone it reads MLP layers", _CONVERT)
    if isinstance(folder.fields.get("intermediate_size"), list) and len(folder.fields["intermediate_size"]) > 1:
        yield Finding(
            "intermediate_size is a list, which it indexes by layer and not by MLP", "use one size for all MLP layers"
        )
    if "moe" in folder.kinds and (shared := folder.fields.get("n_shared_experts") or 1) > 1:
        yield Finding(
            f"n_shared_experts is {shared}, by which it multiplies moe_shared_expert_intermediate_size",
            "write n_shared_experts 1: the shared experts are one MLP of that size",
        )


def _llama_cpp(folder: Folder) -> Iterator[Finding]:
    moe, fields = "moe" in folder.kinds, folder.fields
    if folder.pattern is None and folder.listed is not None and "mlp" in folder.kinds:
        yield Finding("config.json has no hybrid_override_pattern, from which alone it reads MLP layers", _CONVERT)
    if folder.kinds and not moe and "num_experts_per_tok" in fields:
        yield Finding(
            "config.json has num_experts_per_tok, for which it takes a model for MoE; this one is dense", _CONVERT
        )
    if {"moe", "mlp"} <= folder.kinds:
        yield Finding("the model has both MLP and MoE layers, of which it converts one kind", "no remedy: keep to one")
    if isinstance(fields.get("intermediate_size"), list) and "mlp" in folder.kinds:
        yield Finding("intermediate_size is a list; it takes one size", "`nemotron-h convert FOLDER FILE --to gguf`")
    if (depths := fields.get("num_nextn_predict_layers") or 0) > 1:
        yield Finding(
            f"num_nextn_predict_layers is {depths}: it converts one depth alone", "pass it --no-mtp", remark=True
        )
    yield Finding(
        "where transformers 5.3 or newer is installed, it reads the config through that class, which drops the pattern "
        "and num_hidden_layers and adds num_experts_per_tok",
        "run it with this package registered (python -c 'import nemotron_h, runpy, sys; sys.argv = sys.argv[1:]; "
        'runpy.run_path(sys.argv[0], run_name="__main__")\' convert_hf_to_gguf.py FOLDER), or '
        "`nemotron-h convert FOLDER FILE --to gguf`",
        remark=True,
    )


def _mlx(folder: Folder) -> Iterator[Finding]:
    if folder.stored and "lm_head.weight" not in folder.stored:
        yield Finding(
            "there is no lm_head.weight: it does not tie the head to the embeddings",
            "store a copy of backbone.embeddings.weight as lm_head.weight",
        )
    if isinstance(folder.fields.get("intermediate_size"), list) and "mlp" in folder.kinds:
        yield Finding("intermediate_size is a list; it takes one size", "use one size for all MLP layers")


def _before_5_3(folder: Folder) -> Iterator[Finding]:
    yield Finding(
        "it has no class of this model type", "use transformers 5.3 or newer, this package, or NVIDIA's remote code"
    )


def _from_5_13(folder: Folder) -> Iterator[Finding]:
    if folder.pattern is not None and (old := sorted({"mamba", "attention"} & set(folder.listed or ()))):
        yield Finding(
            f"layers_block_type has {', '.join(map(repr, old))}, which it renames only where there is no pattern",
            "delete layers_block_type from config.json there, or import nemotron_h",
        )


def _ours(folder: Folder) -> Iterator[Finding]:
    if folder.config_error:
        yield Finding(f"config.json: {folder.config_error.rstrip('.')}", "correct the config")


_MODELOPT = frozenset({"modelopt"})
_MLX_KEYS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings num_attention_heads "
    "num_key_value_heads attention_bias mamba_num_heads mamba_head_dim mamba_proj_bias ssm_state_size conv_kernel "
    "n_groups mlp_bias layer_norm_epsilon use_bias use_conv_bias"
)
_MOE_KEYS = (
    "n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size "
    "n_group topk_group norm_topk_prob routed_scaling_factor"
)
_EXPERT_KEYS = tuple(_MOE_KEYS.split())

READERS = (
    Reader(
        "NVIDIA's remote code",
        names=frozenset(),
        keys=("num_hidden_layers",),
        numbers_as_limit=True,
        model_prefix=False,
        also=_remote,
    ),
    Reader("vLLM", quantised=_MODELOPT, also=_vllm),
    Reader("SGLang", names=_OLD, quantised=_MODELOPT, also=_sglang),
    Reader("TensorRT-LLM", names=_OLD, moe_keys=_EXPERT_KEYS, quantised=_MODELOPT, also=_tensorrt),
    Reader(
        "llama.cpp's converter",
        names=frozenset({"mamba", "attention", "moe", "mlp"}),  # "mlp" is passed over, see _llama_cpp
        pattern_first=True,
        keys=("num_hidden_layers", "head_dim|attention_head_dim"),
        moe_keys=_EXPERT_KEYS,
        model_prefix=False,
        singular_embedding=True,
        quantised=_MODELOPT,
        also=_llama_cpp,
    ),
    Reader(
        "mlx-lm",
        names=_OLD,
        pattern_first=True,
        keys=(*_MLX_KEYS.split(), "head_dim"),
        moe_keys=_EXPERT_KEYS,
        numbers_as_limit=True,
        model_prefix=False,
        also=_mlx,
    ),
    Reader("transformers before 5.3", in_memory_names=True, singular_embedding=True, also=_before_5_3, older=True),
    Reader(
        "transformers 5.3 to 5.5",
        letters=frozenset("M*E"),
        names=frozenset({"mamba", "attention", "moe"}),
        in_memory_names=True,
        singular_embedding=True,
        remedy="use transformers 5.6 or newer, which know MLP layers, or import nemotron_h",
        older=True,
    ),
    Reader("transformers 5.6 to 5.12", names=_OLD, in_memory_names=True, singular_embedding=True, older=True),
    Reader("transformers 5.13 to 5.19", in_memory_names=True, also=_from_5_13, older=True),
    Reader("transformers 5.20 on", in_memory_names=True),
    Reader(
        "this package",
        in_memory_names=True,
        letters=_LETTERS | frozenset("|/"),
        names=_OLD | _NEW,
        quantised=frozenset({"modelopt", "nemotron_h_weight_only", "torchao", "bitsandbytes"}),
        also=_ours,
    ),
)


# -- the folder itself -----------------------------------------------------------------------------------------------

ITSELF = "the folder itself"


def _itself(folder: Folder) -> Iterator[Finding]:
    if folder.files_error:
        problem, _, remedy = folder.files_error.rpartition(": ")
        yield Finding(problem or folder.files_error, remedy.rstrip(".") if problem else "fetch or write it again")
    else:
        yield from _tensor_set(folder)
        yield from _index(folder)
    yield from _tokenizer(folder)


def _tensor_set(folder: Folder) -> Iterator[Finding]:
    if folder.config is None:
        return
    fetch = "correct config.json, or fetch or write the checkpoint again"
    stored: dict[str, Shape] = {}
    for name, spec in folder.stored.items():
        name = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
        name = "backbone.embeddings.weight" if name == "backbone.embedding.weight" else name
        if _STACKED.fullmatch(name) and len(spec.shape) == 3 and spec.nbytes:
            prefix, _, leaf = name.rpartition(".")
            stored |= {f"{prefix}.{expert}.{leaf}.weight": spec.shape[1:] for expert in range(spec.shape[0])}
        else:
            stored[name] = spec.shape
    expected = folder.expected
    missing = [name for name in expected if name not in stored]
    if folder.config.has_mtp and not any(name.startswith("mtp.") for name in stored):
        missing = [name for name in missing if not name.startswith("mtp.")]
        depths = folder.config.num_nextn_predict_layers
        yield Finding(
            f"there are no mtp.* tensors although num_nextn_predict_layers is {depths}",
            "take them from the checkpoint that it was made from, or write num_nextn_predict_layers 0",
            remark=True,
        )
    if missing:
        yield Finding(f"the tensor {missing[0]}{_others(missing)} is missing", fetch)
    extra = [name for name in stored if name not in expected]
    if folder.config.tie_word_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    if folder.quantised:
        # Scales and packed weights have the names of their weights, and shapes that are the method's affair.
        extra = [name for name in extra if not _belongs(name, expected)]
    else:
        for name, shape in expected.items():
            if name in stored and stored[name] != shape:
                yield Finding(f"{name} has shape {list(stored[name])} where its config asks for {list(shape)}", fetch)
    if extra:
        yield Finding(f"no layer of its config has the tensor {extra[0]}{_others(extra)}", fetch)


def _belongs(name: str, expected: dict[str, Shape]) -> bool:
    module = name.rpartition(".")[0]
    return name.rpartition("_scale")[0] in expected or f"{module}.weight" in expected or "_scale" in name


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _index(folder: Folder) -> Iterator[Finding]:
    index = folder.json("model.safetensors.index.json")
    if index is None:
        return
    rewrite = "write the index again: `nemotron-h convert FOLDER NEW --to huggingface`"
    weight_map = index["weight_map"]
    for name, file in weight_map.items():
        if name not in folder.stored:
            yield Finding(f"the index has {name} in {file}, which does not have it", rewrite)
            return
    if unnamed := [name for name in folder.stored if name not in weight_map]:
        yield Finding(f"the index does not name the tensor {unnamed[0]}{_others(unnamed)}", rewrite)
    total = (index.get("metadata") or {}).get("total_size")
    actual = sum(spec.nbytes for spec in folder.stored.values())
    if total is not None and total != actual:
        yield Finding(f"the index has total_size {total} and the tensors have {actual} bytes", rewrite, remark=True)


def _tokenizer(folder: Folder) -> Iterator[Finding]:
    settings, tokenizer = folder.json("tokenizer_config.json") or {}, folder.json("tokenizer.json")
    if tokenizer is None:
        yield Finding("there is no tokenizer.json", "save the tokenizer into the folder as well", remark=True)
        return
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = {**vocabulary, **ids} if isinstance(vocabulary, dict) else ids
    rows = folder.fields.get("vocab_size")
    if ids and isinstance(rows, int) and (largest := max(ids, key=lambda token: ids[token])) and ids[largest] >= rows:
        yield Finding(
            f"the tokenizer has {largest!r} with id {ids[largest]} and vocab_size is {rows}",
            "resize the embeddings, or take the tokenizer of this checkpoint",
        )
    if not (folder.path / "chat_template.jinja").exists() and not settings.get("chat_template"):
        yield Finding(
            "there is no chat template (base models have none)",
            "save the tokenizer with its chat_template",
            remark=True,
        )
    generation = folder.json("generation_config.json")
    stops = (folder.fields if generation is None else generation).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    where = "config.json" if generation is None else "generation_config.json"
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if stops == [None]:
        yield Finding(f"{where} has no eos_token_id: generation does not stop by itself", _stop(eos, ids), remark=True)
    elif eos in ids and ids[eos] not in stops:
        yield Finding(
            f"{where} has eos_token_id {stops}, and the tokenizer ends texts with {eos!r}, id {ids[eos]}",
            _stop(eos, ids),
            remark=True,
        )


def _stop(eos: Any, ids: dict[str, int]) -> str:
    return f"add {ids.get(eos, 'its id')} to eos_token_id in generation_config.json"


def examine(path: str | Path) -> list[Verdict]:
    """What each reader makes of a folder, the folder itself first.

    Raises:
        ValueError: it is no folder of this family.
    """
    with sound(path):
        folder = Folder(path)
        try:
            verdicts = [Verdict(ITSELF, tuple(_itself(folder))), *(reader.verdict(folder) for reader in READERS)]
        except (TypeError, AttributeError) as error:  # of values of another kind than every reader takes them for
            if folder.config_error:
                raise ValueError(f"{folder.path / 'config.json'}: {folder.config_error}") from error
            raise

    def named(finding: Finding) -> Finding:
        return replace(finding, remedy=finding.remedy.replace("FOLDER", str(path)))

    return [replace(verdict, findings=tuple(map(named, verdict.findings))) for verdict in verdicts]


def reader_of_transformers(version: str) -> str:
    """The row of the table that a version of transformers is."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (5, 3):
        return "transformers before 5.3"
    for first, row in ((20, "5.20 on"), (13, "5.13 to 5.19"), (6, "5.6 to 5.12")):
        if (major, minor) >= (5, first):
            return f"transformers {row}"
    return "transformers 5.3 to 5.5"
