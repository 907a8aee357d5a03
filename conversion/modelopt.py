"""NVIDIA ModelOpt's FP8 and NVFP4 folders <-> plain Hugging Face folders; see `nemotron_h/checkpoints/modelopt.py`.

python conversion/modelopt.py nano-9b nano-9b-fp8 --to fp8
python conversion/modelopt.py nano-9b nano-9b-nvfp4 --to nvfp4 --exclude '*.in_proj,backbone.layers.0'
python conversion/modelopt.py nano-9b-nvfp4 nano-9b-again --to huggingface --dtype bfloat16
"""

import argparse
import sys

from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.modelopt import DTYPES
from nemotron_h.checkpoints.writing import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder")
    parser.add_argument("dest", help="where to write; absent until it is whole")
    parser.add_argument("--to", required=True, choices=("fp8", "nvfp4", "huggingface"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="to huggingface: of the weights that were quantised")
    parser.add_argument("--exclude", help="to fp8 and nvfp4: more modules to leave in full precision, between commas")
    parser.add_argument("--dry-run", action="store_true", help="list every tensor; write nothing")
    given = parser.parse_args()
    try:
        conversion = formats.conversion(given.source, given.to, dtype=given.dtype, exclude=given.exclude)
        for remark in conversion.remarks:
            print(remark)
        if given.dry_run:
            print("\n".join(conversion.plan.lines()))
            return
        convert(conversion, given.dest)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
