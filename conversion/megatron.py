"""Megatron-Core checkpoints <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/megatron.py nano-30b nano-30b-megatron                              # torch_dist
python conversion/megatron.py nano-30b nano-30b-tp4 --to megatron-legacy --tensor-parallel 4
python conversion/megatron.py nano-30b-tp4 nano-30b-back --dry-run
python conversion/megatron.py my-nemo-run/weights my-run-hf --config nano-30b/config.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.writing import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of either kind")
    parser.add_argument("dest", type=Path, help="the folder to write; must not be there")
    parser.add_argument("--to", choices=["megatron", "megatron-legacy"], help="torch_dist, or a file per rank")
    options = {**formats.module("megatron").OPTIONS, **formats.module("megatron-legacy").OPTIONS}
    for name, text in options.items():
        number = name not in ("config", "experts")
        parser.add_argument("--" + name.replace("_", "-"), type=int if number else str, help=text)
    parser.add_argument(
        "--dry-run", action="store_true", help="list every tensor and what it is made of; write nothing"
    )
    given = parser.parse_args()
    try:
        published = formats.detect(given.source) == formats.HUGGINGFACE
        to = (given.to or "megatron") if published else formats.HUGGINGFACE
        conversion = formats.conversion(given.source, to, **{name: getattr(given, name) for name in options})
        for remark in conversion.remarks:
            print(remark)
        if given.dry_run:
            print(*conversion.plan.lines(), sep="\n")
            return
        with tqdm(total=conversion.plan.nbytes, unit="B", unit_scale=True) as bar:
            convert(conversion, given.dest, bar.update)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
