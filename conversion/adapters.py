"""LoRA adapters between `model.` and `backbone.` names, and between stacked and separate experts.

python conversion/adapters.py my-lora my-lora-llama --prefix backbone --experts separate   # llama.cpp, vLLM
python conversion/adapters.py my-lora-llama my-lora-peft                                    # PEFT
python conversion/adapters.py my-lora my-lora-llama --experts separate --base model-folder --dry-run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from nemotron_h.checkpoints import adapters
from nemotron_h.checkpoints.writing import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an adapter's folder")
    parser.add_argument("dest", type=Path, help="the folder to write; must not be there")
    parser.add_argument("--prefix", choices=adapters.PREFIXES, default="model", help="of layers (default: model)")
    parser.add_argument(
        "--experts", choices=adapters.EXPERTS, default="stacked", help="routed experts (default: stacked, for PEFT)"
    )
    parser.add_argument("--base", type=Path, help="the base model's folder, whose shapes are then expected")
    parser.add_argument(
        "--dry-run", action="store_true", help="list every tensor and what it is made of; write nothing"
    )
    given = parser.parse_args()
    try:
        conversion = adapters.conversion(given.source, given.prefix, given.experts, given.base)
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
