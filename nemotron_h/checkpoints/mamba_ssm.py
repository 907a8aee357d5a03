"""mamba-ssm: folders of its `MambaLMHeadModel`, Mamba-2 alone or with attention layers, to and from the published one.

| mamba-ssm                               | published                                    |
|-----------------------------------------|----------------------------------------------|
| backbone.embedding.weight               | backbone.embeddings.weight                   |
| backbone.layers.N.norm.weight           | the same                                     |
| ...mixer.* of a Mamba-2 layer           | the same; both have rows z, x, B, C, dt      |
| ...mixer.in_proj of an attention layer  | q_proj, k_proj, v_proj: its rows, in order   |
| ...mixer.out_proj                       | o_proj                                       |
| backbone.norm_f.weight, lm_head.weight  | the same; a tied head is stored there alone  |

Their `config.json` has `d_model`, `n_layer`, `ssm_cfg`, `attn_layer_idx`, `attn_cfg`; what is left out there has the
defaults of `mamba_ssm.modules` (see `_SSM` and `_ATTENTION`). Weights are in `pytorch_model.bin`.

What one side has and the other has not is refused in a sentence: their gated MLP (`d_intermediate`), Mamba-1, rotary
positions, convolutions in attention, LayerNorm; our MLP and MoE layers, MTP, another epsilon than 1e-5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..config_values import check_layers
from ..configuration import NemotronHConfig
from . import published, torch_files
from .foreign import read_json
from .tensors import Entry, Plan, SafetensorsFolder, Shape, Spec, Tensors, concatenated
from .torch_files import TorchFile
from .writing import SHARD_BYTES, Conversion, Done, copy_companions, into_folder, write_text

OPTIONS = {"shard_bytes": "the largest size of a file of the Hugging Face folder, in bytes"}
WEIGHTS = "pytorch_model.bin"
EPSILON = 1e-5
"""Of every norm there; no config can say another."""

# What `ssm_cfg` and `attn_cfg` may say: key -> its value where it is left out.
_SSM: dict[str, Any] = {
    "layer": "Mamba1",
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "d_ssm": None,
    "ngroups": 1,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init_floor": 1e-4,
    "dt_limit": (0.0, math.inf),
    "bias": False,
    "conv_bias": True,
    "chunk_size": 256,
}
_ATTENTION: dict[str, Any] = {
    "num_heads": None,
    "num_heads_kv": None,
    "head_dim": None,
    "mlp_dim": 0,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "softmax_scale": None,
    "causal": False,
    "d_conv": 0,
    "rotary_emb_dim": 0,
}
# Of `ssm_cfg`, where both sides say the same thing.
_SSM_NAMES = {
    "d_state": "ssm_state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "mamba_head_dim",
    "ngroups": "n_groups",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "bias": "mamba_proj_bias",
    "conv_bias": "use_conv_bias",
    "chunk_size": "chunk_size",
}
# Of initialisation, of kernels, or of something that is refused where it is there.
_WITHOUT_EFFECT = {
    "ssm_cfg": ("conv_init", "A_init_range", "use_mem_eff_path", "process_group", "sequence_parallel"),
    "attn_cfg": ("rotary_emb_base", "rotary_emb_interleaved"),
}


def recognises(path: str | Path) -> bool:
    """Whether it is a folder whose config.json is one of mamba-ssm's."""
    try:
        fields = read_json(Path(path) / "config.json")
    except (OSError, ValueError):
        return False
    return "d_model" in fields and "n_layer" in fields and "model_type" not in fields


def to_huggingface(path: str | Path, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """The published folder of a `MambaLMHeadModel` folder; every value keeps its bits and dtype.

    The vocabulary is the padded one, whose rows the file has. No token is special, as their config names none, and
    `max_position_embeddings` is this family's default; edit config.json where that is known.

    Raises:
        ValueError: the config asks for something that this family has not, or the weights cannot be read.
    """
    path = Path(path)
    source = MambaSsmFolder(path)
    config = source.config
    entries = []
    for name, shape in published.tensors(config).items():
        sources, make = _made_of(source, name)
        dtype = next((source.specs[part].dtype for part in sources if part in source.specs), source.dtype)
        entries.append(Entry(name, Spec(shape, dtype), sources, make))
    unused = {}
    if config.tie_word_embeddings and "lm_head.weight" in source.specs:
        unused["lm_head.weight"] = "tied to the embeddings"
        source.check_tied()
    plan = Plan(source, entries, unused)
    remarks = ["config.json names no special tokens, since mamba-ssm's does not: set eos_token_id before generating."]
    if source.padded:
        remarks.append(f"vocab_size is {config.vocab_size}, with the {source.padded} rows that pad the embeddings.")
    return into_folder(plan, published.saver(config, source.dtype), shard_bytes, beside=[path], remarks=remarks)


def from_huggingface(path: str | Path) -> Conversion:
    """The `MambaLMHeadModel` folder of a model of Mamba-2 and attention layers alone.

    `pytorch_model.bin` has the bytes that `torch.save` writes, but one tensor at a time is in memory.

    Raises:
        ValueError: mamba-ssm has no layer, setting or size such as this model's.
    """
    source = published.PublishedFolder(path)
    fields = mamba_ssm_config(source.config, source.path)
    shapes = published.tensors(source.config)
    entries = []
    for name, shape in shapes.items():
        stem, _, leaf = name.rpartition(".")
        if stem.endswith((".k_proj", ".v_proj")):
            continue
        sources: dict[str, Shape] = {name: shape}
        make: Callable[..., Tensor] | None = None
        if stem.endswith(".q_proj"):
            layer = stem.removesuffix("q_proj")
            sources = {part: shapes[part] for part in (f"{layer}{p}_proj.{leaf}" for p in "qkv")}
            name, make = f"{layer}in_proj.{leaf}", concatenated
            shape = (sum(rows for rows, *_ in sources.values()), *shape[1:])
        name = name.replace(".o_proj.", ".out_proj.").replace("backbone.embeddings.", "backbone.embedding.")
        dtype = next((source.specs[part].dtype for part in sources if part in source.specs), torch.float32)
        entries.append(Entry(name, Spec(shape, dtype), sources, make))
    plan = Plan(source, entries)

    def named_again(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tied = {"lm_head.weight": "backbone.embedding.weight"} if source.config.tie_word_embeddings else {}
        return tensors | {name: tensors[other] for name, other in tied.items()}

    def write(folder: Path, done: Done) -> None:
        torch_files.write(source, entries, folder / WEIGHTS, done, named_again)
        copy_companions(source.path, folder)
        write_text(folder / "config.json", json.dumps(fields, indent=4) + "\n")

    return Conversion("mamba-ssm", plan, write)


def _rows(start: int, stop: int, packed: Tensor) -> Tensor:
    return packed[start:stop]


def _made_of(source: MambaSsmFolder, name: str) -> tuple[dict[str, Shape], Callable[..., Tensor] | None]:
    """The sources of a published tensor with their shapes, and how it is made of them."""
    config, shape = source.config, source.shapes[name]
    if name == "backbone.embeddings.weight":
        return {"backbone.embedding.weight": shape}, None
    stem, _, leaf = name.rpartition(".")
    mixer, _, projection = stem.rpartition(".")
    if projection not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return {name: shape}, None
    if leaf == "bias" and not source.attention["out_proj_bias" if projection == "o_proj" else "qkv_proj_bias"]:
        return {}, partial(torch.zeros, shape)  # theirs has one of the two, ours both or none
    if projection == "o_proj":
        return {f"{mixer}.out_proj.{leaf}": shape}, None
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[projection]
    return {f"{mixer}.in_proj.{leaf}": (queries + 2 * keys, *shape[1:])}, partial(_rows, start, start + shape[0])


# -- configs -------------------------------------------------------------------------------------------------------


def _refuse(path: Path, problem: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path} {problem}; {remedy}.")


class MambaSsmFolder:
    """A `MambaLMHeadModel` folder: its config as ours, and its tensors under their own names.

    Raises:
        ValueError: as `to_huggingface`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fields: dict[str, Any] = read_json(self.path / "config.json")
        self.ssm = self._settings("ssm_cfg", _SSM)
        self.attention = self._settings("attn_cfg", _ATTENTION)
        self.config = self._config()
        self.shapes = published.tensors(self.config)
        stored: Tensors
        if (self.path / WEIGHTS).exists():
            stored = TorchFile(self.path / WEIGHTS)
        elif any(self.path.glob("*.safetensors")):
            stored = SafetensorsFolder(self.path)
        else:
            raise ValueError(
                f"{self.path} has neither {WEIGHTS} nor *.safetensors; name a folder with a model's weights."
            )
        self._stored = stored
        self.specs: Mapping[str, Spec] = stored.specs
        self.files = [self.path / "config.json", *stored.files]

    def read(self, name: str) -> Tensor:
        return self._stored.read(name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, which stands for the model's."""
        spec = self.specs.get("backbone.embedding.weight")
        return spec.dtype if spec else torch.float32

    @property
    def padded(self) -> int:
        """Rows of the embeddings that no token has."""
        return self.config.vocab_size - self.fields["vocab_size"]

    def check_tied(self) -> None:
        """Raises `ValueError` where a head that the config ties has other values than the embeddings."""
        names = ("lm_head.weight", "backbone.embedding.weight")
        if not all(name in self.specs for name in names) or self.specs[names[0]] != self.specs[names[1]]:
            return  # what is missing or has another shape is said by the plan
        head, embedding = map(self.read, names)
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            _refuse(
                self.path,
                "has a lm_head.weight that differs from the embeddings although tie_embeddings is true",
                "set tie_embeddings to false in config.json, or take lm_head.weight out",
            )

    def _settings(self, key: str, known: Mapping[str, Any]) -> dict[str, Any]:
        given = self.fields.get(key) or {}
        unknown = [name for name in given if name not in known and name not in _WITHOUT_EFFECT[key]]
        if unknown:
            _refuse(
                self.path,
                f"has {unknown[0]}={given[unknown[0]]!r} in its {key}, which is not known here",
                f"use {', '.join(known)}",
            )
        return {name: given.get(name, default) for name, default in known.items()}

    def _config(self) -> NemotronHConfig:
        path, fields, ssm = self.path, self.fields, self.ssm
        for key in ("d_model", "n_layer", "vocab_size"):
            if not isinstance(fields.get(key), int) or fields[key] <= 0:
                _refuse(path, f"has {key} {fields.get(key)!r} in config.json", "give a positive integer")
        if inner := fields.get("d_intermediate", 0):
            _refuse(
                path,
                f"has d_intermediate {inner}, a gated MLP in every layer",
                "this family has no gated MLP, only models with d_intermediate 0 can be converted",
            )
        if not fields.get("rms_norm", True):
            _refuse(path, "has rms_norm false, which is LayerNorm", "only models with RMSNorm can be converted")
        width, layers = fields["d_model"], fields["n_layer"]
        check_layers(f"n_layer of {path}", layers)
        attention = fields.get("attn_layer_idx") or []
        if wrong := [index for index in attention if index not in range(layers)]:
            _refuse(path, f"has {wrong[0]} in attn_layer_idx but {layers} layers", "give layers from 0 on")
        kinds = ["attention" if index in attention else "mamba" for index in range(layers)]
        if "mamba" in kinds:
            self._check_mamba()
        multiple = fields.get("pad_vocab_size_multiple", 8)
        settings: dict[str, Any] = {
            "vocab_size": -(-fields["vocab_size"] // multiple) * multiple,
            "hidden_size": width,
            "hybrid_override_pattern": kinds,
            "tie_word_embeddings": bool(fields.get("tie_embeddings", True)),
            "residual_in_fp32": bool(fields.get("residual_in_fp32", True)),
            "layer_norm_epsilon": EPSILON,
            "mamba_num_heads": ssm["expand"] * width // ssm["headdim"],
            **{ours: ssm[theirs] for theirs, ours in _SSM_NAMES.items()},
            "time_step_limit": tuple(ssm["dt_limit"]),
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        }
        if "attention" in kinds:
            settings |= self._attention_settings(width)
        try:
            return NemotronHConfig(**settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _check_mamba(self) -> None:
        path, ssm, width = self.path, self.ssm, self.fields["d_model"]
        if ssm["layer"] != "Mamba2":
            _refuse(path, f"has {ssm['layer']} layers (ssm_cfg.layer)", "only Mamba2 layers can be converted")
        inner = ssm["expand"] * width
        only = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}
        for key, value in only.items():
            if bool(ssm[key]) != value:
                _refuse(path, f"has {key}={ssm[key]} in its ssm_cfg", f"this family has {key}={value} alone")
        if ssm["d_ssm"] not in (None, inner):
            _refuse(
                path,
                f"has d_ssm {ssm['d_ssm']} of {inner} channels, the others being a gated MLP",
                "this family has no gated MLP, only models without d_ssm can be converted",
            )
        if inner % ssm["headdim"]:
            _refuse(
                path,
                f"has headdim {ssm['headdim']}, which does not divide expand x d_model = {inner}",
                "correct config.json",
            )

    def _attention_settings(self, width: int) -> dict[str, Any]:
        path, given = self.path, self.attention
        heads = given["num_heads"]
        if not isinstance(heads, int) or heads <= 0:
            _refuse(path, f"has num_heads {heads!r} in its attn_cfg", "give the number of attention heads")
        for key, what in (
            ("rotary_emb_dim", "rotary positions"),
            ("d_conv", "a convolution of q, k and v"),
            ("mlp_dim", "a gated MLP beside the attention"),
        ):
            if given[key]:
                _refuse(
                    path,
                    f"has {key}={given[key]} in its attn_cfg, {what}",
                    f"this family has none, only models with {key} 0 can be converted",
                )
        if not given["causal"]:
            _refuse(path, "has attention that is not causal (attn_cfg.causal)", "this family is causal")
        size = given["head_dim"] or width // heads
        scale = given["softmax_scale"]
        if scale is not None and not math.isclose(scale, size**-0.5):
            _refuse(
                path, f"has softmax_scale {scale} in its attn_cfg", f"this family has head_dim ** -0.5 = {size**-0.5}"
            )
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": given["num_heads_kv"] or heads,
            "head_dim": size,
            "attention_bias": bool(given["qkv_proj_bias"] or given["out_proj_bias"]),
        }


def mamba_ssm_config(config: NemotronHConfig, path: Path) -> dict[str, Any]:
    """The `config.json` of mamba-ssm for a config of ours. Raises `ValueError` where there is none."""
    kinds = config.layers_block_type
    if other := [(index, kind) for index, kind in enumerate(kinds) if kind not in ("mamba", "attention")]:
        index, kind = other[0]
        _refuse(path, f"has a layer of kind {kind} (layer {index})", "mamba-ssm has only Mamba-2 and attention layers")
    if config.has_mtp:
        _refuse(
            path,
            f"has num_nextn_predict_layers {config.num_nextn_predict_layers}",
            "mamba-ssm has no multi-token prediction, take it off the model first",
        )
    if config.layer_norm_epsilon != EPSILON:
        _refuse(path, f"has layer_norm_epsilon {config.layer_norm_epsilon}", f"mamba-ssm has {EPSILON} alone")
    ssm: dict[str, Any] = {"layer": "Mamba2"}
    if "mamba" in kinds:
        if config.d_inner % config.hidden_size:
            _refuse(
                path,
                f"has {config.d_inner} Mamba channels at hidden_size {config.hidden_size}",
                "mamba-ssm has a whole multiple of it (expand)",
            )
        ssm |= {theirs: getattr(config, ours) for theirs, ours in _SSM_NAMES.items()}
        ssm["expand"] = config.d_inner // config.hidden_size  # the config's own need not be so
        if tuple(config.time_step_limit) != (0.0, math.inf):
            ssm["dt_limit"] = list(config.time_step_limit)
    attention: dict[str, Any] = {}
    if "attention" in kinds:
        attention = {
            "causal": True,
            "d_conv": 0,
            "head_dim": config.head_dim,
            "num_heads": config.num_attention_heads,
            "num_heads_kv": config.num_key_value_heads,
            "out_proj_bias": config.attention_bias,
            "qkv_proj_bias": config.attention_bias,
            "rotary_emb_dim": 0,
        }
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": len(kinds),
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [index for index, kind in enumerate(kinds) if kind == "attention"],
        "attn_cfg": attention,
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
