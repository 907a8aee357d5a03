"""The model in the box: a Nemotron-H of a few megabytes that solves word problems, trained by `examples/train_tiny.py`.

`WORD_PROBLEMS` is a folder like any other: `AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)`.

`WORD_PROBLEMS_MTP` is the file of a multi-token-prediction head for it, trained by `examples/train_mtp.py`: after
`nemotron_h.mtp.load_head(model, WORD_PROBLEMS_MTP)`, `generate(use_mtp=True)` drafts with it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

WORD_PROBLEMS = str(Path(__file__).parent / "word-problems")
WORD_PROBLEMS_MTP = str(Path(__file__).parent / "word-problems-mtp" / "mtp.safetensors")


def figures() -> dict[str, Any]:
    """What was measured on the bundled model when it was trained."""
    return json.loads((Path(WORD_PROBLEMS) / "figures.json").read_text(encoding="utf-8"))


def held_out() -> list[dict[str, Any]]:
    """Word problems the bundled model was never trained on."""
    lines = (Path(WORD_PROBLEMS) / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def read_answer(text: str | None) -> int | None:
    """The number a reply ends on: 21 for "The answer is 21."."""
    numbers = re.findall(r"\d+", (text or "").replace(",", ""))
    return int(numbers[-1]) if numbers else None


__all__ = ["WORD_PROBLEMS", "WORD_PROBLEMS_MTP", "figures", "held_out", "read_answer"]
