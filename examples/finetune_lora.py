"""Teach the bundled model a new kind of word problem with LoRA, on a CPU, in a few minutes.

The data is ``data/halves_train.jsonl`` (see ``halves.py``): stories in which somebody gives half of something away. The
model has never seen a half, and gets nearly all of them wrong before and right after. One run measures, trains with
TRL's `SFTTrainer`, measures again, and writes

    OUTPUT/adapter/      what was trained, for `peft.PeftModel.from_pretrained`
    OUTPUT/merged/       the whole model with the adapter in its weights and a model card: loads anywhere, without PEFT
    OUTPUT/loss.png      the loss; OUTPUT/figures.json what was measured
    OUTPUT/checkpoints/  for --resume

and asks OUTPUT/merged the held-out problems once more through plain `transformers`, in a process without this package.

    pip install trl datasets peft matplotlib
    python examples/finetune_lora.py
    python examples/finetune_lora.py --resume                        # go on after an interruption
    python examples/finetune_lora.py --kind mixers --rank 4          # adapt fewer weights
    python examples/finetune_lora.py --push-to-hub YOU/halves        # the merged model

For a model and data of your own: ``--model`` and ``--data``, a JSONL file of {"messages": [...]}.
"""

from __future__ import annotations

import argparse
import importlib.util
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
    write_folder,
    write_json,
)
from halves import FILES
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import nemotron_h
from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.training.lora import KINDS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune with LoRA: SFT on a small data set, measured before and after."
    )
    parser.add_argument("--model", default=WORD_PROBLEMS, help="folder or hub id (default: the bundled model)")
    parser.add_argument("--data", type=Path, default=FILES["train"], help="JSONL of {'messages': [...]}")
    parser.add_argument("--test", type=Path, default=FILES["test"], help="JSONL of {'messages': [...], 'answer': N}")
    parser.add_argument("--test-size", type=int, default=200, help="problems asked before and after")
    parser.add_argument("--output", type=Path, default=Path("finetuned-lora"))
    parser.add_argument("--kind", choices=KINDS, default="all-linear", help="which weights get an adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantize", choices=("int8", "int4"), help="load the base model in so many bits (QLoRA)")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="LoRA takes ten times that of full fine-tuning"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens a conversation")
    parser.add_argument(
        "--packing", action="store_true", help="fill rows with several conversations, kept apart exactly"
    )
    parser.add_argument("--save-steps", type=int, default=125)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check-plain",
        type=int,
        default=200,
        metavar="N",
        help="of the problems, ask N through transformers' own class as well, in a process without this package",
    )
    parser.add_argument("--push-to-hub", type=hub_name, metavar="OWNER/NAME", help="push the merged model there")
    return parser.parse_args()


def train(arguments: argparse.Namespace, tokenizer, checkpoint: str | None):
    """The trainer, after its work."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, **({"quantize": arguments.quantize} if arguments.quantize else {})
    )
    # Prompt and completion, split before the reply: the loss is the reply's alone, and "<think>" and what else the
    # template opens a reply with are part of the prompt.
    rows = [
        {"prompt": item["messages"][:-1], "completion": item["messages"][-1:]} for item in read_jsonl(arguments.data)
    ]
    settings = SFTConfig(
        output_dir=str(arguments.output / "checkpoints"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=arguments.max_length,
        packing=arguments.packing,
        gradient_checkpointing=False,  # worth its time where memory is short
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=5,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=arguments.seed,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=nemotron_h.lora_config(model, arguments.kind, r=arguments.rank),
    )
    print(f"adapter: {nemotron_h.lora_coverage(trainer.model)}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def merged_model(arguments: argparse.Namespace):
    """The base model at full precision with the adapter in its weights."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    return PeftModel.from_pretrained(base, str(arguments.output / "adapter")).merge_and_unload()


def main() -> None:
    arguments = parse()
    missing = [name for name in ("trl", "datasets", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"This example needs {', '.join(missing)}: pip install {' '.join(missing)}")
    set_seed(arguments.seed)
    checkpoint, started = require_checkpoint(arguments), time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = read_jsonl(arguments.test)[: arguments.test_size]

    before, _ = accuracy(AutoModelForCausalLM.from_pretrained(arguments.model), tokenizer, problems)
    print(f"before: {before:.1%} of {len(problems)} held-out problems right", flush=True)

    trainer = train(arguments, tokenizer, checkpoint)
    minutes = (time.monotonic() - started) / 60
    write_folder(arguments.output / "adapter", trainer.model.save_pretrained)
    drawn = plot_loss(
        trainer.state.log_history, arguments.output / "loss.png", f"LoRA, {arguments.kind}, r={arguments.rank}"
    )

    model = merged_model(arguments)
    after, replies = accuracy(model, tokenizer, problems)
    print(f"after: {after:.1%} of {len(problems)} held-out problems right (before: {before:.1%})", flush=True)

    about = {"tokenizer": tokenizer, **card(arguments, before, after, len(problems))}
    shutil.rmtree(arguments.output / "merged", ignore_errors=True)  # of a run before this one
    nemotron_h.publish(model, arguments.output / "merged", **about)
    figures = {
        "before": before,
        "after": after,
        "problems": len(problems),
        "steps": trainer.state.global_step,
        "minutes_to_trained": round(minutes, 1),
        "adapter": str(nemotron_h.lora_coverage(trainer.model)),
    }
    if arguments.check_plain:
        figures["transformers_own_class"] = ask_plain_transformers(
            arguments.output / "merged", problems[: arguments.check_plain], replies
        )
    write_json(arguments.output / "figures.json", figures)
    print(f"written: {arguments.output}/merged, adapter, figures.json{', loss.png' if drawn else ''}")
    if not drawn:
        print("no plot of the loss: pip install matplotlib")
    if arguments.push_to_hub:
        print(f"pushed: {nemotron_h.publish(model, arguments.push_to_hub, **about)}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
