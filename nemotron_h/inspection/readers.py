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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.foreign import sound
from .folder import CONVERT, Finding, Folder, itself, others, stacked

_LETTERS = frozenset("M*-E")
_OLD = frozenset({"mamba", "attention", "mlp", "moe"})
_NEW = frozenset({"linear_attention", "full_attention", "mlp", "moe"})


@dataclass(frozen=True)
class Verdict:
    """`older`: a version that is superseded; that it does not read a folder counts for less."""

    reader: str
    findings: tuple[Finding, ...]
    older: bool = False

    @property
    def reads(self) -> bool:
        return all(finding.remark for finding in self.findings)


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
    quantized: frozenset[str] = frozenset()
    also: Check = _nothing
    remedy: str = CONVERT  # for layers that it does not know
    older: bool = False

    def verdict(self, folder: Folder) -> Verdict:
        checks = (self._layers, self._keys, self._tensors, self._quantization, self.also)
        return Verdict(self.name, tuple(finding for check in checks for finding in check(folder)), self.older)

    def _layers(self, folder: Folder) -> Iterator[Finding]:
        pattern, listed = folder.pattern, folder.listed
        if pattern is not None and (self.pattern_first or not self.names or listed is None):
            if unknown := sorted(set(pattern) - self.letters):
                yield Finding(f"hybrid_override_pattern has {unknown[0]!r}, which it does not know", self.remedy)
        elif listed is not None and self.names:
            if unknown := sorted(set(listed) - self.names):
                yield Finding(f"layers_block_type has {', '.join(map(repr, unknown))}, which it does not know", CONVERT)
        else:
            wanted = "hybrid_override_pattern" + (" or layers_block_type" if self.names else "")
            yield Finding(f"config.json has no {wanted}", CONVERT)

    def _keys(self, folder: Folder) -> Iterator[Finding]:
        for key in self.keys + (self.moe_keys if "moe" in folder.kinds else ()):
            if all(folder.fields.get(name) is None for name in key.split("|")):
                yield Finding(f"config.json has no {key.replace('|', ' or ')}", CONVERT)
        limit = folder.fields.get("time_step_limit")
        if self.numbers_as_limit and limit is not None and not _two_numbers(limit):
            yield Finding(f"time_step_limit is {json.dumps(limit)}, not two numbers", CONVERT)

    def _tensors(self, folder: Folder) -> Iterator[Finding]:
        odd = [
            name
            for name, spec in folder.stored.items()
            if (name == "backbone.embedding.weight" and not self.singular_embedding)
            or (
                not self.in_memory_names
                and (stacked(name, spec) or (name.startswith("model.") and not self.model_prefix))
            )
        ]
        if odd:
            yield Finding(f"it does not look for the tensor {odd[0]}{others(odd)}", CONVERT)

    def _quantization(self, folder: Folder) -> Iterator[Finding]:
        if (method := folder.quantized) and method not in self.quantized:
            remedy = "dequantize it: load it with this package, model.dequantize(), save it"
            if method == "modelopt":
                remedy = "`nemotron-h convert FOLDER NEW --to huggingface` dequantizes it"
            yield Finding(f"it does not read weights quantized by {method!r}", remedy)


def _two_numbers(limit: Any) -> bool:
    return isinstance(limit, list) and len(limit) == 2 and all(type(bound) in (int, float) for bound in limit)


# -- what does not fit the table -------------------------------------------------------------------------------------


def _remote(folder: Folder) -> Iterator[Finding]:
    number = folder.fields.get("num_hidden_layers")
    if folder.pattern is not None and number is not None and number != len(folder.pattern):
        yield Finding(
            f"num_hidden_layers is {number} and hybrid_override_pattern has {len(folder.pattern)} layers", CONVERT
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
            yield Finding(f"config.json has no {key}, for which it takes {default} instead of {value}", CONVERT)


def _tensorrt(folder: Folder) -> Iterator[Finding]:
    if folder.pattern is None and "mlp" in folder.kinds:
        yield Finding("config.json has no hybrid_override_pattern, from which alone it reads MLP layers", CONVERT)
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
        yield Finding("config.json has no hybrid_override_pattern, from which alone it reads MLP layers", CONVERT)
    if folder.kinds and not moe and "num_experts_per_tok" in fields:
        yield Finding(
            "config.json has num_experts_per_tok, for which it takes a model for MoE; this one is dense", CONVERT
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
    Reader("vLLM", quantized=_MODELOPT, also=_vllm),
    Reader("SGLang", names=_OLD, quantized=_MODELOPT, also=_sglang),
    Reader("TensorRT-LLM", names=_OLD, moe_keys=_EXPERT_KEYS, quantized=_MODELOPT, also=_tensorrt),
    Reader(
        "llama.cpp's converter",
        names=frozenset({"mamba", "attention", "moe", "mlp"}),  # "mlp" is passed over, see _llama_cpp
        pattern_first=True,
        keys=("num_hidden_layers", "head_dim|attention_head_dim"),
        moe_keys=_EXPERT_KEYS,
        model_prefix=False,
        singular_embedding=True,
        quantized=_MODELOPT,
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
        quantized=frozenset({"modelopt", "nemotron_h_weight_only", "torchao", "bitsandbytes"}),
        also=_ours,
    ),
)


ITSELF = "the folder itself"


def examine(path: str | Path) -> list[Verdict]:
    """What each reader makes of a folder, the folder itself first.

    Raises:
        ValueError: it is no folder of this family.
    """
    with sound(path):
        folder = Folder(path)
        try:
            verdicts = [Verdict(ITSELF, tuple(itself(folder))), *(reader.verdict(folder) for reader in READERS)]
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
