"""Train the bundled model with DPO to prefer right replies to its own wrong ones.

The model answers training problems; where it is wrong, its reply is what is rejected, and the right reasoning and
answer are what is chosen. TRL's `DPOTrainer` trains a LoRA adapter on these pairs. One run measures, trains, measures
again, and writes

    OUTPUT/adapter/, OUTPUT/merged/    what was trained, and the model with it in its weights
    OUTPUT/pairs.jsonl                 the pairs; OUTPUT/loss.png, OUTPUT/figures.json
    OUTPUT/checkpoints/                for --resume

    pip install trl datasets peft matplotlib
    python examples/dpo.py
    python examples/dpo.py --resume                    # go on after an interruption
    python examples/dpo.py --pairs my_pairs.jsonl      # {"prompt": [...], "chosen": [...], "rejected": [...]} a line

DPO by itself is content when the rejected reply becomes less likely, and lets the chosen one become less likely with
it; `--sft-weight` adds the chosen reply's own loss, which keeps it up. A right reply preferred is not yet a right reply
written: the accuracy stayed where it was (README.md has the figures).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from finetune_lora import merged_model
from finetuning import accuracy, plot, read_answer, read_jsonl, replies, require_checkpoint, write_folder, write_json
from preferences import (
    add_common_options,
    question_of,
    read_problems,
    require,
    test_problems,
    training_problems,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import nemotron_h

KEYS = ("prompt", "chosen", "rejected")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="DPO with LoRA: right replies against the model's own wrong ones, measured before and after.",
        epilog="Example: python examples/dpo.py --problems 600 --epochs 2 --output /tmp/dpo",
    )
    add_common_options(parser, "trained-dpo", save_steps=20)
    parser.add_argument("--pairs", type=Path, help="JSONL of {'prompt', 'chosen', 'rejected'} instead of --data")
    parser.add_argument(
        "--problems", type=int, default=900, help="problems of --data that the model is asked for pairs"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.5, help="of the replies to problems that it gets right without chance"
    )
    parser.add_argument("--held-out-pairs", type=int, default=64, help="pairs kept from training, for the margin")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.1, help="how dear it is to part from the first model")
    parser.add_argument("--sft-weight", type=float, default=1.0, help="of the chosen replies' own loss; 0: DPO alone")
    return parser.parse_args()


def own_mistakes(model, tokenizer, problems: list[dict], temperature: float, batch_size: int = 100) -> list[dict]:
    """A pair for each problem that the model gets wrong: the right reply chosen, its own rejected.

    What it gets right is asked again with chance in it, and rejected where that went wrong: from its mistakes alone a
    model learns to do the opposite of them, also where it did well.
    """
    pairs = []
    for start in range(0, len(problems), batch_size):
        asked = problems[start : start + batch_size]
        for options in ({}, {"do_sample": True, "temperature": temperature}):
            said = replies(model, tokenizer, [question_of(item) for item in asked], **options)
            wrong = [read_answer(text) != item["answer"] for text, item in zip(said, asked, strict=True)]
            pairs += [pair(item, text) for text, item, bad in zip(said, asked, wrong, strict=True) if bad]
            asked = [item for item, bad in zip(asked, wrong, strict=True) if not bad]
            if not asked:
                break
        done = min(start + batch_size, len(problems))
        print(f"\rasked {done} of {len(problems)} problems: {len(pairs)} wrong replies", end="", flush=True)
    print()
    return pairs


def pair(item: dict, wrong: str) -> dict:
    content = wrong.strip()
    # The template opens a reply with "<think>" in the prompt; in a message of a conversation it is part of the reply.
    content = content if content.startswith("<think>") else f"<think>\n{content}"
    return {
        "prompt": item["messages"][:-1],
        "chosen": item["messages"][-1:],
        "rejected": [{"role": "assistant", "content": content}],
    }


def read_pairs(path: Path) -> list[dict]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if missing := [key for key in KEYS if not row.get(key)]:
            raise SystemExit(f"{path}, line {number} has no {' and no '.join(missing)}: write {', '.join(KEYS)}.")
    return rows


def pairs_of(arguments: argparse.Namespace, tokenizer) -> list[dict]:
    """From --pairs, from the run that is gone on with, or made now."""
    if arguments.pairs:
        return read_pairs(arguments.pairs)
    kept = arguments.output / "pairs.jsonl"
    if arguments.resume and kept.exists():
        return read_pairs(kept)
    problems = read_problems(arguments.data, arguments.problems, training_problems)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    pairs = own_mistakes(model, tokenizer, problems, arguments.temperature)
    random.Random(arguments.seed).shuffle(pairs)
    temporary = kept.with_name(f".{kept.name}")
    temporary.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    temporary.replace(kept)
    return pairs


def make_trainer(arguments: argparse.Namespace, tokenizer, pairs: list[dict]):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    held = min(arguments.held_out_pairs, len(pairs) // 4)
    settings = DPOConfig(
        output_dir=str(arguments.output / "checkpoints"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        beta=arguments.beta,
        loss_type=["sigmoid", "sft"] if arguments.sft_weight else ["sigmoid"],
        loss_weights=[1.0, arguments.sft_weight] if arguments.sft_weight else None,
        max_length=None,
        activation_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=2,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=arguments.seed,
    )
    return DPOTrainer(
        model=model,  # without its adapter it is the reference: no second copy in memory
        args=settings,
        train_dataset=Dataset.from_list(pairs[held:]),
        eval_dataset=Dataset.from_list(pairs[:held]),
        processing_class=tokenizer,
        peft_config=nemotron_h.lora_config(model, arguments.kind, r=arguments.rank),
    )


def main() -> None:
    arguments = parse()
    require("trl", "datasets", "peft")
    checkpoint = require_checkpoint(arguments)
    set_seed(arguments.seed)
    started = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = read_problems(arguments.test, arguments.test_size, test_problems)

    before, _ = accuracy(AutoModelForCausalLM.from_pretrained(arguments.model), tokenizer, problems)
    print(f"before: {before:.1%} of {len(problems)} held-out problems right", flush=True)
    pairs = pairs_of(arguments, tokenizer)
    if len(pairs) < 4:
        raise SystemExit(f"There are {len(pairs)} pairs, and at least 4 are needed: give more problems or other ones.")

    trainer = make_trainer(arguments, tokenizer, pairs)
    trainer.train(resume_from_checkpoint=checkpoint)
    measured = trainer.evaluate()
    rewards = {name: measured[f"eval_rewards/{name}"] for name in ("accuracies", "margins", "chosen", "rejected")}
    print(
        f"{len(trainer.eval_dataset)} held-out pairs: the right reply is preferred in {rewards['accuracies']:.1%}, "
        f"by {rewards['margins']:.2f} (0 before)",
        flush=True,
    )
    write_folder(arguments.output / "adapter", trainer.model.save_pretrained)
    drawn = plot(
        trainer.state.log_history,
        arguments.output / "loss.png",
        f"DPO, {len(trainer.train_dataset)} pairs",
        {"loss": "loss", "rewards/margins": "reward margin"},
    )

    model = merged_model(arguments)
    after, _ = accuracy(model, tokenizer, problems)
    print(f"after: {after:.1%} of {len(problems)} held-out problems right (before: {before:.1%})", flush=True)

    def save(folder: str) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(arguments.output / "merged", save)
    minutes = (time.monotonic() - started) / 60
    figures = {
        "before": before,
        "after": after,
        "problems": len(problems),
        "pairs": len(pairs),
        "held_out_pairs": len(trainer.eval_dataset),
        "rewards": rewards,
        "steps": trainer.state.global_step,
        "minutes": round(minutes, 1),
    }
    write_json(arguments.output / "figures.json", figures)
    print(f"written: {arguments.output}/merged, adapter, pairs.jsonl, figures.json{', loss.png' if drawn else ''}")
    if not drawn:
        print("no plot of the loss: pip install matplotlib")
    print(f"{minutes:.1f} minutes in all")


if __name__ == "__main__":
    main()
