"""Peak memory and time of one long prefill, 131,072 tokens of "M-" and 32,768 of "M*-", a fresh process each.

Dimensions of Nemotron Nano 9B v2 in bfloat16, random weights, no chunking by the caller. Memory is how far the resident
memory rises above weights, keys and values, and states. Bounds: at most 1.5 GB at those lengths, and for "M-" the same
within 10% at 16,384 and 65,536 tokens. transformers' own class stands beside it at 8,192, with "M*-" (a model without
attention it does not run).

Lengths that would take more than the budget are measured with stand-ins in the Linears' places, which write numbers of
the same shape and compute nothing (the memory is that of the rest, and the time says nothing), or left out; the table
says which.

    python benchmarks/long_prefill.py                 # about a minute and a half
    python benchmarks/long_prefill.py --full          # everything, with the Linears
    python benchmarks/long_prefill.py --lengths 4096 16384 --attention-lengths 4096
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import measure, models
from harness.report import Report, arguments

BOUND_GB, SAME = 1.5, 1.1
PROBE, ATTENTION_PROBE = 128, 512
OURS, THEIRS = "nemotron-h", "transformers"


def one_prefill(dims: str, who: str, pattern: str, length: int, ready: bool) -> dict[str, float]:
    """In a fresh process: seconds, and bytes above weights, keys, values and states."""
    model = models.ours(models.config(dims, pattern))
    mine = contender = models.Model(OURS, model, lambda: models.NemotronHCache(model.config))
    if who == THEIRS:
        mine, contender = models.pair(model)
    if ready:
        for side in (mine, contender):
            models.without_linears(side.model)
    held = mine.new_cache()
    mine.forward(models.tokens(model.config, 2), held)
    per_token, states = held_bytes(held)
    del held
    ids, cache = models.tokens(model.config, length), contender.new_cache()
    with measure.peak_memory() as peak:
        took = measure.seconds(lambda: contender.forward(ids, cache))
    cached = states + per_token * length
    return {"seconds": took, "bytes": peak.growth - cached, "growth": peak.growth, "cache_bytes": cached}


def held_bytes(cache: Any) -> tuple[int, int]:
    """What the cache of two tokens says: bytes of keys and values per token, and of states."""
    growing = sum(
        layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None and layer.keys.numel()
    )
    return growing // 2, cache.nbytes() - growing


def attention_seconds(config: Any, length: int) -> float:
    """Of one causal attention, the one part that grows with the square of the length."""
    q, k, v = (
        torch.randn(1, heads, ATTENTION_PROBE, config.head_dim, dtype=torch.bfloat16)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        attend()
        return measure.seconds(attend) * (length / ATTENTION_PROBE) ** 2


class Cost:
    """Seconds to expect of a length, by the last one that was measured."""

    def __init__(self, config: Any, pattern: str, length: int, took: float):
        self.squared = attention_seconds(config, 1) if "*" in pattern else 0.0
        self.learn(length, took)

    def learn(self, length: int, took: float) -> None:
        self.per_token = max(took - self.squared * length**2, 0.1 * took) / length

    def of(self, length: int) -> float:
        return self.per_token * length + self.squared * length**2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "long_prefill", budget=100)
    parser.add_argument("--lengths", type=int, nargs="+", help="of M-; default 16384 65536 131072")
    parser.add_argument("--attention-lengths", type=int, nargs="+", help="of M*-; default 8192 32768")
    parser.add_argument("--peer-lengths", type=int, nargs="+", help="of transformers' M*-; default 8192")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    jobs = [
        (THEIRS, "M*-", options.peer_lengths or ([256] if tiny else [8192])),
        (OURS, "M*-", options.attention_lengths or ([256] if tiny else [8192, 32768])),
        (OURS, "M-", options.lengths or ([256, 512] if tiny else [16384, 65536, 131072])),
    ]
    report = Report("long_prefill", options, __doc__)
    config = models.config(options.dims, "M*-")
    report.data |= {"dims": models.describe(config), "entries": []}
    for place, (who, pattern, lengths) in enumerate(jobs):
        ready, cost, budget = False, None, report.budget.left() / (len(jobs) - place)
        end = report.budget.spent() + budget
        if not options.full:
            for ready in (False, True):  # one way for all the lengths, which are compared with each other
                took = measure.in_fresh_process(one_prefill, options.dims, who, pattern, PROBE, ready)["seconds"]
                cost = Cost(config, pattern, PROBE, took)
                if sum(map(cost.of, lengths)) <= budget:
                    break
        for number, length in enumerate(sorted(lengths)):
            left = end - report.budget.spent()
            if number and cost and cost.of(length) > left:
                print(f"  {who} {pattern} at {length} tokens is left out: about {cost.of(length):.0f} s of {left:.0f}")
                continue
            try:
                found = measure.in_fresh_process(one_prefill, options.dims, who, pattern, length, ready)
            except RuntimeError as error:
                print(f"  {error}")
                continue
            if cost:
                cost.learn(length, found["seconds"])
            report.data["entries"].append(
                {"who": who, "pattern": pattern, "length": length, "stand_ins_for_linears": ready, **found}
            )
    show(report)
    return report.save()


def show(report: Report) -> None:
    entries = sorted(report.data["entries"], key=lambda e: (e["who"], e["pattern"], e["length"]))
    rows = []
    for entry in entries:
        mark = ""
        if entry["stand_ins_for_linears"]:
            mark = report.note("stand-ins in the Linears' places, for time: memory without theirs, time of the rest")
        length = entry["length"]
        rows.append(
            [
                f"{entry['who']} {entry['pattern']}",
                str(length),
                f"{entry['bytes'] / 1e9:.3f}{mark}",
                f"{entry['bytes'] / length / 1e3:.1f}",
                f"{entry['cache_bytes'] / 1e6:.0f}",
                f"{entry['seconds']:.1f}{mark}",
                f"{length / entry['seconds']:.0f}",
            ]
        )
    report.table(
        "One prefill (GB above weights, keys, values and states)",
        ["", "tokens", "GB", "KB/token", "cache MB", "seconds", "tok/s"],
        rows,
    )
    mamba = {e["length"]: e["bytes"] for e in entries if (e["who"], e["pattern"]) == (OURS, "M-")}
    mixed = {e["length"]: e["bytes"] for e in entries if (e["who"], e["pattern"]) == (OURS, "M*-")}
    peer = {e["length"]: e["bytes"] for e in entries if e["who"] == THEIRS}
    for pattern, found in (("M-", mamba), ("M*-", mixed)):
        if found:
            longest = max(found)
            report.check(f"{pattern} at {longest} tokens, peak memory", found[longest] / 1e9, BOUND_GB, unit=" GB")
    if len(mamba) > 1:
        shortest = min(mamba)
        for length in sorted(mamba)[1:]:
            what = f"M- at {length} tokens over {shortest}, peak memory"
            report.check(what, mamba[length] / max(mamba[shortest], 1), SAME)
    for length in sorted(set(peer) & set(mixed)):
        print(f"  {length} tokens: transformers takes {peer[length] / max(mixed[length], 1):.1f} times the memory")
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        lines.setdefault(f"{entry['who']} {entry['pattern']}", []).append(entry)
    report.plot(
        [
            {
                "title": title,
                "x": "tokens",
                "y": unit,
                "lines": {
                    name: ([e["length"] for e in found], [e[key] / scale for e in found])
                    for name, found in lines.items()
                    if key == "bytes" or not found[0]["stand_ins_for_linears"]
                },
            }
            for title, key, unit, scale in (
                ("Memory above weights, keys, values and states", "bytes", "GB", 1e9),
                ("Time of one prefill", "seconds", "seconds", 1),
            )
        ]
    )


if __name__ == "__main__":
    main()
