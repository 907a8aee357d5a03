"""Evaluate a model with lm-evaluation-harness, in this process, with this package's class: a local task, no network.

The task is ``data/word_problems.yaml`` over the problems that come with the bundled model (or ``--data``). The same
problems are then asked as `nemotron-h demo` asks them, one by one, and both accuracies are printed. One run writes

    OUTPUT/results.json    the scores, the class that computed them, and the package's own count
    OUTPUT/samples.jsonl   what was asked, answered and counted right
    OUTPUT/task/           the task and its problems, for lm_eval's own command under `nemotron-h exec`

    pip install 'lm_eval[hf]'
    python examples/evaluate.py
    python examples/evaluate.py --unseen --problems 300                # in sentences the model has never met
    python examples/evaluate.py --model finetuned-lora/merged --data examples/data/halves_test.jsonl
    python examples/evaluate.py --model YOUR_MODEL --tasks gsm8k       # lm_eval's own tasks; downloads their data
    python examples/evaluate.py --resume                               # keep the replies of an interrupted run
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from finetuning import write_folder, write_json
from preferences import question_of, read_problems, require

import nemotron_h
from nemotron_h.bundled import WORD_PROBLEMS, held_out, read_answer

TASK = "word_problems"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate with lm-evaluation-harness and this package's class, without a network.",
        epilog="Example: python examples/evaluate.py --unseen --problems 50 --output /tmp/evaluated",
    )
    parser.add_argument("--model", default=WORD_PROBLEMS, help="folder or hub id (default: the bundled model)")
    parser.add_argument(
        "--data", type=Path, help="JSONL of {'messages': [...], 'answer': N} (default: the bundled ones)"
    )
    parser.add_argument("--unseen", action="store_true", help="bundled problems in sentences kept from training")
    parser.add_argument("--problems", type=int, default=100, help="how many of them")
    parser.add_argument("--tasks", nargs="+", default=[TASK], help="other tasks that lm_eval knows")
    parser.add_argument("--include-path", help="a folder with more tasks")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("evaluated"))
    parser.add_argument("--resume", action="store_true", help="keep the replies that OUTPUT has already")
    parser.add_argument("--no-compare", action="store_true", help="do not ask the problems a second time")
    return parser.parse_args()


def problems_of(arguments: argparse.Namespace) -> list[dict]:
    """{"question", "answer"}, of --data or the bundled ones; those are spread over all kinds of story."""
    if arguments.data:
        rows = read_problems(arguments.data, arguments.problems, None)
        return [{"question": question_of(row), "answer": row["answer"]} for row in rows]
    rows = [row for row in held_out() if bool(row["unseen_template"]) is arguments.unseen]
    rows = random.Random(0).sample(rows, min(arguments.problems, len(rows)))
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def write_task(folder: Path, problems: Sequence[dict]) -> None:
    """The task's YAML, with the place of its problems in it."""

    def save(temporary: str) -> None:
        Path(temporary).mkdir(parents=True)
        lines = (json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
        (Path(temporary) / f"{TASK}.jsonl").write_text("".join(lines), encoding="utf-8")
        text = (Path(__file__).parent / "data" / f"{TASK}.yaml").read_text(encoding="utf-8")
        place = json.dumps(str(folder.absolute() / f"{TASK}.jsonl"))
        (Path(temporary) / f"{TASK}.yaml").write_text(text.replace(f"{TASK}.jsonl", place, 1), encoding="utf-8")

    write_folder(folder, save)


def own_accuracy(model, tokenizer, problems: Sequence[dict]) -> float:
    """As `nemotron-h demo` counts: one problem at a time, the last number of the answer."""
    from nemotron_h.generation.chat import Chat

    chat = Chat(model, tokenizer)
    right = 0
    for number, problem in enumerate(problems, 1):
        reply = chat.ask(problem["question"], max_new_tokens=512, do_sample=False)
        right += read_answer(reply.answer) == problem["answer"]
        print(f"\rone by one: {right} of {number} right", end="", flush=True)
    print()
    return right / len(problems)


def evaluate(arguments: argparse.Namespace, tasks: Path):
    """lm_eval's results, and the model that it loaded."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(
        pretrained=str(arguments.model), dtype=arguments.dtype, device=arguments.device, batch_size=arguments.batch_size
    )
    if not isinstance(lm.model, nemotron_h.NemotronHPreTrainedModel):
        raise SystemExit(f"{arguments.model} is a {type(lm.model).__name__}: this example is for Nemotron-H models.")
    print(f"lm_eval holds {type(lm.model).__module__}.{type(lm.model).__name__}", flush=True)
    include = [str(path) for path in (tasks, arguments.include_path) if path]
    own = arguments.tasks == [TASK]
    cache = arguments.output / "replies"
    if not arguments.resume:
        for path in arguments.output.glob("replies_rank*.db*"):
            path.unlink()
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(arguments.tasks),
        task_manager=TaskManager(include_path=include, include_defaults=not own),  # its own list is long to read
        apply_chat_template=bool(lm.tokenizer.chat_template),
        limit=None if own else arguments.problems,
        use_cache=str(cache),
        log_samples=True,
        bootstrap_iters=1000,
    )
    return results, lm


def main() -> None:
    arguments = parse()
    require("lm_eval", "datasets")
    started = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    problems = problems_of(arguments)
    write_task(arguments.output / "task", problems)
    results, lm = evaluate(arguments, arguments.output / "task")
    scores = {task: {name: value for name, value in found.items() if isinstance(value, float)}
              for task, found in results["results"].items()}  # fmt: skip
    for task, found in scores.items():
        for name, value in found.items():
            print(f"{task} {name}: {value:.4f}", flush=True)
    written = {
        "model": str(arguments.model),
        "class": f"{type(lm.model).__module__}.{type(lm.model).__name__}",
        "problems": {task: counted["effective"] for task, counted in results["n-samples"].items()},
        "scores": scores,
    }
    if TASK in arguments.tasks and not arguments.no_compare:
        written["one_by_one"] = own_accuracy(lm.model, lm.tokenizer, problems)
        print(f"{TASK}, asked one by one as `nemotron-h demo` does: {written['one_by_one']:.4f}")
    written["minutes"] = round((time.monotonic() - started) / 60, 1)
    write_json(arguments.output / "results.json", written)
    samples = arguments.output / ".samples.jsonl"
    with samples.open("w", encoding="utf-8") as file:
        for task, rows in results["samples"].items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
    samples.replace(arguments.output / "samples.jsonl")
    print(f"written: {arguments.output}/results.json, samples.jsonl, task; {written['minutes']} minutes in all")


if __name__ == "__main__":
    main()
