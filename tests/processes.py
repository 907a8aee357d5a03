"""Several processes that talk through gloo, for the tests of what runs on many."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def launch(work: Any, folder: Path, *args: Any, world: int = 2, seconds: float = 120) -> list[Any]:
    """`work(rank, folder, *args)` in each of `world` processes: what it returns, rank by rank.

    `work` must be a function of a module. An exception in one process ends all and is raised here.
    """
    context = multiprocessing.start_processes(
        _enter, args=(world, str(folder), work, args), nprocs=world, join=False, start_method="spawn"
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} in {world} processes took more than {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(rank: int, world: int, folder: str, work: Any, args: tuple[Any, ...]) -> None:
    # gloo listens where the host name points, which need not be reachable
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    rendezvous = Path(folder) / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        torch.save(work(rank, Path(folder), *args), Path(folder) / f"rank{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
