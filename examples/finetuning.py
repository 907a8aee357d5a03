"""What the fine-tuning examples share: the questions asked before and after, the plot of the loss, the folder written.

Nothing in here is needed to fine-tune; `finetune_lora.py` and `finetune_full.py` have all of that.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Run by an interpreter that never imports nemotron_h: a folder has to load without it.
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.path.insert(0, sys.argv[2])
from finetuning import replies
tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
assert "nemotron_h" not in sys.modules
print(json.dumps({"module": type(model).__module__, "replies": replies(model, tokenizer, json.load(sys.stdin))}))
"""

ANSWER = re.compile(r"The answer is (\d+)\.")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_answer(reply: str) -> int | None:
    """The number a reply ends with; what was only thought does not count."""
    found = ANSWER.search(reply.split("</think>")[-1]) if "</think>" in reply else None
    return int(found.group(1)) if found else None


@torch.inference_mode()
def replies(model, tokenizer, questions: Sequence[str], batch_size: int = 50, max_new_tokens: int = 200) -> list[str]:
    """Greedy replies to questions, in batches that are padded on the left."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
    said = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": questions[index]}], tokenize=False, add_generation_prompt=True
            )
            for index in chosen
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
            model.device
        )
        # `use_cache`: a Trainer that checkpoints gradients switches it off in the config.
        output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            said[index] = text
    model.train(was_training)
    return said


def accuracy(model, tokenizer, problems: Sequence[dict]) -> tuple[float, list[str]]:
    """The share of problems answered rightly, and the replies."""
    said = replies(model, tokenizer, [item["messages"][0]["content"] for item in problems])
    right = sum(read_answer(text) == item["answer"] for text, item in zip(said, problems, strict=True))
    return right / len(problems), said


def same_from_plain_transformers(folder: Path, problems: Sequence[dict], ours: Sequence[str]) -> str:
    """Ask `transformers`' own class the problems, in a process without this package: "20 of 20" replies are `ours`."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), str(Path(__file__).parent)],
        input=json.dumps([item["messages"][0]["content"] for item in problems]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{folder} does not load without this package: {done.stderr.strip().splitlines()[-1]}")
    plain = json.loads(done.stdout.splitlines()[-1])
    same = f"{sum(a == b for a, b in zip(plain['replies'], ours, strict=False))} of {len(problems)}"
    print(f"{plain['module']} gives the same reply to {same}", flush=True)
    return same


def plot_loss(history: Sequence[dict], path: Path, title: str) -> bool:
    """Write a Trainer's logged losses as PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*points, strict=True) if points else ([], []))
    axes.set(xlabel="step", ylabel="loss of the replies' tokens", title=title, yscale="log")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
    return True


def write_folder(path: Path, save: Callable[[str], object]) -> None:
    """`save` into a folder beside `path` that takes its place when it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    save(str(temporary))
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)


def write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
