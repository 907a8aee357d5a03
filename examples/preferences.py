"""What `dpo.py`, `grpo.py` and `evaluate.py` share: problems to train on and to ask, and what every run ends with.

The bundled model solves 98% of the word problems whose sentences it knows and 65% of those told in other words. The
examples teach it the other words: training problems are of the split ``unseen`` of ``word_problems.py`` from number
`FIRST` on, the problems asked before and after are the 300 of that split that are shipped with the model. No problem is
in both.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from finetuning import read_jsonl
from word_problems import problem

from nemotron_h.bundled import WORD_PROBLEMS, held_out
from nemotron_h.training.lora import KINDS

FIRST = 1000  # the shipped problems are numbers 0 to 299


def as_messages(question: str, reasoning: str, answer: int) -> dict:
    """A problem as a line of the data files: {"messages": [user, assistant], "answer": N}."""
    reply = f"<think>\n{reasoning}\n</think>\n\nThe answer is {answer}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "answer": answer}


def training_problems(count: int) -> list[dict]:
    made = (problem("unseen", FIRST + index) for index in range(count))
    return [as_messages(item.question, item.trace, item.answer) for item in made]


def test_problems(count: int) -> list[dict]:
    shipped = [item for item in held_out() if item["unseen_template"]][:count]
    return [as_messages(item["question"], item["reasoning"], item["answer"]) for item in shipped]


def read_problems(path: Path | None, count: int, default) -> list[dict]:
    """The first `count` problems of a file, or of `default` where there is none; each has a question and an answer."""
    if path is None:
        return default(count)
    rows = read_jsonl(path)[:count]
    for number, row in enumerate(rows, 1):
        if not row.get("messages") or "answer" not in row:
            raise SystemExit(
                f"{path}, line {number} has the keys {', '.join(row) or 'none'}, or no message: write "
                "{'messages': [...], 'answer': N}."
            )
    if not rows:
        raise SystemExit(f"{path} has no lines: write {{'messages': [...], 'answer': N}} on each.")
    return rows


def question_of(item: dict) -> str:
    return item["messages"][0]["content"]


def add_common_options(parser: argparse.ArgumentParser, output: str, save_steps: int) -> None:
    parser.add_argument("--model", default=WORD_PROBLEMS, help="folder or hub id (default: the bundled model)")
    parser.add_argument(
        "--data", type=Path, help="JSONL of {'messages': [...], 'answer': N} (default: problems in new wordings)"
    )
    parser.add_argument(
        "--test", type=Path, help="JSONL of the same (default: 300 such problems that come with the model)"
    )
    parser.add_argument("--test-size", type=int, default=300, help="problems asked before and after")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--kind", choices=KINDS, default="all-linear", help="which weights get an adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--save-steps", type=int, default=save_steps)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/checkpoints")
    parser.add_argument("--seed", type=int, default=0)


def require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"This example needs {', '.join(missing)}: pip install {' '.join(missing)}")
