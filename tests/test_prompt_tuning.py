"""PEFT's prompt learning: virtual tokens in front of the prompt generate what a full forward at each token gives."""

import pytest
import torch
from families import relative_difference, small_config, small_model, tokens

from nemotron_h import NemotronHForCausalLM, NemotronHForSequenceClassification, PromptCache

peft = pytest.importorskip("peft")

VIRTUAL, NEW = 5, 7
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SETTINGS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_tasks=2
    ),
}


def wrap(model, way):
    """Prompts as large as the embeddings, so that every virtual token says something."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, SETTINGS[way]()).to(model.dtype).eval()
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    return wrapped


def task(way, batch):
    return {"task_ids": torch.arange(batch) % 2} if way == "multitask" else {}


@torch.no_grad()
def token_by_token(wrapped, ids, mask, **given):
    for _ in range(NEW):
        logits = wrapped(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize("batch", ["plain", "left-padded", "one long row"])
@pytest.mark.parametrize("way", SETTINGS)
@pytest.mark.parametrize("family", ["dense", "latent", "mamba", "attention", "tied"])
def test_generate_is_token_by_token(family, way, batch):
    wrapped = wrap(small_model(family), way)
    ids = tokens(1, 40) if batch == "one long row" else tokens(3, 9)
    mask = torch.ones_like(ids)
    if batch == "left-padded":
        mask[0, :4] = mask[1, :1] = 0
    given = task(way, len(ids))
    got = wrapped.generate(input_ids=ids, attention_mask=mask, **GREEDY, **given)
    for row in range(len(ids)):
        pads = int((mask[row] == 0).sum())
        one = {name: value[row : row + 1] for name, value in given.items()}
        expected = token_by_token(wrapped, ids[row : row + 1, pads:], mask[row : row + 1, pads:], **one)
        assert torch.equal(got[row : row + 1, pads:], expected)
    # and so do beams, whose caches change places
    beams = {**GREEDY, "num_beams": 3, **given}
    assert torch.equal(
        wrapped.generate(input_ids=ids, attention_mask=mask, **beams),
        wrapped.generate(input_ids=ids, attention_mask=mask, use_cache=False, **beams),
    )


@pytest.mark.parametrize("way", SETTINGS)
def test_virtual_tokens_are_tokens_in_front_forward_and_backward(way):
    model, ids = small_model("latent"), tokens(2, 9)
    wrapped, given = wrap(model, way).train(), task(way, 2)
    virtual = wrapped.get_prompt(2, **given)
    whole = model(inputs_embeds=torch.cat([virtual, model.model.embeddings(ids)], dim=1)).logits
    got = wrapped(input_ids=ids, labels=ids, **given)
    assert relative_difference(got.logits, whole) <= 1e-9
    expected = torch.nn.functional.cross_entropy(whole[:, VIRTUAL - 1 : -1].flatten(0, 1), ids.flatten())
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(got.loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert relative_difference(one, other) <= 1e-6  # the library's loss is float32


def test_what_does_not_go_with_virtual_tokens_is_refused():
    wrapped, ids = wrap(small_model("dense"), "prompt tuning"), tokens(1, 9)
    expected = wrapped.generate(input_ids=ids, **GREEDY)
    for given in ({"prompt_cache": PromptCache()}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=r"PROMPT_TUNING puts tokens of its own in front: leave it out"):
            wrapped.generate(input_ids=ids, **GREEDY, **given)
    assert torch.equal(wrapped.generate(input_ids=ids, **GREEDY), expected)
    # below the wrapper nothing is in front
    base = wrapped.get_base_model()
    assert torch.equal(base.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), base.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("cls", "task_type"),
    [(NemotronHForCausalLM, "CAUSAL_LM"), (NemotronHForSequenceClassification, "SEQ_CLS")],
)
@pytest.mark.parametrize("family", ["dense", "mamba", "latent"])
def test_prefix_tuning_is_refused_at_once(cls, task_type, family):
    settings = peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=VIRTUAL)
    with pytest.raises(ValueError, match=r"PREFIX_TUNING learns keys .* Mamba layers have neither: use peft\.Prompt"):
        peft.get_peft_model(cls(small_config(family)), settings)
