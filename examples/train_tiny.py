"""Train the small reasoning model that ships inside the package, from nothing, on a CPU.

A Nemotron-H model of about a million weights learns to solve the word problems of ``word_problems.py`` in the chat
format of Nemotron Nano 2: with ``/think`` it works the sums out between ``<think>`` and ``</think>`` and then answers,
with ``/no_think`` it has to answer at once. One run makes the corpus, trains the tokenizer and the model, measures both
modes on problems that training never saw, and writes a folder in the published layout.

    python examples/train_tiny.py --output my-model                 # the shipped model: about an hour on two cores
    python examples/train_tiny.py --output my-model --resume        # go on after an interruption
    python examples/train_tiny.py --output taste --minutes 5        # a taste: the schedule shrinks to the time given
    python examples/train_tiny.py --output my-model --evaluate-only # measure a finished folder again
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Sampler
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from word_problems import KINDS, Problem, problems

import nemotron_h  # noqa: F401  (registers the family: the Auto classes below give this package's classes)

ANSWER = re.compile(r"The answer is (\d+)\.")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Most conversations have an empty system turn, as when only "/think" or "/no_think" stands in it.
SYSTEM_PROMPTS = ("", "", "", "You are a helpful assistant.", "Solve the word problem.")

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE in which every digit is a token of its own
# ---------------------------------------------------------------------------------------------------------------------

# The first ids of the published v2 tokenizer: 10, 11 and 12 of the reserved tokens open and end turns.
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{number}>" for number in range(3, 16))]
THINK_TOKENS = ["<think>", "</think>"]


def train_tokenizer(vocab_size: int, sample: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training split, with the chat template."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A word with its space, one digit with its space, one sign, one newline: no token spans two digits, and
            # the first digit of a number looks different from the others, which tells the model where a number starts.
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        f"System\n{item.question}\nUser\nAssistant\n{item.trace}\n{item.answer_text}"
        for item in problems("train", sample)
    )
    bpe.train_from_iterator([*SYSTEM_PROMPTS, *texts], trainer)
    # Text, not special: `skip_special_tokens=True` must leave them where a reasoning parser looks for them.
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<SPECIAL_12>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Training examples
# ---------------------------------------------------------------------------------------------------------------------


def prompt_text(tokenizer, question: str, think: bool, system: str = "") -> str:
    messages = [{"role": "system", "content": f"{system} {'/think' if think else '/no_think'}"}]
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def completion_text(item: Problem, think: bool) -> str:
    """What the assistant says after the generation prompt, with the end of its turn."""
    reasoning = f"{item.trace}\n</think>\n\n" if think else ""
    return f"{reasoning}{item.answer_text}\n<SPECIAL_12>"


def encode_problems(tokenizer, count: int, think_share: float) -> list[dict[str, list[int]]]:
    """The first ``count`` problems of the training split as token ids; only the assistant's turn has labels."""
    # One rendering for each mode and system prompt: the template is slow beside the tokenizer.
    frames = {
        (think, system): prompt_text(tokenizer, "{question}", think, system).split("{question}")
        for think in (True, False)
        for system in SYSTEM_PROMPTS
    }
    rows = []
    for start in range(0, count, 1000):
        prompts, targets = [], []
        for item in problems("train", min(1000, count - start), start):
            # The golden ratio spreads the modes evenly over any range of indices, whatever the kind.
            think = (item.index * 0.6180339887) % 1 < think_share
            system = SYSTEM_PROMPTS[item.index // len(KINDS) % len(SYSTEM_PROMPTS)]
            prompts.append(item.question.join(frames[think, system]))
            targets.append(completion_text(item, think))
        encoded = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, targets))
        for prompt, target in zip(*encoded, strict=True):
            rows.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})
    return rows


class Collator:
    """Pads on the right, to a multiple of ``multiple`` so that the model sees few distinct lengths."""

    def __init__(self, pad_token_id: int, multiple: int = 16):
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = math.ceil(longest / self.multiple) * self.multiple

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

        # No attention mask: everything is causal and the padding is on the right, so no real token sees it.
        return {"input_ids": padded("input_ids", self.pad_token_id), "labels": padded("labels", -100)}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Minutes trained so far, interruptions left out; ends training when there are none left."""

    def __init__(self, limit: float):
        self.limit, self.elapsed, self.started = limit, 0.0, time.monotonic()

    @property
    def minutes(self) -> float:
        return self.elapsed + (time.monotonic() - self.started) / 60

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run reads from its log how long it has trained.
        self.elapsed = max((entry.get("minutes", 0.0) for entry in state.log_history), default=0.0)
        self.started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.minutes >= self.limit:
            control.should_training_stop = control.should_save = True


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for everything else.

    Muon steps along the orthogonalised momentum of a matrix, which reaches a given loss in about half the steps of
    AdamW: worth having where an hour of CPU is all there is. Both halves take the same learning rate, as the Muon step
    is scaled to the size of an AdamW step.
    """

    def __init__(self, matrices, others, lr: float, weight_decay: float, betas=(0.9, 0.98), momentum: float = 0.95):
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(
            [
                {"params": list(matrices), "muon": True, "weight_decay": weight_decay},
                {"params": list(others), "muon": False},
            ],
            defaults,
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter.grad, self.state[parameter], group), alpha=-group["lr"])
        return loss

    @staticmethod
    def _adam(gradient: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        return mean / ((state["square"] / (1 - second ** state["step"])).sqrt_() + group["eps"])

    @staticmethod
    def _muon(gradient: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalised(gradient.lerp(state["momentum"], group["momentum"]))  # Nesterov
        return direction * (0.2 * max(gradient.shape) ** 0.5)  # 0.2 is about the root mean square of an AdamW step


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly ``U V^T`` of ``matrix = U S V^T``, by a quintic Newton-Schulz iteration (Jordan et al., 2024)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


class BatchesOfOneLength(Sampler):
    """Rows of about the same length in a batch, batches in random order.

    Padding would cost a third of the time otherwise. `group_by_length` of `Trainer` hands the batches out from long to
    short, fifty at a time: a model this small forgets the long problems while it sees the short ones.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(self.seed)
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        pool = 50 * self.batch_size
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            rng.shuffle(batches)
            for batch in batches:
                yield from batch


class TinyTrainer(Trainer):
    """`Trainer` with `MuonAdamW` and a learning-rate schedule that fits a number of minutes."""

    def __init__(self, *args, clock: Clock, **kwargs):
        super().__init__(*args, callbacks=[clock], **kwargs)
        self.clock = clock

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs | {"minutes": round(self.clock.minutes, 2)}, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Linear warm-up, then a constant rate, then from 30% of the way a cosine down to almost nothing.

        How far the way is counts by steps or by time, whichever is further.
        """

        def factor(step: int) -> float:
            progress = min(1.0, max(step / num_training_steps, self.clock.minutes / self.clock.limit))
            decay = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.3) / 0.7))
            return min(1.0, (step + 1) / self.args.warmup_steps) * max(0.01, decay)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # `Trainer` reads the file's tensors by the names they have in memory; the file has the published names.
        saved = AutoModelForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return BatchesOfOneLength(lengths, self.args.per_device_train_batch_size, self.args.seed)

    def create_optimizer(self, model=None):
        # Embeddings are tables, and A_log, D, dt_bias and the convolutions are gains and time constants, not matrices:
        # they get AdamW and no weight decay.
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if inside else others).append(parameter)
        self.optimizer = MuonAdamW(matrices, others, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer


def build_config(vocab_size: int, pattern: str, hidden_size: int) -> AutoConfig:
    return AutoConfig.for_model(
        "nemotron_h",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        hybrid_override_pattern=pattern,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=3 * hidden_size,
        mamba_num_heads=hidden_size // 32,
        mamba_head_dim=64,
        ssm_state_size=32,
        n_groups=1,
        conv_kernel=4,
        chunk_size=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=12,
    )


def train(arguments: argparse.Namespace, tokenizer) -> tuple[torch.nn.Module, dict]:
    config = build_config(len(tokenizer), arguments.pattern, arguments.hidden_size)
    model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__module__} {arguments.pattern}: {parameters:,} parameters, {len(tokenizer)} tokens")
    print(f"encoding {arguments.problems:,} problems", flush=True)
    data = encode_problems(tokenizer, arguments.problems, arguments.think_share)
    settings = TrainingArguments(
        output_dir=str(arguments.work),
        per_device_train_batch_size=arguments.batch_size,
        num_train_epochs=1,
        learning_rate=arguments.learning_rate,
        warmup_steps=100,
        weight_decay=0.05,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        seed=arguments.seed,
        data_seed=arguments.seed,
    )
    clock = Clock(arguments.minutes)
    trainer = TinyTrainer(
        model=model, args=settings, train_dataset=data, data_collator=Collator(tokenizer.pad_token_id), clock=clock
    )
    trainer.train(resume_from_checkpoint=True if arguments.resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    run = {
        "steps": trainer.state.global_step,
        "batch_size": arguments.batch_size,
        "problems_seen": trainer.state.global_step * arguments.batch_size,
        "minutes": round(clock.minutes, 1),
        "final_loss": round(sum(losses[-8:]) / len(losses[-8:]), 4) if losses else None,
        "parameters": parameters,
        "learning_rate": arguments.learning_rate,
        "think_share": arguments.think_share,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return model, run


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(model, tokenizer, questions: Sequence[str], think: bool, batch_size: int = 50) -> list[str]:
    """Greedy answers, batched with padding on the left."""
    model.eval()
    order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
    texts = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [prompt_text(tokenizer, questions[index], think) for index in chosen]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        output = model.generate(**batch, do_sample=False, max_new_tokens=320 if think else 16)
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, reply in zip(chosen, replies, strict=True):
            texts[index] = reply
    return texts


def read_answer(text: str) -> int | None:
    match = ANSWER.search(text.split("</think>")[-1])
    return int(match.group(1)) if match else None


def evaluate(model, tokenizer, items: Sequence[Problem], log: Callable[[str], None] = print) -> dict:
    """Right answers of each split, mode and kind, and the wrong traces (for a person to read)."""
    figures: dict = {}
    for split in dict.fromkeys(item.split for item in items):
        chosen = [item for item in items if item.split == split]
        figures[split] = {"problems": len(chosen)}
        for mode in ("think", "no_think"):
            started = time.monotonic()
            replies = answers(model, tokenizer, [item.question for item in chosen], think=mode == "think")
            right = [read_answer(reply) == item.answer for item, reply in zip(chosen, replies, strict=True)]
            figures[split][mode] = {
                "accuracy": round(sum(right) / len(right), 4),
                "right": sum(right),
                "by_kind": _shares((item.kind for item in chosen), right),
                "by_steps": _shares((str(len(item.steps)) for item in chosen), right),
                "seconds": round(time.monotonic() - started, 1),
            }
            log(f"{split:9} {mode:9} {sum(right)}/{len(right)} = {sum(right) / len(right):.1%}")
            if mode == "think":
                figures[split]["wrong_examples"] = [
                    {"question": item.question, "expected": f"{item.trace} {item.answer}", "got": reply}
                    for item, reply, ok in zip(chosen, replies, right, strict=True)
                    if not ok
                ][:3]
    return figures


def _shares(keys: Iterable[str], right: Sequence[bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for key, ok in zip(keys, right, strict=True):
        groups[key].append(ok)
    return {key: round(sum(values) / len(values), 4) for key, values in sorted(groups.items())}


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def write_folder(model, tokenizer, output: Path) -> None:
    """Weights and config in the published layout, tokenizer with its template, generation settings.

    The weights stay in float32, in which they were trained: three megabytes, and the fastest type on a CPU.
    """
    output.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # `Trainer` turns it off
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 12], pad_token_id=0, do_sample=False)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)  # the weights are written for their owner alone


def write_held_out(items: Iterable[Problem], output: Path) -> None:
    lines = (json.dumps(item.record(), ensure_ascii=False) for item in items)
    (output / "held_out.jsonl").write_text("\n".join(lines) + "\n")


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
tags: [nemotron-h, mamba2, hybrid, reasoning, tiny]
---

# word-problems: a tiny Nemotron-H that reasons

A Nemotron-H model of {parameters:,} weights (`{pattern}`: Mamba-2, attention and MLP layers) that solves English word
problems of two to four steps with +, - and x and results to 999. It was trained from nothing on a CPU by
`examples/train_tiny.py`, on generated problems only, and exists to show and to test a whole hybrid reasoning model on
any machine. It knows nothing but these problems: not a chat model, not a calculator.

It speaks the chat format of Nemotron Nano 2: `/think` (the default) in a system or user message lets it reason between
`<think>` and `</think>`, `/no_think` makes it answer at once; `enable_thinking=` of `apply_chat_template` overrules
both.

```python
import nemotron_h
from nemotron_h.bundled import WORD_PROBLEMS
from transformers import pipeline

ask = pipeline("text-generation", WORD_PROBLEMS)
question = "Mia has 47 shells. Then she finds 35 more. How many shells does she have in the end?"
ask([{{"role": "user", "content": question}}], max_new_tokens=300)
```

## Measured

Greedy decoding, in the type the weights are stored in ({dtype}). None of these problems is in the training data:

| problems | with reasoning | without |
|---|---|---|
{rows}

*Held-out* problems use the sentence templates of training with names and at least one sum that training never has;
in the *unseen* ones the sentences are worded in ways that training never has either. `held_out.jsonl` has the problems,
`figures.json` the shares by kind and number of steps, the settings and the seed.

| kind | held out, with reasoning | without |
|---|---|---|
{kinds}

Training: {problems_seen:,} problems in {steps:,} steps of {batch_size}, {minutes} minutes on
{threads} CPU thread(s).{note}

## Limits

Words outside the training vocabulary are spelled in pieces and often misread. Division, fractions, more than four
steps, numbers above 999 and questions with numbers that do not matter are outside what it has seen. Without reasoning
it is nearly always wrong: that difference is what it is there to show.
"""


def write_card(config, figures: dict, output: Path) -> None:
    rows = []
    for split, name in (("held_out", "held-out"), ("unseen", "unseen wordings")):
        think, at_once = (figures[split][mode]["accuracy"] for mode in ("think", "no_think"))
        rows.append(f"| {figures[split]['problems']} {name} | {think:.1%} | {at_once:.1%} |")
    think, at_once = (figures["held_out"][mode]["by_kind"] for mode in ("think", "no_think"))
    kinds = [f"| {kind} | {think[kind]:.0%} | {at_once[kind]:.0%} |" for kind in think]
    training = figures["training"]
    text = CARD.format(
        **training | {"note": f" {training['note']}" if training.get("note") else ""},
        pattern=config.hybrid_override_pattern,
        dtype=str(config.dtype).removeprefix("torch."),
        rows="\n".join(rows),
        kinds="\n".join(kinds),
    )
    (output / "README.md").write_text(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--work", type=Path, help="folder for the training checkpoints (default: OUTPUT.training)")
    parser.add_argument("--problems", type=int, default=120_000, help="problems to train on, each seen once")
    parser.add_argument("--minutes", type=float, default=60, help="stop, with the schedule finished, after this long")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--think-share", type=float, default=0.85, help="share of problems with a reasoning trace")
    parser.add_argument("--pattern", default="M*-M*-", help="layers: M Mamba-2, * attention, - MLP")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=768)
    parser.add_argument("--held-out", type=int, default=600, help="held-out problems to measure; half as many unseen")
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in --output, train nothing")
    arguments = parser.parse_args()
    arguments.work = arguments.work or arguments.output.with_name(arguments.output.name + ".training")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)
    items = [*problems("held_out", arguments.held_out), *problems("unseen", arguments.held_out // 2)]
    figures_file = arguments.output / "figures.json"
    if arguments.evaluate_only:
        figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    else:
        tokenizer = train_tokenizer(arguments.vocab_size)
        model, run = train(arguments, tokenizer)
        write_folder(model, tokenizer, arguments.output)
        write_held_out(items, arguments.output)
        figures = {"training": run}
    # What is measured is what was written: the folder, loaded again as a user loads it.
    model = AutoModelForCausalLM.from_pretrained(arguments.output)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    figures |= evaluate(model, tokenizer, items)
    figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    if "training" in figures:
        write_card(model.config, figures, arguments.output)
    print(f"{arguments.output} is written; the training checkpoints in {arguments.work} can be deleted")


if __name__ == "__main__":
    main()
