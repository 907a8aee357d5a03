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
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import torch_files
from ..foreign import shown
from ..published import PublishedFolder, tensors
from ..tensors import Entry, Plan, Shape, Spec
from ..writing import Conversion, Done
from . import folders
from .folders import IS_STATE, ITERATION, MegatronFolder, Reasons, common_spec, from_published, iteration_folders
from .names import EXPERT_NAMES, TENSOR_PARALLEL, VOCAB_DIVISIBLE_BY, Weight, cut, join, rank_shape, to_whole

OPTIONS = {
    **folders.OPTIONS,
    "tensor_parallel": "ranks to write for: 1, 2, 4 or 8",
    "experts": "how experts are spelled: grouped (weight{i}) or sequential (local_experts.{i})",
    "expert_tensor_parallel": "ranks that share out an expert: tensor_parallel, or 1",
    "shard_bytes": "bytes per file of the published folder, about",
}
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_MAPPED = 256 << 20  # files are mapped anew after so many bytes, and their pages leave memory


def recognises(path: str | Path) -> bool:
    return _folder(Path(path)) is not None


def _folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    return next((folder for folder in iteration_folders(path) if any(folder.glob("mp_rank_*"))), None)


class RankFolders(MegatronFolder):
    """The tensors of all ranks, as `mp_rank_XX/name`, their names without the prefix `module.`.

    `args` are Megatron's arguments, None where the files have none; `ranks` is their number.

    Raises:
        ValueError: other parallelism than of tensors, a rank that is not there, a file that cannot be read.
    """

    embeddings = f"mp_rank_00/{MegatronFolder.embeddings}"

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

        self.expert_parts = getattr(self.args, "expert_tensor_parallel_size", None) or self.ranks
        if self.expert_parts not in (1, self.ranks):
            raise ValueError(
                f"{path} was written with expert_tensor_parallel_size {shown(self.expert_parts)} on {self.ranks} "
                "ranks, and 1 or all of them are read; let Megatron write it as torch_dist."
            )

    def _map(self, rank: str) -> Mapping[str, Tensor]:
        if rank not in self._open:
            contents = torch_files.load(self._paths[rank], mmap=True)
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

    def spelled(self, name: str) -> str:
        return name.partition("/")[2]

    def sources(self, weight: Weight, name: str) -> dict[str, Shape]:
        ranks = (self.expert_parts if weight.expert else self.ranks) if weight.axis is not None else 1
        return {f"mp_rank_{rank:02d}/{name}": rank_shape(weight, ranks) for rank in range(ranks)}

    def whole(self, weight: Weight, parts: tuple[Tensor, ...]) -> Tensor:
        return join(weight, parts)

    def reasons(self, plan: Plan) -> Reasons:
        used = {name for entry in plan.entries for name in entry.sources}
        same = {"rank 0 has the same": lambda name: re.sub(r"^mp_rank_\d\d", "mp_rank_00", name) in used}
        return {**IS_STATE, **same}


to_huggingface = RankFolders.to_huggingface


def from_huggingface(
    path: str | Path,
    tensor_parallel: int = 1,
    experts: str = "grouped",
    expert_tensor_parallel: int | None = None,
    vocab_divisible_by: int = VOCAB_DIVISIBLE_BY,
) -> Conversion:
    """A checkpoint with a file per rank, of a folder of this family; see `folders.from_published`.

    The vocabulary is padded with zeros, and a model that does not divide among the ranks is refused.
    """
    parts = tensor_parallel if expert_tensor_parallel is None else expert_tensor_parallel
    if parts not in (1, tensor_parallel):
        raise ValueError(f"expert_tensor_parallel is {parts!r}; give 1 or tensor_parallel, {tensor_parallel}.")

    def entries(source: PublishedFolder, table: list[Weight]) -> Iterator[Entry]:
        return _rank_entries(source, table, tensor_parallel, experts, parts)

    def write(plan: Plan, folder: Path, args: dict[str, Any], done: Done) -> None:
        contents = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": ITERATION}
        for rank in range(tensor_parallel):
            name = f"mp_rank_{rank:02d}"
            mine = [entry for entry in plan.entries if entry.name.startswith(f"{name}/")]
            (folder / name).mkdir(exist_ok=True)

            def of_rank(tensors: dict[str, Tensor]) -> dict[str, Any]:
                return contents | {
                    "model": OrderedDict((stored.partition("/")[2], tensor) for stored, tensor in tensors.items())
                }

            torch_files.write(plan.source, mine, folder / name / _FILES[0], done, of_rank)

    return from_published(
        path,
        "megatron-legacy",
        tensor_parallel,
        experts,
        parts,
        vocab_divisible_by,
        args={
            "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": parts,
            "moe_grouped_gemm": experts == "grouped",
            "ckpt_format": "torch",
        },
        options=[parts],
        entries=entries,
        write=write,
    )


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
