"""A mixture-of-experts model, 128 experts of which 6 are taken, against transformers' own class: prefill and decoding.

Seven layers "MEM*EME", hidden size 1,024, experts of 512, bfloat16, random weights, one process, in turns.
Bound: at least as fast as transformers at both.

    python benchmarks/moe.py                          # about 40 seconds
    python benchmarks/moe.py --lengths 256 1024
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from harness import measure, models
from harness.report import Budget, Report, arguments

BOUND = 1.0
CONTEXT = 512


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "moe", budget=35, rounds=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="of the prefill; default 1024")
    parser.add_argument("--tokens", type=int, default=None, help="decoded in each round; default 8")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    lengths = options.lengths or ([64] if tiny else [1024])
    count = options.tokens or (2 if tiny else 8)
    report = Report("moe", options, __doc__)

    config = models.config(options.dims, models.MOE_PATTERN, moe=True)
    contenders = models.pair(models.ours(config))
    context = 64 if tiny else CONTEXT
    caches = models.filled_caches(*contenders, context)
    report.data |= {"dims": models.describe(config), "dtype": "bfloat16", "entries": []}

    def decode(contender: models.Model, cache: Any) -> float:
        """Seconds of a token: the median of a few, the first of a turn not counted."""
        return statistics.median(contender.decode(cache, count + 1)[1:])

    tasks = [(f"prefill {n}", n, {c.name: partial(c.prefill, n) for c in contenders}) for n in lengths]
    decoders = {c.name: partial(decode, c, cache) for c, cache in zip(contenders, caches, strict=True)}
    tasks.append((f"decode at {context}", 1, decoders))
    rows = []
    for number, (task, tokens, runs) in enumerate(tasks):
        for contender in contenders:
            contender.prefill(8)
        budget = Budget(report.budget.left() / (len(tasks) - number))
        times = measure.in_turns(runs, options.rounds, budget)
        entry = {"task": task, "contenders": {}}
        for name, rounds in times.items():
            median = statistics.median(rounds)
            over = measure.ratio(times["transformers"], rounds)
            entry["contenders"][name] = {
                "tokens_per_second": tokens / median,
                "over_transformers": over,
                "rounds": rounds,
            }
            rows.append([f"{task}, {name}", f"{tokens / median:.1f}", f"{over:.2f}", str(len(rounds))])
        report.data["entries"].append(entry)
        over = entry["contenders"]["nemotron-h"]["over_transformers"]
        report.check(f"{task}, nemotron-h over transformers, tokens per second", over, BOUND, at_most=False)
    report.table("Mixture of experts", ["", "tok/s", "x transformers", "rounds"], rows)
    return report.save()


if __name__ == "__main__":
    main()
