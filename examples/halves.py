"""Word problems with a half in them: what the bundled model cannot do, for the fine-tuning examples to teach it.

``data/halves_train.jsonl`` and ``data/halves_test.jsonl`` are made by this script, a line a problem:

    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "answer": 37}

the question, and the reasoning between ``<think>`` and ``</think>`` with the answer after it. Stories and sums are as
in ``word_problems.py``; new are the sentences in which half of something goes, and how a half is worked out, from the
left, a digit at a time: ``74: 7 = 3 + 3 + 1, 14 = 7 + 7, so 37.``

The reasoning has no token that the model's own reasoning lacks: LoRA leaves the head as it is, and a head tells tokens
that it was never trained to write apart no better than by chance. (`modules_to_save=["lm_head"]` would train it whole.)

The test problems have people that training does not have, and halve numbers that training never halves (`kept_back`).

    python examples/halves.py            # write both files again: the same bytes on every machine
    python examples/halves.py --show 5   # print some
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

from word_problems import GAIN, HOW_MANY_NOW, LIMIT, LOSS, OBJECTS, START, SUM, Draw, OutOfRange, wording, work_out

DATA = Path(__file__).parent / "data"
FILES = {"train": DATA / "halves_train.jsonl", "test": DATA / "halves_test.jsonl"}
SIZES = {"train": 2000, "test": 200}

HALF_GOES = wording(
    "{She} gives half of them to {other}.",
    "Then {name} gives half of the {things} to {other}.",
    "Then {she} loses half of them.",
    "{She} sells half of the {things}.",
    "{other} takes half of them.",
    "Later {she} uses half of the {things}.",
)


def work_out_half(number: int) -> str:
    """How the half of an even number is written down: ``30: 3 = 1 + 1 + 1, 10 = 5 + 5, so 15.``"""
    if number % 2 or number < 2:
        raise ValueError(f"{number} has no half above zero: pass an even number.")
    columns, over = [], 0
    for digit in map(int, str(number)):
        part = 10 * over + digit
        over = part % 2
        columns.append(f"{part} = {part // 2} + {part // 2}" + (" + 1" if over else ""))
    return f"{number}: {', '.join(columns)}, so {number // 2}."


def kept_back(number: int) -> bool:
    """Whether training never halves this number: one in six, from 20 on (there are too few below)."""
    return number >= 20 and zlib.crc32(f"half {number}".encode()) % 6 == 0


def problem(split: str, index: int) -> dict:
    """The problem number ``index`` of a split, as a line of its file."""
    rng = random.Random(f"halves {split} {index}")
    while True:
        draw = Draw(rng, "train" if split == "train" else "held_out")
        try:
            made = _tell(draw, rng)
        except OutOfRange:
            continue
        if made is not None:
            return made


def _tell(draw: Draw, rng: random.Random) -> dict | None:
    """A story with a half in it; None where its numbers belong to the other split."""
    who, other, things = draw.person(), draw.person(), draw.choice(OBJECTS)
    words = who | {"things": things, "other": other["name"]}
    # Every other problem of training starts anywhere below a thousand: with tens alone, the halves are learnt by heart.
    count = draw.number(10, LIMIT if draw.split == "train" and rng.random() < 0.5 else None)
    sentences, lines = [draw.say(START, n=count, **words)], []

    def change() -> None:
        nonlocal count
        n, op = draw.number(), draw.choice("+-")
        sentences.append(draw.say(GAIN if op == "+" else LOSS, n=n, **words))
        steps, text = work_out(f"{count} {op} {n}")
        lines.append(text)
        count = steps[-1].result

    before, after = rng.choice(((0, 0), (1, 0), (0, 1), (1, 1)))
    for _ in range(before):
        change()
    if count % 2 or count > LIMIT or kept_back(count) != (draw.split != "train"):
        return None
    sentences.append(draw.say(HALF_GOES, **words))
    lines.append(work_out_half(count))
    count //= 2
    for _ in range(after):
        change()
    sentences.append(draw.say(HOW_MANY_NOW, **words))
    reply = f"<think>\n{SUM} {' '.join(lines)}\n</think>\n\nThe answer is {count}."
    return {
        "messages": [{"role": "user", "content": " ".join(sentences)}, {"role": "assistant", "content": reply}],
        "answer": count,
    }


def problems(split: str, count: int) -> Iterator[dict]:
    return (problem(split, index) for index in range(count))


def read(split: str) -> list[dict]:
    """The lines of a shipped file."""
    return [json.loads(line) for line in FILES[split].read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the fine-tuning examples, or print some of it.")
    parser.add_argument("--show", type=int, metavar="N", help="print N problems of the test split and write nothing")
    arguments = parser.parse_args()
    if arguments.show:
        for item in problems("test", arguments.show):
            print("\n".join(message["content"] for message in item["messages"]), end="\n\n")
        return
    for split, path in FILES.items():
        lines = [json.dumps(item, ensure_ascii=False) for item in problems(split, SIZES[split])]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {len(lines)} problems, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
