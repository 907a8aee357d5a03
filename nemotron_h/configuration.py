"""`NemotronHConfig`: every published dialect of a Nemotron-H `config.json` in, one form inside, readable by all out.

The dialects are those of NVIDIA's remote code (patterns, `attention_head_dim`, `rms_norm_eps`, `torch_dtype`), of the
later releases (`layers_block_type`, `head_dim`, `norm_eps`, `dtype`), of `transformers`' own class (`linear_attention`,
`full_attention`, `{"__float__": "Infinity"}`) and of Megatron (`|` between pipeline stages, `/` before MTP depths).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .config_values import (
    LARGEST_SIZE,
    LAYER_KINDS,
    MOST_EXPERTS,
    MOST_LAYERS,
    check_for_library,
    check_kinds,
    check_names,
    check_optional,
    check_positive,
    check_sizes,
    is_bool,
    is_int,
    layers_to_pattern,
    parse_layers,
    read_time_step_limit,
    shorten,
)
from .config_values import fail as _fail

# The pattern of Nemotron-H-8B, whose dimensions are the defaults below.
_DEFAULT_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_DEFAULT_MTP_PATTERN = "*E"

# Arguments that were published under several names: ours -> (default, the other names). In the class they default to
# None, so that "not given" can be told from "given with the default's value", and a null in a file means the default.
_ALIASED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "head_dim": (128, ("attention_head_dim",)),
    "layer_norm_epsilon": (1e-5, ("rms_norm_eps", "norm_eps")),
    "n_groups": (8, ("mamba_num_groups", "mamba_n_groups")),
    "ssm_state_size": (128, ("mamba_state_dim", "mamba_d_state")),
    "conv_kernel": (4, ("mamba_d_conv",)),
    "use_conv_bias": (True, ("mamba_conv_bias",)),
    "chunk_size": (128, ("mamba_chunk_size",)),
    "expand": (2, ("mamba_expand",)),
    "time_step_min": (0.001, ("mamba_dt_min",)),
    "time_step_max": (0.1, ("mamba_dt_max",)),
    "time_step_floor": (1e-4, ("mamba_dt_init_floor",)),
    "time_step_limit": ((0.0, math.inf), ("mamba_dt_limit",)),
    "n_routed_experts": (8, ("num_local_experts",)),
}
_UNSET: Any = None

# Written only for a model that has such layers: llama.cpp takes any file with `num_experts_per_tok` for an MoE model.
_MOE_KEYS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_overlap",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "output_router_logits",
)
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern")

_SSM_DTYPES = ("float32", "float64", "bfloat16", "float16")
_FLOAT32_MAX = 3.4028234663852886e38


def _layers_property(slot: str, show: Callable[[list[str]], Any], doc: str) -> Any:
    """A view of the layers kept in `slot`. Reading gives a copy; any dialect may be assigned."""

    def fget(self: Any) -> Any:
        return show(self.__dict__[slot])

    def fset(self: Any, layers: str | Sequence[str]) -> None:
        self.__dict__[slot] = parse_layers(layers, slot)

    return property(fget, fset, doc=doc)


# Called once, when the first config exists: what the package puts off until then (importing its model classes).
_before_first_use: list[Callable[[], None]] = []


class NemotronHConfig(PreTrainedConfig):
    """Configuration of a Nemotron-H model (Nemotron-H, Nemotron Nano 2, Nemotron 3). The defaults are Nemotron-H-8B's.

    Which layers the model has is said by `hybrid_override_pattern` (`M` Mamba-2, `*` attention, `-` MLP, `E` MoE) or by
    the list `layers_block_type`; either key takes either form, and `num_hidden_layers` follows from it. Sizes count
    elements or heads, never bytes. Raises `ValueError`, one sentence with the offending value and the remedy, at
    construction and again at saving; values of parts that the model does not have are not looked at.

    Worth knowing:

    - `intermediate_size` may be a list, one entry per MLP layer in order; see `mlp_intermediate_size`.
    - `head_dim` and `mamba_num_heads * mamba_head_dim` (`d_inner`) stand for themselves: neither follows from
      `hidden_size`, and `expand` is kept for the file but never used.
    - `time_step_limit` clamps the time step, `(0, inf)` unless given; `time_step_min/max/floor` are for initialisation.
    - `use_bias` and `mamba_proj_bias` are two published names of one thing, a bias in Mamba's `in_proj` and `out_proj`
      (transformers reads the first, mlx-lm the second): if either is set, both are.
    - Shared experts are one MLP of `moe_shared_expert_intermediate_size`, whatever `n_shared_experts` says.
    - MTP keys count only where `num_nextn_predict_layers` is positive; see `has_mtp`.
    - `auto_map` is dropped: it names Python files that are not written beside what this class saves.
    """

    model_type = "nemotron_h"
    attribute_map = {
        **{alias: name for name, (_, aliases) in _ALIASED.items() for alias in aliases},
        "torch_dtype": "dtype",
    }

    vocab_size: int = 131072
    hidden_size: int = 4096
    tie_word_embeddings: bool = False
    use_cache: bool = True
    num_logits_to_keep: int | None = 1
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    layer_norm_epsilon: float = _UNSET
    residual_in_fp32: bool = False
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    hidden_dropout: float = 0.0
    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = _UNSET
    attention_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    # MLP
    intermediate_size: int | list[int] = 21504
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    # Mamba-2
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = _UNSET
    n_groups: int = _UNSET
    conv_kernel: int = _UNSET
    use_conv_bias: bool = _UNSET
    use_bias: bool = False
    mamba_proj_bias: bool = False
    mamba_hidden_act: str = "silu"
    mamba_ssm_cache_dtype: str = "float32"
    chunk_size: int = _UNSET
    expand: int = _UNSET
    time_step_min: float = _UNSET
    time_step_max: float = _UNSET
    time_step_floor: float = _UNSET
    time_step_limit: tuple[float, float] = _UNSET
    use_mamba_kernels: bool = True
    # MoE
    n_routed_experts: int = _UNSET
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    moe_shared_expert_overlap: bool = False
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    output_router_logits: bool = False
    # MTP
    num_nextn_predict_layers: int = _UNSET

    _writes_list = False  # set where it was read from a list of layers

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_aliases(kwargs)
        self._read_layers(kwargs)
        kwargs.pop("auto_map", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in ("use_bias", "mamba_proj_bias"):
            check_optional(name, getattr(self, name), "true or false", is_bool)
        self.use_bias = self.mamba_proj_bias = bool(self.use_bias or self.mamba_proj_bias)
        self._read_dtype(kwargs.pop("torch_dtype", None))
        if kwargs.get("num_labels", 0) is None:
            del kwargs["num_labels"]
        check_for_library({**vars(self), **kwargs})
        super().__post_init__(**kwargs)
        self.validate()
        while _before_first_use:
            _before_first_use.pop()()

    def _read_dtype(self, torch_dtype: Any) -> None:
        # Both may be there and differ: from_pretrained(..., dtype=...) replaces one of them in the file's dictionary.
        dtype: Any = getattr(self, "dtype", None) or torch_dtype
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(found, torch.dtype):
            _fail(f"dtype is {shorten(dtype)}", "name a torch dtype such as 'bfloat16' or 'float32'")
        self.dtype = found

    def _read_aliases(self, kwargs: dict[str, Any]) -> None:
        for name, (default, aliases) in _ALIASED.items():
            given = {key: kwargs.pop(key, None) for key in aliases}
            given = {key: value for key, value in {name: getattr(self, name), **given}.items() if value is not None}
            if name == "time_step_limit":
                given = {key: read_time_step_limit(value) for key, value in given.items()}
            (first, value), *others = given.items() or [(name, default)]
            for other, other_value in others:
                if other_value != value:
                    _fail(
                        f"{first} is {shorten(value)} but {other} is {shorten(other_value)}, and they are two names of "
                        "one setting",
                        "give one of them, or both the same value",
                    )
            if isinstance(default, float) and is_int(value) and abs(value) <= LARGEST_SIZE:
                value = float(value)  # transformers' own class is strict about it
            setattr(self, name, value)

    def _read_layers(self, kwargs: dict[str, Any]) -> None:
        mtp_given = {key: kwargs.pop(key, None) for key in ("mtp_hybrid_override_pattern", "mtp_layers_block_type")}
        mtp = {key: parse_layers(value, key) for key, value in mtp_given.items() if value}
        main: dict[str, list[str]] = {}
        for key in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
            if (value := kwargs.pop(key, None)) is None:
                continue
            depths: list[str] = []
            if isinstance(value, str):
                value, *depths = value.split("/")
            main[key] = parse_layers(value, key)
            # A list in transformers' own names is its class's spelling, whatever the release had.
            if key == "layers_block_type" and not {"linear_attention", "full_attention"} & set(value):
                self._writes_list = True
            if depths:
                mtp[f"the part of {key} after '/'"] = self._read_depths(key, depths)
        self.layers_block_type = self._agreed(main) or parse_layers(_DEFAULT_PATTERN)
        self.mtp_layers_block_type = self._agreed(mtp) or parse_layers(_DEFAULT_MTP_PATTERN)
        if self.num_nextn_predict_layers is None:
            self.num_nextn_predict_layers = 0
        if (number := kwargs.pop("num_hidden_layers", None)) is not None:
            self.num_hidden_layers = number

    def _read_depths(self, key: str, depths: list[str]) -> list[str]:
        """The MTP layers of a pattern such as "M-M*-/*E/*E", which are the same for every depth."""
        if len(depths) > MOST_LAYERS:
            _fail(f"{key} has {len(depths)} MTP depths", f"give at most {MOST_LAYERS}")
        if "" in depths:
            _fail(f"{key} has a '/' with no MTP layers after it", "leave the '/' out, or write the layers of the depth")
        if len(set(depths)) > 1:
            _fail(f"{key} has different MTP depths {shorten(depths)}", "write the same pattern after each '/'")
        given = self.num_nextn_predict_layers
        if given is not None and given != len(depths):
            _fail(
                f"num_nextn_predict_layers is {shorten(given)} but {key} has {len(depths)} MTP depths",
                "give one of them, or the same number of depths",
            )
        self.num_nextn_predict_layers = len(depths)
        return parse_layers(depths[0], key)

    @staticmethod
    def _agreed(given: dict[str, list[str]]) -> list[str] | None:
        """The one list that was given, under however many names."""
        if not given:
            return None
        (first, layers), *others = given.items()
        for other, other_layers in others:
            if other_layers == layers:
                continue
            says, but = layers_to_pattern(layers), layers_to_pattern(other_layers)
            position = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(says, but, strict=False)))
            _fail(
                f"{first} and {other} differ from position {position} (from 0) on: {says[position:]!r} and "
                f"{but[position:]!r}",
                "give one of them, or both the same layers",
            )
        return layers

    # -- layers: one list is kept, in published names; everything else follows from it -------------------------------

    layers_block_type = _layers_property(
        "layers_block_type", list, """The layers in published names: "mamba", "attention", "mlp", "moe"."""
    )
    hybrid_override_pattern = _layers_property(
        "layers_block_type", layers_to_pattern, "The layers as letters: `M` Mamba-2, `*` attention, `-` MLP, `E` MoE."
    )
    layer_types = _layers_property(
        "layers_block_type",
        lambda layers: [LAYER_KINDS[layer][1] for layer in layers],
        """The layers in the names that transformers' cache and mask code reads, such as "linear_attention".""",
    )
    mtp_layers_block_type = _layers_property(
        "mtp_layers_block_type", list, "The layers of one MTP depth in published names; used where `has_mtp`."
    )
    mtp_hybrid_override_pattern = _layers_property(
        "mtp_layers_block_type",
        layers_to_pattern,
        "The layers of one MTP depth as letters; used where `has_mtp`.",
    )

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of every kind, without MTP. It follows from the pattern; assigning another number fails."""
        return len(self.layers_block_type)

    @num_hidden_layers.setter
    def num_hidden_layers(self, number: int) -> None:
        if number != self.num_hidden_layers:
            _fail(
                f"num_hidden_layers is {shorten(number)} but the pattern {shorten(self.hybrid_override_pattern)} has "
                f"{self.num_hidden_layers}",
                "leave num_hidden_layers out, or give a hybrid_override_pattern of that length",
            )

    # -- what follows from the dimensions ----------------------------------------------------------------------------

    @property
    def has_mtp(self) -> bool:
        """Whether the model predicts further tokens with MTP layers."""
        return self.num_nextn_predict_layers > 0

    @property
    def has_moe(self) -> bool:
        """Whether any layer, MTP included, is a mixture of experts."""
        return "moe" in self._all_layers

    @property
    def _all_layers(self) -> list[str]:
        return self.layers_block_type + (self.mtp_layers_block_type if self.has_mtp else [])

    @property
    def d_inner(self) -> int:
        """Channels of Mamba's x and z: `mamba_num_heads * mamba_head_dim`."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of Mamba's convolution, in the order x, B, C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_size(self) -> int:
        """Rows of Mamba's `in_proj`, in the order z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.mamba_num_heads

    def mlp_intermediate_size(self, layer_idx: int) -> int:
        """Width of the MLP at `layer_idx`, an index over all layers, also where `intermediate_size` is a list."""
        if isinstance(self.intermediate_size, int):
            return self.intermediate_size
        layers = self.layers_block_type
        if not 0 <= layer_idx < len(layers) or layers[layer_idx] != "mlp":
            _fail(f"layer {layer_idx} of {self.hybrid_override_pattern!r} is no MLP", "ask for a layer marked '-'")
        return self.intermediate_size[layers[:layer_idx].count("mlp")]

    # -- checks ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the settings of the parts that this model has. Raises `ValueError`: cause, value, remedy in a sentence.

        It takes the place of transformers' generic checks, which do not know an "mlp" layer, and which call this again
        before a save.
        """
        self.time_step_limit = read_time_step_limit(self.time_step_limit)
        self.mamba_ssm_cache_dtype = str(self.mamba_ssm_cache_dtype).removeprefix("torch.")
        depths = self.num_nextn_predict_layers
        if not isinstance(depths, int) or isinstance(depths, bool) or depths < 0:
            _fail(f"num_nextn_predict_layers is {shorten(depths)}", "give the number of MTP depths, 0 for none")
        layers = len(self.layers_block_type) + depths * len(self.mtp_layers_block_type)
        if layers > MOST_LAYERS:
            _fail(f"the model has {layers} layers, of {depths} MTP depths", f"give at most {MOST_LAYERS}")
        check_kinds(self)
        kinds = ("", *sorted(set(self._all_layers)))
        check_sizes(self, kinds)
        if "mamba" in kinds and self.time_step_min > self.time_step_max:
            _fail(
                f"time_step_min is {self.time_step_min!r} but time_step_max is {self.time_step_max!r}",
                "give time_step_min <= time_step_max",
            )
        if "mamba" in kinds and self.mamba_ssm_cache_dtype not in _SSM_DTYPES:
            _fail(
                f"mamba_ssm_cache_dtype is {shorten(self.mamba_ssm_cache_dtype)}",
                f"use one of {', '.join(_SSM_DTYPES)}",
            )
        if "mamba" in kinds and self.mamba_hidden_act not in ("silu", "swish"):
            _fail(f"mamba_hidden_act is {shorten(self.mamba_hidden_act)}", "use 'silu', as every published model does")
        act = self.mlp_hidden_act
        if {"mlp", "moe"} & set(kinds) and not (isinstance(act, str) and act in ACT2FN):
            _fail(f"mlp_hidden_act is {shorten(act)}", "use a name of transformers.activations.ACT2FN")
        if "mlp" in kinds:
            self._check_mlp()
        if "moe" in kinds:
            self._check_moe()

    def _check_mlp(self) -> None:
        if isinstance(self.intermediate_size, int):
            return check_positive("intermediate_size", self.intermediate_size)
        sizes, mlps = self.intermediate_size, self.layers_block_type.count("mlp")
        if not isinstance(sizes, (list, tuple)) or len(sizes) != mlps:
            _fail(
                f"intermediate_size is {shorten(sizes)} but the model has {mlps} MLP layers",
                "give one size for all of them, or a list with one size per MLP layer",
            )
        for index, size in enumerate(sizes):
            check_positive(f"intermediate_size[{index}]", size)
        if self.has_mtp and "mlp" in self.mtp_layers_block_type:
            _fail(
                f"intermediate_size is the list {shorten(sizes)} but the MTP pattern "
                f"{shorten(self.mtp_hybrid_override_pattern)} has an MLP layer that no entry belongs to",
                "give one size for all MLP layers",
            )

    def _check_moe(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if self.moe_latent_size is not None:
            check_positive("moe_latent_size", self.moe_latent_size)
        layers = self.layers_block_type.count("moe")
        layers += self.num_nextn_predict_layers * self.mtp_layers_block_type.count("moe")
        if layers * experts > MOST_EXPERTS:
            _fail(
                f"n_routed_experts is {experts} in each of {layers} layers, more than in any model",
                f"give at most {MOST_EXPERTS} in all",
            )
        if self.topk_group > groups:
            _fail(f"topk_group is {self.topk_group} but n_group is {groups}", "choose at most n_group groups")
        if self.num_experts_per_tok > (available := experts // groups * self.topk_group):
            _fail(
                f"num_experts_per_tok is {self.num_experts_per_tok} but only {available} experts can be chosen "
                f"(n_routed_experts {experts}, n_group {groups}, topk_group {self.topk_group})",
                f"choose at most {available} experts per token",
            )

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; settings changed by keyword are checked as well."""
        check_names(cls, config_dict)
        check_for_library({**config_dict, **kwargs})
        # After a new pattern, if there is one: it is compared with it.
        ordered = dict(sorted(kwargs.items(), key=lambda item: item[0] == "num_hidden_layers"))
        result = super().from_dict(config_dict, **ordered)
        (result[0] if kwargs.get("return_unused_kwargs") else result).validate()
        return result

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary that old and new readers accept; this is what `save_pretrained` writes.

        That is: the pattern, and the list beside it only where the config was read from one, as those of Ultra and
        Lightning are; every name that some reader requires (llama.cpp, mlx-lm, vLLM, TensorRT-LLM, transformers) also
        at its default value; no MoE or MTP keys in a model without them, and no infinity in any spelling. The list is
        a property without a setter in readers that are older than it (NVIDIA's remote code up to Nano 2, vLLM's config
        class of that time), which refuse a file that has it, and transformers' own class before 5.20 leaves its old
        layer names unread beside a pattern.
        """
        output = super().to_dict()
        output.pop("_writes_list", None)
        if not self._writes_list:
            output.pop("layers_block_type")
        for key in ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "num_hidden_layers"):
            output[key] = getattr(self, key)
        # Not `layer_types`: Trainer reads the file with the base class when it resumes, which refuses "mlp" there.
        output.pop("layer_types", None)
        output["attention_head_dim"] = self.head_dim
        output["rms_norm_eps"] = output["norm_eps"] = self.layer_norm_epsilon
        output["use_bias"] = output["mamba_proj_bias"] = bool(self.use_bias or self.mamba_proj_bias)
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        low, high = read_time_step_limit(self.time_step_limit)
        # Left out where it is the default, as in every published file. A finite stand-in for infinity, as NVIDIA's own
        # conversion script writes it, because neither a bare Infinity nor {"__float__": ...} is read everywhere.
        output["time_step_limit"] = [low, min(high, _FLOAT32_MAX)]
        absent: list[str] = [] if (low, high) != (0.0, math.inf) else ["time_step_limit"]
        if not self.has_moe:
            absent += _MOE_KEYS
        elif self.moe_latent_size is None:
            absent += ["moe_latent_size"]
        if not self.has_mtp:
            absent += _MTP_KEYS
        for key in absent:
            output.pop(key, None)
        return output
