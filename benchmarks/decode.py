"""Tokens per second at context 512 and 8,192: bfloat16, int8 and int4, beside transformers' own class and llama.cpp.

Nine layers "M-M*-M-M-" with the dimensions of Nemotron Nano 9B v2, random weights, one process. Each model in turn
decodes a few tokens, one forward each; the first of a turn is not counted; the median of a token is what is given, and
with it the share of the memory bandwidth, measured in the same run, at which a token's weights were read.
Bounds, over transformers in bfloat16: bfloat16 at least 1.6 times, int8 3 times, int4 4.5 times as many tokens.

The contexts are not prefilled, which could take an hour: caches are filled with random keys, values and states of that
length, the same for both models; llama.cpp takes the state that a thinner model of the same cache shapes has come to.

    python benchmarks/decode.py                       # about 2 minutes
    python benchmarks/decode.py --contexts 512 --tokens 64
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import llama, measure, models
from harness.report import Budget, Report, arguments

BOUNDS = {"nemotron-h bf16": 1.6, "nemotron-h int8": 3.0, "nemotron-h int4": 4.5}
PEER = "transformers bf16"
TURN = 5  # tokens of a turn, of which the first is not counted


def in_short_turns(
    runs: dict[str, Callable[[int], list[float]]], tokens: int, budget: Budget
) -> dict[str, list[float]]:
    """Seconds of each counted token, at least of two turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    turns = -(-tokens // (TURN - 1))
    for turn in range(turns):
        if turn >= 2 and budget.left() < 0:
            break
        for name in runs if turn % 2 == 0 else reversed(runs):
            times[name] += runs[name](TURN)[1:]
    return times


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "decode", budget=110)
    parser.add_argument("--contexts", type=int, nargs="+", default=None, help="default 512 8192")
    parser.add_argument("--tokens", type=int, default=32, help="counted for each model; default %(default)s")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    contexts = options.contexts or ([64] if tiny else [512, 8192])
    report = Report("decode", options, __doc__)

    config = models.config(options.dims)
    model = models.ours(config)
    mine, twin = models.pair(model)
    bandwidth = measure.read_bandwidth(1 << (24 if tiny else 30))
    report.data |= {
        "dims": models.describe(config),
        "bandwidth": bandwidth,
        "contexts": [],
        "tokens_per_turn": TURN,
        "filled": "random keys, values and states",
    }
    ways = ", ".join(f"{name} {value:.1f}" for name, value in bandwidth.items() if name != "best")
    print(f"read bandwidth {bandwidth['best']:.1f} GB/s, the best of: {ways}")

    variants = {"nemotron-h bf16": mine}
    for bits in (8, 4):
        quantised = models.quantised(model, bits)
        if quantised is None:
            print(f"int{bits} is left out: this version of the package has no nemotron_h.quantization")
        else:
            variants[f"nemotron-h int{bits}"] = models.Model(f"int{bits}", quantised, mine.new_cache)
    bytes_read = {name: models.linear_bytes(variant.model) for name, variant in variants.items()}
    bytes_read[PEER] = models.linear_bytes(twin.model)

    with tempfile.TemporaryDirectory() as folder:
        peers, thin = {}, None
        if reason := llama.missing():
            print(reason)
        else:
            peers, thin = llama_files(options.dims, model, Path(folder), report.threads)
            bytes_read |= {name: llama.matrix_bytes(path) for name, path in peers.items()}
        loaded = {name: llama.Llama(path, name, contexts[0] + 512, report.threads) for name, path in peers.items()}
        for number, context in enumerate(contexts):
            budget = Budget(report.budget.left() / (len(contexts) - number))
            runs: dict[str, Callable[[int], list[float]]] = {}
            for name, variant in variants.items():
                cache, other = models.filled_caches(variant, twin, context)
                runs[name] = partial(variant.decode, cache)
            runs[PEER] = partial(twin.decode, other)
            for floor in models.floors(model):
                runs[f"{floor.name} bf16"] = floor.decode
                bytes_read[f"{floor.name} bf16"] = bytes_read[PEER]
            if thin:
                state = llama_state(thin, context, report.threads)
                for name, peer in loaded.items():
                    peer.resize(context + 512)
                    peer.take(state)
                    runs[name] = peer.decode
            for run in runs.values():
                run(1)
            times = in_short_turns(runs, options.tokens, budget)
            show(report, context, times, bytes_read, bandwidth["best"])
        for peer in loaded.values():
            peer.close()
    return report.save()


def llama_files(dims: str, model: Any, folder: Path, threads: int) -> tuple[dict[str, Path], Path]:
    """The model in llama.cpp's types, and a thin model whose caches have the same shapes."""
    files = {f"llama.cpp {kind}": folder / f"{kind}.gguf" for kind in llama.TYPES}
    source = files["llama.cpp bf16"]
    llama.write_gguf(model, source)
    for kind in llama.TYPES[1:]:
        llama.quantise(source, files[f"llama.cpp {kind}"], kind, threads)
    narrow = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    llama.write_gguf(models.ours(models.config(dims, **narrow)), folder / "thin.gguf")
    return files, folder / "thin.gguf"


def llama_state(thin: Path, length: int, threads: int) -> tuple[bytes, int]:
    model = llama.Llama(thin, "thin", length + 512, threads)
    model.prefill(length)
    state = model.state()
    model.close()
    return state


def show(
    report: Report, context: int, times: dict[str, list[float]], bytes_read: dict[str, int], bandwidth: float
) -> None:
    entries, rows = {}, []
    medians = {name: statistics.median(tokens) for name, tokens in times.items()}
    for name, tokens in times.items():
        median = medians[name]
        gigabytes = bytes_read[name] / 1e9
        over_peer = medians[PEER] / median
        entries[name] = {
            "tokens_per_second": 1 / median,
            "seconds_per_token": median,
            "over_transformers": over_peer,
            "weight_bytes_per_token": bytes_read[name],
            "bandwidth_share": gigabytes / median / bandwidth,
            "rounds": tokens,
        }
        cells = [f"{1 / median:.2f}", f"{median * 1e3:.1f}", f"{over_peer:.2f}", f"{gigabytes:.2f}"]
        rows.append([name, *cells, f"{gigabytes / median / bandwidth:.0%}", str(len(tokens))])
        if name in BOUNDS:
            what = f"context {context}, {name} over {PEER}, tokens per second"
            report.check(what, over_peer, BOUNDS[name], at_most=False)
    report.data["contexts"].append({"context": context, "contenders": entries})
    header = ["", "tok/s", "ms/token", "x transformers", "GB/token", "of bandwidth", "tokens"]
    report.table(f"Decoding at context {context}", header, rows)


if __name__ == "__main__":
    main()
