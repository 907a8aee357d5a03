"""`nemotron-h doctor`: what it prints, and its exit code."""

import pytest
from transformers import __version__
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as LibraryModel

from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.inspection.readers import reader_of_transformers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("theirs")
    config = LibraryModel.config_class(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        hybrid_override_pattern="M-*",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
    )
    LibraryModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.core
def test_a_folder_that_some_refuse(cli, cli_json, theirs) -> None:
    text = " ".join(cli("doctor", theirs, code=1).stdout.split())
    assert "TensorRT-LLM" in text and "mlx-lm" in text and "linear_attention" in text
    readers = {each["reader"]: each for each in cli_json("doctor", theirs, code=1)["readers"]}
    for name in ("TensorRT-LLM", "mlx-lm"):
        assert readers[name]["reads"] is False
        (what, remedy) = (readers[name]["findings"][0][key] for key in ("what", "remedy"))
        assert what == "layers_block_type has 'full_attention', 'linear_attention', which it does not know"
        assert f"`nemotron-h convert {theirs} NEW --to huggingface`" in remedy
    assert [name for name, each in readers.items() if each["installed"]] == [reader_of_transformers(__version__)]


@pytest.mark.core
def test_a_folder_that_all_read(cli, cli_json) -> None:
    assert "Every current reader reads it." in cli("doctor", WORD_PROBLEMS).stdout
    facts = cli_json("doctor", WORD_PROBLEMS)
    assert facts["healthy"] is True
    assert all(each["reads"] for each in facts["readers"] if not each["older"])


def test_errors(refused, tmp_path) -> None:
    assert "has no config.json" in refused("doctor", str(tmp_path))
    assert "has no config.json" in refused("doctor", str(tmp_path / "nowhere"))
