"""TRL's DistillationTrainer hands a head's arguments to the backbone: its loss is the divergence of whole models'
logits, gradients too."""

import pytest
import torch
from families import relative_difference, small_model

from nemotron_h import bundled

pytest.importorskip("trl", minversion="1.16", reason="pip install 'trl>=1.16' datasets, which has this trainer")

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

PROMPTS = ["Tom has 3 apples.", "How many pens are there if Ann buys 4 and then 5 more?", "2 + 2"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "lora"])
@pytest.mark.parametrize("family", ["dense", "latent", "tied"])
def test_one_step_has_the_loss_and_the_gradients_of_whole_logits(family, wrapped, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(bundled.WORD_PROBLEMS)
    student, teacher = (
        small_model(family, dtype=torch.float32, vocab_size=len(tokenizer), seed=seed) for seed in (0, 1)
    )
    if wrapped:
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        student = peft.get_peft_model(student, settings)
    seen = {}
    compute = DistillationTrainer._compute_loss

    def record(trainer, model, inputs, count):
        loss, *rest = compute(trainer, model, inputs, count)
        seen.update(inputs, model=model, count=count, loss=loss.detach().clone())
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        seen["gradients"] = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
        seen["expected"] = divergence(model, teacher, inputs, count)
        seen["expected gradients"] = torch.autograd.grad(seen["expected"], parameters)
        return loss, *rest

    monkeypatch.setattr(DistillationTrainer, "_compute_loss", record)
    settings = DistillationConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(PROMPTS),
        max_completion_length=9,
        max_steps=1,
        beta=0.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    DistillationTrainer(student, teacher, settings, data, processing_class=tokenizer).train()
    assert relative_difference(seen["loss"], seen["expected"]) <= 1e-5
    for (name, got), expected in zip(seen["gradients"].items(), seen["expected gradients"], strict=True):
        assert (got - expected).abs().max() <= 1e-4 * max(1e-3, expected.abs().max().item()), name
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters() if p.requires_grad)


def divergence(student, teacher, inputs, count):
    """KL(teacher | student) of the completions' tokens, from logits of all positions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    assert not inputs["prompt_mask"].all()  # rows of unlike lengths, padded on the left
    first = inputs["prompt_ids"].shape[1] - 1
    s_BLV, t_BLV = (
        model(ids, attention_mask=mask, use_cache=False).logits[:, first:-1].log_softmax(-1)
        for model in (student, teacher)
    )
    t_BLV = t_BLV.detach()
    kept = inputs["completion_mask"].bool()
    return (t_BLV.exp() * (t_BLV - s_BLV)).sum(-1)[kept].sum() / (kept.sum() if count is None else count)
