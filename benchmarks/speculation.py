"""Speculative decoding: tokens per second of prompt lookup over plain greedy generate(), and the cost of a check.

Two texts that repeat themselves. The bundled model, in float32, is let go on after its answer, whose line it then says
again and again; and nine layers with the dimensions of Nemotron Nano 9B v2 in bfloat16, whose random weights are made
to copy: the embeddings are large beside what the layers add to them, and the head's row of a token is the embedding of
the one before it, so that every token is followed by the next of a period; all layers are computed all the same. Both
are the most that speculation can give: nearly every draft is kept. Bound: 2 times the tokens per second, same tokens.

Then the step that checks a draft of four tokens, five tokens at once, over the step of one: everything but the Linears
and the head (bound: 1.3 times), and whole steps in bfloat16, int8 and int4; and going back over two of the tokens.

    python benchmarks/speculation.py                  # about 2 minutes
    python benchmarks/speculation.py --lookup 15 --tokens 192
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from harness import measure, models
from harness.report import Report, arguments
from torch import Tensor

from nemotron_h import NemotronHForCausalLM
from nemotron_h.bundled import WORD_PROBLEMS, held_out
from nemotron_h.compat import CACHE_NAME

SPEEDUP, AROUND = 2.0, 1.3
PERIOD = 24
DRAFT = 4
CONTEXT = 512


def bundled() -> tuple[Any, Tensor]:
    """The bundled model, and a problem with its reasoning and answer, the answer's line said three times."""
    from transformers import AutoTokenizer

    model = NemotronHForCausalLM.from_pretrained(WORD_PROBLEMS).eval()
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    messages = [{"role": "user", "content": held_out()[1]["question"]}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return model, model.generate(asked["input_ids"], max_new_tokens=150, do_sample=False, eos_token_id=None)


@torch.no_grad()
def copying(model: NemotronHForCausalLM) -> tuple[NemotronHForCausalLM, Tensor]:
    """A model that repeats the last `PERIOD` tokens for ever, in place, and a prompt to begin with."""
    embeddings, head = model.model.embeddings.weight, model.lm_head.weight
    row = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(5))
    embeddings.copy_(row * 100)
    head.zero_()
    first = 8
    period = torch.arange(first, first + PERIOD)
    head[period.roll(-1)] = row[period].to(head.dtype)
    return model, period.repeat(3)[None]


def speedup(report: Report, name: str, model: Any, ids: Tensor, count: int, lookup: int, rounds: int) -> None:
    """Plain and looked up, in turns."""
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    ways: dict[str, dict[str, Any]] = {"plain": {}, "prompt lookup": {"prompt_lookup_num_tokens": lookup}}
    outputs: dict[str, Any] = {}

    def run(way: str, new: int = count) -> float:
        def go() -> None:
            mask = torch.ones_like(ids)
            outputs[way] = model.generate(ids, attention_mask=mask, **{**settings, "max_new_tokens": new}, **ways[way])

        return measure.seconds(go)

    for way in ways:
        run(way, min(count, 2 * lookup))
    times = measure.in_turns({way: lambda way=way: run(way) for way in ways}, rounds, report.budget)
    same = torch.equal(outputs["plain"].sequences, outputs["prompt lookup"].sequences)
    found = outputs["prompt lookup"].speculation
    over = measure.ratio(times["plain"], times["prompt lookup"])
    medians = {way: statistics.median(seconds) for way, seconds in times.items()}
    report.data["speedups"][name] = {
        "same_tokens": same,
        "tokens": count,
        "drafts_of": lookup,
        "over_plain": over,
        "tokens_per_step": found.tokens_per_step,
        "acceptance": found.acceptance_rate,
        **{way: {"tokens_per_second": count / medians[way], "rounds": times[way]} for way in ways},
    }
    rows = [[way, f"{count / medians[way]:.2f}", str(len(times[way]))] for way in ways]
    report.table(f"{name}: {count} tokens, drafts of {lookup}", ["", "tok/s", "rounds"], rows)
    print(
        f"{over:.2f} times; {found.tokens_per_step:.2f} tokens per step, {found.acceptance_rate:.0%} of the drafts "
        f"kept; the tokens are {'the same' if same else 'NOT THE SAME'}"
    )
    report.check(f"{name}: the same tokens", float(same), 1.0, at_most=False, unit="")
    report.check(f"{name}: prompt lookup over plain, tokens per second", over, SPEEDUP, at_most=False)


@torch.no_grad()
def step_costs(report: Report, variants: dict[str, Any], twin: Any, context: int, rounds: int) -> None:
    """Milliseconds of a step of one token and of five, and of going back over two of them."""
    entries, rows = {}, []
    for name, variant in variants.items():
        cache, _ = models.filled_caches(variant, twin, context)
        model, config = variant.model, variant.model.config

        def step(count: int, model: Any = model, config: Any = config, cache: Any = cache) -> float:
            ids = models.tokens(config, count)
            return measure.seconds(lambda: model(ids, use_cache=True, logits_to_keep=count, **{CACHE_NAME: cache}))

        times: dict[str, list[float]] = {"one": [], "draft": [], "back": []}
        for number in range(rounds + 1):
            if number > 2 and report.budget.left() < 0:
                break
            found = {"one": step(1)}  # as in plain decoding
            cache.activate_past_recording()
            found["draft"], found["back"] = step(1 + DRAFT), measure.seconds(partial(cache.crop, -2))
            for layer in cache.layers:
                if hasattr(layer, "deactivate_past_recording"):
                    layer.deactivate_past_recording()
            for key, value in found.items():
                if number:
                    times[key].append(value)
        medians = {key: statistics.median(values) for key, values in times.items()}
        ratio = measure.ratio(times["draft"], times["one"])
        back = measure.ratio(times["back"], times["one"])
        entries[name] = {"draft_over_one": ratio, "back_over_one": back} | {
            key: {"seconds": medians[key], "rounds": values} for key, values in times.items()
        }
        cells = [f"{medians[key] * 1e3:.2f}" for key in ("one", "draft", "back")]
        rows.append([name, *cells, f"{ratio:.2f}", f"{back:.2f}"])
        if name == "without Linears":
            report.check("a step of five tokens over one, without Linears", ratio, AROUND)
    report.data["steps"] = {"context": context, "tokens": 1 + DRAFT, "contenders": entries}
    header = ["", "1 token, ms", f"{1 + DRAFT} tokens, ms", "2 back, ms", "5 over 1", "back over 1"]
    report.table(f"One step at context {context}", header, rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "speculation", budget=110, rounds=3)
    parser.add_argument("--tokens", type=int, default=None, help="new tokens of a call; default 96")
    parser.add_argument("--lookup", type=int, default=15, help="longest draft; default %(default)s")
    options = parser.parse_args(argv)
    tiny = options.dims == "tiny"
    count = options.tokens or (12 if tiny else 96)
    report = Report("speculation", options, __doc__)

    config = models.config(options.dims)
    model = models.ours(config)
    report.data |= {"dims": models.describe(config), "speedups": {}}
    speedup(report, "bundled model, float32", *bundled(), 2 * count, options.lookup, 2 * options.rounds)

    mine, twin = models.pair(model)
    bare = models.without_linears(_bare(model), head=False)
    variants = {"without Linears": models.Model("bare", bare, mine.new_cache), "bf16": mine}
    for bits in (8, 4):
        if (quantised := models.quantised(model, bits)) is not None:
            variants[f"int{bits}"] = models.Model(f"int{bits}", quantised, mine.new_cache)
    step_costs(report, variants, twin, 64 if tiny else CONTEXT, 4 * options.rounds)
    del variants, bare

    speedup(report, "9B dimensions, bfloat16", *copying(model), count, options.lookup, options.rounds)
    return report.save()


def _bare(model: NemotronHForCausalLM) -> NemotronHForCausalLM:
    """A second model on the first one's tensors."""
    with torch.device("meta"):
        second = NemotronHForCausalLM(model.config).to(model.dtype)
    second.load_state_dict(model.state_dict(), assign=True)
    return second.eval()


if __name__ == "__main__":
    main()
