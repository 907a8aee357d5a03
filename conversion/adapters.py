"""LoRA adapters between `model.` and `backbone.` names, and between stacked and separate experts.

python conversion/adapters.py my-lora my-lora-llama --prefix backbone --experts separate   # llama.cpp, vLLM
python conversion/adapters.py my-lora-llama my-lora-peft                                    # PEFT
python conversion/adapters.py my-lora my-lora-llama --experts separate --base model-folder --dry-run
"""

from pathlib import Path

from command import arguments, run

from nemotron_h.checkpoints import adapters


def main() -> None:
    parser = arguments(__doc__, "an adapter's folder")
    parser.add_argument("--prefix", choices=adapters.PREFIXES, default="model", help="of layers (default: model)")
    parser.add_argument(
        "--experts", choices=adapters.EXPERTS, default="stacked", help="routed experts (default: stacked, for PEFT)"
    )
    parser.add_argument("--base", type=Path, help="the base model's folder, whose shapes are then expected")
    given = parser.parse_args()
    run(given, lambda: adapters.conversion(given.source, given.prefix, given.experts, given.base))


if __name__ == "__main__":
    main()
