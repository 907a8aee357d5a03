"""Peak memory of converting a folder to every format and back, a fresh process each.

The folder is made up: random bfloat16 in the published layout, Mamba-2, attention, MLP and MoE layers (as many of the
kinds as a format has in one model), its largest tensor a fifteenth of it. Resident memory, with torch and transformers
imported and without; what came back is compared with what went in, bit for bit where the format keeps all bits.
Bound: 1.5 GB for 4 GB, which is `--size 4GB`.

    python benchmarks/convert.py                      # 1 GB; writes three times as much in a temporary folder
    python benchmarks/convert.py --size 4GB --only gguf
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import measure
from harness.report import Report, arguments

from nemotron_h import NemotronHConfig
from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.checkpoints import formats, published, writing
from nemotron_h.checkpoints.tensors import Entry, Plan, SafetensorsFolder, Spec
from nemotron_h.cli.arguments import parse_size

BOUND = 1.5e9
FULL = 4e9  # the size whose dimensions are those of the 8B model
# to -> options and whether all bits come back
TARGETS: dict[str, tuple[dict[str, Any], bool]] = {
    "huggingface": ({}, True),
    "megatron": ({"tensor_parallel": 2}, True),
    "megatron-legacy": ({"tensor_parallel": 2}, True),
    "mamba-ssm": ({}, True),
    "gguf": ({"outtype": "bf16"}, True),
    "gguf q8_0": ({"outtype": "q8_0"}, False),
    "fp8": ({}, False),
    "nvfp4": ({}, False),
}
# Where a format does not have all kinds of layer in one model.
PATTERNS = {"mamba-ssm": "M*" * 14, "gguf": "ME*M" * 4}


def config_for(size: float, target: str) -> NemotronHConfig:
    """Of about `size` bytes: the widths go with its square root, the tensors with itself."""
    width = 4096 * math.sqrt(size / FULL)
    head_dim = 64 if width >= 512 else 16
    width = max(1, round(width / head_dim / 4)) * head_dim * 4
    return NemotronHConfig(
        vocab_size=max(512, width * 8),
        hidden_size=width,
        intermediate_size=width * 5,
        hybrid_override_pattern=PATTERNS.get(target, "M-*E" * 3),
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim // 4,
        head_dim=head_dim,
        mamba_num_heads=width // 8,
        mamba_head_dim=16,
        n_groups=1 if target == "mamba-ssm" else 8,
        ssm_state_size=64,
        chunk_size=256 if target == "mamba-ssm" else 128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=width // 2,
        moe_shared_expert_intermediate_size=width,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["NemotronHForCausalLM"],
    )


class Random:
    """A source without files: each tensor is drawn when it is read."""

    files: tuple[Path, ...] = ()

    def __init__(self, config: NemotronHConfig, path: Path):
        self.path = path
        self.specs = {name: Spec(shape, torch.bfloat16) for name, shape in published.tensors(config).items()}

    def read(self, name: str) -> torch.Tensor:
        return torch.empty(self.specs[name].shape, dtype=torch.bfloat16).uniform_(-1, 1)


def write_source(folder: Path, size: float, target: str) -> int:
    """The folder that is converted; the bytes of its tensors."""
    config = config_for(size, target)
    source = Random(config, folder)
    plan = Plan(source, [Entry(name, spec, {name: spec.shape}) for name, spec in source.specs.items()])
    folder.mkdir(parents=True)
    writing.copy_companions(Path(WORD_PROBLEMS), folder)
    config.save_pretrained(folder)
    writing.write_safetensors(plan, folder, lambda nbytes: None, shard_bytes=int(size / 2))
    return plan.nbytes


def convert(source: str, dest: str, to: str, options: dict[str, Any]) -> dict[str, float]:
    """In a fresh process: seconds, memory before (the imports) and how far it rose."""

    def run() -> None:
        writing.convert(formats.conversion(source, to, **options), dest)

    with measure.peak_memory() as peak:
        took = measure.seconds(run)
    return {"seconds": took, "imports": peak.before, "growth": peak.growth, "peak": peak.before + peak.growth}


def same_bits(a: Path, b: Path) -> bool:
    first, second = SafetensorsFolder(a), SafetensorsFolder(b)
    if first.specs != second.specs:
        return False
    return all(torch.equal(first.read(name), second.read(name)) for name in first.specs)


def there_and_back(report: Report, scratch: Path, name: str, size: float) -> list[str]:
    to, (options, exact) = name.split()[0], TARGETS[name]
    source, dest, back = scratch / "source", scratch / "dest", scratch / "back"
    nbytes = write_source(source, size, to)
    largest = max(spec.nbytes for spec in SafetensorsFolder(source).specs.values())
    entry: dict[str, Any] = {"format": name, "bytes": nbytes, "largest_tensor": largest}
    try:
        entry["to"] = measure.in_fresh_process(convert, str(source), str(dest), to, options)
        entry["back"] = measure.in_fresh_process(convert, str(dest), str(back), "huggingface", {})
        entry["same_bits"] = same_bits(source, back)
    finally:
        for path in (source, dest, back):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
    report.data["entries"].append(entry)
    row = [name, f"{nbytes / 1e6:.1f}", f"{largest / 1e6:.1f}"]
    for direction in ("to", "back"):
        found = entry[direction]
        row += [f"{found['peak'] / 1e6:.0f}", f"{found['growth'] / 1e6:.0f}", f"{found['seconds']:.1f}"]
        report.check(f"{name}, {direction}: peak memory", found["peak"] / 1e9, BOUND / 1e9, unit=" GB")
    if exact:
        report.check(f"{name}: all bits come back", float(entry["same_bits"]), 1.0, at_most=False, unit="")
    return [*row, "yes" if entry["same_bits"] else "no"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, "convert", budget=120)
    parser.add_argument("--size", default=None, help="of the folder; default 1GB")
    parser.add_argument("--only", nargs="+", choices=[*TARGETS], help="default: all")
    options = parser.parse_args(argv)
    size = float(parse_size(options.size or ("2MB" if options.dims == "tiny" else "1GB")))
    report = Report("convert", options, __doc__)
    config = config_for(size, "")
    dims = {"pattern": config.hybrid_override_pattern, "hidden_size": config.hidden_size, "size": size}
    report.data |= {"dims": dims, "entries": []}
    rows = []
    with tempfile.TemporaryDirectory(prefix="convert-") as scratch:
        for name in options.only or TARGETS:
            if rows and report.budget.left() <= 0:
                report.note(f"{name} is left out: the budget is spent; --full or --only {name.split()[0]} measures it")
                continue
            try:
                rows.append(there_and_back(report, Path(scratch) / name.replace(" ", "-"), name, size))
            except RuntimeError as error:  # of the fresh process
                report.note(f"{name} is left out: {error}".replace(scratch, "..."))
    report.table(
        "Converting, MB and seconds; peak is the process's, rise is above what its imports take",
        ["", "folder", "largest", "to: peak", "rise", "seconds", "back: peak", "rise", "seconds", "same bits"],
        rows,
    )
    return report.save()


if __name__ == "__main__":
    main()
