"""Give a model a multi-token-prediction head, train it and nothing else, and see how many of its drafts are right.

The model in the box (or `--model`) stays as it is. A new head of a few layers learns, from the model's hidden states
and the token after them, what the model itself says next; `generate(use_mtp=True)` then drafts with the head, checks
the drafts with the model and gives the same text in fewer steps. The data is that of ``train_tiny.py``. The hidden
states of a batch are computed once and kept: later epochs cost the head alone.

    python examples/train_mtp.py --output my-head                  # the shipped head: some minutes on two cores
    python examples/train_mtp.py --output my-head --resume         # go on after an interruption
    python examples/train_mtp.py --output my-head --evaluate-only  # measure what was written again

OUTPUT/model is the whole model with its head, for `from_pretrained`; OUTPUT/mtp.safetensors is the head alone, for
`nemotron_h.mtp.load_head(model, file)`; a card, figures.json and loss.png are beside them. OUTPUT
is not there until all is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from finetuning import plot_loss, write_folder, write_json
from torch.nn import functional as F
from tqdm import tqdm
from train_tiny import BatchesOfOneLength, Collator, MuonAdamW, encode_problems, prompt_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_problems import Problem, problems

import nemotron_h  # noqa: F401  (registers the family)
from nemotron_h import mtp
from nemotron_h.bundled import WORD_PROBLEMS

IGNORED = -100


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of rows of about one length, and what the frozen model makes of each, computed on first use."""

    def __init__(self, model, tokenizer, count: int, batch_size: int, seed: int):
        rows = encode_problems(tokenizer, count, think_share=0.9)
        order = list(BatchesOfOneLength([len(row["input_ids"]) for row in rows], batch_size, seed))
        starts = range(0, len(order) - batch_size + 1, batch_size)
        self.model, self.collate = model, Collator(tokenizer.pad_token_id)
        self.rows = [[rows[index] for index in order[start : start + batch_size]] for start in starts]
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if not self.rows:
            raise SystemExit(f"--problems {count} do not fill one batch of {batch_size}: give at least {batch_size}.")

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Ids, hidden states and, shifted by one, what the model says where the text has a label."""
        batch = self.collate(self.rows[index])
        if index not in self.known:
            x = self.model.model(batch["input_ids"], use_cache=False).last_hidden_state
            labelled = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
            # Not the text's next token: a draft is kept where it is the model's own.
            said = self.model.lm_head(x).argmax(dim=-1)
            self.known[index] = x, said.masked_fill(~labelled, IGNORED)
        x, said = self.known[index]
        return {"x_BLD": x, "shift_labels": said, "input_ids": batch["input_ids"]}


def order_of(epoch: int, batches: int, seed: int) -> list[int]:
    order = list(range(batches))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def optimizer_of(model, learning_rate: float) -> torch.optim.Optimizer:
    matrices, others = [], []
    for parameter in model.mtp.parameters():
        (matrices if parameter.ndim == 2 else others).append(parameter)
    return MuonAdamW(matrices, others, learning_rate, weight_decay=0.01)


def settings_of(arguments: argparse.Namespace) -> dict:
    """What a run must share with the one that it goes on from."""
    names = ("model", "pattern", "depths", "ahead", "problems", "epochs", "batch_size", "learning_rate", "seed")
    return {name: getattr(arguments, name) for name in names}


def save_state(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path, settings: dict) -> dict | None:
    """What an interrupted run left; None where there is nothing.

    Raises:
        SystemExit: it is a run with other settings.
    """
    if not path.exists():
        print(f"nothing to go on from in {path.parent}: starting anew", flush=True)
        return None
    state = torch.load(path, weights_only=True)
    for name, value in settings.items():
        if (before := state["settings"][name]) != value:
            raise SystemExit(
                f"{path} is of a run with --{name.replace('_', '-')} {before}, and this one has {value}: "
                "give the same, or leave --resume out to start anew."
            )
    return state


def train(arguments: argparse.Namespace, model, tokenizer) -> tuple[dict, list[dict]]:
    """Train `model.mtp`, a new one, and nothing else; what was done, as numbers, and the losses.

    A run that was interrupted and resumed comes to the same weights as one that was not.
    """
    mtp.add_head(model, arguments.pattern, arguments.depths)
    model.train().requires_grad_(False)
    model.mtp_loss_scale = 1.0  # unfreezes the head
    model.mtp_depths = arguments.ahead
    size = sum(parameter.numel() for parameter in model.mtp.parameters())
    print(f"a head of {size:,} weights; encoding {arguments.problems:,} problems", flush=True)
    batches = Batches(model, tokenizer, arguments.problems, arguments.batch_size, arguments.seed)
    optimizer = optimizer_of(model, arguments.learning_rate)
    step, spent, history = 0, 0.0, []
    path, settings = arguments.work / "state.pt", settings_of(arguments)
    if arguments.resume and (state := load_state(path, settings)):
        model.mtp.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, history = state["step"], state["seconds"], state["history"]
        print(f"going on from step {step}, {spent / 60:.1f} minutes in", flush=True)
    started, limit, steps = time.monotonic() - spent, arguments.minutes * 60, len(batches) * arguments.epochs
    bar, recent = tqdm(total=steps, initial=step, desc="training", unit="step"), []
    while step < steps and (elapsed := time.monotonic() - started) < limit:
        # A cosine to almost nothing at the end of the steps or of the time, whichever is nearer.
        done = max(step / steps, elapsed / limit)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, (step + 1) / 20) * max(0.01, math.cos(done * math.pi / 2))
        epoch, place = divmod(step, len(batches))
        # `model(**batch).loss` has this added to the model's own, which a frozen model has no use for.
        loss = mtp.loss(model, labels=None, **batches[order_of(epoch, len(batches), arguments.seed)[place]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(loss.item())
        bar.update()
        if step % 25 == 0 or step == steps:
            history.append({"step": step, "loss": round(sum(recent) / len(recent), 4)})
            bar.set_postfix(loss=history[-1]["loss"])
            recent = []
        if step % arguments.save_steps == 0:
            seconds = time.monotonic() - started
            state = {"head": model.mtp.state_dict(), "optimizer": optimizer.state_dict(), "settings": settings}
            save_state({**state, "step": step, "seconds": seconds, "history": history}, path)
    bar.close()
    model.mtp_loss_scale = 0.0
    run = {
        **{name: value for name, value in settings.items() if name != "model"},
        "parameters": size,
        "steps": step,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "final_loss": history[-1]["loss"] if history else None,
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    return run, history


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, tokenizer, items: list[Problem], drafts: list[int]) -> list[dict]:
    """Greedy replies to problems that training never had, without the head and with so many drafts at a time: whether
    they are the same, how many drafts were kept, and how fast it went."""
    model.eval()
    kinds = [0, *drafts]  # 0: plain
    tallies = {
        kind: {"seconds": 0.0, "tokens": 0, "steps": 0, "drafted": 0, "accepted": 0, "same": 0} for kind in kinds
    }
    for item in tqdm(items, desc="held-out problems", unit="problem"):
        prompt = tokenizer(
            prompt_text(tokenizer, item.question, think=True), return_tensors="pt", add_special_tokens=False
        )
        plain = None
        for kind in kinds:  # one after the other for each problem: a machine that slows down slows all
            given = {"use_mtp": True, "num_assistant_tokens": kind} if kind else {}
            started = time.perf_counter()
            output = model.generate(
                **prompt, do_sample=False, max_new_tokens=320, return_dict_in_generate=True, **given
            )
            tally = tallies[kind]
            tally["seconds"] += time.perf_counter() - started
            tally["tokens"] += output.sequences.shape[1] - prompt["input_ids"].shape[1]
            plain = output.sequences if plain is None else plain
            tally["same"] += torch.equal(output.sequences, plain)
            if kind:
                for name in ("steps", "drafted", "accepted"):
                    tally[name] += getattr(output.speculation, name)
    speed = {kind: tally["tokens"] / tally["seconds"] for kind, tally in tallies.items()}
    figures = []
    for kind in drafts:
        tally = tallies[kind]
        figures.append(
            {
                "problems": len(items),
                "drafts": kind,
                "same_text": tally["same"],
                "drafted": tally["drafted"],
                "accepted": tally["accepted"],
                "acceptance": round(tally["accepted"] / max(1, tally["drafted"]), 4),
                "tokens_per_step": round(tally["tokens"] / max(1, tally["steps"]), 3),
                "tokens_per_second": round(speed[kind], 1),
                "plain_tokens_per_second": round(speed[0], 1),
            }
        )
        print(describe(figures[-1]), flush=True)
    return figures


def describe(figures: dict) -> str:
    return (
        f"{figures['drafts']} drafts at a time: {figures['accepted']:,} of {figures['drafted']:,} kept "
        f"({figures['acceptance']:.1%}), {figures['tokens_per_step']:.2f} tokens a step, "
        f"{figures['tokens_per_second']:.0f} tokens/s ({figures['plain_tokens_per_second']:.0f} without); "
        f"the same text for {figures['same_text']} of {figures['problems']} problems"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------

CARD = """\
# A multi-token-prediction head for {name}

`mtp.safetensors` has {parameters:,} weights: {depths} depth(s) of `{pattern}`, trained to guess {ahead} tokens ahead.
`generate(use_mtp=True)` drafts with them and checks the drafts with the model, which says what it says without them, in
fewer steps:

```python
from nemotron_h import mtp

mtp.load_head(model, "mtp.safetensors")
model.generate(**inputs, use_mtp=True)
```

It was trained by `examples/train_mtp.py`, the model itself frozen, on generated problems of the split that the model
was trained on, to say what the model says there. {problems:,} problems seen {epochs} times, {steps:,} steps of
{batch_size}, {minutes} minutes on {threads} CPU thread(s), seed {seed}.

## Measured

Greedy replies with reasoning to {held_out} held-out problems (names and sums that training never had), with and without
the head in turn:

| drafts at a time | kept | tokens a step | tokens/s | without | the same text |
|---|---|---|---|---|---|
{rows}

Fewer steps are less time where a step is what costs: reading the weights of a large model. A step of a model that is
hardly larger than its head costs no more than a draft.
"""


def write_card(model: str, figures: dict, folder: Path) -> None:
    rows = [
        f"| {entry['drafts']} | {entry['acceptance']:.1%} | {entry['tokens_per_step']:.2f} | "
        f"{entry['tokens_per_second']:.0f} | {entry['plain_tokens_per_second']:.0f} | "
        f"{entry['same_text']} of {entry['problems']} |"
        for entry in figures["held_out"]
    ]
    name = "the bundled model, `word-problems`" if model == WORD_PROBLEMS else f"`{Path(model).name}`"
    text = CARD.format(
        **figures["training"], name=name, held_out=figures["held_out"][0]["problems"], rows="\n".join(rows)
    )
    temporary = folder / ".README.md"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "README.md")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model and its head to")
    parser.add_argument(
        "--model", default=WORD_PROBLEMS, help="the model to make a head for (default: the bundled one)"
    )
    parser.add_argument("--work", type=Path, help="folder for what --resume needs (default: OUTPUT.training)")
    parser.add_argument("--pattern", default="*-", help="layers of a depth: M Mamba-2, * attention, - MLP, E MoE")
    parser.add_argument("--depths", type=int, default=1, help="depths with layers of their own")
    parser.add_argument("--ahead", type=int, default=3, help="tokens ahead to train for; the last depth is used again")
    parser.add_argument("--problems", type=int, default=6_000, help="problems to train on")
    parser.add_argument("--epochs", type=int, default=3, help="times that each is seen")
    parser.add_argument("--minutes", type=float, default=30, help="stop, with the schedule finished, after this long")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--held-out", type=int, default=50, help="held-out problems to measure")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of drafts to measure")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between savings for --resume")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from what is in --work")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in --output, train nothing")
    arguments = parser.parse_args()
    arguments.work = arguments.work or arguments.output.with_name(arguments.output.name + ".training")
    return arguments


def load(folder: str | Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def evaluate_only(arguments: argparse.Namespace, items: list[Problem]) -> None:
    if not (arguments.output / "model" / "config.json").exists():
        raise SystemExit(f"There is no model in {arguments.output}: leave --evaluate-only out to train its head.")
    figures = json.loads((arguments.output / "figures.json").read_text(encoding="utf-8"))
    figures["held_out"] = evaluate(*load(arguments.output / "model"), items, arguments.drafts)
    write_json(arguments.output / "figures.json", figures)
    write_card(arguments.model, figures, arguments.output)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    items = list(problems("held_out", arguments.held_out))
    if arguments.evaluate_only:
        return evaluate_only(arguments, items)
    model, tokenizer = load(arguments.model)
    run, history = train(arguments, model, tokenizer)

    def save(folder: str) -> None:
        whole = Path(folder) / "model"
        model.generation_config.num_assistant_tokens = arguments.ahead
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        mtp.save_head(model, Path(folder) / "mtp.safetensors")
        # What is measured is what was written, loaded as a user loads it.
        figures = {"training": run, "held_out": evaluate(*load(whole), items, arguments.drafts)}
        write_json(Path(folder) / "figures.json", figures)
        write_card(arguments.model, figures, Path(folder))
        if not plot_loss(history, Path(folder) / "loss.png", "the MTP head's loss"):
            print("no loss.png: it needs matplotlib (pip install matplotlib)")

    write_folder(arguments.output, save)
    print(f"{arguments.output} is written; {arguments.work} can be deleted")


if __name__ == "__main__":
    main()
