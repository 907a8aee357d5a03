"""Megatron's arguments and the config that they describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config_values import check_layers
from ...configuration import NemotronHConfig
from ..published import read_config
from .names import TENSOR_PARALLEL, VOCAB_DIVISIBLE_BY


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
        return Described(read_config(file), file, [])
    stored = next((folder / "config.json" for folder in folders if (folder / "config.json").exists()), None)
    if args is None and stored is None:
        raise ValueError(f"{path} has no Megatron arguments and no config.json; name the model's with --config.")
    if stored is not None:
        described = read_config(stored)
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
