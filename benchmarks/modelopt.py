"""FP8 and NVFP4 as ModelOpt stores them: what the bundled model still solves in them, and what they take in memory.

The bundled model is written in both formats (weights alone, scales from the largest magnitude), loaded dequantised and
packed, and answers the same held-out word problems, greedily, with its reasoning. Bounds: at most 1 point of accuracy
lost in FP8 and 3 in NVFP4; packed, the quantised tensors take at most 0.56 and 0.33 of their size in bfloat16.

    python benchmarks/modelopt.py                 # 200 problems, 2 to 5 minutes
    python benchmarks/modelopt.py --problems 600 --only fp8 nvfp4
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.report import Report, arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h.bundled import WORD_PROBLEMS, held_out, read_answer
from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.writing import convert
from nemotron_h.quantization.modelopt import LowPrecisionExperts, LowPrecisionLinear

PLAIN = "as it is"
POINTS, BYTES = {"fp8": 1.0, "nvfp4": 3.0}, {"fp8": 0.56, "nvfp4": 0.33}
BATCH = 50


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, problems: Sequence[dict[str, Any]]) -> list[bool]:
    """Which of the problems it solves; in batches of similar length, padded on the left."""
    right = [False] * len(problems)
    order = sorted(range(len(problems)), key=lambda index: len(problems[index]["question"]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problems[index]["question"]}], add_generation_prompt=True, tokenize=False
            )
            for index in chosen
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        output = model.generate(**batch, do_sample=False, max_new_tokens=320)
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, reply in zip(chosen, replies, strict=True):
            right[index] = read_answer(reply.rpartition("</think>")[2]) == problems[index]["answer"]
    return right


def packed_share(model: torch.nn.Module) -> float:
    """Bytes of the packed modules' tensors over those of their weights in bfloat16."""
    modules = [m for m in model.modules() if isinstance(m, (LowPrecisionLinear, LowPrecisionExperts))]
    held = sum(tensor.nbytes for m in modules for tensor in (*m.parameters(), *m.buffers()))
    return held / sum(2 * torch.Size(shape).numel() for m in modules for shape in m.weights().values())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "modelopt", budget=300, rounds=1)
    parser.add_argument("--problems", type=int, default=200, help="at most 600; default %(default)s")
    parser.add_argument("--only", nargs="+", choices=("fp8", "nvfp4", "packed"), help="default: all; plain always")
    options = parser.parse_args(argv)
    report = Report("modelopt", options, __doc__)
    problems = [problem for problem in held_out() if not problem["unseen_template"]][: options.problems]
    if options.dims == "tiny":
        problems = problems[:2]
    only = options.only or ["fp8", "nvfp4", "packed"]
    report.data |= {"dims": {"problems": len(problems)}, "models": {}}
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    rows = []

    def measure(name: str, folder: str | Path, **how: Any) -> None:
        if rows and report.budget.left() < 0:
            rows.append([name, "-", "-", "-", report.note("not measured: --budget was spent")])
            return
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        start = time.perf_counter()
        right = answer(model, tokenizer, problems)
        seconds = time.perf_counter() - start
        share = packed_share(model) if how else None
        report.data["models"][name] = {"right": right, "accuracy": sum(right) / len(right), "seconds": seconds}
        if share is not None:
            report.data["models"][name]["share_of_bfloat16"] = share
        accuracy = f"{sum(right) / len(right):.1%}"
        rows.append([name, f"{sum(right)}/{len(right)}", accuracy, f"{seconds:.1f}", f"{share:.3f}" if share else ""])

    with tempfile.TemporaryDirectory() as temporary:
        measure(PLAIN, WORD_PROBLEMS)
        for to in POINTS:
            if to not in only:
                continue
            folder = Path(temporary) / to
            convert(formats.conversion(WORD_PROBLEMS, to), folder)
            measure(to, folder)
            if "packed" in only:
                measure(f"{to}, packed", folder, quantized="packed")
    report.table("the bundled model", ["", "right", "accuracy", "seconds", "bytes over bfloat16"], rows)
    measured = report.data["models"]
    for to, points in POINTS.items():
        for name in (to, f"{to}, packed"):
            if name in measured:
                lost = 100 * (measured[PLAIN]["accuracy"] - measured[name]["accuracy"])
                report.check(f"{name}: accuracy lost", lost, points, unit=" points")
                report.check(f"{name}: bytes", measured[name].get("share_of_bfloat16"), BYTES[to])
    return report.save()


if __name__ == "__main__":
    main()
