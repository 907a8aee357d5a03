"""Times in turns, memory in fresh processes, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .report import Budget


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], float]], rounds: int, budget: Budget) -> dict[str, list[float]]:
    """Each run once a round, every other round backwards; a run returns its seconds.

    The first round is always made. A later one is begun only if it fits what is left of the budget.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    took = 0.0
    for number in range(rounds):
        if number and budget.left() < took:
            break
        start = time.perf_counter()
        for name in runs if number % 2 == 0 else reversed(runs):
            times[name].append(runs[name]())
        took = time.perf_counter() - start
    return times


def ratio(a: list[float], b: list[float]) -> float:
    """a over b, the median over the rounds: a machine that slows down slows both of a round."""
    if len(a) == len(b):
        return statistics.median(x / y for x, y in zip(a, b, strict=True))
    return statistics.median(a) / statistics.median(b)


# -- what the machine can do -----------------------------------------------------------------------------------------


def read_bandwidth(bytes_: int = 1 << 30, repeats: int = 5) -> dict[str, float]:
    """GB/s of reading memory, several ways, the best of a few repeats each; "best" is the best of all."""
    words = bytes_ // 4
    buffer = torch.empty(words).fill_(0.5)
    rows = buffer.view(-1, min(words, 4096))
    ones = torch.ones(rows.shape[1])
    half = buffer.view(torch.bfloat16).view(-1, rows.shape[1] * 2)
    half_ones = torch.ones(half.shape[1], dtype=torch.bfloat16)
    ways: dict[str, Callable[[], Any]] = {
        "float32 sum": lambda: buffer.sum(),
        "float32 matrix-vector": lambda: torch.mv(rows, ones),
        "int64 max": lambda: buffer.view(torch.int64).max(),
        "bfloat16 matrix-vector": lambda: torch.mv(half, half_ones),
    }
    with torch.no_grad():
        found = {name: bytes_ / min(seconds(way) for _ in range(repeats)) / 1e9 for name, way in ways.items()}
    return {**found, "best": max(found.values())}


def linear_speed(dtype: torch.dtype, rows: int = 128, width: int = 2048, repeats: int = 3) -> float:
    """GFLOP/s of `F.linear`."""
    x, weight = (torch.full((n, width), 0.5, dtype=dtype) for n in (rows, width))
    with torch.no_grad():
        F.linear(x, weight)
        return 2 * rows * width * width / min(seconds(lambda: F.linear(x, weight)) for _ in range(repeats)) / 1e9


# -- memory ----------------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process that has imported torch and the models and computed nothing.

    A fork of a server that only imported: as fresh as a new interpreter, and started in an instant.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.models"])
    receiver, sender = context.Pipe(duplex=False)
    # By name: a script is called __main__ here and something else over there.
    name = function.__module__
    module = Path(importlib.import_module(name).__file__ or "").stem if name == "__main__" else name
    process = context.Process(target=_child, args=(sender, module, function.__name__, args, torch.get_num_threads()))
    before = os.environ.get("PYTHONPATH")
    # For the server, which imports before it is told where to look.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), before]))
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{function.__name__}{args} ended with code {process.exitcode}; -9 is what the system does to a process "
            "that asks for more memory than there is."
        ) from None
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _child(sender: Any, module: str, function: str, args: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(getattr(importlib.import_module(module), function)(*args))
    except Exception as error:
        sender.send(RuntimeError(f"{function}{args}: {type(error).__name__}: {error}"))


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}


class Peak:
    """How far the resident memory rose above where it was, in bytes."""

    before: int
    growth: int


@contextmanager
def peak_memory() -> Any:
    """`with peak_memory() as peak: ...`, then `peak.growth`. Linux; the process's high-water mark is set back first."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what building the model left free is not there to be used unseen
    except (OSError, AttributeError):
        pass
    Path("/proc/self/clear_refs").write_text("5")
    peak = Peak()
    peak.before = _status()["VmRSS"]
    yield peak
    peak.growth = _status()["VmHWM"] - peak.before
