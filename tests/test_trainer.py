"""`transformers.Trainer` trains, evaluates and resumes, with nothing of it replaced."""

import json

import pytest
import torch
from families import small_model, tokens
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.data import DataCollatorWithFlattening

from nemotron_h import NemotronHConfig

pytestmark = pytest.mark.core


def arguments(folder, **kwargs):
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **settings | kwargs)


def rows(count=8, length=9):
    ids = tokens(count, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_evaluation_reports_a_loss(tmp_path):
    model = small_model("dense", dtype=torch.float32)
    trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=rows())
    ids = tokens(8, 9)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["dense", "moe", "latent", "tied"])
def test_an_interrupted_run_resumes_to_the_same_weights(family, tmp_path):
    def trainer(model):
        return Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())

    whole = small_model(family, dtype=torch.float32)
    trainer(whole).train()
    resumed = small_model(family, dtype=torch.float32, seed=5)
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7, msg=name)


def test_flattened_documents_have_the_separate_documents_loss():
    model = small_model("moe")
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 3)]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    loss = model(**{key: value for key, value in batch.items() if torch.is_tensor(value)}).loss
    losses = [
        torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        for ids in map(torch.tensor, documents)
    ]
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_load_state_dict_takes_the_published_names(tmp_path):
    from safetensors.torch import load_file

    for family in ("moe", "latent"):
        model = small_model(family, dtype=torch.float32)
        model.save_pretrained(tmp_path / family)
        published = load_file(tmp_path / family / "model.safetensors")
        assert any(name.startswith("backbone.") for name in published)
        other = small_model(family, dtype=torch.float32, seed=3)
        for target in (other, other.model):
            result = target.load_state_dict(published, strict=False)
            assert not result.missing_keys
        for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_the_saved_config_is_read_by_the_base_class(tmp_path):
    """Trainer reads a checkpoint's version with it."""
    small_model("dense").save_pretrained(tmp_path)
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").transformers_version
    written = json.loads((tmp_path / "config.json").read_text())
    assert NemotronHConfig(**written).hybrid_override_pattern == "M-M*-M-"


def test_nothing_is_written_with_a_wrong_config(tmp_path):
    model = small_model("dense")
    model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
