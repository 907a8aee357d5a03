"""One Mamba-2 layer at 2,048 tokens, part by part, beside transformers'; then its memory and time per token by length.

Dimensions of Nemotron Nano 9B v2 in bfloat16, random weights. Bounds: everything but the two projections takes at most
15% of the projections' time; time and memory per token at 8,192, 16,384 and 65,536 tokens are at most 5% above those
at 2,048 (a whole model of one Mamba layer, fresh process each; for the time, 2,048 is measured before and after each of
them: a machine that slows down slows both).

Where the projections alone would take more than the budget, they are measured at fewer rows and scaled, and stand-ins
that only write numbers of their shape take their places while the rest is measured; the table marks it.

    python benchmarks/mamba_layer.py                  # about a minute and a half
    python benchmarks/mamba_layer.py --length 512 --lengths 512 1024
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from harness import measure, models
from harness.report import Budget, Report, arguments
from torch import nn

from nemotron_h import ops

PARTS = ("in_proj", "conv", "scan", "gated norm", "rest", "out_proj")
PROJECTIONS = ("in_proj", "out_proj")
SHARE, FLAT = 0.15, 1.05
ROWS = 128  # of the projections where they are measured apart
REPEATS = 4  # of the shortest length, as long together as the next


@contextmanager
def stopwatch(targets: Sequence[tuple[Any, str, str]]) -> Iterator[dict[str, float]]:
    """Seconds by label, of functions named by (owner, attribute, label); of nested ones the outermost counts."""
    took: dict[str, float] = {}
    inside: list[str] = []
    kept = []

    def watched(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return function(*args, **kwargs)
            inside.append(label)
            results: list[Any] = []
            took[label] = took.get(label, 0.0) + measure.seconds(lambda: results.append(function(*args, **kwargs)))
            inside.pop()
            return results[0]

        return call

    for owner, attribute, label in targets:
        kept.append((owner, attribute, vars(owner).get(attribute)))
        setattr(owner, attribute, watched(getattr(owner, attribute), label))
    try:
        yield took
    finally:
        for owner, attribute, old in reversed(kept):
            if old is None:
                delattr(owner, attribute)  # a method of the class was shadowed on the instance
            else:
                setattr(owner, attribute, old)


def watch_points(mixer: nn.Module) -> list[tuple[Any, str, str]]:
    modules = {"in_proj": "in_proj", "conv1d": "conv", "norm": "gated norm", "out_proj": "out_proj"}
    points = [(getattr(mixer, name), "forward", label) for name, label in modules.items()]
    functions: dict[ModuleType, dict[str, str]] = {
        ops: {"causal_conv": "conv", "time_step": "scan", "ssd": "scan", "gated_rms_norm": "gated norm"},
        models.library: {"causal_conv1d_fn": "conv", "mamba2_chunk_scan": "scan"},
    }
    return points + [
        (owner, name, label)
        for owner, names in functions.items()
        for name, label in names.items()
        if hasattr(owner, name)
    ]


@torch.no_grad()
def split(contender: models.Model, length: int) -> dict[str, float]:
    """Seconds of each part of the first Mamba mixer, and of all of it."""
    mixer = contender.model.model.layers[0].mixer
    x_BLD = torch.randn(1, length, contender.model.config.hidden_size).to(contender.model.dtype)
    cache = contender.new_cache()
    with stopwatch(watch_points(mixer)) as took:
        whole = measure.seconds(lambda: mixer(x_BLD, cache=cache))
    return {**{part: took.get(part, 0.0) for part in PARTS}, "rest": whole - sum(took.values()), "whole": whole}


@torch.no_grad()
def projections(contender: models.Model, rows: int, scale_to: int) -> dict[str, float]:
    """Seconds of the two projections alone, scaled from some rows to as many as are wanted."""
    took = {}
    for name in PROJECTIONS:
        linear = getattr(contender.model.model.layers[0].mixer, name)
        x = torch.randn(1, rows, linear.in_features).to(contender.model.dtype)
        took[name] = measure.seconds(lambda linear=linear, x=x: linear(x)) * scale_to / rows
    return took


def parts(report: Report, options: Any, length: int) -> float:
    """The split at one length, both models in turns. Returns the seconds per token of our projections."""
    contenders = models.pair(models.ours(models.config(options.dims, "M*")))
    alone: dict[str, list[dict[str, float]]] = {}
    for contender in contenders:
        split(contender, 8)
        alone[contender.name] = [projections(contender, ROWS, length) for _ in range(3)]
    median = {
        name: {part: statistics.median(took[part] for took in rounds) for part in PROJECTIONS}
        for name, rounds in alone.items()
    }
    apart = sum(sum(took.values()) for took in median.values()) > report.budget.left() / 4
    if apart:
        for contender in contenders:
            models.without_linears(contender.model.model.layers[0].mixer)
    series: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}

    def run(contender: models.Model) -> float:
        took = split(contender, length)
        if apart:
            real = median[contender.name]
            took["whole"] += sum(real[part] - took[part] for part in PROJECTIONS)
            took |= real
        series[contender.name].append(took)
        return took["whole"]

    measure.in_turns(
        {contender.name: partial(run, contender) for contender in contenders},
        options.rounds,
        Budget(report.budget.left() / 3),
    )
    rows, entries = [], {}
    mark = report.note(f"projections measured apart with {ROWS} rows and scaled, for time") if apart else ""
    for name, rounds in series.items():
        medians = {part: statistics.median(took[part] for took in rounds) for part in (*PARTS, "whole")}
        share = statistics.median(
            (took["whole"] - took["in_proj"] - took["out_proj"]) / (took["in_proj"] + took["out_proj"])
            for took in rounds
        )
        entries[name] = {"seconds": medians, "around_over_projections": share, "rounds": rounds}
        cells = [f"{medians[part] * 1e3:.1f}" + (mark if part in PROJECTIONS else "") for part in PARTS]
        rows.append([name, *cells, f"{medians['whole'] * 1e3:.1f}", f"{share:.1%}"])
    report.table(
        f"One Mamba mixer, {length} tokens, ms ({len(rounds)} rounds)", ["", *PARTS, "whole", "share around"], rows
    )
    report.data["parts"] = {"length": length, "projections_apart": apart, "contenders": entries}
    if apart:
        report.data["parts"]["projections"] = alone
    report.check(
        f"{length} tokens, a Mamba layer without its projections over its projections",
        entries["nemotron-h"]["around_over_projections"],
        SHARE,
    )
    return sum(median["nemotron-h"].values()) / length


def at_length(dims: str, length: int, ready: bool, repeats: int) -> dict[str, float]:
    """In a fresh process: our model of one Mamba layer, a prefill. Seconds, the median of `repeats`, and bytes above
    weights and states, of the first."""
    model = models.ours(models.config(dims, "M"))
    if ready:
        models.without_linears(model)
    contender = models.Model("nemotron-h", model, lambda: models.NemotronHCache(model.config))
    contender.prefill(64)
    ids, cache = models.tokens(model.config, length), contender.new_cache()
    with measure.peak_memory() as peak:
        took = [measure.seconds(lambda: contender.forward(ids, cache))]
    took += [contender.prefill(length) for _ in range(repeats - 1)]
    return {"length": length, "seconds": statistics.median(took), "bytes": peak.growth - cache.nbytes()}


def by_length(report: Report, options: Any, lengths: Sequence[int], linear: float) -> None:
    """`linear`: the seconds per token of the projections.

    The first length is measured again after each other: a length is compared with those on both sides of it.
    """
    probe = measure.in_fresh_process(at_length, options.dims, lengths[0], True, REPEATS)
    around = probe["seconds"] / lengths[0]
    again = REPEATS * lengths[0]
    ready = (around + linear) * sum(length + again for length in lengths) > report.budget.left()
    first = probe if ready else measure.in_fresh_process(at_length, options.dims, lengths[0], False, REPEATS)
    entries, firsts = [first], [first["seconds"]]
    for length in lengths[1:]:
        cost = (around + (0.0 if ready else linear)) * (length + again)
        if cost > report.budget.left():
            print(f"  {length} tokens are left out: about {cost:.0f} s, more than the budget has left")
            continue
        entries.append(measure.in_fresh_process(at_length, options.dims, length, ready, 1))
        firsts.append(measure.in_fresh_process(at_length, options.dims, lengths[0], ready, REPEATS)["seconds"])
        entries[-1]["seconds_of_first"] = statistics.mean(firsts[-2:])
    first |= {"seconds": statistics.median(firsts), "seconds_of_first": statistics.median(firsts)}
    mark = ""
    if ready:
        mark = report.note("stand-ins in the projections' places, for time: what is around them is measured")
    rows = []
    for entry in entries:
        length = entry["length"]
        time = entry["seconds"] / length / (entry["seconds_of_first"] / lengths[0])
        memory = entry["bytes"] / length / (first["bytes"] / lengths[0])
        entry |= {"seconds_per_token_over_first": time, "bytes_per_token_over_first": memory}
        rows.append(
            [
                f"{length}{mark}",
                f"{entry['seconds']:.2f}",
                f"{entry['seconds'] / length * 1e6:.0f}",
                f"{time:.3f}",
                f"{entry['bytes'] / 1e6:.0f}",
                f"{entry['bytes'] / length / 1e3:.1f}",
                f"{memory:.3f}",
            ]
        )
        if length != lengths[0]:
            report.check(f"{length} tokens, time per token over that at {lengths[0]}", time, FLAT)
            report.check(f"{length} tokens, memory per token over that at {lengths[0]}", memory, FLAT)
    report.table(
        "A model of one Mamba layer, nemotron-h, fresh process each (memory above weights and states; time over the "
        "first's beside it)",
        ["tokens", "seconds", "us/token", "/ first", "MB", "KB/token", "/ first"],
        rows,
    )
    report.data["by_length"] = {"stand_ins_for_projections": ready, "entries": entries}
    xs = [entry["length"] for entry in entries]
    report.plot(
        [
            {
                "title": "One Mamba layer, time",
                "x": "tokens",
                "y": "µs per token",
                "lines": {"nemotron-h": (xs, [entry["seconds"] / entry["length"] * 1e6 for entry in entries])},
            },
            {
                "title": "One Mamba layer, memory above weights and states",
                "x": "tokens",
                "y": "MB",
                "lines": {"nemotron-h": (xs, [entry["bytes"] / 1e6 for entry in entries])},
            },
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "mamba_layer", budget=80)
    parser.add_argument("--length", type=int, default=None, help="of the split; default 2048")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="default 2048 8192 16384 65536")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    report = Report("mamba_layer", options, __doc__)
    report.data["dims"] = models.describe(models.config(options.dims, "M"))
    linear = parts(report, options, options.length or (128 if tiny else 2048))
    by_length(report, options, options.lengths or ([256, 512] if tiny else [2048, 8192, 16384, 65536]), linear)
    return report.save()


if __name__ == "__main__":
    main()
