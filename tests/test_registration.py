"""After `import nemotron_h`, the Auto classes and pipelines give this package's classes, whatever the folder says."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from families import small_model, tokens

import nemotron_h
from nemotron_h.bundled import WORD_PROBLEMS

pytestmark = pytest.mark.core
AUTO = {
    "AutoModel": "NemotronHModel",
    "AutoModelForCausalLM": "NemotronHForCausalLM",
    "AutoModelForSequenceClassification": "NemotronHForSequenceClassification",
    "AutoModelForTokenClassification": "NemotronHForTokenClassification",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as NVIDIA publishes it: with `auto_map` and remote code, which here fails when it is run."""
    path = tmp_path_factory.mktemp("published")
    small_model("dense", dtype=torch.float32).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModel": "modeling_nemotron_h.NemotronHForCausalLM",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    for module in ("configuration", "modeling"):
        (path / f"{module}_nemotron_h.py").write_text("raise RuntimeError('remote code was run')\n")
    return path


@pytest.mark.parametrize("trust", [None, False, True])
def test_config(folder, trust):
    assert type(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is nemotron_h.NemotronHConfig


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize(("auto", "name"), AUTO.items())
def test_models(folder, auto, name, trust):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is getattr(nemotron_h, name)


@pytest.mark.parametrize(("auto", "name"), AUTO.items())
def test_from_config(folder, auto, name):
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(getattr(transformers, auto).from_config(config)) is getattr(nemotron_h, name)


def test_pipeline():
    generator = transformers.pipeline("text-generation", model=WORD_PROBLEMS)
    assert type(generator.model) is nemotron_h.NemotronHForCausalLM
    out = generator("Tom has 3 apples.", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert isinstance(out[0]["generated_text"], str)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_classification_heads(kind):
    """The head sees the model's hidden states: of the last real token, or of each."""
    from families import randomise, small_config

    cls = getattr(nemotron_h, f"NemotronHFor{kind}Classification")
    model = cls(small_config("dense", num_labels=3)).double().eval()
    randomise(model)
    ids = tokens(2, 9)
    ids[0, 6:] = 0
    mask = (ids != 0).long()
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    out = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]) if kind == "Sequence" else ids % 3)
    rows = hidden[[0, 1], [5, 8]] if kind == "Sequence" else hidden
    torch.testing.assert_close(out.logits, torch.nn.functional.linear(rows, model.score.weight, model.score.bias))
    out.loss.backward()
    assert model.model.embeddings.weight.grad.abs().sum() > 0


def test_model_classes_wait_for_the_first_config():
    """`import nemotron_h` is cheap; the first config, however made, brings the models, also under their own names."""
    script = """
import sys, nemotron_h
assert "nemotron_h.modeling" not in sys.modules
from transformers import AutoModelForCausalLM
config = nemotron_h.NemotronHConfig(hybrid_override_pattern="-", hidden_size=8, intermediate_size=8, vocab_size=16)
assert type(AutoModelForCausalLM.from_config(config)) is nemotron_h.NemotronHForCausalLM
assert all(getattr(nemotron_h, name) for name in nemotron_h.__all__)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
