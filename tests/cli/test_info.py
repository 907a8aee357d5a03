"""`nemotron-h info`: published figures from published configs, and nothing but the config is read."""

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
NANO_9B = str(CONFIGS / "NVIDIA-Nemotron-Nano-9B-v2.json")
NANO_12B = str(CONFIGS / "NVIDIA-Nemotron-Nano-12B-v2.json")
SUPER = str(CONFIGS / "NVIDIA-Nemotron-3-Super-120B-A12B.json")


@pytest.mark.core
def test_9b_fits(cli, cli_json) -> None:
    arguments = ("info", NANO_9B, "--context", "131072", "--gpu-memory", "22GiB")
    text = cli(*arguments).stdout
    assert "8,888,227,328" in text
    assert "16,384 bytes per token" in text
    assert "136.90 MiB per sequence" in text
    assert "At 131,072 tokens, batch 1, bfloat16: 18.69 GiB" in text
    assert "fits 22GiB, 3.31 GiB to spare" in text
    assert "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-" in text
    facts = cli_json(*arguments)
    assert facts["parameters"]["total"] == 8_888_227_328
    assert facts["kv_bytes_per_token"] == 16_384
    assert facts["state_bytes_per_sequence"] / 2**20 == pytest.approx(136.90, abs=0.005)
    assert facts["memory"]["total"] == sum(facts["memory"][part] for part in ("weights", "kv", "states"))
    assert facts["fit"]["fits"] is True


@pytest.mark.core
def test_12b_does_not_fit(cli, cli_json) -> None:
    assert "does not fit 22GiB, 4.07 GiB too much" in cli("info", NANO_12B, "--gpu-memory", "22GiB").stdout
    assert cli_json("info", NANO_12B, "--gpu-memory", "22GiB")["fit"] == {
        "gpu_memory": 22 * 2**30,
        "fits": False,
        "longest_context": 0,
    }


def test_longest_context_is_the_longest(cli_json) -> None:
    def fit(context: int) -> dict:
        return cli_json("info", NANO_9B, "--gpu-memory", "22GiB", "--batch", "3", "--context", str(context))["fit"]

    longest = fit(1000)["longest_context"]
    assert fit(longest)["fits"] and not fit(longest + 1)["fits"]


def test_context_batch_dtype(cli_json) -> None:
    small = cli_json("info", NANO_9B, "--context", "1000")["memory"]
    large = cli_json("info", NANO_9B, "--context", "2000", "--batch", "4", "--dtype", "float32")["memory"]
    assert large["kv"] == 2 * 4 * 2 * small["kv"]
    assert large["weights"] == 2 * small["weights"]


def test_moe(cli, cli_json) -> None:
    text = cli("info", SUPER).stdout
    assert "40 mixture of experts (E)" in text
    assert "active per token" in text and "latent projections" in text and "MTP layers" in text
    assert cli_json("info", SUPER)["parameters"]["total"] == 120_668_707_840


def test_every_published_config(cli) -> None:
    for path in sorted(CONFIGS.glob("*.json")):
        cli("info", str(path))


def test_folder_and_nested_config(cli_json, tmp_path: Path) -> None:
    """A folder without weights is enough, and a vision-language model's config holds the text model's."""
    fields = json.loads(Path(NANO_12B).read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "NemotronH_Nano_VL_V2", "llm_config": fields}))
    assert cli_json("info", str(tmp_path)) == cli_json("info", NANO_12B)


def test_errors(refused, tmp_path: Path) -> None:
    assert "'22 gallons' is not a size" in refused("info", NANO_9B, "--gpu-memory", "22 gallons")
    assert "'float7'" in refused("info", NANO_9B, "--dtype", "float7")
    assert "no config.json" in refused("info", str(tmp_path))
    assert "no folder 'nowhere'" in refused("info", "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in refused("info", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h", "hybrid_override_pattern": "M-X"}')
    assert "X" in refused("info", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused("info", str(tmp_path))


@pytest.mark.parametrize(
    "text, nbytes", [("22GiB", 22 * 2**30), ("24 GB", 24 * 10**9), ("80g", 80 * 10**9), ("1.5MiB", 1572864), ("7", 7)]
)
def test_sizes(text: str, nbytes: int) -> None:
    from nemotron_h.cli.arguments import parse_size

    assert parse_size(text) == nbytes
