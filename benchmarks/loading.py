"""What `import nemotron_h` costs, and loading the bundled model and a published-layout folder of about 1 GB.

Beside them `import transformers`, transformers' own from_pretrained on the same folder, and a bare safetensors read.
Fresh processes, in turns; every page of the weights is read before the clock stops, for a mapped file is not loaded.
Bounds: importing adds at most 0.3 s to what a script with transformers pays anyway; loading takes no second copy of a
dense model's weights (peak memory at most 1.2 times their size).

    python benchmarks/loading.py                      # about a minute; writes 2 GB in a temporary folder
    python benchmarks/loading.py --rounds 9 --only import
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import measure, models
from harness.report import Budget, Report, arguments
from safetensors.torch import load_file

from nemotron_h import NemotronHForCausalLM
from nemotron_h.bundled import WORD_PROBLEMS

IMPORT_BOUND, COPY_BOUND = 0.3, 1.2
PEER = "from transformers import AutoModelForCausalLM, PreTrainedModel"
OURS = f"{PEER}; import nemotron_h"
READERS = ("nemotron-h", "transformers", "safetensors alone")
# name -> (pattern, mixture of experts?, what it is)
FOLDERS = {"dense": ("M-*", False), "experts": ("MEEE*", True)}


def importing(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def imports(report: Report, rounds: int, warm: bool) -> None:
    for statement in (PEER, OURS) if warm else ():  # once for the disk cache and the bytecode
        importing(statement)
    runs = {"transformers": partial(importing, PEER), "with nemotron_h": partial(importing, OURS)}
    times = measure.in_turns(runs, rounds, Budget(report.budget.left() / 3))
    peer, ours = times.values()
    # Of the pairs, not of the medians: a machine that slows down during the run slows both of a pair.
    difference = statistics.median(b - a for a, b in zip(peer, ours, strict=True))
    report.table(
        "import, seconds",
        ["", "seconds", "rounds"],
        [[name, f"{statistics.median(rounds):.3f}", str(len(rounds))] for name, rounds in times.items()],
    )
    report.data["import"] = {"rounds": times, "difference": difference, "ratio": measure.ratio(ours, peer)}
    report.check("import nemotron_h beside transformers", difference, IMPORT_BOUND, unit=" s")


def write_folder(folder: str, dims: str, name: str) -> int:
    """In a fresh process: a folder in the published layout; the bytes of its weights."""
    pattern, moe = FOLDERS[name]
    model = models.ours(models.config(dims, pattern, moe=moe, dtype=torch.bfloat16))
    model.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def load(folder: str, reader: str) -> dict[str, float]:
    """In a fresh process: seconds until every weight is in memory, and the peak of memory meanwhile."""
    loaders = {
        "nemotron-h": partial(NemotronHForCausalLM.from_pretrained, dtype="auto"),
        "transformers": models.load_theirs,
    }
    kept: list[Any] = []

    def run() -> None:
        if reader in loaders:
            kept.append(loaders[reader](folder))
            tensors = kept[0].state_dict().values()
        else:
            kept.extend(load_file(path) for path in sorted(Path(folder).glob("*.safetensors")))
            tensors = [tensor for file in kept for tensor in file.values()]
        for tensor in tensors:
            tensor.detach().contiguous().view(-1).view(torch.uint8)[::4096].sum()

    with measure.peak_memory() as peak:
        took = measure.seconds(run)
    return {"seconds": took, "bytes": peak.growth}


def folder_loads(report: Report, name: str, folder: str, size: int, rounds: int, budget: Budget) -> None:
    found: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}

    def run(reader: str) -> float:
        found[reader].append(measure.in_fresh_process(load, folder, reader))
        return found[reader][-1]["seconds"]

    times = measure.in_turns({reader: partial(run, reader) for reader in READERS}, rounds, budget)
    mark = report.note("resident memory, in which the pages of a mapped file count until the system wants them back")
    rows, entries = [], {}
    for reader, seconds in times.items():
        copies = statistics.median(each["bytes"] for each in found[reader]) / size
        entries[reader] = {
            "seconds": statistics.median(seconds),
            "over_nemotron_h": measure.ratio(seconds, times["nemotron-h"]),
            "peak_over_weights": copies,
            "rounds": found[reader],
        }
        rows.append(
            [
                reader,
                f"{entries[reader]['seconds']:.2f}",
                f"{entries[reader]['over_nemotron_h']:.2f}",
                f"{copies:.2f}",
                str(len(seconds)),
            ]
        )
    report.table(
        f"Loading, {name}, {size / 1e6:.1f} MB of weights",
        ["", "seconds", "/ nemotron-h", f"peak / weights{mark}", "rounds"],
        rows,
    )
    report.data["folders"].append({"name": name, "bytes": size, "readers": entries})
    if name == "dense":
        report.check(
            "loading, peak memory over the weights' size", entries["nemotron-h"]["peak_over_weights"], COPY_BOUND
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "loading", budget=60, rounds=5)
    parser.add_argument("--only", nargs="+", choices=("import", "bundled", *FOLDERS), help="default: all")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    rounds = 1 if tiny else options.rounds
    parts = options.only or ["import", "bundled", *FOLDERS]
    report = Report("loading", options, __doc__)
    report.data |= {"dims": models.describe(models.config(options.dims, "M-*")), "folders": []}
    if "import" in parts:
        imports(report, rounds, warm=not tiny)
    if "bundled" in parts:
        size = (Path(WORD_PROBLEMS) / "model.safetensors").stat().st_size
        folder_loads(report, "bundled", WORD_PROBLEMS, size, rounds, Budget(report.budget.left() / 4))
    for name in FOLDERS:
        if name in parts:
            with tempfile.TemporaryDirectory() as folder:
                size = measure.in_fresh_process(write_folder, folder, options.dims, name)
                share = 1 if name == list(FOLDERS)[-1] else 2
                folder_loads(report, name, folder, size, rounds, Budget(report.budget.left() / share))
    return report.save()


if __name__ == "__main__":
    main()
