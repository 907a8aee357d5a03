"""What both kinds of Megatron folders share: where their files lie, and the way there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configuration import NemotronHConfig
from ..foreign import below
from ..published import PublishedFolder, tensors
from ..tensors import Entry, Plan, Shape, Spec, Tensors
from ..writing import SHARD_BYTES, Conversion, Done, copy_companions, into_folder
from .arguments import Described, check_writable, describe, to_megatron_args
from .names import Spelling, Weight, from_whole, padded_vocab, weights

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = 1
"""What a written folder says: Megatron takes 0 for no checkpoint at all."""

EXPERTS = ("grouped", "sequential")
OPTIONS = {
    "config": "config.json of the model, where the checkpoint has no Megatron arguments",
    "vocab_size": "tokens of the tokenizer, where the arguments have the padded number alone",
    "vocab_divisible_by": "the padded vocabulary is a multiple of this and of the ranks",
}
"""Of both kinds."""

Reasons = Mapping[str, Callable[[str], bool]]
"""Why a tensor of Megatron's is no part of the model, and which ones are meant."""

IS_STATE: Reasons = {
    "the state of TransformerEngine": lambda name: name.endswith("_extra_state") or "._extra_state/" in name
}


class MegatronFolder(ABC):
    """A Megatron checkpoint, read: `folder` is its iteration's, `args` are Megatron's arguments (None: not there)."""

    path: Path
    folder: Path
    args: Any
    specs: dict[str, Spec]
    files: list[Path]
    embeddings = "embedding.word_embeddings.weight"
    ranks = 1
    """That share out the rows of `embeddings`."""

    @abstractmethod
    def __init__(self, path: str | Path) -> None: ...

    @abstractmethod
    def read(self, name: str) -> Tensor: ...

    @abstractmethod
    def spelled(self, name: str) -> str:
        """A tensor's name as in `Weight.names`."""

    @abstractmethod
    def sources(self, weight: Weight, name: str) -> dict[str, Shape]:
        """The tensors that hold the weight that is called `name`."""

    @abstractmethod
    def whole(self, weight: Weight, parts: tuple[Tensor, ...]) -> Tensor:
        """The weight over all ranks, of those tensors."""

    @abstractmethod
    def reasons(self, plan: Plan) -> Reasons: ...

    @classmethod
    def to_huggingface(
        cls,
        path: str | Path,
        config: str | Path | None = None,
        vocab_size: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> Conversion:
        """The published folder, of such a checkpoint.

        Its config is `config`, or the config.json beside the checkpoint, or what its Megatron arguments say;
        `vocab_size` is for the last alone.

        Raises:
            ValueError: no such checkpoint, files that cannot be read, no config or two that differ.
        """
        source = cls(path)
        beside = [source.path, source.folder, source.folder.parent]
        described = describe(source.path, beside, source.args, config, vocab_size)
        embeddings = source.specs.get(cls.embeddings)
        rows = embeddings.shape[0] * source.ranks if embeddings and embeddings.shape else 0
        table = weights(described.config, max(rows, described.config.vocab_size))
        plan = Plan(source, list(source._published_entries(described.config, table)))
        reasons = source.reasons(plan)
        for name in plan.left_over():
            if reason := next((reason for reason, applies in reasons.items() if applies(name)), None):
                plan.unused[name] = reason
        places, options = dict.fromkeys(reversed(beside)), [described.config.to_json_string()]
        return into_folder(plan, described.write, shard_bytes, options, beside=places, remarks=described.remarks)

    def _published_entries(self, config: NemotronHConfig, table: list[Weight]) -> Iterator[Entry]:
        spelling, shapes = Spelling(map(self.spelled, self.specs), table), tensors(config)
        for weight in table:
            sources = self.sources(weight, spelling(weight))
            for name in weight.of:

                def make(*parts: Tensor, weight: Weight = weight, name: str = name) -> Tensor:
                    return from_whole(weight, config, name, self.whole(weight, parts))

                yield Entry(name, common_spec(self, sources, shapes[name]), sources, make)


def from_published(
    path: str | Path,
    to: str,
    tensor_parallel: int,
    experts: str,
    expert_parts: int,
    vocab_divisible_by: int,
    *,
    args: Mapping[str, Any],
    options: Sequence[object] = (),
    entries: Callable[[PublishedFolder, list[Weight]], Iterable[Entry]],
    write: Callable[[Plan, Path, dict[str, Any], Done], None],
) -> Conversion:
    """A Megatron checkpoint of a folder of this family, whose config.json and tokenizer are kept beside it.

    Args:
        expert_parts: ranks that share out an expert.
        args: Megatron's arguments of this kind of checkpoint, beside those of the model.
        entries: the tensors of the result, by its table of weights.
        write: puts them, and all of Megatron's arguments, into the folder of an iteration.

    Raises:
        ValueError: a wrong source or option, or a model that Megatron has no place for.
    """
    source = PublishedFolder(path)
    config, remarks = source.config, source.without_absent_mtp()
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}; give one of {', '.join(EXPERTS)}.")
    check_writable(config, tensor_parallel, vocab_divisible_by, expert_parts)
    rows = padded_vocab(config.vocab_size, tensor_parallel, vocab_divisible_by)
    plan = Plan(source, list(entries(source, weights(config, rows))))
    all_args = to_megatron_args(config) | {
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": vocab_divisible_by,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": 1,
        **args,
        "iteration": ITERATION,
    }

    def write_all(folder: Path, done: Done) -> None:
        (folder / TRACKER).write_text(f"{ITERATION}\n")
        inner = folder / f"iter_{ITERATION:07d}"
        inner.mkdir(exist_ok=True)
        write(plan, inner, all_args, done)
        Described(config, None if remarks else source.path / "config.json", remarks).write(folder)
        copy_companions(source.path, folder)

    return Conversion(to, plan, write_all, (tensor_parallel, experts, rows, *options), remarks=remarks)


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
