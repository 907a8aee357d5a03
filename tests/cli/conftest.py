"""A random model with a byte tokenizer, with and without a chat template, and the command line to run on it."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.cli import app

# The switch of Nano 2 in as few words as it takes.
TEMPLATE = (
    "{% for m in messages %}<SPECIAL_11>{{ m.role }}\n{{ m.content }}\n{% endfor %}<SPECIAL_11>Assistant\n"
    "{% if '/no_think' in messages[0].content %}<think></think>{% else %}<think>\n{% endif %}"
)


def save_random_model(folder: Path, template: str | None) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<SPECIAL_12>", pad_token="<unk>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        hybrid_override_pattern="M-*-",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    NemotronHForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(tmp_path_factory.mktemp("base"), None)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch):
    """`cli("info", ...)` runs the command line in this process and gives what came of it."""
    # A fixed width: what is printed must not depend on the terminal the tests run in.
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("NEMOTRON_H_DEBUG", raising=False)

    def run(*arguments: str, code: int = 0, input: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=input)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def refused(cli):
    """`refused(...)` runs a command line that must fail, and gives its one sentence."""

    def run(*arguments: str, input: str | bytes | None = None) -> str:
        result = cli(*arguments, code=2, input=input)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert result.stderr.startswith("nemotron-h: ")
        return result.stderr.strip()

    return run


@pytest.fixture
def cli_json(cli):
    """As `cli`, with `--json`; what was printed is one JSON object and nothing else."""
    return lambda *arguments, **kwargs: json.loads(cli(*arguments, "--json", **kwargs).stdout)
