"""Megatron-Core's names and layouts of this family, shared by its two file formats, and its arguments.

    Megatron                                                 published                          ranks have
    embedding.word_embeddings.weight, output_layer.weight    embeddings, lm_head                rows, with padding
    decoder.final_norm.weight (or final_layernorm)           norm_f                             all of it
    decoder.layers.N.
      mixer.in_proj.layer_norm_weight                        layers.N.norm                      all of it
      mixer.in_proj.weight                                   in_proj: z, x, B, C, dt            rows of each part
      mixer.conv1d.weight, bias (or conv1d_weight, _bias)    conv1d: x, B, C                    rows of each part
      mixer.A_log, D, dt_bias, norm.weight                   the same                           rows
      mixer.out_proj.weight                                  out_proj                           columns
      self_attention.linear_qkv.layer_norm_weight            layers.N.norm                      all of it
      self_attention.linear_qkv.weight                       per KV head: its q heads, k, v     rows
      self_attention.linear_proj.weight                      o_proj                             columns
      mlp.linear_fc1.layer_norm_weight                       layers.N.norm                      all of it
      mlp.linear_fc1.weight, mlp.linear_fc2.weight           up_proj, down_proj                 rows, columns
      pre_mlp_layernorm.weight (MoE)                         layers.N.norm                      all of it
      mlp.router.weight, mlp.router.expert_bias              gate.*                             all of it
      mlp.experts.*                                          experts.i.up_proj, down_proj       rows, columns
      mlp.shared_experts.linear_fc1, linear_fc2              shared_experts.*                   rows, columns
      mlp.fc1_latent_proj, mlp.fc2_latent_proj               the same                           all of it
    mtp.layers.o.enorm, hnorm, final_layernorm               mtp.layers.(o L), (o L + L - 1)    all of it
    mtp.layers.o.eh_proj.weight                              mtp.layers.(o L).eh_proj           rows
    mtp.layers.o.mtp_model_layer.layers.i.*                  mtp.layers.(o L + i).*             as above

o is an MTP depth and L the number of its layers. A norm that is not fused with what follows it is
`layers.N.norm.weight`, `input_layernorm.weight` or `pre_mlp_layernorm.weight`. The experts have four spellings, see
`EXPERT_NAMES`. Rows and columns are cut into equal pieces, one per rank of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config_values import check_layers
from ..configuration import NemotronHConfig
from .foreign import below, read_json
from .tensors import Plan, Shape, Spec, Tensors

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = 1
"""What a written folder says: Megatron takes 0 for no checkpoint at all."""

TENSOR_PARALLEL = (1, 2, 4, 8)
VOCAB_DIVISIBLE_BY = 128
"""Megatron's default of `make_vocab_size_divisible_by`."""

EXPERT_NAMES = {
    "stacked": "mlp.experts.experts.{linear}.weight[{expert}]",  # one tensor with the experts as its first dimension
    "numbered": "mlp.experts.experts.{expert}.{linear}.weight",
    "grouped": "mlp.experts.{linear}.weight{expert}",
    "sequential": "mlp.experts.local_experts.{expert}.{linear}.weight",
}
"""How the weights of an expert are called: the first two in distributed checkpoints, the others in a rank's module."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a Megatron model as it is over all ranks together.

    `axis` is the dimension that ranks share out (None: each has all of it), `parts` the parts of that dimension that
    are shared out one by one with their sizes, `names` the ways to spell it, the usual one first. `of` are the
    published tensors that it is made of.
    """

    names: tuple[str, ...]
    shape: Shape
    of: tuple[str, ...]
    axis: int | None = None
    parts: Mapping[str, int] | None = None
    expert: bool = False
    vocab: bool = False


def weights(config: NemotronHConfig, padded_vocab: int | None = None) -> list[Weight]:
    """Every tensor of a Megatron model with this config, its embeddings padded to `padded_vocab` rows."""
    h, vocab = config.hidden_size, padded_vocab or config.vocab_size
    table = [
        Weight(("embedding.word_embeddings.weight",), (vocab, h), ("backbone.embeddings.weight",), axis=0, vocab=True)
    ]
    for index, kind in enumerate(config.layers_block_type):
        inner = config.mlp_intermediate_size(index) if kind == "mlp" else 0
        table += _layer(config, f"decoder.layers.{index}.", f"backbone.layers.{index}.", kind, inner)
    final = ("decoder.final_norm.weight", "decoder.final_layernorm.weight")
    table.append(Weight(final, (h,), ("backbone.norm_f.weight",)))
    if not config.tie_word_embeddings:
        table.append(Weight(("output_layer.weight",), (vocab, h), ("lm_head.weight",), axis=0, vocab=True))
    if config.has_mtp:
        kinds = config.mtp_layers_block_type
        for depth in range(config.num_nextn_predict_layers):
            outer, first = f"mtp.layers.{depth}.", depth * len(kinds)
            for name in ("enorm", "hnorm"):
                table.append(Weight((f"{outer}{name}.weight",), (h,), (f"mtp.layers.{first}.{name}.weight",)))
            table.append(
                Weight((f"{outer}eh_proj.weight",), (h, 2 * h), (f"mtp.layers.{first}.eh_proj.weight",), axis=0)
            )
            for index, kind in enumerate(kinds):
                inner = config.mlp_intermediate_size(index) if kind == "mlp" else 0
                mine, theirs = f"{outer}mtp_model_layer.layers.{index}.", f"mtp.layers.{first + index}."
                table += _layer(config, mine, theirs, kind, inner)
            last = f"mtp.layers.{first + len(kinds) - 1}.final_layernorm.weight"
            table.append(Weight((f"{outer}final_layernorm.weight",), (h,), (last,)))
    return table


def _layer(config: NemotronHConfig, ours: str, published: str, kind: str, inner: int) -> Iterator[Weight]:
    h, mixer = config.hidden_size, published + "mixer."
    norms = tuple(f"{ours}{name}.weight" for name in ("pre_mlp_layernorm", "input_layernorm", "norm"))

    def norm(*fused: str) -> Weight:
        return Weight(
            (*(ours + name + ".layer_norm_weight" for name in fused), *norms), (h,), (published + "norm.weight",)
        )

    def one(name: str, of: str, shape: Shape, axis: int | None = None) -> Weight:
        return Weight((ours + name,), shape, (mixer + of,), axis)

    def mlp(name: str, of: str, size: int) -> Iterator[Weight]:
        yield one(f"{name}linear_fc1.weight", f"{of}up_proj.weight", (size, h), 0)
        yield one(f"{name}linear_fc2.weight", f"{of}down_proj.weight", (h, size), 1)

    if kind == "mamba":
        d, states, heads = config.d_inner, config.n_groups * config.ssm_state_size, config.mamba_num_heads
        parts = {"z": d, "x": d, "B": states, "C": states, "dt": heads}
        convolved = {"x": d, "B": states, "C": states}
        yield norm("mixer.in_proj")
        yield Weight((ours + "mixer.in_proj.weight",), (config.in_proj_size, h), (mixer + "in_proj.weight",), 0, parts)
        for name, shape in {"weight": (config.conv_dim, 1, config.conv_kernel), "bias": (config.conv_dim,)}.items():
            spelled = (f"{ours}mixer.conv1d.{name}", f"{ours}mixer.conv1d_{name}")
            yield Weight(spelled, shape, (f"{mixer}conv1d.{name}",), 0, convolved)
        for name in ("dt_bias", "A_log", "D"):
            yield one(f"mixer.{name}", name, (heads,), 0)
        yield one("mixer.norm.weight", "norm.weight", (d,), 0)
        yield one("mixer.out_proj.weight", "out_proj.weight", (h, d), 1)
    elif kind == "attention":
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        of = tuple(f"{mixer}{name}_proj.weight" for name in "qkv")
        yield norm("self_attention.linear_qkv")
        yield Weight((ours + "self_attention.linear_qkv.weight",), (queries + 2 * keys, h), of, 0)
        yield one("self_attention.linear_proj.weight", "o_proj.weight", (h, queries), 1)
    elif kind == "mlp":
        yield norm("mlp.linear_fc1")
        yield from mlp("mlp.", "", inner)
    else:
        experts, width = config.n_routed_experts, config.moe_latent_size or h
        yield norm()
        yield one("mlp.router.weight", "gate.weight", (experts, h))
        yield one("mlp.router.expert_bias", "gate.e_score_correction_bias", (experts,))
        linears = {
            "linear_fc1": ("up_proj", (config.moe_intermediate_size, width), 0),
            "linear_fc2": ("down_proj", (width, config.moe_intermediate_size), 1),
        }
        for expert in range(experts):
            for linear, (projection, shape, axis) in linears.items():
                names = tuple(ours + name.format(linear=linear, expert=expert) for name in EXPERT_NAMES.values())
                of = (f"{mixer}experts.{expert}.{projection}.weight",)
                yield Weight(names, shape, of, axis, expert=True)
        yield from mlp("mlp.shared_experts.", "shared_experts.", config.moe_shared_expert_intermediate_size)
        if config.moe_latent_size:
            yield one("mlp.fc1_latent_proj.weight", "fc1_latent_proj.weight", (width, h))
            yield one("mlp.fc2_latent_proj.weight", "fc2_latent_proj.weight", (h, width))


class Spelling:
    """Which of a weight's names a checkpoint uses; for one that is missing, the name that its siblings have."""

    def __init__(self, names: Iterable[str], table: Iterable[Weight]) -> None:
        self._there = set(names)
        experts = [weight for weight in table if weight.expert]
        found = (i for i in range(len(EXPERT_NAMES)) if any(weight.names[i] in self._there for weight in experts))
        self._experts = next(found, 0)

    def __call__(self, weight: Weight, ending: str = "") -> str:
        usual = weight.names[self._experts if weight.expert else 0] + ending
        if weight.expert:
            return usual
        return next((name + ending for name in weight.names if name + ending in self._there), usual)


# -- layouts ---------------------------------------------------------------------------------------------------------


def to_whole(weight: Weight, config: NemotronHConfig, *published: Tensor) -> Tensor:
    """The tensor over all ranks, of the published ones."""
    if weight.vocab:
        padding = weight.shape[0] - published[0].shape[0]
        return torch.nn.functional.pad(published[0], (0, 0, 0, padding)) if padding else published[0]
    if len(weight.of) == 1:
        return published[0]
    groups = config.num_key_value_heads
    return torch.cat([part.reshape(groups, -1, part.shape[-1]) for part in published], dim=1).flatten(0, 1)


def from_whole(weight: Weight, config: NemotronHConfig, name: str, whole: Tensor) -> Tensor:
    """The published tensor `name`, of the tensor over all ranks."""
    if weight.vocab:
        return whole[: config.vocab_size]
    if len(weight.of) == 1:
        return whole
    heads = config.num_attention_heads // config.num_key_value_heads
    head_GNDH = whole.reshape(config.num_key_value_heads, heads + 2, config.head_dim, whole.shape[-1])
    which = {"q": slice(0, heads), "k": slice(heads, heads + 1), "v": slice(heads + 1, heads + 2)}
    part = which[name.removesuffix("_proj.weight")[-1]]
    return head_GNDH[:, part].reshape(-1, whole.shape[-1])


def rank_shape(weight: Weight, ranks: int) -> Shape:
    """What each of `ranks` ranks has."""
    shape = list(weight.shape)
    if weight.axis is not None:
        shape[weight.axis] //= ranks
    return tuple(shape)


def cut(weight: Weight, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """What rank `rank` of `ranks` has of the tensor; a view where it can be one."""
    if weight.axis is None or ranks == 1:
        return whole
    if weight.parts is None:
        return whole.chunk(ranks, weight.axis)[rank]
    parts = whole.split(list(weight.parts.values()), dim=weight.axis)
    return torch.cat([part.chunk(ranks, weight.axis)[rank] for part in parts], dim=weight.axis)


def join(weight: Weight, pieces: tuple[Tensor, ...]) -> Tensor:
    """The tensor over all ranks, of what each has."""
    if len(pieces) == 1:
        return pieces[0]
    assert weight.axis is not None
    if weight.parts is None:
        return torch.cat(pieces, dim=weight.axis)
    sizes = [size // len(pieces) for size in weight.parts.values()]
    by_rank = [piece.split(sizes, dim=weight.axis) for piece in pieces]
    return torch.cat(
        [by_rank[rank][part] for part in range(len(sizes)) for rank in range(len(pieces))], dim=weight.axis
    )


def padded_vocab(vocab: int, tensor_parallel: int, divisible_by: int = VOCAB_DIVISIBLE_BY) -> int:
    multiple = divisible_by * tensor_parallel
    return -(-vocab // multiple) * multiple


def common_spec(source: Tensors, names: Iterable[str], shape: Shape) -> Spec:
    """What is made of these source tensors. Raises `ValueError` where they have several dtypes."""
    specs = {name: source.specs[name] for name in names if name in source.specs}  # those missing are told by the plan
    dtypes = {spec.dtype: name for name, spec in specs.items()}
    if len(dtypes) > 1:
        (first, one), (second, other) = list(dtypes.items())[:2]
        raise ValueError(
            f"{source.path} has {one} in {first} and {other} in {second}, which are one tensor on the other side: "
            "write the checkpoint in one dtype."
        )
    return Spec(shape, next(iter(dtypes), torch.float32))


def check_writable(config: NemotronHConfig, tensor_parallel: int, divisible_by: int, expert_parts: int) -> None:
    """Raises `ValueError` where Megatron could not read the result: the model has what it lacks, or does not divide."""
    to_megatron_args(config)
    if tensor_parallel not in TENSOR_PARALLEL:
        raise ValueError(f"tensor_parallel is {tensor_parallel!r}; give one of {TENSOR_PARALLEL}.")
    if divisible_by < 1:
        raise ValueError(f"vocab_divisible_by is {divisible_by!r}; give a positive integer.")
    kinds = {*config.layers_block_type, *(config.mtp_layers_block_type if config.has_mtp else ())}
    shared_out = {"mamba": ("n_groups", "mamba_num_heads"), "attention": ("num_attention_heads",)}
    shared_out |= {"mlp": ("intermediate_size",), "moe": ("moe_shared_expert_intermediate_size",)}
    fields = [name for kind in sorted(kinds) for name in shared_out[kind]] + (["hidden_size"] if config.has_mtp else [])
    numbers = [(name, getattr(config, name), tensor_parallel) for name in fields]
    if "moe" in kinds:
        numbers.append(("moe_intermediate_size", config.moe_intermediate_size, expert_parts))
    for name, number, ranks in numbers:
        if number % ranks:
            raise ValueError(
                f"{name} is {number}, which {ranks} ranks cannot share out; choose a tensor_parallel that divides it."
            )
    keys = config.num_key_value_heads
    if "attention" in kinds and keys % tensor_parallel and tensor_parallel % keys:
        # With fewer KV heads than ranks Megatron gives each rank an equal piece of the rows and gathers them.
        raise ValueError(
            f"num_key_value_heads is {keys}, neither a multiple nor a divisor of tensor_parallel {tensor_parallel}, "
            "which Megatron refuses; choose another tensor_parallel."
        )


# -- arguments -------------------------------------------------------------------------------------------------------

# Config -> Megatron's argument, where both say the same thing; by the layers that they matter to.
_ARGUMENTS = {
    "": {
        "hidden_size": "hidden_size",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "residual_in_fp32": "fp32_residual_connection",
        "hidden_dropout": "hidden_dropout",
        "initializer_range": "init_method_std",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "attention_dropout": "attention_dropout",
    },
    "mamba": {
        "mamba_num_heads": "mamba_num_heads",
        "mamba_head_dim": "mamba_head_dim",
        "n_groups": "mamba_num_groups",
        "ssm_state_size": "mamba_state_dim",
        "chunk_size": "mamba_chunk_size",
    },
    "moe": {
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap": "moe_shared_expert_overlap",
        "moe_latent_size": "moe_latent_size",
        "n_group": "moe_router_num_groups",
        "topk_group": "moe_router_group_topk",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
    },
}
# Other names of an argument: Megatron's model config and NeMo have their own.
_ARGUMENT_ALIASES = {"norm_epsilon": ("layernorm_epsilon",), "num_experts": ("num_moe_experts",)}
# Megatron builds these in, for every model of this family.
_BUILT_IN: dict[str, dict[str, Any]] = {
    "": {},
    "attention": {"attention_bias": False, "sliding_window": None},
    "mlp": {"mlp_bias": False, "mlp_hidden_act": "relu2"},
    "moe": {"mlp_bias": False, "mlp_hidden_act": "relu2", "norm_topk_prob": True},
    "mamba": {
        "conv_kernel": 4,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": (0.0, float("inf")),
    },
}


def to_megatron_args(config: NemotronHConfig) -> dict[str, Any]:
    """Megatron-LM's arguments for a model with this config, as `args` in its checkpoints has them.

    Raises:
        ValueError: the model is none that Megatron could build (biases, another activation, time steps with a limit).
    """
    kinds = {*config.layers_block_type, *(config.mtp_layers_block_type if config.has_mtp else ())}
    for kind, expected in _BUILT_IN.items():
        for name, value in expected.items() if kind in kinds else ():
            found = getattr(config, name)
            if (tuple(found) if isinstance(found, list) else found) != value:
                raise ValueError(
                    f"{name} is {found!r} where Megatron builds in {value!r}; it has no place for this model."
                )
    if not isinstance(config.intermediate_size, int):
        raise ValueError(
            f"intermediate_size is {config.intermediate_size!r} but Megatron has one ffn_hidden_size for all MLPs; "
            "it has no place for this model."
        )
    args: dict[str, Any] = {}
    for kind, names in _ARGUMENTS.items():
        if not kind or kind in kinds:
            args |= {theirs: getattr(config, ours) for ours, theirs in names.items()}
    pattern = config.hybrid_override_pattern
    if config.has_mtp:
        args |= {"mtp_num_layers": config.num_nextn_predict_layers, "mtp_use_repeated_layer": False}
        pattern += ("/" + config.mtp_hybrid_override_pattern) * config.num_nextn_predict_layers
    if "moe" in kinds:
        args |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": True,
        }
    dtype = config.dtype or torch.bfloat16
    return {
        **args,
        "hybrid_layer_pattern": pattern,
        "num_layers": config.num_hidden_layers,
        "group_query_attention": True,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": VOCAB_DIVISIBLE_BY,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "normalization": "RMSNorm",
        "squared_relu": True,
        "swiglu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "position_embedding_type": "none",
        "add_position_embedding": True,  # the default of a flag that is about learned positions; Megatron compares it
        "seq_length": config.max_position_embeddings,
        "is_hybrid_model": True,
        "use_mcore_models": True,
        "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
    }


def from_megatron_args(args: Any, vocab_size: int | None = None) -> NemotronHConfig:
    """The config of a model that Megatron-LM built with these arguments, a namespace or a mapping.

    `vocab_size` is the tokenizer's; without it, and where the arguments have only the padded size, that is taken.

    Raises:
        ValueError: no pattern of layers among them, or a model of another family. Names the argument.
    """
    given: Mapping[str, Any] = args if isinstance(args, Mapping) else vars(args)

    def get(name: str) -> Any:
        return next(
            (given[key] for key in (name, *_ARGUMENT_ALIASES.get(name, ())) if given.get(key) is not None), None
        )

    pattern = get("hybrid_layer_pattern") or get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        raise ValueError(
            f"Megatron's arguments have the pattern of layers {pattern!r} (hybrid_layer_pattern or "
            "hybrid_override_pattern); name the model's config.json."
        )
    refused = {
        "add_bias_linear": (False, None),
        "add_qkv_bias": (False, None),
        "swiglu": (False, None),
        "squared_relu": (True, None),
        "normalization": ("RMSNorm", None),
        "moe_router_score_function": ("sigmoid", None),
        "position_embedding_type": ("none", None),
    }
    for name, known in refused.items():
        if (value := get(name)) not in known:
            raise ValueError(
                f"Megatron's argument {name} is {value!r} but this family has {known[0]!r}; convert it as what it is."
            )
    fields: dict[str, Any] = {}
    for names in _ARGUMENTS.values():
        fields |= {ours: value for ours, theirs in names.items() if (value := get(theirs)) is not None}
    if get("group_query_attention") is False:
        fields.pop("num_key_value_heads", None)
    if get("num_query_groups") is None or get("group_query_attention") is False:
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    if fields.get("moe_intermediate_size") is None and "intermediate_size" in fields:
        fields["moe_intermediate_size"] = fields["intermediate_size"]
    main, *depths = pattern.split("/")
    if not depths and (depth := get("mtp_hybrid_override_pattern")) and (number := get("mtp_num_layers")):
        check_layers("mtp_num_layers", number)
        depths = [depth] * number
    if depths and get("mtp_use_repeated_layer"):
        depths = depths[:1]  # one depth's weights, used again for each
    dtype = get("params_dtype")
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if get("bf16") else torch.float16 if get("fp16") else None
    vocab = vocab_size or get("vocab_size") or get("padded_vocab_size")
    if vocab is not None:
        fields["vocab_size"] = vocab
    untied = get("untie_embeddings_and_output_weights")
    return NemotronHConfig(
        **fields,
        hybrid_override_pattern="/".join([main, *depths]),
        tie_word_embeddings=untied is False,
        dtype=dtype,
        architectures=["NemotronHForCausalLM"],
    )


@dataclass
class Described:
    """The config of a checkpoint, and the file that it was read from, if it was one."""

    config: NemotronHConfig
    file: Path | None
    remarks: list[str]

    def write(self, folder: Path) -> None:
        if self.file is not None:
            (folder / "config.json").write_bytes(self.file.read_bytes())
        else:
            self.config.save_pretrained(folder)


def describe(
    path: Path, folders: Iterable[Path], args: Any, config: str | Path | None, vocab_size: int | None
) -> Described:
    """The config of a checkpoint: from `config`, from a config.json beside it, or from Megatron's arguments.

    Raises:
        ValueError: there is none of them, or the config.json and the arguments describe different models.
    """
    if config is not None:
        file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        if not file.exists():
            raise ValueError(f"There is no {file}; name the model's config.json.")
        return Described(_read(file), file, [])
    stored = next((folder / "config.json" for folder in folders if (folder / "config.json").exists()), None)
    if args is None and stored is None:
        raise ValueError(f"{path} has no Megatron arguments and no config.json; name the model's with --config.")
    if stored is not None:
        described = _read(stored)
        if args is not None:
            _agree(path, described, from_megatron_args(args, described.vocab_size))
        return Described(described, stored, [])
    made, remarks = from_megatron_args(args, vocab_size), []
    if vocab_size is None and getattr(args, "vocab_size", None) is None:
        remarks.append(
            f"Megatron's arguments do not say how many tokens the tokenizer has: the padded vocabulary of "
            f"{made.vocab_size} is kept; name a config.json with --config to cut it."
        )
    return Described(made, None, remarks)


def _read(file: Path) -> NemotronHConfig:
    fields = read_json(file)
    if (kind := fields.get("model_type")) != "nemotron_h":
        raise ValueError(f"{file} describes a {kind!r} model; this package knows nemotron_h alone.")
    config: NemotronHConfig = NemotronHConfig.from_dict(fields)
    return config


def _agree(path: Path, stored: NemotronHConfig, said: NemotronHConfig) -> None:
    kinds = {*stored.layers_block_type, *(stored.mtp_layers_block_type if stored.has_mtp else ())}
    shapes = [
        name
        for kind, names in _ARGUMENTS.items()
        for name in names
        if (kind in kinds or not kind) and name not in ("initializer_range", "max_position_embeddings")
    ]
    for name in ("hybrid_override_pattern", "num_nextn_predict_layers", "tie_word_embeddings", *shapes):
        ours, theirs = getattr(stored, name), getattr(said, name)
        if ours != theirs and not (name == "chunk_size" or name.endswith(("dropout", "overlap"))):
            raise ValueError(
                f"{path} has a config.json with {name} {ours!r} while its Megatron arguments say {theirs!r}; correct "
                "one of them, or name another file with --config."
            )


# -- files -----------------------------------------------------------------------------------------------------------


def iteration_folders(path: Path) -> list[Path]:
    """Where a checkpoint's files may lie, the likeliest first: `path` itself, NeMo's `weights`, the last iteration."""
    folders = [path, path / "weights"]
    if (path / TRACKER).is_file():
        last = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        name = f"iter_{int(last):07d}" if last.isdecimal() and len(last) < 20 else last
        folders.append(below(path, name, path / TRACKER))
    else:
        folders += sorted(path.glob("iter_*"), reverse=True)[:1]
    return [folder for folder in folders if folder.is_dir()]


def start(folder: Path) -> Path:
    """The folder of the one iteration that is written, with the file beside it that says so."""
    (folder / TRACKER).write_text(f"{ITERATION}\n")
    inner = folder / f"iter_{ITERATION:07d}"
    inner.mkdir(exist_ok=True)
    return inner


def leave_out(plan: Plan, reasons: Mapping[str, Callable[[str], bool]]) -> None:
    """Tensors of the source that nothing is made of are left out on purpose where a reason applies."""
    for name in plan.left_over():
        for reason, applies in reasons.items():
            if applies(name):
                plan.unused[name] = reason
                break


def is_state(name: str) -> bool:
    return name.endswith("_extra_state") or "._extra_state/" in name
