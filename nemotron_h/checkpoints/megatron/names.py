"""Megatron-Core's names and layouts of this family, shared by its two file formats.

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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configuration import NemotronHConfig
from ..published import tensors
from ..tensors import Shape

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
    shapes = tensors(config)
    vocab = (padded_vocab or config.vocab_size, config.hidden_size)

    def one(names: str | tuple[str, ...], of: str, axis: int | None = None) -> Weight:
        return Weight((names,) if isinstance(names, str) else names, shapes[of], (of,), axis)

    table = [Weight(("embedding.word_embeddings.weight",), vocab, ("backbone.embeddings.weight",), 0, vocab=True)]
    for index, kind in enumerate(config.layers_block_type):
        table += _layer(config, shapes, f"decoder.layers.{index}.", f"backbone.layers.{index}.", kind)
    table.append(one(("decoder.final_norm.weight", "decoder.final_layernorm.weight"), "backbone.norm_f.weight"))
    if not config.tie_word_embeddings:
        table.append(Weight(("output_layer.weight",), vocab, ("lm_head.weight",), 0, vocab=True))
    kinds = config.mtp_layers_block_type
    for depth in range(config.num_nextn_predict_layers):
        outer, first = f"mtp.layers.{depth}.", depth * len(kinds)
        for name, axis in (("enorm", None), ("hnorm", None), ("eh_proj", 0)):
            table.append(one(f"{outer}{name}.weight", f"mtp.layers.{first}.{name}.weight", axis))
        for index, kind in enumerate(kinds):
            mine, theirs = f"{outer}mtp_model_layer.layers.{index}.", f"mtp.layers.{first + index}."
            table += _layer(config, shapes, mine, theirs, kind)
        last = f"mtp.layers.{first + len(kinds) - 1}.final_layernorm.weight"
        table.append(one(f"{outer}final_layernorm.weight", last))
    return table


def _layer(
    config: NemotronHConfig, shapes: Mapping[str, Shape], ours: str, published: str, kind: str
) -> Iterator[Weight]:
    def norm(fused: str = "") -> Weight:
        names = [f"{ours}{name}.weight" for name in ("pre_mlp_layernorm", "input_layernorm", "norm")]
        names = [f"{ours}{fused}.layer_norm_weight", *names] if fused else names
        return Weight(tuple(names), shapes[f"{published}norm.weight"], (f"{published}norm.weight",))

    def one(
        names: str, of: str, axis: int | None = None, parts: Mapping[str, int] | None = None, expert: bool = False
    ) -> Weight:
        """Both kinds of names with blanks between them; several published ones are stacked by rows."""
        sources = tuple(f"{published}mixer.{name}" for name in of.split())
        shape = (sum(shapes[name][0] for name in sources), *shapes[sources[0]][1:])
        return Weight(tuple(ours + name for name in names.split()), shape, sources, axis, parts, expert)

    def mlp(name: str, of: str) -> Iterator[Weight]:
        yield one(f"{name}linear_fc1.weight", f"{of}up_proj.weight", 0)
        yield one(f"{name}linear_fc2.weight", f"{of}down_proj.weight", 1)

    if kind == "mamba":
        d, states = config.d_inner, config.n_groups * config.ssm_state_size
        convolved = {"x": d, "B": states, "C": states}
        yield norm("mixer.in_proj")
        yield one("mixer.in_proj.weight", "in_proj.weight", 0, {"z": d, **convolved, "dt": config.mamba_num_heads})
        for name in ("weight", "bias"):
            yield one(f"mixer.conv1d.{name} mixer.conv1d_{name}", f"conv1d.{name}", 0, convolved)
        for name in ("dt_bias", "A_log", "D", "norm.weight"):
            yield one(f"mixer.{name}", name, 0)
        yield one("mixer.out_proj.weight", "out_proj.weight", 1)
    elif kind == "attention":
        yield norm("self_attention.linear_qkv")
        yield one("self_attention.linear_qkv.weight", "q_proj.weight k_proj.weight v_proj.weight", 0)
        yield one("self_attention.linear_proj.weight", "o_proj.weight", 1)
    elif kind == "mlp":
        yield norm("mlp.linear_fc1")
        yield from mlp("mlp.", "")
    else:
        yield norm()
        yield one("mlp.router.weight", "gate.weight")
        yield one("mlp.router.expert_bias", "gate.e_score_correction_bias")
        for expert in range(config.n_routed_experts):
            for linear, projection, axis in (("linear_fc1", "up_proj", 0), ("linear_fc2", "down_proj", 1)):
                names = " ".join(name.format(linear=linear, expert=expert) for name in EXPERT_NAMES.values())
                yield one(names, f"experts.{expert}.{projection}.weight", axis, expert=True)
        yield from mlp("mlp.shared_experts.", "shared_experts.")
        if config.moe_latent_size:
            yield one("mlp.fc1_latent_proj.weight", "fc1_latent_proj.weight")
            yield one("mlp.fc2_latent_proj.weight", "fc2_latent_proj.weight")


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
