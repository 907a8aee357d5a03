"""Training one Mamba layer, memory and time beside transformers'; and the loss of a large vocabulary without logits.

Dimensions of Nemotron Nano 9B v2, random weights, one layer and a head of a small vocabulary. Bounds: what one training
step (forward and backward) of a Mamba layer needs above the weights is at most half of what transformers' torch path
needs, in no more time; the cross-entropy of 131,072 columns needs at most 15% of what it needs with whole logits, and
loss and gradients are the same to 1e-5.

The layer is measured with stand-ins in the projections' places, which keep and write what the projections would (the
memory is the layer's own, the time is that around the products, which both have alike); --full measures the time of the
whole layer too. Whole logits of 8,192 tokens are 13 GB at their peak: in the default budget they are measured at fewer
tokens and scaled, which the table marks.

    python benchmarks/training.py                     # about a minute
    python benchmarks/training.py --full
    python benchmarks/training.py --length 512 --tokens 512
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import measure, models
from harness.report import Report, arguments
from torch import Tensor, nn

from nemotron_h.training import losses

HALF, NO_WORSE, SHARE, SAME = 0.5, 1.0, 0.15, 1e-5
HEAD = {"full": (131072, 8192, 2048), "tiny": (2048, 256, 128)}  # vocabulary, tokens, tokens of the whole logits
HEAD_WIDTH = {"full": 128, "tiny": 16}


class _Ready(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], row.shape[0]).copy_(row)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.full_like(x, 0.01), None


class ReadyProjection(nn.Module):
    """In a projection's place, in training: keeps its input as a Linear would, and computes nothing."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, None  # transformers' mixer names them before it knows its path
        row = (torch.randn(linear.out_features) * 0.5).to(linear.weight.dtype)
        self.row = nn.Parameter(row, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Ready.apply(x, self.row)


def layer(name: str, dims: str, dtype: torch.dtype, ready: bool) -> Callable[[int], float]:
    """A training step of one Mamba layer as a function of the tokens, returning its seconds."""
    ours = models.ours(models.config(dims, "M", vocab_size=256), dtype)
    model = ours if name == "nemotron-h" else models.theirs(ours)
    block = model.train().model.layers[0]
    if ready:
        for part in ("in_proj", "out_proj"):
            setattr(block.mixer, part, ReadyProjection(getattr(block.mixer, part)))
    for parameter in block.parameters():
        parameter.requires_grad_(not ready or parameter.ndim < 2 or parameter.ndim > 2)

    def step(length: int) -> float:
        x_BLD = torch.randn(1, length, model.config.hidden_size).to(dtype).requires_grad_()
        dy_BLD = torch.randn(1, length, model.config.hidden_size).to(dtype)
        return measure.seconds(lambda: block(x_BLD).backward(dy_BLD))

    return step


def layer_memory(name: str, dims: str, dtype: str, length: int) -> dict[str, float]:
    """In a fresh process: bytes above the weights at the peak of one step, those of the layer's input not counted."""
    step = layer(name, dims, getattr(torch, dtype), ready=True)
    step(64)
    with measure.peak_memory() as peak:
        took = step(length)
    return {"bytes": peak.growth, "seconds": took}


def mamba(report: Report, options: Any, length: int) -> None:
    names, rows = ("nemotron-h", "transformers"), []
    entries: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        memory = {name: measure.in_fresh_process(layer_memory, name, options.dims, dtype, length) for name in names}
        share = memory[names[0]]["bytes"] / memory[names[1]]["bytes"]
        short = min(length, 1024)
        steps = {name: layer(name, options.dims, getattr(torch, dtype), ready=True) for name in names}
        for step in steps.values():
            step(64)
        turns = {name: partial(step, short) for name, step in steps.items()}
        times = measure.in_turns(turns, options.rounds, report.budget)
        speed = measure.ratio(times[names[0]], times[names[1]])
        # At the whole length each was timed once, in its own process.
        whole = memory[names[0]]["seconds"] / memory[names[1]]["seconds"]
        entries[dtype] = {"memory": memory, "bytes_ratio": share, "rounds": times, "time_ratio": speed}
        entries[dtype]["time_ratio_whole_length"] = whole
        for name in names:
            cells = [f"{memory[name]['bytes'] / 1e6:.0f}", f"{memory[name]['bytes'] / length / 1e3:.0f}"]
            cells += [f"{memory[name]['seconds']:.2f}", f"{sorted(times[name])[len(times[name]) // 2]:.2f}"]
            rows.append([f"{dtype}, {name}", *cells])
        report.check(f"{dtype}, {length} tokens, memory of a training step over transformers'", share, HALF)
        report.check(f"{dtype}, {length} tokens, time over transformers', projections apart", whole, NO_WORSE)
        report.check(f"{dtype}, {short} tokens in turns, time over transformers', projections apart", speed, NO_WORSE)
    header = ["", "MB above weights", "KB/token", "seconds", f"seconds, {short} tokens"]
    report.table(f"One Mamba layer, forward and backward, {length} tokens", header, rows)
    report.data["mamba"] = {"length": length, "short": short, "dtypes": entries}
    if options.full or options.dims == "tiny":
        steps = {name: layer(name, options.dims, torch.float32, ready=False) for name in names}
        turns = {name: partial(step, length) for name, step in steps.items()}
        times = measure.in_turns(turns, options.rounds, report.budget)
        speed = measure.ratio(times[names[0]], times[names[1]])
        report.data["mamba"]["whole_layer"] = {"rounds": times, "time_ratio": speed}
        report.check(f"float32, {length} tokens, time of the whole layer over transformers'", speed, NO_WORSE)


def head_step(how: str, vocabulary: int, width: int, tokens: int) -> tuple[float, Tensor, Tensor, dict[str, float]]:
    """A loss and its gradients by hidden states and weight, with bytes at the peak and seconds."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.normal_(std=0.1, generator=generator)
    x_BLD = torch.randn(1, tokens, width, generator=generator).requires_grad_()
    labels_BL = torch.randint(0, vocabulary, (1, tokens), generator=generator)
    # The weight's gradient is the caller's, whichever way it is made: there before the measuring begins.
    head.weight.grad, x_BLD.grad = torch.zeros_like(head.weight), torch.zeros_like(x_BLD)
    found: list[Tensor] = []

    def run() -> None:
        if how == "whole logits":
            logits_BLV = head(x_BLD).float()
            loss = losses.ForCausalLMLoss(logits_BLV, labels_BL, vocabulary)
            del logits_BLV
        else:
            loss = losses.without_logits(head, x_BLD, labels_BL, None)
        loss.backward()
        found.append(loss.detach())

    with measure.peak_memory() as peak:
        took = measure.seconds(run)
    return found[0].item(), x_BLD.grad, head.weight.grad, {"bytes": peak.growth, "seconds": took}


def head_cost(how: str, vocabulary: int, width: int, tokens: int) -> dict[str, float]:
    return head_step(how, vocabulary, width, tokens)[-1]


def head_difference(vocabulary: int, width: int, tokens: int) -> float:
    """The largest relative difference of the losses and of either gradient."""
    a, b = (head_step(how, vocabulary, width, tokens) for how in ("without logits", "whole logits"))
    of_gradients = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a[1:3], b[1:3], strict=True)]
    return max(abs(a[0] - b[0]) / abs(b[0]), *of_gradients)


def cross_entropy(report: Report, options: Any, tokens: int | None) -> None:
    vocabulary, length, fewer = HEAD[options.dims]
    length = tokens or length
    width = models.DENSE["full"]["hidden_size"] if options.full else HEAD_WIDTH[options.dims]
    fewer = length if options.full else min(fewer, length)
    ours = measure.in_fresh_process(head_cost, "without logits", vocabulary, width, length)
    whole = measure.in_fresh_process(head_cost, "whole logits", vocabulary, width, fewer)
    short = measure.in_fresh_process(head_cost, "without logits", vocabulary, width, fewer)
    mark = "" if fewer == length else report.note(f"measured at {fewer} tokens and scaled in proportion, for memory")
    scaled = {key: value * length / fewer for key, value in whole.items()}
    difference = measure.in_fresh_process(head_difference, vocabulary, width, min(fewer, 1024))
    report.table(
        f"Cross-entropy of {vocabulary} columns, {length} tokens of width {width}, float32, forward and backward",
        ["", "MB at the peak", "seconds"],
        [
            ["without logits", f"{ours['bytes'] / 1e6:.0f}", f"{ours['seconds']:.2f}"],
            ["whole logits", f"{scaled['bytes'] / 1e6:.0f}{mark}", f"{scaled['seconds']:.2f}{mark}"],
        ],
    )
    report.data["cross_entropy"] = {
        "vocabulary": vocabulary,
        "tokens": length,
        "width": width,
        "without_logits": ours,
        "whole_logits": {**whole, "tokens": fewer},
        "without_logits_at_those": short,
        "difference": difference,
    }
    report.check(
        f"{length} tokens, memory of the loss over that with whole logits", ours["bytes"] / scaled["bytes"], SHARE
    )
    report.check("loss and gradients, relative difference", difference, SAME, unit="")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "training", budget=60)
    parser.add_argument("--length", type=int, default=None, help="of the Mamba layer; default 8192")
    parser.add_argument("--tokens", type=int, default=None, help="of the cross-entropy; default 8192")
    options = parser.parse_args(argv)
    report = Report("training", options, __doc__)
    report.data["dims"] = models.describe(models.config(options.dims, "M"))
    cross_entropy(report, options, options.tokens)
    mamba(report, options, options.length or (256 if options.dims == "tiny" else 8192))
    return report.save()


if __name__ == "__main__":
    main()
