"""What the fine-tuning examples share: the questions asked before and after, the plot of the loss, the folder written.

Nothing in here is needed to fine-tune; `finetune_lora.py` and `finetune_full.py` have all of that.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from halves import FILES

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


def require_checkpoint(arguments: Namespace) -> str | None:
    """The checkpoint that --resume goes on from: the last one that was written to its end. None without --resume."""
    if not arguments.resume:
        return None
    folder = arguments.output / "checkpoints"
    # Trainer writes its state last; a folder without it was cut off by a kill or a full disk.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if not whole:
        raise SystemExit(
            f"{folder} has no checkpoint to go on from: leave --resume out, or name the run with --output."
        )
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1])))


def read_answer(reply: str) -> int | None:
    """The number a reply ends with; what was only thought does not count."""
    found = ANSWER.search(reply.split("</think>")[-1]) if "</think>" in reply else None
    return int(found.group(1)) if found else None


@torch.inference_mode()
def replies(
    model, tokenizer, questions: Sequence[str], batch_size: int = 50, max_new_tokens: int = 200, **options
) -> list[str]:
    """Replies to questions, greedy unless `options` of `generate()` say otherwise, in batches padded on the left."""
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
        options = {"do_sample": False, **options, "max_new_tokens": max_new_tokens, "use_cache": True}
        output = model.generate(**batch, **options)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            said[index] = text
    model.train(was_training)
    return said


def accuracy(model, tokenizer, problems: Sequence[dict]) -> tuple[float, list[str]]:
    """The share of problems answered rightly, and the replies."""
    said = replies(model, tokenizer, [item["messages"][0]["content"] for item in problems])
    return share_right(said, problems), said


def share_right(said: Sequence[str], problems: Sequence[dict]) -> float:
    right = sum(read_answer(text) == item["answer"] for text, item in zip(said, problems, strict=True))
    return right / len(problems)


def ask_plain_transformers(folder: Path, problems: Sequence[dict], ours: Sequence[str]) -> dict[str, float]:
    """Ask `transformers`' own class the problems, in a process without this package, and print both accuracies.

    That class keeps the time steps of Mamba layers above 0.001 while it reads a prompt, so a few replies may differ.
    """
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), str(Path(__file__).parent)],
        input=json.dumps([item["messages"][0]["content"] for item in problems]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{folder} does not load without this package: {done.stderr.strip().splitlines()[-1]}")
    plain = json.loads(done.stdout.splitlines()[-1])
    ours = ours[: len(problems)]
    figures = {
        "problems": len(problems),
        "right": share_right(plain["replies"], problems),
        "right_with_this_package": share_right(ours, problems),
        "same_replies": sum(a == b for a, b in zip(plain["replies"], ours, strict=True)),
    }
    print(
        f"{folder} in {plain['module']}: {figures['right']:.1%} of {len(problems)} right (with this package: "
        f"{figures['right_with_this_package']:.1%}), {figures['same_replies']} of {len(problems)} replies are the same",
        flush=True,
    )
    return figures


def card(arguments: Namespace, before: float, after: float, problems: int) -> dict[str, Any]:
    """What `nemotron_h.publish` writes on the model card."""
    data = "word problems with a half in them" if arguments.data == FILES["train"] else arguments.data.name
    asked = f"right answers to {problems} held-out problems"
    metrics = {f"{asked}, before": f"{before:.1%}", f"{asked}, after": f"{after:.1%}"}
    base_model = None if Path(arguments.model).is_dir() else arguments.model  # a folder has no name at the hub
    return {"base_model": base_model, "data": data, "metrics": metrics}


def hub_name(text: str) -> str:
    """The argument of --push-to-hub."""
    if text.count("/") != 1 or not all(text.split("/")):
        raise ArgumentTypeError(f"{text!r} is not OWNER/NAME")
    return text


def plot(history: Sequence[dict], path: Path, title: str, labels: dict[str, str], yscale: str = "linear") -> bool:
    """Write what a Trainer logged under some keys as PNG, a panel a key; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(labels), figsize=(2 + 5 * len(labels), 4), squeeze=False)
    for axes, (key, label) in zip(panels[0], labels.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []))
        axes.set(xlabel="step", ylabel=label, yscale=yscale)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
    return True


def plot_loss(history: Sequence[dict], path: Path, title: str) -> bool:
    """`plot` of a Trainer's logged losses."""
    return plot(history, path, title, {"loss": "loss of the replies' tokens"}, yscale="log")


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
