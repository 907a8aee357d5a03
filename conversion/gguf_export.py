"""GGUF files, as llama.cpp reads them <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/gguf_export.py my-nano-9b my-nano-9b.gguf --outtype q8_0 --dry-run
python conversion/gguf_export.py my-nano-9b my-nano-9b.gguf --outtype q8_0
python conversion/gguf_export.py my-nano-9b.gguf my-nano-9b-back --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from nemotron_h.checkpoints import gguf, huggingface
from nemotron_h.checkpoints.writing import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder, or a GGUF file (of a split one, any part)")
    parser.add_argument("dest", type=Path, help="the file or folder to write; must not be there")
    parser.add_argument("--outtype", choices=gguf.OUTTYPES, default="bf16", help="of the matrices (default: bf16)")
    parser.add_argument("--pre", help="llama.cpp's name for how the tokenizer splits text, where it cannot be told")
    parser.add_argument("--no-mtp", action="store_true", help="leave the multi-token-prediction layers out")
    parser.add_argument("--dtype", choices=huggingface.TARGETS, help="of the folder (default: as stored)")
    parser.add_argument(
        "--dry-run", action="store_true", help="list every tensor and what it is made of; write nothing"
    )
    given = parser.parse_args()
    try:
        if gguf.recognises(given.source):
            conversion = gguf.to_huggingface(given.source, given.dtype)
        else:
            conversion = gguf.from_huggingface(given.source, given.outtype, given.pre, not given.no_mtp)
        for remark in conversion.remarks:
            print(remark)
        if given.dry_run:
            print(*conversion.plan.lines(), sep="\n")
            return
        with tqdm(total=conversion.plan.nbytes, unit="B", unit_scale=True) as bar:
            convert(conversion, given.dest, bar.update)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
