"""mamba-ssm's MambaLMHeadModel folders <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/mamba_ssm.py mamba2-130m mamba2-130m-hf --dry-run
python conversion/mamba_ssm.py mamba2-130m mamba2-130m-hf
python conversion/mamba_ssm.py mamba2-130m-hf mamba2-130m-back
"""

from command import arguments, run, there_or_back


def main() -> None:
    given = arguments(__doc__, "a folder of either kind").parse_args()
    run(given, lambda: there_or_back(given, "mamba-ssm"))


if __name__ == "__main__":
    main()
