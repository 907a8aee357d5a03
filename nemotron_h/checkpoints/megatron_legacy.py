"""Megatron's older checkpoints, a file per rank of tensor parallelism (`ckpt_format` torch).

    DEST/latest_checkpointed_iteration.txt
    DEST/iter_0000001/mp_rank_00/model_optim_rng.pt     {"args", "model", "checkpoint_version", "iteration"}
    DEST/iter_0000001/mp_rank_01/model_optim_rng.pt     ...

"model" has the names of `megatron_names`, and of each tensor what its rank has:

    rows         the rank's piece of dimension 0; of in_proj and conv1d its piece of z, then of x, B, C and dt
    columns      the rank's piece of dimension 1
    experts      pieces as above (an expert tensor parallelism of all ranks), or all of it in each rank (of 1)
    the rest     all of it in each rank; rank 0's is read

Taken are 1, 2, 4 or 8 ranks without pipeline and expert parallelism (`mp_rank_XX` alone), experts spelled
`linear_fc1.weight{i}` ("grouped") or `local_experts.{i}.linear_fc1.weight` ("sequential"), old (`conv1d.weight`) and
new (`conv1d_weight`) names, and a file's states of optimizer and random numbers, which stay behind. With fewer KV heads
than ranks each rank has an equal piece of linear_qkv's rows, as in Megatron. Memory: one tensor; the files are mapped.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration import NemotronHConfig
from ..files import atomic_write
from .foreign import shown
from .megatron_names import (
    EXPERT_NAMES,
    ITERATION,
    TENSOR_PARALLEL,
    VOCAB_DIVISIBLE_BY,
    Described,
    Spelling,
    Weight,
    check_writable,
    common_spec,
    cut,
    describe,
    from_whole,
    is_state,
    iteration_folders,
    join,
    leave_out,
    padded_vocab,
    rank_shape,
    start,
    to_megatron_args,
    to_whole,
    weights,
)
from .published import PublishedFolder, tensors
from .tensors import Entry, Plan, Shape, Spec
from .torch_files import load
from .writing import SHARD_BYTES, Conversion, Done, copy_companions, write_safetensors

OPTIONS = {
    "config": "config.json of the model, where the checkpoint has no Megatron arguments",
    "vocab_size": "tokens of the tokenizer, where the arguments have the padded number alone",
    "tensor_parallel": "ranks to write for: 1, 2, 4 or 8",
    "experts": "how experts are spelled: grouped (weight{i}) or sequential (local_experts.{i})",
    "expert_tensor_parallel": "ranks that share out an expert: tensor_parallel, or 1",
    "vocab_divisible_by": "the padded vocabulary is a multiple of this and of the ranks",
    "shard_bytes": "bytes per file of the published folder, about",
}
EXPERTS = ("grouped", "sequential")

_FILES = ("model_optim_rng.pt", "model_rng.pt")
_MAPPED = 256 << 20  # files are mapped anew after so many bytes, and their pages leave memory


def recognises(path: str | Path) -> bool:
    return _folder(Path(path)) is not None


def _folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    return next((folder for folder in iteration_folders(path) if any(folder.glob("mp_rank_*"))), None)


class RankFolders:
    """The tensors of all ranks, as `mp_rank_XX/name`, their names without the prefix `module.`.

    `args` are Megatron's arguments, None where the files have none; `ranks` is their number.

    Raises:
        ValueError: other parallelism than of tensors, a rank that is not there, a file that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        folder = _folder(self.path)
        if folder is None:
            raise ValueError(f"{path} has no mp_rank_00; name the folder of a Megatron checkpoint.")
        self.folder = folder
        folders = sorted(entry for entry in folder.glob("mp_rank_*") if entry.is_dir())
        for entry in folders:
            if not re.fullmatch(r"mp_rank_\d\d", entry.name):
                raise ValueError(
                    f"{entry} is of a run with pipeline or expert parallelism, and only tensor parallelism is read; "
                    "let Megatron write it as torch_dist, which is read with any."
                )
        self.ranks = len(folders)
        self._paths: dict[str, Path] = {}
        for rank in range(int(folders[-1].name[-2:]) + 1):
            name = f"mp_rank_{rank:02d}"
            file = next((folder / name / one for one in _FILES if (folder / name / one).exists()), None)
            if file is None:
                raise ValueError(f"{folder} lacks {name}/{_FILES[0]}, a rank's file: fetch or write it again.")
            self._paths[name] = file
        if self.ranks not in TENSOR_PARALLEL:
            raise ValueError(f"{folder} has {self.ranks} ranks; {TENSOR_PARALLEL} are read.")
        self.files = list(self._paths.values())
        self._open: dict[str, Mapping[str, Tensor]] = {}
        self._read_bytes = 0
        self.specs: dict[str, Spec] = {}
        self.args: Any = None
        for rank_name in self._paths:
            for name, tensor in self._map(rank_name).items():
                self.specs[f"{rank_name}/{name}"] = Spec(tuple(tensor.shape), tensor.dtype)
            self._open.clear()
        for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
            if (size := getattr(self.args, name, None) or 1) != 1:
                raise ValueError(f"{folder} was written with {name} {size}; let Megatron write it as torch_dist.")
        if (said := getattr(self.args, "tensor_model_parallel_size", None) or self.ranks) != self.ranks:
            raise ValueError(
                f"{folder} has {self.ranks} ranks but its arguments say tensor_model_parallel_size {said}: fetch the "
                f"rest, mp_rank_{min(said - 1, self.ranks):02d} among it, or write it again."
            )

    def _map(self, rank: str) -> Mapping[str, Tensor]:
        if rank not in self._open:
            contents = load(self._paths[rank], mmap=True)
            model = contents.get("model") if isinstance(contents, dict) else None
            if not isinstance(model, dict):
                raise ValueError(f"{self._paths[rank]} has no 'model'; only runs without virtual pipelines are read.")
            if self.args is None:
                self.args = contents.get("args")
            self._open[rank] = {
                re.sub(r"^(module\.)+", "", name): tensor
                for name, tensor in model.items()
                if isinstance(tensor, Tensor)
            }
        return self._open[rank]

    def read(self, name: str) -> Tensor:
        if self._read_bytes > _MAPPED:
            self._open.clear()
            self._read_bytes = 0
        self._read_bytes += self.specs[name].nbytes
        rank, _, tensor = name.partition("/")
        return self._map(rank)[tensor]


def to_huggingface(
    path: str | Path,
    config: str | Path | None = None,
    vocab_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """The published folder, of a checkpoint with a file per rank.

    Its config is `config`, or the config.json beside the checkpoint, or what its Megatron arguments say; `vocab_size`
    is for the last alone.

    Raises:
        ValueError: no such checkpoint, parallelism that is not read, no config or two that differ.
    """
    path = Path(path)
    source = RankFolders(path)
    beside = [path, source.folder, source.folder.parent]
    described = describe(path, beside, source.args, config, vocab_size)
    parts = getattr(source.args, "expert_tensor_parallel_size", None) or source.ranks
    if parts not in (1, source.ranks):
        raise ValueError(
            f"{path} was written with expert_tensor_parallel_size {shown(parts)} on {source.ranks} ranks, and 1 or "
            "all of them are read; let Megatron write it as torch_dist."
        )
    embeddings = source.specs.get("mp_rank_00/embedding.word_embeddings.weight")
    rows = embeddings.shape[0] * source.ranks if embeddings and embeddings.shape else 0
    entries = _published_entries(source, described.config, max(rows, described.config.vocab_size), parts)
    plan = Plan(source, list(entries))
    used = {name for entry in plan.entries for name in entry.sources}
    reasons = {
        "the state of TransformerEngine": is_state,
        "rank 0 has the same": lambda name: re.sub(r"^mp_rank_\d\d", "mp_rank_00", name) in used,
    }
    leave_out(plan, reasons)

    def write(folder: Path, done: Done) -> None:
        write_safetensors(plan, folder, done, shard_bytes)
        described.write(folder)
        for place in dict.fromkeys(reversed(beside)):
            copy_companions(place, folder)

    return Conversion(
        "huggingface", plan, write, (shard_bytes, described.config.to_json_string()), remarks=described.remarks
    )


def _published_entries(source: RankFolders, config: NemotronHConfig, rows: int, expert_parts: int) -> Iterator[Entry]:
    table, shapes = weights(config, rows), tensors(config)
    spelling = Spelling((name.partition("/")[2] for name in source.specs), table)
    for weight in table:
        ranks = (expert_parts if weight.expert else source.ranks) if weight.axis is not None else 1
        name = spelling(weight)
        sources: dict[str, Shape] = {f"mp_rank_{rank:02d}/{name}": rank_shape(weight, ranks) for rank in range(ranks)}
        for published in weight.of:

            def make(*pieces: Tensor, weight: Weight = weight, published: str = published) -> Tensor:
                return from_whole(weight, config, published, join(weight, pieces))

            yield Entry(published, common_spec(source, sources, shapes[published]), sources, make)


def from_huggingface(
    path: str | Path,
    tensor_parallel: int = 1,
    experts: str = "grouped",
    expert_tensor_parallel: int | None = None,
    vocab_divisible_by: int = VOCAB_DIVISIBLE_BY,
) -> Conversion:
    """A checkpoint with a file per rank, of a folder of this family.

    The vocabulary is padded with zeros. The folder's config.json and its tokenizer are kept beside it, for the way
    back.

    Raises:
        ValueError: a wrong source or option, a model that Megatron has no place for or that does not divide.
    """
    source = PublishedFolder(path)
    config, remarks = source.config, source.without_absent_mtp()
    parts = tensor_parallel if expert_tensor_parallel is None else expert_tensor_parallel
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}; give one of {', '.join(EXPERTS)}.")
    if parts not in (1, tensor_parallel):
        raise ValueError(f"expert_tensor_parallel is {parts!r}; give 1 or tensor_parallel, {tensor_parallel}.")
    check_writable(config, tensor_parallel, vocab_divisible_by, parts)
    rows = padded_vocab(config.vocab_size, tensor_parallel, vocab_divisible_by)
    entries = list(_rank_entries(source, weights(config, rows), tensor_parallel, experts, parts))
    plan = Plan(source, entries)
    args = to_megatron_args(config) | {
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": vocab_divisible_by,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": parts,
        "moe_grouped_gemm": experts == "grouped",
        "ckpt_format": "torch",
        "iteration": ITERATION,
    }

    def write(folder: Path, done: Done) -> None:
        inner = start(folder)
        for rank in range(tensor_parallel):
            mine = [entry for entry in entries if entry.name.startswith(f"mp_rank_{rank:02d}/")]
            (inner / f"mp_rank_{rank:02d}").mkdir(exist_ok=True)
            _write_rank(source, mine, args, inner / f"mp_rank_{rank:02d}" / _FILES[0], done)
        Described(config, None if remarks else source.path / "config.json", remarks).write(folder)
        copy_companions(source.path, folder)

    return Conversion("megatron-legacy", plan, write, (tensor_parallel, experts, parts, rows), remarks=remarks)


def _rank_entries(
    source: PublishedFolder, table: list[Weight], ranks: int, experts: str, expert_parts: int
) -> Iterator[Entry]:
    config, shapes = source.config, tensors(source.config)
    spelled = list(EXPERT_NAMES).index(experts)
    for rank in range(ranks):
        for weight in table:
            parts = expert_parts if weight.expert else ranks
            sources = {published: shapes[published] for published in weight.of}

            def make(*published: Tensor, weight: Weight = weight, rank: int = rank, parts: int = parts) -> Tensor:
                return cut(weight, to_whole(weight, config, *published), rank, parts)

            name = f"mp_rank_{rank:02d}/{weight.names[spelled if weight.expert else 0]}"
            yield Entry(name, common_spec(source, sources, rank_shape(weight, parts)), sources, make)


def _write_rank(source: PublishedFolder, entries: list[Entry], args: dict[str, Any], path: Path, done: Done) -> None:
    """One rank's file: first with room for its tensors, then the tensors into it, one at a time."""
    if path.exists():
        done(sum(entry.spec.nbytes for entry in entries))
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = OrderedDict(
            (entry.name.partition("/")[2], torch.empty(entry.spec.shape, dtype=entry.spec.dtype)) for entry in entries
        )
    contents = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": model,
    }
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(contents, file)
            if hasattr(os, "posix_fallocate"):  # writing into a mapped file ends the process where the disk is full
                os.posix_fallocate(file.fileno(), 0, file.tell())
        mapped: Mapping[str, Tensor] = {}
        written = 0
        for entry in entries:
            if not mapped or written > _MAPPED:
                del mapped
                mapped, written = _writable(temporary), 0
            mapped[entry.name.partition("/")[2]].copy_(entry.read(source))
            written += entry.spec.nbytes
            done(entry.spec.nbytes)
        del mapped


def _writable(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a rank's file, mapped so that what is written into them is written to the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        model: Mapping[str, Tensor] = load(path, mmap=True)["model"]
    return model
