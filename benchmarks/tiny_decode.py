"""generate() with the bundled model, greedy, tokens per second, against transformers' own class on the same folder.

A small model shows what is around the arithmetic: Python, dispatch, masks, caches. One process, in turns.
Bound: at least 2 times transformers' tokens per second.

    python benchmarks/tiny_decode.py                  # about half a minute
    python benchmarks/tiny_decode.py --profile        # and where ours spends its time, by function and by operator
"""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from harness import measure, models
from harness.report import Report, arguments

from nemotron_h import NemotronHForCausalLM
from nemotron_h.bundled import WORD_PROBLEMS

BOUND = 2.0


def generate(model: Any, ids: torch.Tensor, count: int) -> float:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    mask = torch.ones_like(ids)
    return measure.seconds(lambda: model.generate(ids, attention_mask=mask, **settings))


def profile(model: Any, ids: torch.Tensor, count: int) -> dict[str, str]:
    """Two tables: Python functions by their own time, and torch's operators."""
    profiler = cProfile.Profile()
    profiler.runcall(generate, model, ids, count)
    text = io.StringIO()
    stats = pstats.Stats(profiler, stream=text).strip_dirs()
    stats.sort_stats("tottime").print_stats(25)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operators:
        generate(model, ids, count)
    table = operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40)
    return {"python": text.getvalue(), "operators": table}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "tiny_decode", budget=25, rounds=9)
    parser.add_argument("--tokens", type=int, default=None, help="new tokens per call; default 128")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt; default %(default)s")
    parser.add_argument("--profile", action="store_true", help="say where the time of ours goes")
    options = parser.parse_args(argv)
    count = options.tokens or (8 if options.dims == "tiny" else 128)
    report = Report("tiny_decode", options, __doc__)

    mine = NemotronHForCausalLM.from_pretrained(WORD_PROBLEMS).eval()
    other = models.load_theirs(WORD_PROBLEMS).eval()
    contenders = {"nemotron-h": mine, "transformers": other}
    ids = models.tokens(mine.config, options.prompt)
    for model in contenders.values():
        generate(model, ids, 4)
    runs = {name: partial(generate, model, ids, count) for name, model in contenders.items()}
    times = measure.in_turns(runs, options.rounds, report.budget)

    entries, rows = {}, []
    for name, rounds in times.items():
        median = statistics.median(rounds)
        over = measure.ratio(times["transformers"], rounds)
        entries[name] = {"tokens_per_second": count / median, "over_transformers": over, "rounds": rounds}
        rows.append([name, f"{count / median:.1f}", f"{median / count * 1e3:.2f}", f"{over:.2f}", str(len(rounds))])
    report.data |= {"dims": models.describe(mine.config), "dtype": "float32", "tokens": count, "contenders": entries}
    report.table(
        f"generate(), {options.prompt} + {count} tokens", ["", "tok/s", "ms/token", "x transformers", "rounds"], rows
    )
    over = entries["nemotron-h"]["over_transformers"]
    report.check("nemotron-h over transformers, tokens per second", over, BOUND, at_most=False)
    if options.profile:
        report.data["profile"] = profile(mine, ids, count)
        for table in report.data["profile"].values():
            print(table)
    return report.save()


if __name__ == "__main__":
    main()
