"""mamba-ssm's MambaLMHeadModel folders <-> this family's Hugging Face folders; the direction follows from SOURCE.

python conversion/mamba_ssm.py mamba2-130m mamba2-130m-hf --dry-run
python conversion/mamba_ssm.py mamba2-130m mamba2-130m-hf
python conversion/mamba_ssm.py mamba2-130m-hf mamba2-130m-back
"""

from command import arguments, run

from nemotron_h.checkpoints import mamba_ssm
from nemotron_h.checkpoints.writing import Conversion


def main() -> None:
    given = arguments(__doc__, "a folder of either kind").parse_args()

    def make() -> Conversion:
        to_huggingface = mamba_ssm.recognises(given.source)
        return (mamba_ssm.to_huggingface if to_huggingface else mamba_ssm.from_huggingface)(given.source)

    run(given, make)


if __name__ == "__main__":
    main()
