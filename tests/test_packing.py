"""Documents packed into a row do not see each other: outputs and every gradient, float64, on the CPU."""

import pytest
import torch
from families import FAMILIES, relative_difference, small_model, tokens

from nemotron_h import NemotronHCache

pytestmark = pytest.mark.core
TOLERANCE = 1e-9
LENGTHS = (5, 1, 11, 8, 2)


def as_position_ids():
    return {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


def as_seq_idx():
    return {"seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].int()}


def as_cu_seq_lens():
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    longest = max(LENGTHS)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


every_spelling = pytest.mark.parametrize("pack", [as_position_ids, as_seq_idx, as_cu_seq_lens])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@every_spelling
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_equal_separate_ones(family, pack, attention):
    model = small_model(family, attn_implementation=attention).train()
    assert model.config._attn_implementation == attention
    row = tokens(1, sum(LENGTHS))
    weights = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # labels and the caller's all-ones mask, as collators pass them, change nothing
    packed = model(row, attention_mask=torch.ones_like(row), **pack()).logits
    packed_gradients = gradients(model, (packed.sin() @ weights).sum())
    separate = torch.cat([model(document).logits for document in row.split(LENGTHS, dim=1)], dim=1)
    separate_gradients = gradients(model, (separate.sin() @ weights).sum())
    assert relative_difference(packed, separate) <= TOLERANCE
    assert packed_gradients.keys() == separate_gradients.keys()
    for name in separate_gradients:
        assert relative_difference(packed_gradients[name], separate_gradients[name]) <= TOLERANCE, name


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_packed_rows_with_padding(side):
    model = small_model("moe")
    rows = [(5, 9, 2), (3, 4)]
    width = 20
    ids, mask = tokens(2, width), torch.zeros(2, width, dtype=torch.long)
    position_ids = torch.zeros(2, width, dtype=torch.long)
    spans = []
    for row, lengths in enumerate(rows):
        total = sum(lengths)
        start = width - total if side == "left" else 0
        mask[row, start : start + total] = 1
        position_ids[row, start : start + total] = torch.cat([torch.arange(n) for n in lengths])
        for length in lengths:
            spans.append((row, slice(start, start + length)))
            start += length
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
    for row, span in spans:
        assert relative_difference(logits[row : row + 1, span], model(ids[row : row + 1, span]).logits) <= TOLERANCE


@torch.no_grad()
def test_padding_inside_a_packed_document():
    """Pads in the middle of a document, numbered -1 by the caller, do not split it."""
    model, ids = small_model("moe"), tokens(1, 12)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1, 1, 1, 2, 2]])
    mask = (seq_idx >= 0).long()
    logits = model(ids, attention_mask=mask, seq_idx=seq_idx).logits
    for document in range(3):
        here = seq_idx[0] == document
        assert relative_difference(logits[:, here], model(ids[:, here]).logits) <= TOLERANCE


@torch.no_grad()
def test_positions_of_left_padded_rows_are_not_taken_for_a_pack():
    model = small_model("dense")
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    out = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=True)
    assert out.cache is not None if hasattr(out, "cache") else out.past_key_values is not None
    torch.testing.assert_close(out.logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


def test_a_pack_has_no_cache_to_go_on_from():
    model = small_model("dense")
    row = tokens(1, sum(LENGTHS))
    assert model(row, **as_position_ids(), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="packed documents and a cache of 0 tokens"):
        model(row, **as_position_ids(), cache=NemotronHCache(model.config))


def test_cu_seq_lens_are_for_one_row():
    with pytest.raises(ValueError, match="one packed row and the batch has 2"):
        small_model("dense")(tokens(2, sum(LENGTHS)), **as_cu_seq_lens())
