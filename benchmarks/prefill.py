"""Prefill time at 2,048 and 8,192 tokens, against the bare Linears, transformers' own class and llama.cpp.

Nine layers "M-M*-M-M-" with the dimensions of Nemotron Nano 9B v2 in bfloat16, random weights, one process, in turns.
Bound: at most 1.15 times the bare Linears (F.linear with the model's weights and rows, nothing else), which is also
given for the fastest linear that this package has, where it has one.

On a CPU without bfloat16 instructions some of these take many minutes. What does not fit the budget is measured one
layer of each kind at a time and added up, at fewer tokens if need be, scaled in proportion (which leaves out that
attention grows faster); the table marks it.

    python benchmarks/prefill.py                      # about 3 minutes
    python benchmarks/prefill.py --full               # everything whole, three rounds
    python benchmarks/prefill.py --lengths 512 --threads 1
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import llama, measure, models
from harness.report import Budget, Report, arguments

BOUND = 1.15
OURS = "nemotron-h"
PROBE = 128  # tokens; enough for a GEMM to run as it does at length


@dataclass
class Plan:
    """How one contender is measured at one length: whole or layer by layer, at `tokens` of the `length` wanted."""

    whole: bool
    tokens: int
    length: int
    cost: float

    def says(self) -> str | None:
        parts = []
        if not self.whole:
            parts.append("one layer of each kind, times their number")
        if self.tokens != self.length:
            parts.append(f"{self.tokens} tokens, scaled to {self.length} in proportion")
        return "measured in part, for time: " + "; ".join(parts) if parts else None


def ways(layers: dict[str, float], counts: Counter, length: int) -> list[Plan]:
    """From the cheapest to the most faithful, by the seconds of one layer of each kind at PROBE tokens.

    A contender that cannot run a layer by itself has the kind "all", its seconds for the whole model.
    """
    per_token = sum(counts.get(kind, 1) * took for kind, took in layers.items()) / PROBE
    alone = "all" not in layers
    one_each = sum(layers.values()) / PROBE
    plans = [Plan(True, length, length, per_token * length)]
    tokens = length if alone else length // 2
    while tokens >= PROBE:
        plans.append(Plan(not alone, tokens, length, one_each * tokens))
        tokens //= 2
    return plans[::-1]


def choose(candidates: dict[str, list[Plan]], available: float) -> dict[str, Plan]:
    """A plan for each: the cheapest, and then again and again the least faithful improved that the budget carries.

    Ours counts as less faithful than it is: it is what the others are compared with.
    """
    place = dict.fromkeys(candidates, 0)

    def cost(name: str, more: int = 0) -> float:
        return candidates[name][place[name] + more].cost

    while True:
        spare = available - sum(map(cost, candidates))
        better = [
            name
            for name, plans in candidates.items()
            if place[name] + 1 < len(plans) and cost(name, 1) - cost(name) <= spare
        ]
        if not better:
            return {name: plans[place[name]] for name, plans in candidates.items()}
        place[min(better, key=lambda name: candidates[name][place[name]].tokens * (1 if name == OURS else 4))] += 1


def run_plan(contender: Any, plan: Plan, counts: Counter) -> float:
    """Seconds for the whole length, as the plan has it."""
    if plan.whole:
        took = contender.prefill(plan.tokens)
    else:
        took = sum(count * contender.layer(kind, plan.tokens) for kind, count in counts.items())
    return took * plan.length / plan.tokens


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "prefill", budget=180)
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="default 2048 8192")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    lengths = options.lengths or ([256] if tiny else [2048, 8192])
    report = Report("prefill", options, __doc__)
    budget = report.budget

    config = models.config(options.dims)
    model = models.ours(config)
    counts = Counter(config.layers_block_type)
    report.data |= {"dims": models.describe(config), "dtype": "bfloat16", "lengths": []}
    contenders: dict[str, Any] = {each.name: each for each in (*models.pair(model), *models.floors(model))}
    probes = {}
    for name, contender in contenders.items():
        for kind in counts:  # the first call of each is for what is only done once
            contender.layer(kind, 8)
        probes[name] = {kind: contender.layer(kind, PROBE) for kind in counts}
    report.data["probe"] = {"tokens": PROBE, "seconds": probes}

    with tempfile.TemporaryDirectory() as folder:
        if reason := llama.missing():
            print(reason)
        else:
            llama.write_gguf(model, Path(folder) / "model.gguf")
            name = "llama.cpp bf16"
            contenders[name] = llama.Llama(Path(folder) / "model.gguf", name, PROBE * 2, report.threads)
            contenders[name].prefill(8)
            probes[name] = {"all": contenders[name].prefill(PROBE)}

        for number, length in enumerate(lengths):
            # The longer length, measured last, has what is left; the shorter one half of it at most.
            available = budget.left() / (len(lengths) - number)
            plans = choose({name: ways(probe, counts, length) for name, probe in probes.items()}, available)
            times = measure.in_turns(
                {name: partial(run_plan, contenders[name], plans[name], counts) for name in contenders},
                options.rounds,
                Budget(available),
            )
            show(report, length, plans, times)

    report.plot(
        [
            {
                "title": "Prefill",
                "x": "tokens",
                "y": "seconds",
                "lines": {
                    name: (
                        [entry["length"] for entry in report.data["lengths"]],
                        [entry["contenders"][name]["seconds"] for entry in report.data["lengths"]],
                    )
                    for name in contenders
                },
            }
        ]
    )
    return report.save()


def show(report: Report, length: int, plans: dict[str, Plan], times: dict[str, list[float]]) -> None:
    entries, rows = {}, []
    floors = [name for name in times if name.startswith("bare")]
    mine = times[OURS]
    for name, rounds in times.items():
        note = plans[name].says()
        median = statistics.median(rounds)
        ratio = measure.ratio(rounds, mine)
        entries[name] = {
            "seconds": median,
            "tokens_per_second": length / median,
            "over_nemotron_h": ratio,
            "rounds": rounds,
            "whole": plans[name].whole,
            "tokens_measured": plans[name].tokens,
        }
        mark = report.note(note) if note else ""
        rows.append([name, f"{median:.2f}{mark}", f"{length / median:.1f}", f"{ratio:.2f}", str(len(rounds))])
    report.data["lengths"].append({"length": length, "contenders": entries})
    report.table(f"{length} tokens", ["", "seconds", "tok/s", "/ nemotron-h", "rounds"], rows)
    for name in floors:
        report.check(f"{length} tokens, nemotron-h over {name}", measure.ratio(mine, times[name]), BOUND)


if __name__ == "__main__":
    main()
