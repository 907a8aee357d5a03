"""A full forward, every split into pieces, token-by-token decoding and padded rows are one function (float64)."""

import pytest
import torch
from families import FAMILIES, relative_difference, small_model, tokens

from nemotron_h import NemotronHCache

pytestmark = pytest.mark.core
TOLERANCE = 1e-9
every_family = pytest.mark.parametrize("family", FAMILIES)


def run_in_pieces(model, ids, lengths, **cache_kwargs):
    cache = NemotronHCache(model.config, **cache_kwargs)
    pieces, start = [], 0
    for length in lengths:
        out = model(ids[:, start : start + length], cache=cache, use_cache=True)
        pieces.append(out.logits)
        start += length
        assert int(cache.get_seq_length()) == start
    return torch.cat(pieces, dim=1)


@every_family
@torch.no_grad()
def test_every_split_equals_one_forward(family):
    model = small_model(family)
    ids = tokens(2, 29)  # three chunks of 8 and a tail of 5
    full = model(ids, use_cache=False).logits
    for first in range(1, 29):
        assert relative_difference(run_in_pieces(model, ids, [first, 29 - first]), full) <= TOLERANCE, first


@every_family
@pytest.mark.parametrize("length", [1, 7, 8, 9, 29])
@torch.no_grad()
def test_token_by_token_equals_one_forward(family, length):
    model = small_model(family)
    ids = tokens(2, length)
    full = model(ids, use_cache=False).logits
    assert relative_difference(run_in_pieces(model, ids, [1] * length), full) <= TOLERANCE


@every_family
@pytest.mark.parametrize("pieces", [[3, 1, 9, 1, 1, 14], [8, 8, 8, 5], [1, 28], [17, 1, 11]])
@torch.no_grad()
def test_ragged_pieces_equal_one_forward(family, pieces):
    model = small_model(family)
    ids = tokens(2, 29)
    full = model(ids, use_cache=False).logits
    for cache_kwargs in ({}, {"max_cache_len": 40}):
        assert relative_difference(run_in_pieces(model, ids, pieces, **cache_kwargs), full) <= TOLERANCE


@torch.no_grad()
def test_the_test_models_have_small_time_steps():
    """The premise of this file: without them the clamp of other implementations does not show."""
    model = small_model("dense")
    smallest = min(
        torch.nn.functional.softplus(layer.mixer.dt_bias).min().item()
        for layer in model.model.layers
        if layer.block_type == "mamba"
    )
    assert smallest < 1e-4


@torch.no_grad()
def test_the_result_does_not_depend_on_the_chunk_size():
    ids = tokens(1, 37)
    full = small_model("dense", chunk_size=8)(ids).logits
    for chunk_size in (1, 5, 64):
        assert relative_difference(small_model("dense", chunk_size=chunk_size)(ids).logits, full) <= TOLERANCE


@torch.no_grad()
def test_finite_time_step_limit_holds_in_every_form():
    model = small_model("dense", time_step_limit=[1e-3, 0.2])
    free = small_model("dense")
    ids = tokens(2, 21)
    full = model(ids, use_cache=False).logits
    assert relative_difference(run_in_pieces(model, ids, [1] * 21), full) <= TOLERANCE
    assert relative_difference(free(ids).logits, full, record=False) > 1e-3


def padded(rows, side):
    """Rows of different lengths as one batch, with junk that is not the pad token at the padding."""
    width = max(len(row) for row in rows)
    ids = tokens(len(rows), width, seed=9)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (values, keep) in enumerate(zip(ids, mask, strict=True)):
        span = slice(width - len(rows[row]), width) if side == "left" else slice(0, len(rows[row]))
        values[span], keep[span] = rows[row], 1
    return ids, mask


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_is_not_there(family, side, training, use_cache):
    model = small_model(family).train(training)
    rows = [tokens(1, length, seed=length)[0] for length in (19, 3, 8, 1)]
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for row, alone in enumerate(rows):
        expected = model(alone[None], use_cache=False).logits
        assert relative_difference(logits[row][mask[row].bool()][None], expected) <= TOLERANCE


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_decoding_goes_on_from_padded_rows(family, side):
    model = small_model(family)
    rows = [tokens(1, length, seed=length)[0] for length in (13, 2, 8, 1)]
    more = tokens(4, 7, seed=3)
    ids, mask = padded(rows, side)
    cache = NemotronHCache(model.config)
    model(ids, attention_mask=mask, cache=cache)
    pieces = []
    # token by token, then several at once
    for piece in (more[:, :1], more[:, 1:2], more[:, 2:]):
        mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
        pieces.append(model(piece, attention_mask=mask, cache=cache).logits)
    logits = torch.cat(pieces, dim=1)
    for row, alone in enumerate(rows):
        expected = model(torch.cat([alone, more[row]])[None], use_cache=False).logits[:, len(alone) :]
        assert relative_difference(logits[row : row + 1], expected) <= TOLERANCE


@every_family
@pytest.mark.parametrize("max_cache_len", [None, 30])
@torch.no_grad()
def test_a_mask_as_wide_as_a_static_cache(family, max_cache_len):
    """Columns that no token has come to yet are nobody's, whatever they say."""
    model, ids = small_model(family), tokens(2, 18)
    mask = torch.ones(2, 30)
    mask[0, :4] = 0
    cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
    logits = torch.cat(
        [model(piece, attention_mask=mask, cache=cache).logits for piece in ids.split([9, 1, 8], dim=1)], dim=1
    )
    expected = model(ids, attention_mask=mask[:, :18], use_cache=False).logits
    assert relative_difference(logits[mask[:, :18].bool()], expected[mask[:, :18].bool()]) <= TOLERANCE


@every_family
@torch.no_grad()
def test_padding_in_the_middle_and_in_decoding_steps(family):
    """A second turn padded on the right, then a step that is padding for one row."""
    model = small_model(family)
    turns = [tokens(2, 9, seed=4), tokens(2, 6, seed=5), tokens(2, 1, seed=6), tokens(2, 5, seed=7)]
    masks = [torch.ones(2, 9), torch.ones(2, 6), torch.ones(2, 1), torch.ones(2, 5)]
    masks[1][0, 2:] = 0
    masks[1][1, :3] = 0
    masks[2][1, 0] = 0
    cache, mask = NemotronHCache(model.config), torch.zeros(2, 0)
    for turn, keep in zip(turns, masks, strict=True):
        mask = torch.cat([mask, keep], dim=1)
        logits = model(turn, attention_mask=mask, cache=cache).logits
    everything = torch.cat(turns, dim=1)
    for row in range(2):
        alone = everything[row][mask[row].bool()][None]
        expected = model(alone, use_cache=False).logits[:, -5:]
        assert relative_difference(logits[row : row + 1], expected) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padded_rows(side):
    """The gradients of a padded batch are the sums of the rows' own."""
    model = small_model("moe").train()
    rows = [tokens(1, length, seed=length)[0] for length in (11, 4, 9)]
    ids, mask = padded(rows, side)
    weights = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits = model(ids, attention_mask=mask).logits
    batched = gradients((logits.sin() @ weights)[mask.bool()].sum())
    alone = gradients(sum((model(row[None]).logits.sin() @ weights).sum() for row in rows))
    assert batched.keys() == alone.keys()
    for name in alone:
        assert relative_difference(batched[name], alone[name]) <= TOLERANCE, name
