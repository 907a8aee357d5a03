"""The MTP head: its loss and gradients against the formula written out for one unpadded document at a time, its drafts
against the same formula without a cache, and `generate(use_mtp=True)` against plain `generate()`."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
from families import relative_difference, small_config, small_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from nemotron_h import NemotronHCache, NemotronHForCausalLM, mtp
from nemotron_h.generation import drafts

HEADS = {
    "dense": {"mtp_hybrid_override_pattern": "*-", "num_nextn_predict_layers": 1},
    "moe": {"mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 1},
    "latent": {"mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 2},
    "tied": {"mtp_hybrid_override_pattern": "M*", "num_nextn_predict_layers": 2},
}


def model_with_head(family="dense", dtype=torch.float64, **overrides):
    return small_model(family, dtype, **{**HEADS[family], **overrides})


# -- the formula ------------------------------------------------------------------------------------------------------


def rms(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(config, mixer, x):
    """Causal grouped-query attention of (L, D), written out."""
    length, size = x.shape[0], config.head_dim
    q, k, v = (
        F.linear(x, proj.weight).view(length, -1, size).transpose(0, 1)
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    k, v = (t.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=0) for t in (k, v))
    scores = (q @ k.transpose(1, 2) * size**-0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1), mixer.o_proj.weight)


def formula(model, depth, x, embeds):
    """One depth (from 0) on one document: (L, D) hidden states and embeddings -> (L, D)."""
    config, head = model.config, model.mtp
    kinds = config.mtp_layers_block_type
    at = min(depth, config.num_nextn_predict_layers - 1) * len(kinds)
    layers = head.layers[at : at + len(kinds)]
    first, last = layers[0], layers[-1]
    x = F.linear(torch.cat([rms(embeds, first.enorm.weight), rms(x, first.hnorm.weight)], -1), first.eh_proj.weight)
    for kind, layer in zip(kinds, layers, strict=True):
        normed = rms(x, layer.norm.weight)
        if kind == "attention":
            y = attention(config, layer.mixer, normed)
        elif kind == "mlp":
            y = F.linear(F.relu(F.linear(normed, layer.mixer.up_proj.weight)) ** 2, layer.mixer.down_proj.weight)
        else:  # tested for themselves
            y = layer.mixer(normed[None])[0]
        x = x + y
    return rms(x, last.final_layernorm.weight)


def losses_of_document(model, ids, labels, depths):
    """For each depth, the sum of its cross-entropies and their number; everything the document has, nothing else."""
    x = model.model(ids[None], use_cache=False).last_hidden_state[0]
    embeds = model.model.embeddings.weight[ids]
    found = []
    for depth in range(depths):
        # position t and token t + depth + 1; the token after that is the target
        x = formula(model, depth, x, torch.cat([embeds[depth + 1 :], embeds[: depth + 1]])[: len(ids)])
        number = len(ids) - depth - 2
        if number < 1:
            found.append((torch.zeros((), dtype=x.dtype), 0))
            continue
        logits, targets = F.linear(x[:number], model.lm_head.weight), labels[depth + 2 :]
        found.append(
            (F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), int((targets != -100).sum()))
        )
    return found


def oracle(model, documents, depths, items=None):
    per_document = [losses_of_document(model, ids, labels, depths) for ids, labels in documents]
    total = 0
    for depth in range(depths):
        number = sum(found[depth][1] for found in per_document) if items is None else items
        total = total + sum(found[depth][0] for found in per_document) / max(1, number)
    return total / depths


def batch(kind):
    """Inputs, and the documents that are in them."""
    ids, labels = tokens(2, 24, seed=5), tokens(2, 24, seed=5)
    labels[:, :3] = -100
    labels[0, 15] = -100
    if kind == "plain":
        return {"input_ids": ids, "labels": labels}, list(zip(ids, labels, strict=True))
    if kind.endswith("padding"):
        mask = torch.ones_like(ids)
        if kind == "left padding":
            mask[0, :7] = 0
        elif kind == "right padding":
            mask[0, 17:] = mask[1, 22:] = 0
        else:
            mask[0, :2] = mask[0, 9:12] = mask[1, 20] = 0
        labels = labels.masked_fill(mask == 0, -100)
        # What comes before padding has no target for the model either.
        gaps = F.pad(mask[:, :-1] == 0, (1, 0), value=False)
        labels = labels.masked_fill(gaps, -100)
        keep = mask.bool()
        documents = [(row[k], label[k]) for row, label, k in zip(ids, labels, keep, strict=True)]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}, documents
    lengths = [[9, 1, 2, 12], [24]]
    documents = [
        (i, lab)
        for row, label, sizes in zip(ids, labels, lengths, strict=True)
        for i, lab in zip(row.split(sizes), label.split(sizes), strict=True)
    ]
    if kind == "positions":
        positions = torch.stack([torch.cat([torch.arange(n) for n in sizes]) for sizes in lengths])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}, documents
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(s)), torch.tensor(s)) for s in lengths])
    return {"input_ids": ids, "labels": labels, "seq_idx": numbers}, documents


KINDS = ["plain", "left padding", "right padding", "interior padding", "positions", "seq_idx"]


@pytest.mark.parametrize(
    ("family", "depths", "kind"),
    [
        *(("dense", 3, kind) for kind in KINDS),
        *(("latent", 2, kind) for kind in KINDS),
        *(
            (family, depths, kind)
            for family, depths in (("moe", 1), ("tied", 3))
            for kind in ("left padding", "seq_idx")
        ),
    ],
)
def test_the_loss_and_its_gradients(family, depths, kind):
    model = model_with_head(family).train()
    inputs, documents = batch(kind)
    plain = model(**inputs).loss
    model.mtp_loss_scale, model.mtp_depths = 0.3, depths
    model.zero_grad()
    ours = model(**inputs).loss - plain
    expected = 0.3 * oracle(model, documents, depths)
    assert relative_difference(ours.detach(), expected.detach()) <= 1e-9
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(ours, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    reached = 0
    for parameter, a, b in zip(parameters, grads, theirs, strict=True):
        a, b = (torch.zeros_like(parameter) if g is None else g for g in (a, b))
        # What the two main losses leave of each other: the library has them in float32.
        assert float((a - b).abs().max()) <= 1e-6 + 1e-8 * float(b.abs().max())
        reached += bool(b.abs().max() > 0)
    assert reached > len(list(model.mtp.parameters()))


def test_off_unless_asked_for():
    model = model_with_head()
    ids = tokens(2, 12)
    assert model.mtp_loss_scale == 0 and not any(p.requires_grad for p in model.mtp.parameters())
    without = small_model("dense")
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    assert torch.equal(model(ids, labels=ids).loss, without(ids, labels=ids).loss)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.mtp.parameters())
    by_config = NemotronHForCausalLM(small_config("dense", mtp_loss_scale=0.3, **HEADS["dense"]))
    assert by_config.mtp_loss_scale == 0.3 and all(p.requires_grad for p in by_config.mtp.parameters())


@pytest.mark.parametrize("family", ["dense", "moe", "latent"])
def test_a_frozen_trunk(family):
    model = model_with_head(family).train()
    model.requires_grad_(False)
    model.mtp_loss_scale = 1.0
    ids = tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    wanted = {name for name, _ in model.named_parameters() if name.startswith("mtp.")}
    # Every expert that some token was sent to has one: the tensors hold all of them.
    assert with_grad == wanted


def test_every_way_of_a_training_step_is_one_loss():
    """Counted over several steps, shifted labels, without logits, embeddings, checkpointing, after evaluation mode."""
    model = model_with_head("latent").train()
    model.mtp_loss_scale, model.mtp_depths = 0.5, 3
    inputs, documents = batch("left padding")
    labels = inputs["labels"]
    expected = model(**inputs).loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    shifted = {**inputs, "shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()}
    del shifted["labels"]
    embedded = {**inputs, "inputs_embeds": model.model.embeddings(inputs["input_ids"]).detach()}
    del embedded["input_ids"]
    for other in (shifted, embedded, {**inputs, "skip_logits": True}, {**inputs, "use_cache": True}):
        torch.testing.assert_close(model(**other).loss, expected, rtol=1e-7, atol=0)  # the library's is in float32
    torch.testing.assert_close(model.eval()(**inputs).loss, expected, rtol=1e-12, atol=0)
    counted = model(**inputs, num_items_in_batch=torch.tensor(77)).loss
    model.mtp_loss_scale = 0.0
    plain = model(**inputs, num_items_in_batch=torch.tensor(77)).loss
    model.mtp_loss_scale = 0.5
    torch.testing.assert_close(counted - plain, 0.5 * oracle(model, documents, 3, items=77), rtol=1e-9, atol=0)

    for reentrant in (False, True):
        model.train().zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = model(**inputs).loss
        again.backward()
        torch.testing.assert_close(again, expected, rtol=1e-12, atol=0)
        for name, parameter in model.named_parameters():
            if name in grads:
                torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-9, atol=1e-12, msg=name)


def test_too_short_to_predict_anything():
    model = model_with_head().train()
    model.mtp_loss_scale, model.mtp_depths = 0.5, 4
    ids = tokens(1, 3)
    with_head = model(ids, labels=ids).loss
    (sums,) = [losses_of_document(model, ids[0], ids[0], 4)]
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]) + 0.5 * sums[0][0] / 4
    torch.testing.assert_close(with_head, expected, rtol=1e-7, atol=0)


# -- drafting ---------------------------------------------------------------------------------------------------------


def drafted_without_a_cache(model, ids, number):
    """The drafts after (1, L) ids, of which the last has no hidden state yet: every depth over the whole text.

    Depths beyond the head's: its last over its pairs of the text, and after them one pair for each further draft."""
    config = model.config
    table = model.model.embeddings.weight
    x = model.model(ids[:, :-1], use_cache=False).last_hidden_state[0]
    text, start = ids[0], 1
    drafts = []
    for step in range(number):
        if step < config.num_nextn_predict_layers:
            pairs = x, table[torch.cat([text, torch.tensor(drafts, dtype=torch.long)])[start : start + len(x)]]
            start += 1
        else:
            pairs = torch.cat([pairs[0], x[-1:]]), torch.cat([pairs[1], table[drafts[-1:]]])
        x = formula(model, min(step, config.num_nextn_predict_layers - 1), *pairs)
        drafts.append(int(F.linear(x[-1], model.lm_head.weight).argmax()))
    return drafts


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "depths", "number"),
    [
        ("dense", 1, 1),
        ("dense", 1, 4),
        ("dense", 3, 5),
        ("moe", 1, 3),
        ("latent", 2, 4),
        ("latent", 3, 2),
        ("tied", 2, 4),
    ],
)
@torch.no_grad()
def test_drafts(family, depths, number, implementation):
    """Any numbers of accepted drafts, one after the other: always the drafts of the text so far."""
    model = model_with_head(family, num_nextn_predict_layers=depths)
    model.set_attn_implementation(implementation)
    cache = NemotronHCache(model.config)
    cache.activate_past_recording()
    config = model.generation_config
    config.num_assistant_tokens, config.max_length, config.do_sample = number, 1000, False
    drafter = drafts.Drafter(model, config)
    rest = iter(tokens(1, 200, seed=9)[0].tolist())
    ids = tokens(1, 6, seed=3)
    assert drafter.get_candidates(ids, is_first_iteration=True)[0] is ids
    seen, matches = 0, 0
    choose = torch.Generator().manual_seed(1)
    drafted = ids
    for _round in range(12):
        outputs = model(drafted[:, seen:], cache=cache, return_last_hidden_state=True, logits_to_keep=1)
        # So many of the drafts stay, and the model says another token.
        matches = int(torch.randint(0, drafted.shape[1] - ids.shape[1] + 1, (), generator=choose))
        cache.crop(matches - (drafted.shape[1] - ids.shape[1]))
        ids = torch.cat([drafted[:, : ids.shape[1] + matches], torch.tensor([[next(rest)]])], dim=1)
        seen = ids.shape[1] - 1
        drafted, scores = drafter.get_candidates(
            ids, model_outputs=outputs, is_first_iteration=False, n_last_matches=matches
        )
        assert scores is None
        assert drafted[0, ids.shape[1] :].tolist() == drafted_without_a_cache(model, ids, number)


SMALL_VOCABULARY = {"vocab_size": 6, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["dense", "moe", "latent"])
def test_greedy_is_plain_greedy(family, dtype):
    """50 prompts (12 in float32; 200 of each for the record), of a vocabulary so small that some drafts are right."""
    model = model_with_head(family, dtype, **SMALL_VOCABULARY)
    accepted = drafted = 0
    for seed in range(int(os.environ.get("SPECULATION_PROMPTS", 50 if dtype == torch.float64 else 12))):
        ids = torch.randint(0, 6, (1, 1 + seed % 13), generator=torch.Generator().manual_seed(seed))
        given = {"max_new_tokens": 7, "do_sample": False}
        plain = model.generate(ids, **given)
        output = model.generate(
            ids, use_mtp=True, num_assistant_tokens=(None, 1, 2, 5)[seed % 4], return_dict_in_generate=True, **given
        )
        assert torch.equal(output.sequences, plain), seed
        accepted, drafted = accepted + output.speculation.accepted, drafted + output.speculation.drafted
    assert 0.02 < accepted / drafted < 0.9


def test_what_generate_is_asked_for_besides():
    """Padding, a cache that is gone on with, a processor, an end token, long drafts, sampling with the same options."""
    model = model_with_head("dense", **SMALL_VOCABULARY)
    ids = torch.randint(0, 6, (1, 9), generator=torch.Generator().manual_seed(2))
    mtp_options = {"use_mtp": True, "num_assistant_tokens": 3, "do_sample": False}
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)

    padded, mask = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=30, **mtp_options)[:, 4:], plain)

    cache = NemotronHCache(model.config)
    half = model.generate(ids, cache=cache, max_new_tokens=12, **mtp_options)
    assert torch.equal(model.generate(half, cache=cache, max_new_tokens=18, **mtp_options), plain)

    for extra in ({"repetition_penalty": 1.8}, {"eos_token_id": int(plain[0, 20])}, {"min_new_tokens": 20}):
        expected = model.generate(ids, max_new_tokens=30, do_sample=False, **extra)
        assert torch.equal(model.generate(ids, max_new_tokens=30, **mtp_options, **extra), expected), extra
    config = model.generation_config
    config.use_mtp, config.num_assistant_tokens = True, 4
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), plain)
    config.use_mtp = config.num_assistant_tokens = None
    with pytest.raises(ValueError, match="batch"):
        model.generate(ids.expand(2, -1), max_new_tokens=3, **mtp_options)


def test_padding_in_the_prompt_is_not_drafted_from():
    x, ids = torch.arange(5.0).view(1, 5, 1), torch.arange(10, 15).view(1, 5)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1]])  # of a token before the first hidden state's, and of these
    kept_x, kept_ids = drafts._without_padding(x, ids, mask)
    # pairs of a token and the next: hidden state 1 (column 2) with id 11 (column 3), and 4 (column 5) with id 14
    assert kept_x.flatten().tolist() == [1.0, 4.0] and kept_ids.tolist() == [[11, 14]]


@torch.no_grad()
def test_sampling_is_the_models_distribution():
    """Three tokens of a vocabulary of two: 8 texts, whose probabilities the model itself says."""
    model = model_with_head("dense", **{**SMALL_VOCABULARY, "vocab_size": 2})
    model.lm_head.weight.mul_(0.15)  # nothing that is all but certain
    ids = torch.tensor([[0, 1, 1, 0, 1]])
    texts = torch.tensor(list(itertools.product(range(2), repeat=3)))
    warm = 0.8
    logits = model(torch.cat([ids.expand(8, -1), texts], dim=1)).logits[:, 4:7] / warm
    expected = logits.log_softmax(-1).gather(2, texts[..., None]).sum((1, 2)).exp()
    assert abs(float(expected.sum()) - 1) < 1e-9
    number, counts = 400, torch.zeros(8)
    torch.manual_seed(4)
    for _ in range(number):
        sampled = model.generate(
            ids, max_new_tokens=3, do_sample=True, temperature=warm, top_k=0, use_mtp=True, num_assistant_tokens=2
        )
        counts[int((sampled[0, 5:] * torch.tensor([4, 2, 1])).sum())] += 1
    chi_square = float(((counts - number * expected) ** 2 / (number * expected)).sum())
    assert chi_square < 24.3, chi_square  # 7 degrees of freedom, one in a thousand


# -- heads ------------------------------------------------------------------------------------------------------------


def test_without_a_head():
    model = small_model("dense")
    with pytest.raises(
        ValueError, match="use_mtp=True needs a multi-token-prediction head, and this checkpoint has none"
    ):
        model.generate(tokens(1, 4), use_mtp=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="mtp_loss_scale needs a multi-token-prediction head"):
        model.mtp_loss_scale = 0.1
    model.mtp_loss_scale = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model, "mtp_loss_scale", -1), "mtp_loss_scale is -1: give a number"),
        (lambda model: setattr(model, "mtp_loss_scale", "0.3"), "mtp_loss_scale is '0.3'"),
        (lambda model: model.generate(tokens(1, 4), use_mtp=True, num_assistant_tokens=0), "num_assistant_tokens is 0"),
        (lambda model: model.generate(tokens(1, 4), use_mtp=True, num_assistant_tokens=99), "draft 1 to 32 tokens"),
        (lambda model: mtp.add_head(model), "has an MTP head already, of 1 depths"),
    ],
)
def test_wrong_settings(change, words):
    with pytest.raises(ValueError, match=words):
        change(model_with_head())


def test_wrong_settings_of_the_loss():
    model = model_with_head().train()
    model.mtp_loss_scale, model.mtp_depths = 1.0, 0
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match="mtp_depths is 0"):
        model(ids, labels=ids)
    model.mtp_depths = None
    cache = NemotronHCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache passed held 6 tokens"):
        model(ids, cache=cache, labels=ids)
    with pytest.raises(ValueError, match="depths is 0"):
        mtp.add_head(small_model("dense"), depths=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_head_is_saved_and_loaded(tmp_path, dtype):
    """A head made for a model without one: in the published names, in the model's dtype, drafting after loading."""
    model = mtp.add_head(small_model("moe", dtype, eos_token_id=None), "*E", depths=2)
    assert not any(p.requires_grad for p in model.mtp.parameters())
    assert torch.equal(model.mtp.layers[3].final_layernorm.weight, model.model.norm_f.weight)
    assert {p.dtype for name, p in model.mtp.named_parameters() if "gate.weight" in name} == {torch.float32}
    assert {p.dtype for name, p in model.mtp.named_parameters() if "gate." not in name} == {dtype}
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["num_nextn_predict_layers"], written["mtp_hybrid_override_pattern"]) == (2, "*E")
    again = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = tokens(1, 7)
    plain = again.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=True), plain)


@pytest.mark.parametrize("family", ["dense", "moe", "latent", "tied"])
def test_a_head_in_a_file_of_its_own(tmp_path, family):
    """In the published names, as `save_pretrained` has them; into a model that had none, which stays what it is."""
    model = model_with_head(family, torch.float32, eos_token_id=None)
    model.mtp_depths = 3
    model.save_pretrained(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    mtp.save_head(model, tmp_path / "head.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.safetensors", "whole"]
    alone = load_file(tmp_path / "head.safetensors")
    assert alone.keys() == {name for name in whole if name.startswith("mtp.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.items())

    other = small_model(family, torch.float32, eos_token_id=None)
    other.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")})
    assert mtp.load_head(other, tmp_path / "head.safetensors") is other
    ours, theirs = other.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(parameter.requires_grad for parameter in other.mtp.parameters())
    assert other.mtp_depths == 3 and not other.mtp.training
    ids = tokens(1, 7)
    given = {"max_new_tokens": 9, "do_sample": False}
    output = other.generate(ids, use_mtp=True, return_dict_in_generate=True, **given)
    assert torch.equal(output.sequences, model.generate(ids, **given))
    # three drafts at a time: those that it was trained for
    assert output.speculation.drafted > 2 * (output.speculation.steps - 2)
    half = mtp.load_head(small_model(family, torch.bfloat16), tmp_path / "head.safetensors")
    assert half.mtp.layers[0].eh_proj.weight.dtype == torch.bfloat16
    assert torch.equal(half.mtp.layers[0].eh_proj.weight, model.mtp.layers[0].eh_proj.weight.bfloat16())


def test_a_file_that_is_no_head_for_this_model(tmp_path):
    path = tmp_path / "head.safetensors"
    mtp.save_head(model_with_head(), path)
    with pytest.raises(ValueError, match="has an MTP head already"):
        mtp.load_head(model_with_head(), path)
    with pytest.raises(ValueError, match="save_head needs a multi-token-prediction head"):
        mtp.save_head(small_model("dense"), path)
    model = small_model("dense", hidden_size=48)
    before = model.config.to_dict()
    words = (
        r"is the head of another model: mtp\.\S+ is \(\d+.*\) in it and \(\d+.*\) in this one; load it into the model"
    )
    with pytest.raises(ValueError, match=words):
        mtp.load_head(model, path)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other\.safetensors is not an MTP head's file .*: write one with"):
        mtp.load_head(model, tmp_path / "other.safetensors")
    with safe_open(path, "pt") as file:
        said = file.metadata()
    del tensors["mtp.layers.0.enorm.weight"]
    save_file(tensors, tmp_path / "less.safetensors", metadata=said)
    with pytest.raises(ValueError, match=r"mtp\.layers\.0\.enorm\.weight is absent in it"):
        mtp.load_head(small_model("dense"), tmp_path / "less.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    for name in ("head.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a safetensors file"):
            mtp.load_head(model, tmp_path / name)
    assert model.mtp is None and model.config.to_dict() == before and model.mtp_depths is None


def test_a_head_learns():
    """A few steps on one text: the loss of the head alone goes down, the trunk stays as it is."""
    model = mtp.add_head(small_model("dense", torch.float32), "*-").train()
    model.requires_grad_(False)
    model.mtp_loss_scale = 1.0
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("mtp.")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens(2, 20)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
