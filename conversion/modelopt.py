"""NVIDIA ModelOpt's FP8 and NVFP4 folders <-> plain Hugging Face folders; see `nemotron_h/checkpoints/modelopt.py`.

python conversion/modelopt.py nano-9b nano-9b-fp8 --to fp8
python conversion/modelopt.py nano-9b nano-9b-nvfp4 --to nvfp4 --exclude '*.in_proj,backbone.layers.0'
python conversion/modelopt.py nano-9b-nvfp4 nano-9b-again --to huggingface --dtype bfloat16
"""

from command import arguments, run

from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.modelopt import DTYPES


def main() -> None:
    parser = arguments(__doc__, "a folder")
    parser.add_argument("--to", required=True, choices=("fp8", "nvfp4", "huggingface"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="to huggingface: of the weights that were quantised")
    parser.add_argument("--exclude", help="to fp8 and nvfp4: more modules to leave in full precision, between commas")
    given = parser.parse_args()
    run(given, lambda: formats.conversion(given.source, given.to, dtype=given.dtype, exclude=given.exclude))


if __name__ == "__main__":
    main()
