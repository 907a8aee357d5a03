"""Teach the bundled model a new kind of word problem by training all of its weights, with `Trainer` alone.

The data, the measure and what is written are those of ``finetune_lora.py``; there is no adapter, and neither TRL, PEFT
nor datasets is needed:

    python examples/finetune_full.py
    python examples/finetune_full.py --resume          # go on after an interruption: to the same weights
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from finetuning import (
    accuracy,
    ask_plain_transformers,
    card,
    hub_name,
    plot_loss,
    read_jsonl,
    require_checkpoint,
    write_json,
)
from halves import FILES
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import nemotron_h
from nemotron_h.bundled import WORD_PROBLEMS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune all weights: SFT with Trainer, measured before and after.")
    parser.add_argument("--model", default=WORD_PROBLEMS, help="folder or hub id (default: the bundled model)")
    parser.add_argument("--data", type=Path, default=FILES["train"], help="JSONL of {'messages': [...]}")
    parser.add_argument("--test", type=Path, default=FILES["test"], help="JSONL of {'messages': [...], 'answer': N}")
    parser.add_argument("--test-size", type=int, default=200, help="problems asked before and after")
    parser.add_argument("--output", type=Path, default=Path("finetuned-full"))
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check-plain",
        type=int,
        default=200,
        metavar="N",
        help="of the problems, ask N through transformers' own class as well, in a process without this package",
    )
    parser.add_argument("--push-to-hub", type=hub_name, metavar="OWNER/NAME", help="push the model there")
    return parser.parse_args()


def encode(tokenizer, messages: list[dict]) -> dict[str, list[int]]:
    """A conversation as token ids; only what comes after the generation prompt has labels."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"The template opens a reply with {prompt[-20:]!r}, and this one starts with another text: {whole[-60:]!r}."
        )
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return {"input_ids": start + reply, "labels": [-100] * len(start) + reply}


class Collator:
    """Pads on the right, and says so in the mask."""

    def __init__(self, pad_token_id: int):
        self.pads = {"input_ids": pad_token_id, "labels": -100}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            key: torch.tensor([row[key] + [pad] * (longest - len(row[key])) for row in rows])
            for key, pad in self.pads.items()
        }
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {**batch, "attention_mask": (torch.arange(longest) < lengths).long()}


def train(arguments: argparse.Namespace, tokenizer, checkpoint: str | None) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(arguments.output / "checkpoints"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=5,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=arguments.seed,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        args=settings,
        train_dataset=[encode(tokenizer, item["messages"]) for item in read_jsonl(arguments.data)],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def main() -> None:
    arguments = parse()
    set_seed(arguments.seed)
    checkpoint, started = require_checkpoint(arguments), time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = read_jsonl(arguments.test)[: arguments.test_size]

    before, _ = accuracy(AutoModelForCausalLM.from_pretrained(arguments.model), tokenizer, problems)
    print(f"before: {before:.1%} of {len(problems)} held-out problems right", flush=True)
    trainer = train(arguments, tokenizer, checkpoint)
    model = trainer.model
    after, replies = accuracy(model, tokenizer, problems)
    print(f"after: {after:.1%} of {len(problems)} held-out problems right (before: {before:.1%})", flush=True)

    about = {"tokenizer": tokenizer, **card(arguments, before, after, len(problems))}
    shutil.rmtree(arguments.output / "model", ignore_errors=True)  # of a run before this one
    nemotron_h.publish(model, arguments.output / "model", **about)
    drawn = plot_loss(trainer.state.log_history, arguments.output / "loss.png", "all weights")
    figures = {"before": before, "after": after, "problems": len(problems), "steps": trainer.state.global_step}
    if arguments.check_plain:
        figures["transformers_own_class"] = ask_plain_transformers(
            arguments.output / "model", problems[: arguments.check_plain], replies
        )
    write_json(arguments.output / "figures.json", figures)
    print(f"written: {arguments.output}/model, figures.json{', loss.png' if drawn else ''}")
    if not drawn:
        print("no plot of the loss: pip install matplotlib")
    if arguments.push_to_hub:
        print(f"pushed: {nemotron_h.publish(model, arguments.push_to_hub, **about)}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
