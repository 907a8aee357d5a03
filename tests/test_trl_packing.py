"""TRL's SFTTrainer packs documents, and the model trains as on them one by one: loss and gradients, float32."""

import functools
from itertools import pairwise

import pytest
import torch
from families import small_model

from nemotron_h import bundled

pytest.importorskip("trl", reason="TRL is not installed: pip install trl datasets")

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

LENGTHS = (5, 17, 2, 11, 8, 1, 9)

CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}"
    "</s>{% endgeneration %}{% else %}U:{{ message.content }}\n{% endif %}{% endfor %}"
)


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.WORD_PROBLEMS)


def model_of(family="latent", attention="sdpa"):
    return small_model(family, dtype=torch.float32, vocab_size=len(tokenizer()), attn_implementation=attention).train()


def step(model, rows, folder, **settings):
    """One training step of SFTTrainer on all rows at once: its loss, the model's gradients and what the model got."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **settings,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    trainer.create_optimizer()
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 1
    batch, count = trainer.get_batch_samples(iter(batches), 1, torch.device("cpu"))
    loss = trainer.training_step(model, batch[0], count)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, seen[0]


def alone(model, documents):
    """The mean loss of the wanted tokens, each document in a row of its own, and its gradients.

    A document is its ids and, for each, whether its token is one to learn.
    """
    model.zero_grad()
    losses = []
    for ids, wanted in documents:
        ids, wanted = torch.tensor(ids), torch.tensor(wanted, dtype=torch.bool)
        losses.append(
            torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")[wanted[1:]]
        )
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def documents():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, len(tokenizer()), (length,), generator=generator).tolist() for length in LENGTHS]
    return [(row, [True] * len(row)) for row in ids]


PACKED = {"packing": True, "max_length": 20}
FLAT = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize("settings", [PACKED, FLAT], ids=["packing", "padding_free"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("dense", "sdpa"), ("moe", "sdpa"), ("latent", "sdpa"), ("tied", "eager"), ("latent", "eager")],
)
def test_packed_documents_train_as_separate_ones(family, attention, settings, tmp_path):
    rows = [{"input_ids": ids} for ids, _ in documents()]
    loss, gradients, inputs = step(model_of(family, attention), rows, tmp_path, **settings)
    assert inputs["input_ids"].shape == (1, sum(LENGTHS))  # one row, nothing of it padding
    assert_same((loss, gradients), alone(model_of(family, attention), documents()))


def test_flex_attention_sees_the_same_documents(tmp_path):
    """What TRL passes, without gradients: torch's flex attention has no backward on a CPU. Uncompiled: compiling it
    takes a minute and changes nothing."""
    _, _, inputs = step(model_of(), [{"input_ids": ids} for ids, _ in documents()], tmp_path, **PACKED)
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "fused_lm_head")}
    ends = inputs["cu_seq_lens_q"].tolist()
    assert len(ends) == 1 + len(LENGTHS)
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            logits = model_of("latent", "flex_attention")(**inputs).logits
        for start, stop in pairwise(ends):
            expected = model_of()(inputs["input_ids"][:, start:stop]).logits
            torch.testing.assert_close(logits[:, start:stop], expected, rtol=1e-5, atol=1e-5)


def test_padding_to_a_multiple(tmp_path):
    rows = [{"input_ids": ids} for ids, _ in documents()]
    loss, gradients, inputs = step(model_of(), rows, tmp_path, **FLAT, pad_to_multiple_of=16)
    assert inputs["input_ids"].shape[1] % 16 == 0 and inputs["input_ids"].shape[1] > sum(LENGTHS)
    assert_same((loss, gradients), alone(model_of(), documents()))


@pytest.mark.parametrize("settings", [PACKED, FLAT], ids=["packing", "padding_free"])
def test_completions_alone_are_learned(settings, tmp_path):
    """Prompt and completion, of which TRL learns the completion."""
    texts = [("2 + 3 =", " 5"), ("The sum of 4 and 9 is", " 13."), ("7 - 1 =", " 6")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    loss, gradients, _ = step(model_of(), rows, tmp_path, **settings)
    wanted = []
    for prompt, completion in texts:
        before = tokenizer()(prompt)["input_ids"]
        whole = tokenizer()(prompt + completion + tokenizer().eos_token)["input_ids"]
        wanted.append((whole, [position >= len(before) for position in range(len(whole))]))
    assert_same((loss, gradients), alone(model_of(), wanted))


@pytest.mark.parametrize("settings", [PACKED | {"max_length": 64}, FLAT], ids=["packing", "padding_free"])
def test_assistant_turns_alone_are_learned(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer(), "chat_template", CHAT)
    chats = [[("2 + 3", "5"), ("and 1 more", "6")], [("4 - 4", "0")]]
    rows, wanted = [], []
    for chat in chats:
        messages, ids, learn = [], [], []
        for question, answer in chat:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rendered = tokenizer().apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids, learn = rendered["input_ids"], rendered["assistant_masks"]
        assert 0 < sum(learn) < len(learn)
        rows.append({"messages": messages})
        wanted.append((ids, [bool(one) for one in learn]))
    loss, gradients, _ = step(model_of(), rows, tmp_path, **settings, assistant_only_loss=True)
    assert_same((loss, gradients), alone(model_of(), wanted))
