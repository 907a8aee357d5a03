"""Masks in every form that trainers and scripts pass: read as what they say, or refused; never half obeyed."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, relative_difference, small_model, tokens
from torch import Tensor

from nemotron_h import NemotronHCache
from nemotron_h.mtp import add_head

pytestmark = pytest.mark.core
TOLERANCE = 1e-9
LENGTHS = (4, 1, 6)
TOTAL = sum(LENGTHS)


def blocks(lengths=LENGTHS) -> Tensor:
    """(L, L) bool: causal inside each document."""
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()


def hiding(pads: list[int], length: int = TOTAL) -> Tensor:
    """(L, L) bool: causal, nobody sees the pads."""
    seen = torch.ones(length, length).tril().bool()
    seen[:, pads] = False
    return seen


def added(seen: Tensor, value: float = float("-inf"), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, value)


DOCUMENTS = {
    "4-D bool": blocks()[None, None],
    "4-D int": blocks()[None, None].long(),
    "4-D minus infinity": added(blocks())[None, None],
    "4-D smallest float": added(blocks(), torch.finfo(torch.float32).min, torch.float32)[None, None],
    "4-D bfloat16 -10000": added(blocks(), -1e4, torch.bfloat16)[None, None],
    "4-D of every head": blocks().expand(1, 4, -1, -1),
    "3-D": blocks()[None],
    "2-D numbers": torch.tensor([[1] * 4 + [2] + [3] * 6]),
    "2-D numbers with a gap": torch.tensor([[2] * 4 + [5] + [9] * 6]),
    "2-D numbers as floats": torch.tensor([[1.0] * 4 + [2.0] + [3.0] * 6]),
}


def gradients(model, loss) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", DOCUMENTS)
@pytest.mark.parametrize("family", ["dense", "latent", "mamba"])
def test_documents_that_a_mask_tells_apart_equal_separate_ones(family, how):
    model, row = small_model(family).train(), tokens(1, TOTAL)
    weights = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    packed = model(row, attention_mask=DOCUMENTS[how]).logits
    packed_gradients = gradients(model, (packed.sin() @ weights).sum())
    separate = torch.cat([model(document).logits for document in row.split(LENGTHS, dim=1)], dim=1)
    assert relative_difference(packed, separate) <= TOLERANCE
    for name, gradient in gradients(model, (separate.sin() @ weights).sum()).items():
        assert relative_difference(packed_gradients[name], gradient) <= TOLERANCE, name


def _filled(pads: list[int]) -> Tensor:
    """As transformers fills rows that see nothing: with everything."""
    seen = hiding(pads)
    seen[~seen.any(1)] = True
    return seen


PADDING = {
    "4-D left": (hiding([0, 1, 2])[None, None], [0, 1, 2]),
    "4-D added, left": (added(hiding([0, 1, 2]))[None, None], [0, 1, 2]),
    "4-D left, filled rows": (_filled([0, 1])[None, None], [0, 1]),
    "4-D right": (hiding([9, 10])[None, None], [9, 10]),
    "4-D between": (hiding([0, 4, 5, 10])[None, None], [0, 4, 5, 10]),
    "4-D left, which sees itself": ((hiding([0, 1]) | torch.eye(TOTAL).bool())[None, None], [0, 1]),
    "2-D added": (added(torch.tensor([[False] * 3 + [True] * 8])), [0, 1, 2]),
    "2-D half -65504": (added(torch.tensor([[False] * 3 + [True] * 8]), -65504, torch.float16), [0, 1, 2]),
    "2-D added, right": (added(torch.tensor([[True] * 8 + [False] * 3]), -1e9), [8, 9, 10]),
    "2-D added, nothing hidden": (torch.zeros(1, TOTAL), []),
    "2-D floats 0 and 1": (torch.tensor([[0.0] * 3 + [1.0] * 8]), [0, 1, 2]),
}


@pytest.mark.parametrize("how", PADDING)
@pytest.mark.parametrize("family", ["dense", "moe", "tied"])
def test_padding_that_a_mask_hides_is_not_there(family, how):
    mask, pads = PADDING[how]
    keep = [i for i in range(TOTAL) if i not in pads]
    model, row = small_model(family), tokens(1, TOTAL)
    weights = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = model(row, attention_mask=mask).logits[:, keep]
    padded_gradients = gradients(model, (padded.sin() @ weights).sum())
    alone = model(row[:, keep]).logits
    assert relative_difference(padded, alone) <= TOLERANCE
    for name, gradient in gradients(model, (alone.sin() @ weights).sum()).items():
        assert relative_difference(padded_gradients[name], gradient) <= TOLERANCE, name


@pytest.mark.parametrize("how", [name for name in PADDING if "nothing" not in name])
@pytest.mark.parametrize("max_cache_len", [None, 16])
@torch.no_grad()
def test_decoding_goes_on_from_rows_that_a_mask_pads(how, max_cache_len):
    """With a 4-D mask again for each token, as scripts that make their own go on."""
    mask, pads = PADDING[how]
    model, row = small_model("dense"), tokens(1, TOTAL + 3)
    keep = [i for i in range(TOTAL + 3) if i not in pads]
    cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
    model(row[:, :TOTAL], attention_mask=mask, cache=cache)
    found = []
    for i in range(TOTAL, TOTAL + 3):
        seen = torch.ones(1, 1, 1, i + 1, dtype=torch.bool)
        seen[..., pads] = False
        found.append(model(row[:, i : i + 1], attention_mask=added(seen), cache=cache).logits)
    assert relative_difference(torch.cat(found, 1), model(row[:, keep]).logits[:, -3:]) <= TOLERANCE


@torch.no_grad()
def test_rows_of_a_batch_are_read_each_for_itself():
    model, ids = small_model("moe"), tokens(3, TOTAL)
    seen = torch.stack([blocks(), hiding([0, 1]), torch.ones(TOTAL, TOTAL).tril().bool()])[:, None]
    logits = model(ids, attention_mask=added(seen), use_cache=False).logits
    first = torch.cat([model(document).logits for document in ids[:1].split(LENGTHS, dim=1)], dim=1)
    assert relative_difference(logits[:1], first) <= TOLERANCE
    assert relative_difference(logits[1:2, 2:], model(ids[1:2, 2:]).logits) <= TOLERANCE
    assert relative_difference(logits[2:], model(ids[2:]).logits) <= TOLERANCE


@torch.no_grad()
def test_numbers_and_padding_together_and_pieces():
    model, ids = small_model("dense"), tokens(2, 12)
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 0, 3, 3, 3], [1] * 12])
    logits = model(ids, attention_mask=numbers).logits
    for document in (1, 2, 3):
        here = numbers[0] == document
        assert relative_difference(logits[:1, here], model(ids[:1, here]).logits) <= TOLERANCE
    assert relative_difference(logits[1:], model(ids[1:]).logits) <= TOLERANCE
    # A new document begins where either says so.
    seq_idx = torch.tensor([[0] * 12, [0] * 5 + [1] * 7])
    logits = model(ids, attention_mask=numbers, seq_idx=seq_idx).logits
    assert relative_difference(logits[1:, 5:], model(ids[1:, 5:]).logits) <= TOLERANCE
    assert relative_difference(logits[:1, 5:7], model(ids[:1, 5:7]).logits) <= TOLERANCE
    long = small_model("dense", max_position_embeddings=4096, hidden_size=32)
    ids, seen = tokens(1, 600), torch.ones(1, 600).bool()
    seen[:, :7] = False
    assert (
        relative_difference(long(ids, attention_mask=added(seen)).logits[:, 7:], long(ids[:, 7:]).logits) <= TOLERANCE
    )


def test_the_mtp_loss_reads_the_same_masks():
    model, row = small_model("dense").train(), tokens(1, TOTAL)
    add_head(model, "*E" if model.config.n_routed_experts else "*-")
    model.to(torch.float64)
    model.mtp_loss_scale = 0.5
    numbered = model(row, labels=row, seq_idx=DOCUMENTS["2-D numbers"]).loss
    for how in ("2-D numbers", "4-D minus infinity"):
        assert relative_difference(model(row, labels=row, attention_mask=DOCUMENTS[how]).loss, numbered) <= TOLERANCE


def _window() -> Tensor:
    return torch.ones(TOTAL, TOTAL).tril().bool() & torch.ones(TOTAL, TOTAL).triu(-3).bool()


def _tree() -> Tensor:
    seen = torch.ones(TOTAL, TOTAL).tril().bool()
    seen[6:, 3:6] = False
    return seen


def _prefix() -> Tensor:
    seen = torch.ones(TOTAL, TOTAL).tril().bool()
    seen[:4, :4] = True
    return seen


def _drafts() -> Tensor:
    seen = torch.ones(TOTAL, TOTAL).tril().bool()
    seen[8:, 8:] = torch.eye(3).bool()
    return seen


def _bias() -> Tensor:
    return added(torch.ones(TOTAL, TOTAL).tril().bool()) - torch.arange(TOTAL)


REFUSED = {
    "a tree": (_tree()[None, None], "does not see its document"),
    "a window": (_window()[None, None], "does not see its document"),
    "a prefix that sees itself": (_prefix()[None, None], "does not see its document"),
    "parallel drafts": (_drafts()[None, None], "does not see its document"),
    "everything": (torch.zeros(1, 1, TOTAL, TOTAL), "does not see its document"),
    "a bias": (_bias()[None, None], "adds -1 to a score"),
    "floats 0 and 1 in 4-D": (blocks()[None, None].float(), "adds 1 to a score"),
    "heads that differ": (torch.stack([blocks(), hiding([0])] * 2)[None], "its heads see different tokens"),
    "another length": (blocks()[None, None, 1:], "pass \\(1, 1, 11, 11\\)"),
    "columns of nobody": (torch.ones(1, 1, TOTAL, TOTAL + 2).bool(), "shows columns from 11"),
    "numbers that fall": (torch.tensor([[2] * 5 + [1] * 6]), "lower than one before it"),
    "a share of a token": (torch.full((1, TOTAL), 0.5), "values from 0.5 to 0.5"),
    "a 2-D bias": (torch.tensor([[-0.5] * 3 + [0.0] * 8]), "adds -0.5 to a score"),
    "not a number": (torch.full((1, TOTAL), torch.nan), "values from nan"),
    "negative integers": (torch.tensor([[-1] * 3 + [1] * 8]), "values from -1 to 1"),
    "one dimension": (torch.ones(TOTAL), "has shape \\(11,\\)"),
    "no tensor": ([1] * TOTAL, "is a list"),
    "a dict of somebody's": ({"full_attention": None}, "a dict of 'full_attention'"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("grad", [True, False])
def test_what_mamba_layers_cannot_obey_is_refused(how, grad):
    mask, said = REFUSED[how]
    model, cache = small_model("dense"), NemotronHCache(small_model("dense").config)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"attention_mask.*{said}"):
        model(tokens(1, TOTAL), attention_mask=mask, cache=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_mask_of_attention_layers_alone_is_theirs():
    """Nothing but attention obeys a tree, and there is nothing else in this model."""
    model, row = small_model("attention"), tokens(1, TOTAL)
    logits = model(row, attention_mask=added(_tree())[None, None]).logits
    branch = torch.cat([row[:, :3], row[:, 6:]], 1)
    assert relative_difference(logits[:, 6:], model(branch).logits[:, 3:]) <= TOLERANCE


@torch.no_grad()
def test_cached_tokens_stay_what_they_were():
    """The state holds the cached tokens: a mask can neither take one out of it nor bring padding into it."""
    model, ids = small_model("dense"), tokens(2, 12)
    mask = torch.ones(2, 12).long()
    mask[0, :3] = 0

    def filled(how: str = "nothing"):
        cache = NemotronHCache(model.config)
        model(ids[:, :10], attention_mask=mask[:, :10], cache=cache)
        if how == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif how == "select":
            cache.batch_select_indices(torch.tensor([1]))
        elif how == "repeat":
            cache.batch_repeat_interleave(2)
        return cache

    def step(cache, mask):
        rows = len(mask)
        return model(ids[:1, 10:11].expand(rows, -1), attention_mask=mask, cache=cache).logits

    step(filled(), mask[:, :11])
    step(filled("reorder"), mask[:, :11].flip(0))
    step(filled("select"), mask[1:, :11])
    step(filled("repeat"), mask[:, :11].repeat_interleave(2, 0))
    hides = mask[:, :11].clone()
    hides[1, 4] = 0
    for wrong, said in (
        (hides, "hides column 4 of row 1, which was a token"),
        (torch.ones(2, 11).long(), "shows column 0 of row 0, which was padding"),
        (hides[:, None, None].bool(), "hides column 4 of row 1"),
        (added(torch.ones(2, 1, 1, 11).bool()), "shows column 0 of row 0"),
    ):
        with pytest.raises(ValueError, match=said):
            step(filled(), wrong)
    with pytest.raises(ValueError, match="shows column 0 of row 1"):
        step(filled("reorder"), torch.ones(2, 11).long())
    with pytest.raises(ValueError, match="hides column 8 of row 0"):
        unpadded = NemotronHCache(model.config)
        model(ids[:1, :10], cache=unpadded)
        step(unpadded, torch.tensor([[1] * 8 + [0, 1, 1]]))
    anew = torch.cat([torch.zeros(2, 1, 2, 10), torch.ones(2, 1, 2, 2).tril()], 3).bool()
    with pytest.raises(ValueError, match="a new document begins while the cache holds another"):
        model(ids[:, 10:], attention_mask=anew, cache=filled())
    with pytest.raises(ValueError, match="numbers several documents and the cache holds 10 tokens"):
        step(filled(), torch.tensor([[0, 0, 0, *[1] * 7, 2], [1] * 11]))
    restored = filled()
    restored.restore(filled().snapshot())
    step(restored, mask[:, :11])  # a snapshot does not say, so the mask is believed
    emptied = filled()
    emptied.reset()
    model(ids[:, :10], cache=emptied)
    step(emptied, torch.ones(2, 11).long())


@torch.no_grad()
@pytest.mark.parametrize("max_cache_len", [None, 16])
def test_without_a_mask_cached_padding_stays_hidden(max_cache_len):
    model, ids = small_model("dense"), tokens(2, 12)
    mask = torch.ones(2, 10).long()
    mask[0, :3] = 0
    cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
    model(ids[:, :10], attention_mask=mask, cache=cache)
    logits = torch.cat([model(token, cache=cache).logits for token in ids[:, 10:].split(1, dim=1)], 1)
    assert relative_difference(logits[:1], model(ids[:1, 3:]).logits[:, -2:]) <= TOLERANCE
    assert relative_difference(logits[1:], model(ids[1:]).logits[:, -2:]) <= TOLERANCE


@torch.no_grad()
def test_generate_reads_masks_too():
    model, ids = small_model("dense"), tokens(1, 9)
    seen = torch.ones(1, 9).bool()
    seen[:, :3] = False
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids[:, 3:], **settings)[:, 6:]
    assert torch.equal(model.generate(ids, attention_mask=seen.long(), **settings)[:, 9:], alone)
    with pytest.raises(ValueError, match=r"packed documents and a cache|tells several documents apart"):
        model.generate(ids, attention_mask=torch.tensor([[1] * 4 + [2] * 5]), **settings)


def test_every_family_is_covered():
    assert {"dense", "latent", "mamba", "moe", "tied", "attention"} == set(FAMILIES)
