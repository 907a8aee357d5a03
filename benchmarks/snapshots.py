"""The second turn of a conversation after 1,000 and after 16,000 tokens: with kept states, and computed from nothing.

A model of Mamba and MLP layers, random weights, one process. Each history is computed once and kept by a PromptCache;
then second turns, of the history and new tokens each, are generated in turns for both lengths. A recurrent state has
one size, so a turn should cost what it adds, whatever was said before, and a snapshot weigh the same.
Bounds: the turn after the long history at most 1.1 times the one after the short; the snapshot not a byte more.

    python benchmarks/snapshots.py                    # about a minute
    python benchmarks/snapshots.py --pattern "M-M*M-" # with attention the keys grow
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import measure, models
from harness.report import Report, arguments
from torch import Tensor

from nemotron_h import NemotronHCache, PromptCache

BOUND = 1.1
PATTERN = "MM-MM-"
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "mamba_num_heads": 24, "mamba_head_dim": 64, "vocab_size": 4096}
NEW = 24  # tokens of a turn's question


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "snapshots", budget=50, rounds=15)
    parser.add_argument("--histories", type=int, nargs="+", default=None, help="tokens; default 1000 16000")
    parser.add_argument("--tokens", type=int, default=16, help="that a turn generates; default %(default)s")
    parser.add_argument("--pattern", default=PATTERN, help="default %(default)s")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    histories = options.histories or ([40, 400] if tiny else [1000, 16000])
    report = Report("snapshots", options, __doc__)
    config = models.config(options.dims, options.pattern, **({} if tiny else SMALL))
    model = models.ours(config, torch.float32)
    settings = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}

    def turn(ids: Tensor, **kwargs: Any) -> tuple[float, Tensor]:
        outputs: list[Tensor] = []
        seconds = measure.seconds(lambda: outputs.append(model.generate(ids, **settings, **kwargs)))
        return seconds, outputs[0]

    told = {length: models.tokens(config, length) for length in histories}
    kept, first = {}, {}
    for length, ids in told.items():
        kept[length] = PromptCache(max_bytes=1 << 40)
        first[length], told[length] = turn(ids, prompt_cache=kept[length])
        print(f"turn 1 after {length:,} tokens: {first[length]:.2f} s")

    def question(length: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.cat([told[length], torch.randint(3, config.vocab_size, (1, NEW), generator=generator)], dim=1)

    def run(length: int) -> float:
        asked[length] += 1
        return turn(question(length, asked[length]), prompt_cache=kept[length])[0]

    asked = dict.fromkeys(histories, 0)
    for length in histories:
        run(length)  # the first is not counted
    runs = {str(length): (lambda length=length: run(length)) for length in histories}
    times = measure.in_turns(runs, options.rounds, report.budget)

    rows, report.data["histories"] = [], []
    for length in histories:
        ids = question(length, 0)
        nothing, expected = turn(ids)
        again, found = turn(ids, prompt_cache=kept[length])
        cache = NemotronHCache(config)
        reused = kept[length].resume(cache, told[length][0, :-1], model)
        snapshot = cache.snapshot()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            saving = measure.seconds(lambda path=path, cache=cache: cache.save(path, model=model))
            loading = measure.seconds(lambda path=path: NemotronHCache.load(path, model))
            file = path.stat().st_size
        seconds = statistics.median(times[str(length)])
        same = bool(torch.equal(expected, found))
        report.data["histories"].append(
            {
                "tokens": length,
                "turn_1": {"seconds": first[length]},
                "turn_2": {"seconds": seconds, "all": times[str(length)], "reused_tokens": reused},
                "turn_2_from_nothing": {"seconds": nothing},
                "same_tokens": same,
                "snapshot_bytes": snapshot.nbytes,
                "file_bytes": file,
                "save": {"seconds": saving},
                "load": {"seconds": loading},
            }
        )
        rows.append(
            [
                f"{length:,}", f"{seconds * 1e3:.0f} ms", f"{nothing * 1e3:.0f} ms", f"{nothing / seconds:.1f}x",
                f"{snapshot.nbytes:,}", f"{saving * 1e3:.0f} / {loading * 1e3:.0f} ms", "yes" if same else "no",
            ]
        )  # fmt: skip
        del again
    header = ["history", "turn 2", "from nothing", "gain", "snapshot bytes", "save / load", "same tokens"]
    report.table(f"{NEW} new tokens and {options.tokens} generated, {options.pattern}, float32", header, rows)
    short, long = report.data["histories"][0], report.data["histories"][-1]
    report.data["dims"] = models.describe(config)
    slower = measure.ratio(times[str(histories[-1])], times[str(histories[0])])
    report.check(f"turn 2 after {histories[-1]:,} over after {histories[0]:,} tokens", slower, BOUND)
    if "*" not in options.pattern:
        report.check("bytes of the snapshots", long["snapshot_bytes"] / short["snapshot_bytes"], 1.0)
    return report.save()


if __name__ == "__main__":
    main()
