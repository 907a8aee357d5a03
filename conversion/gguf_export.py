"""GGUF files, as llama.cpp reads them <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/gguf_export.py my-nano-9b my-nano-9b.gguf --outtype q8_0 --dry-run
python conversion/gguf_export.py my-nano-9b my-nano-9b.gguf --outtype q8_0
python conversion/gguf_export.py my-nano-9b.gguf my-nano-9b-back --dtype bfloat16
"""

from command import arguments, run

from nemotron_h.checkpoints import gguf, huggingface
from nemotron_h.checkpoints.writing import Conversion


def main() -> None:
    parser = arguments(
        __doc__, "a folder, or a GGUF file (of a split one, any part)", "the file or folder to write; must not be there"
    )
    parser.add_argument("--outtype", choices=gguf.OUTTYPES, default="bf16", help="of the matrices (default: bf16)")
    parser.add_argument("--pre", help="llama.cpp's name for how the tokenizer splits text, where it cannot be told")
    parser.add_argument("--no-mtp", action="store_true", help="leave the multi-token-prediction layers out")
    parser.add_argument("--dtype", choices=huggingface.TARGETS, help="of the folder (default: as stored)")
    given = parser.parse_args()

    def make() -> Conversion:
        if gguf.recognises(given.source):
            return gguf.to_huggingface(given.source, given.dtype)
        return gguf.from_huggingface(given.source, given.outtype, given.pre, not given.no_mtp)

    run(given, make)


if __name__ == "__main__":
    main()
