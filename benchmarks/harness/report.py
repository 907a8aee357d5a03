"""A benchmark's command line, what it prints, and the JSON and PNG that it leaves."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import nemotron_h

RESULTS = Path(__file__).parent.parent / "results"
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


class Budget:
    """The seconds a script may take, from its start. What does not fit is measured in part, and the report says so."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.perf_counter()

    def spent(self) -> float:
        return time.perf_counter() - self.start

    def left(self) -> float:
        return self.seconds - self.spent()


def arguments(
    doc: str | None, name: str, *, budget: float, dims: bool = True, rounds: int = 3
) -> argparse.ArgumentParser:
    """The options that every script has; a script adds its own before it parses."""
    parser = argparse.ArgumentParser(prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=budget, metavar="SECONDS", help="default %(default)g")
    parser.add_argument("--full", action="store_true", help="everything whole and all rounds, however long it takes")
    parser.add_argument("--rounds", type=int, default=rounds, help="at most so many; default %(default)s")
    parser.add_argument("--threads", type=int, default=None, help="torch's own choice unless given")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder, or a .json file; default benchmarks/results"
    )
    if dims:
        parser.add_argument("--dims", choices=("full", "tiny"), default="full", help="tiny is for trying the script")
    return parser


class Report:
    def __init__(self, name: str, options: argparse.Namespace, doc: str | None):
        if options.threads:
            torch.set_num_threads(options.threads)
        self.name, self.options = name, options
        self.budget = Budget(math.inf if options.full else options.budget)
        self.data: dict[str, Any] = {
            "benchmark": name,
            "environment": environment(),
            "options": {key: value for key, value in vars(options).items() if key != "output"},
        }
        self.checks: list[dict[str, Any]] = []
        self.notes: list[str] = []
        machine = self.data["environment"]
        print(f"{name}: {(doc or '').strip().splitlines()[0]}")
        print(
            f"{machine['cpu']}, {machine['threads']} threads, {machine['torch_capability']}, "
            f"bf16 instructions: {'yes' if machine['bf16_instructions'] else 'no'}; "
            f"torch {machine['torch']}, transformers {machine['transformers']}"
        )
        if getattr(options, "dims", "") == "tiny":
            print("Tiny dimensions: this tries the script, and its figures mean nothing.")

    def note(self, text: str) -> str:
        """A footnote; the same text is one note. Returns its mark."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def check(self, what: str, value: float | None, bound: float, at_most: bool = True, unit: str = "x") -> None:
        """One line of the acceptance list: printed at the end, never a failure of the script."""
        if value is None:
            return
        holds = value <= bound if at_most else value >= bound
        self.checks.append(
            {"what": what, "value": value, "bound": bound, "sense": "<=" if at_most else ">=", "holds": holds}
        )
        self.checks[-1]["unit"] = unit

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
        print(f"\n{title}")
        for row in [header, *rows]:
            cells = [
                str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  " + "  ".join(cells).rstrip())

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def json_path(self) -> Path:
        output = self.options.output
        return output if output.suffix == ".json" else output / f"{self.name}.json"

    def save(self) -> dict[str, Any]:
        self.data["environment"]["native_kernels"] = _native()
        self.data |= {"checks": self.checks, "notes": self.notes, "seconds": self.budget.spent()}
        print()
        for number, note in enumerate(self.notes, 1):
            print(f"  [{number}] {note}")
        for check in self.checks:
            verdict = "holds" if check["holds"] else "MISSED"
            value, bound, unit = (check[key] for key in ("value", "bound", "unit"))
            print(f"  {check['what']}: {value:.3g}{unit}, bound {check['sense']} {bound:g}{unit}: {verdict}")
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        self.json_path.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"  {self.json_path.name} written, {self.data['seconds']:.0f} s in all")
        return self.data

    def plot(self, panels: Sequence[dict[str, Any]]) -> None:
        """One PNG beside the JSON. A panel: title, x, y (axis names) and lines, name -> (xs, ys)."""
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            print("  no plot: pip install 'nemotron-h[bench]' brings matplotlib")
            return
        panels = [panel for panel in panels if any(xs for xs, _ in panel["lines"].values())]
        if not panels:
            return
        figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.2), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            for name, (xs, ys) in panel["lines"].items():
                axis.plot(xs, ys, marker="o", label=name)
            axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"], xscale="log", ylim=(0, None))
            ticks = sorted({x for xs, _ in panel["lines"].values() for x in xs})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30, minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        machine = self.data["environment"]
        figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads", fontsize=9)
        figure.tight_layout()
        path = self.json_path.with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        print(f"  {path.name} drawn")


def environment() -> dict[str, Any]:
    """What the figures depend on. No names of machines, people or folders."""
    cpu, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "bf16_instructions": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": affinity,
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nemotron_h": nemotron_h.__version__,
        "llama_cpp": _llama_version(),
        "platform": sys.platform,
        "date": datetime.date.today().isoformat(),
    }


def _native() -> bool | None:
    """Whether the package's compiled kernels were there; None for a version without any."""
    try:
        from nemotron_h.ops import native
    except ImportError:
        return None
    return native.library() is not None


def _llama_version() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return None
