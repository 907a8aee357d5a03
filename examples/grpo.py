"""Let the bundled model teach itself the other way of telling a story with GRPO: a rule says which answers are right.

For each problem the model writes a group of replies, by chance; `reward` gives one point to a reply that ends its
reasoning and then says the right number and nothing else; TRL's `GRPOTrainer` makes the replies that did better than
their group more likely. Nobody shows it a solution. One run measures, trains a LoRA adapter, measures again, and writes

    OUTPUT/adapter/, OUTPUT/merged/    what was trained, and the model with it in its weights
    OUTPUT/loss.png                    the mean reward and the loss; OUTPUT/figures.json
    OUTPUT/checkpoints/                for --resume

    pip install trl datasets peft matplotlib
    python examples/grpo.py
    python examples/grpo.py --resume                    # go on after an interruption
    python examples/grpo.py --model YOUR_MODEL --data problems.jsonl --test more.jsonl

GRPO learns only from groups that are not all right or all wrong: begin with a model that solves some of the problems.
"""

from __future__ import annotations

import argparse
import re
import time

import torch
from finetune_lora import merged_model
from finetuning import plot, replies, require_checkpoint, write_folder, write_json
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

ENDED = re.compile(r"\s*The answer is (\d+)\.\s*")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="GRPO with LoRA and a reward by rule, measured before and after.",
        epilog="Example: python examples/grpo.py --steps 20 --output /tmp/grpo",
    )
    add_common_options(parser, "trained-grpo", save_steps=10)
    parser.add_argument("--problems", type=int, default=2000, help="problems of --data to draw from")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64, help="replies a step")
    parser.add_argument("--group", type=int, default=8, help="replies a problem; divides --batch-size")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=200, help="a longer reply is cut off, and wrong")
    return parser.parse_args()


def reward(reply: str, answer: int) -> float:
    """One point for a reply with one end of its reasoning and, after it, the right answer and nothing else.

    What was only thought does not count, nor does a second answer: a model finds every gap in a rule.
    """
    _, *after = reply.split("</think>")
    said = ENDED.fullmatch(after[0]) if len(after) == 1 else None
    return float(said is not None and int(said[1]) == answer)


def right_answer(completions: list[list[dict]], answer: list[int], **_: object) -> list[float]:
    """`reward` as TRL calls it: a batch of conversations and, from the data set's column, their answers."""
    return [reward(one[-1]["content"], right) for one, right in zip(completions, answer, strict=True)]


def mean_reward(model, tokenizer, problems: list[dict]) -> float:
    """Of one greedy reply to each problem."""
    said = replies(model, tokenizer, [question_of(item) for item in problems])
    return sum(reward(text, item["answer"]) for text, item in zip(said, problems, strict=True)) / len(problems)


def make_trainer(arguments: argparse.Namespace, tokenizer):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    problems = read_problems(arguments.data, arguments.problems, training_problems)
    rows = [{"prompt": item["messages"][:1], "answer": item["answer"]} for item in problems]
    settings = GRPOConfig(
        output_dir=str(arguments.output / "checkpoints"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        num_generations=arguments.group,
        max_completion_length=arguments.max_new_tokens,
        temperature=arguments.temperature,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        beta=0.0,  # no second forward for a reference; above zero keeps the model near the first one
        activation_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=1,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=arguments.seed,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=right_answer,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=nemotron_h.lora_config(model, arguments.kind, r=arguments.rank),
    )


def main() -> None:
    arguments = parse()
    require("trl", "datasets", "peft")
    if arguments.group < 2 or arguments.batch_size % arguments.group:
        raise SystemExit(
            f"--batch-size {arguments.batch_size} is not made of groups of {arguments.group}: give a --group of 2 or "
            "more that divides it."
        )
    checkpoint = require_checkpoint(arguments)
    set_seed(arguments.seed)
    started = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = read_problems(arguments.test, arguments.test_size, test_problems)

    before = mean_reward(AutoModelForCausalLM.from_pretrained(arguments.model), tokenizer, problems)
    print(f"before: mean reward {before:.3f} on {len(problems)} held-out problems", flush=True)
    trainer = make_trainer(arguments, tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    write_folder(arguments.output / "adapter", trainer.model.save_pretrained)
    drawn = plot(
        history, arguments.output / "loss.png", "GRPO", {"reward": "mean reward of the step's replies", "loss": "loss"}
    )

    model = merged_model(arguments)
    after = mean_reward(model, tokenizer, problems)
    print(f"after: mean reward {after:.3f} on {len(problems)} held-out problems (before: {before:.3f})", flush=True)

    def save(folder: str) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(arguments.output / "merged", save)
    minutes = (time.monotonic() - started) / 60
    figures = {
        "before": before,
        "after": after,
        "problems": len(problems),
        "rewards_in_training": [round(entry["reward"], 4) for entry in history],
        "steps": trainer.state.global_step,
        "minutes": round(minutes, 1),
    }
    write_json(arguments.output / "figures.json", figures)
    print(f"written: {arguments.output}/merged, adapter, figures.json{', loss.png' if drawn else ''}")
    if not drawn:
        print("no plot of the reward: pip install matplotlib")
    print(f"{minutes:.1f} minutes in all")


if __name__ == "__main__":
    main()
