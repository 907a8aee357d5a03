"""mamba-ssm's MambaLMHeadModel folders <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/mamba_ssm.py mamba2-130m mamba2-130m-hf --dry-run
python conversion/mamba_ssm.py mamba2-130m mamba2-130m-hf
python conversion/mamba_ssm.py mamba2-130m-hf mamba2-130m-back
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from nemotron_h.checkpoints import mamba_ssm
from nemotron_h.checkpoints.writing import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of either kind")
    parser.add_argument("dest", type=Path, help="the folder to write; must not be there")
    parser.add_argument(
        "--dry-run", action="store_true", help="list every tensor and what it is made of; write nothing"
    )
    given = parser.parse_args()
    try:
        to_huggingface = mamba_ssm.recognises(given.source)
        conversion = (mamba_ssm.to_huggingface if to_huggingface else mamba_ssm.from_huggingface)(given.source)
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
