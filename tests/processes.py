"""Several processes that talk through gloo, for the tests of what runs on many."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def launch(work: Any, folder: Path, *args: Any, world: int = 2, seconds: float = 300) -> list[Any]:
    """`work(rank, folder, *args)` in each of `world` processes: what it returns, rank by rank.

    `work` must be a function of a module. An exception in one process ends all and is raised here.
    """
    context = multiprocessing.start_processes(
        _enter, args=(world, _free_port(), str(folder), work, args), nprocs=world, join=False, start_method="spawn"
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _enter(rank: int, world: int, port: int, folder: str, work: Any, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    # gloo listens where the host name points, which need not be reachable
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        torch.save(work(rank, Path(folder), *args), Path(folder) / f"rank{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
