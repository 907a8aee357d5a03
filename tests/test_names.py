"""Names that other people's code, adapters and saved configs hold: they stay importable wherever the code moves."""

from __future__ import annotations

from importlib import import_module

import pytest

import nemotron_h

# PEFT writes the module of these classes into the adapters that it saves.
OF_MODELING = (
    "NemotronHAttention",
    "NemotronHBlock",
    "NemotronHExperts",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHForTokenClassification",
    "NemotronHMLP",
    "NemotronHMTPLayer",
    "NemotronHMamba2Mixer",
    "NemotronHMoE",
    "NemotronHModel",
    "NemotronHMultiTokenPredictor",
    "NemotronHPreTrainedModel",
    "NemotronHTopkRouter",
)
OF_GENERATION = (
    "ReasoningStreamer",
    "ReasoningSwitchWarning",
    "Split",
    "opens_reasoning",
    "reasoning_switch",
    "split_reasoning",
)
OF_MTP = ("add_head", "load_head", "loss", "save_head")
CHECKPOINTS = (
    "adapters",
    "foreign",
    "formats",
    "gguf",
    "gguf_tokenizer",
    "huggingface",
    "mamba_ssm",
    "megatron",
    "megatron_legacy",
    "megatron_names",
    "modelopt",
    "published",
    "tensors",
    "torch_files",
    "writing",
)
FROM = {
    "nemotron_h.modeling": OF_MODELING,
    "nemotron_h.generation": OF_GENERATION,
    "nemotron_h.mtp": OF_MTP,
    "nemotron_h.parallel": ("keep_float32",),
    "nemotron_h.bundled": ("WORD_PROBLEMS", "WORD_PROBLEMS_MTP", "held_out", "read_answer"),
    "nemotron_h.ops.native": ("serves", "reason"),
    "nemotron_h.cache": ("MambaLayer", "NemotronHCache"),
    "nemotron_h.quantization": ("NemotronHQuantizationConfig",),
}


@pytest.mark.core
@pytest.mark.parametrize("name", nemotron_h.__all__)
def test_the_package(name: str) -> None:
    assert getattr(nemotron_h, name) is not None


@pytest.mark.core
@pytest.mark.parametrize("module", FROM)
def test_its_modules(module: str) -> None:
    found = import_module(module)
    assert [name for name in FROM[module] if not hasattr(found, name)] == []


@pytest.mark.core
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_formats(name: str) -> None:
    import_module(f"nemotron_h.checkpoints.{name}")


@pytest.mark.core
def test_model_classes_say_the_module_that_adapters_name() -> None:
    import nemotron_h.modeling as modeling

    for name in ("NemotronHForCausalLM", "NemotronHModel", "NemotronHForSequenceClassification"):
        assert getattr(modeling, name).__module__ == "nemotron_h.modeling"
