"""Megatron-Core checkpoints <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/megatron.py nano-30b nano-30b-megatron                              # torch_dist
python conversion/megatron.py nano-30b nano-30b-tp4 --to megatron-legacy --tensor-parallel 4
python conversion/megatron.py nano-30b-tp4 nano-30b-back --dry-run
python conversion/megatron.py my-nemo-run/weights my-run-hf --config nano-30b/config.json
"""

from command import arguments, run, there_or_back

from nemotron_h.checkpoints import formats


def main() -> None:
    parser = arguments(__doc__, "a folder of either kind")
    parser.add_argument("--to", choices=["megatron", "megatron-legacy"], help="torch_dist, or a file per rank")
    options = {**formats.module("megatron").OPTIONS, **formats.module("megatron-legacy").OPTIONS}
    for name, text in options.items():
        number = name not in ("config", "experts")
        parser.add_argument("--" + name.replace("_", "-"), type=int if number else str, help=text)
    given = parser.parse_args()
    chosen = {name: getattr(given, name) for name in options}
    run(given, lambda: there_or_back(given, given.to or "megatron", **chosen))


if __name__ == "__main__":
    main()
