"""generation/chunked_prefill.py: a row that goes through the model in pieces is the row that goes through whole
(float64)."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, relative_difference, small_config, small_model, tokens

from nemotron_h import NemotronHCache
from nemotron_h.generation import chunked_prefill as pieces

pytestmark = pytest.mark.core
TOLERANCE = 1e-9
LENGTH, PIECE = 29, 8  # three pieces of 8 and one of 5
CUT = [8, 8, 8, 5]
every_family = pytest.mark.parametrize("family", FAMILIES)


@contextmanager
def watched(model):
    """The lengths of what goes through the inner model."""
    lengths = []

    def note(module, args, kwargs):
        given = kwargs.get("input_ids", args[0] if args else None)
        lengths.append((kwargs["inputs_embeds"] if given is None else given).shape[1])

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


@pytest.fixture
def in_pieces(monkeypatch):
    """A context in which every prompt of more than 8 tokens is long."""

    @contextmanager
    def cut(model):
        with monkeypatch.context() as patch, watched(model) as lengths:
            patch.setattr(pieces, "_STEP", PIECE)
            patch.setattr(pieces, "_BUDGET", {"cpu": 1})
            yield lengths

    return cut


def padded(side, lengths=(LENGTH, 3, 12), seed=9):
    """Rows of several lengths as one batch, with junk at the padding; three quarters of a row may be padding."""
    ids, mask = tokens(len(lengths), LENGTH, seed=seed), torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)] = 1
    return ids, mask


def assert_same_memory(cache, expected):
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        if hasattr(ours, "state_BHPN"):
            assert relative_difference(ours.state_BHPN, theirs.state_BHPN) <= TOLERANCE
            assert relative_difference(ours.window_BCW, theirs.window_BCW) <= TOLERANCE
    assert int(cache.get_seq_length()) == int(expected.get_seq_length())


@every_family
@torch.no_grad()
def test_in_pieces_as_whole(family, in_pieces):
    model, ids = small_model(family), tokens(2, LENGTH)
    whole = model(ids, use_cache=True)
    for keep in (0, 1, 5, 12, torch.tensor([0, 7, 8, 20, 28])):
        given = None if isinstance(keep, int) else NemotronHCache(model.config)
        with in_pieces(model) as lengths:
            out = model(ids, logits_to_keep=keep, use_cache=True, cache=given)
        assert lengths == CUT
        expected = whole.logits[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
        assert out.logits.shape == expected.shape and relative_difference(out.logits, expected) <= TOLERANCE, keep
        assert given is None or out.cache is given
        assert_same_memory(out.cache, whole.cache)
        assert out.hidden_states is out.attentions is out.router_logits is None


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_and_decoding_on(family, side, in_pieces):
    model, (ids, mask), more = small_model(family), padded(side), tokens(3, 4, seed=3)
    expected = model(ids, attention_mask=mask, use_cache=True)
    for keep in (0, 1, 5):
        with in_pieces(model) as lengths:
            out = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=keep)
        assert lengths == CUT
        valid = mask.bool()[:, -keep:]
        assert relative_difference(out.logits[valid], expected.logits[:, -keep:][valid]) <= TOLERANCE
        assert_same_memory(out.cache, expected.cache)
    for token in more.split([1, 1, 2], dim=1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        ours, theirs = (model(token, attention_mask=mask, cache=each.cache).logits for each in (out, expected))
        assert relative_difference(ours, theirs) <= TOLERANCE


@every_family
@pytest.mark.parametrize("max_cache_len", [None, 50])
@torch.no_grad()
def test_going_on_from_a_cache(family, max_cache_len, in_pieces):
    """A second turn, whose padding is not the first's; then single tokens."""
    model, (ids, turn) = small_model(family), padded("left")
    first = 5
    start, more = tokens(3, first, seed=2), tokens(3, 3, seed=3)
    mask = torch.cat([torch.ones(3, first, dtype=torch.long), turn], 1)
    everything = torch.cat([start, ids, more], 1)
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    expected = model(everything, attention_mask=whole, use_cache=False).logits
    cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
    model(start, cache=cache)
    with in_pieces(model) as lengths:
        logits = model(ids, attention_mask=mask, cache=cache).logits
    assert lengths == CUT
    assert relative_difference(logits[turn.bool()], expected[:, first : first + LENGTH][turn.bool()]) <= TOLERANCE
    for at in range(3):
        end = first + LENGTH + at + 1
        logits = model(more[:, at : at + 1], attention_mask=whole[:, :end], cache=cache).logits
        assert relative_difference(logits, expected[:, end - 1 : end]) <= TOLERANCE


@pytest.mark.parametrize("family", ["dense", "latent"])
@pytest.mark.parametrize("max_cache_len", [None, 40])
@torch.no_grad()
def test_every_way_to_pass_the_row(family, max_cache_len, in_pieces):
    """Embeddings; a mask as wide as a static cache, of ones, of booleans, of one row for all; positions."""
    model, (ids, mask) = small_model(family), padded("left", (LENGTH, LENGTH - 1))
    one = mask[1:]
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    alone = model(ids, use_cache=False).logits
    shared = model(ids, attention_mask=one.expand(2, -1), use_cache=False).logits
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # what generate() passes
    embeds = model.get_input_embeddings()(ids)
    wide = torch.cat([mask, torch.zeros(2, 11, dtype=torch.long)], 1)
    ways = [
        (expected, {"inputs_embeds": embeds, "attention_mask": mask}),
        (expected, {"input_ids": ids, "attention_mask": mask.bool()}),
        (expected, {"input_ids": ids, "attention_mask": wide}),
        (expected, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}),
        (alone, {"inputs_embeds": embeds}),
        (alone, {"input_ids": ids, "attention_mask": torch.ones_like(mask)}),
        (alone, {"input_ids": ids, "position_ids": torch.arange(LENGTH)[None]}),
        (alone, {"input_ids": ids, "use_cache": False}),
        (shared, {"input_ids": ids, "attention_mask": one}),
    ]
    for wanted, inputs in ways:
        cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
        with in_pieces(model) as lengths:
            out = model(cache=cache, **inputs)
        assert lengths == CUT, inputs.keys()
        valid = torch.ones_like(mask) if wanted is alone else one.expand(2, -1) if wanted is shared else mask
        assert relative_difference(out.logits[valid.bool()], wanted[valid.bool()]) <= TOLERANCE, inputs.keys()
        assert (out.cache is None) == (inputs.get("use_cache") is False)
        assert int(cache.get_seq_length()) == LENGTH


@torch.no_grad()
def test_without_a_cache_none_is_given_back(in_pieces):
    model, ids = small_model("dense"), tokens(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    with in_pieces(model) as lengths:
        out = model(ids, use_cache=False)
        as_tuple = model(ids, use_cache=False, return_dict=False)
    assert lengths == 2 * CUT and out.cache is None
    assert relative_difference(out.logits, expected) <= TOLERANCE
    assert len(as_tuple) == 1 and relative_difference(as_tuple[0], expected) <= TOLERANCE


@torch.no_grad()
def test_the_loss_is_that_of_the_whole_row(in_pieces):
    model, (ids, mask) = small_model("moe"), padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    for items in ({}, {"num_items_in_batch": 7}):  # what Trainer passes
        expected = model(ids, attention_mask=mask, labels=labels, **items)
        with in_pieces(model) as lengths:
            out = model(ids, attention_mask=mask, labels=labels, **items)
        assert lengths == CUT and abs(out.loss - expected.loss) <= TOLERANCE


@pytest.mark.parametrize("length", [PIECE + 1, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1])
@torch.no_grad()
def test_lengths_about_a_piece(length, in_pieces):
    model, ids = small_model("dense"), tokens(2, length)
    for keep in (0, 1, 2, length - 1, length, length + 3):
        expected = model(ids, logits_to_keep=keep).logits
        with in_pieces(model) as lengths:
            logits = model(ids, logits_to_keep=keep).logits
        assert lengths == [PIECE] * (length // PIECE) + [length % PIECE] * (length % PIECE > 0)
        assert logits.shape == expected.shape and relative_difference(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("family", ["dense", "mamba"])
@torch.no_grad()
def test_generate(family, in_pieces):
    """Prompts in pieces, then tokens one by one: greedy, beams, static."""
    model, (ids, mask) = small_model(family), padded("left")
    model.generation_config.eos_token_id = None
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **settings}
        if "cache_implementation" in settings:
            settings["disable_compile"] = True
        expected = model.generate(ids, **settings)
        with in_pieces(model) as lengths:
            assert torch.equal(model.generate(ids, **settings), expected), settings
        if "cache_implementation" not in settings:
            assert lengths[: len(CUT)] == CUT and set(lengths[len(CUT) :]) == {1}


# ------------------------------------------------------------------------------------------------- what is not cut


def not_cut(model, ids, in_pieces, **inputs):
    expected = model(ids, **inputs)
    with in_pieces(model) as lengths:
        out = model(ids, **inputs)
    assert lengths == [ids.shape[1]]
    assert torch.equal(out.logits, expected.logits)
    return out


@torch.no_grad()
def test_who_watches_is_told_and_changes_nothing(in_pieces):
    """Before the first piece and after each, past what a cache holds; afterwards nobody is."""
    model, ids = small_model(), tokens(1, LENGTH)
    whole = model(ids).logits
    said = []
    with in_pieces(model) as lengths, pieces.watched(lambda *numbers: said.append(numbers)):
        assert relative_difference(model(ids).logits, whole) <= TOLERANCE
        assert (lengths, said) == (CUT, [(0, 29), (8, 29), (16, 29), (24, 29), (29, 29)])
        said.clear()
        cache = NemotronHCache(model.config)
        model(ids[:, :5], past_key_values=cache)  # short: there is nothing to tell
        assert relative_difference(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:]) <= TOLERANCE
        assert said == [(5, 29), (13, 29), (21, 29), (29, 29)]
        said.clear()
        model.generate(ids, max_new_tokens=4, do_sample=False)
        assert said[-1] == (29, 29) and len(said) == 5
    said.clear()
    with in_pieces(model):
        model(ids)
    assert said == []


@torch.no_grad()
def test_what_is_watched_goes_in_pieces_that_take_no_minutes(monkeypatch):
    """Of a small model, which else takes tens of thousands of tokens at once; what somebody wants cut finer, is."""
    model, ids = small_model(), tokens(1, 37)
    monkeypatch.setattr(pieces, "_STEP", 4)
    monkeypatch.setattr(pieces, "_WATCHED", 16)
    with watched(model) as lengths:
        model(ids)
        assert lengths == [37]
        lengths.clear()
        with pieces.watched(lambda seen, total: None):
            model(ids)
        assert lengths == [16, 16, 5]


@torch.no_grad()
def test_a_watcher_that_fails_is_not_kept(in_pieces):
    model, ids = small_model(), tokens(1, LENGTH)

    def fail(seen, total):
        raise KeyboardInterrupt

    with in_pieces(model):
        with pytest.raises(KeyboardInterrupt), pieces.watched(fail):
            model(ids)
        assert model(ids).logits.shape[1] == LENGTH


@every_family
@torch.no_grad()
def test_packed_rows_are_not_cut(family, in_pieces):
    model, ids = small_model(family), tokens(1, LENGTH)
    lengths = [11, 1, 17]
    expected = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], 1)
    ends = torch.tensor([0, 11, 12, 29])
    packs = (
        {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]},
        {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]},
        {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
    )
    for pack in packs:
        out = not_cut(model, ids, in_pieces, **pack)
        assert relative_difference(out.logits, expected) <= TOLERANCE


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions", "output_router_logits"])
@pytest.mark.parametrize("by", ["argument", "config"])
@torch.no_grad()
def test_what_every_layer_gave_is_that_of_the_whole_row(wanted, by, in_pieces):
    model, ids = small_model("moe"), tokens(2, LENGTH)
    if wanted == "output_attentions":
        model.set_attn_implementation("eager")
    if by == "config":
        setattr(model.config, wanted, True)
    out = not_cut(model, ids, in_pieces, **({wanted: True} if by == "argument" else {}))
    recorded = getattr(out, wanted.removeprefix("output_"))
    assert recorded and all(LENGTH in t.shape or t.shape[0] == 2 * LENGTH for t in recorded)


@every_family
def test_a_row_with_gradients_is_not_cut(family, in_pieces):
    model, ids = small_model(family), tokens(2, LENGTH)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    out = not_cut(model, ids, in_pieces, labels=ids)
    assert relative_difference(torch.autograd.grad(out.loss, model.lm_head.weight)[0], expected) <= TOLERANCE


@torch.no_grad()
def test_masks_that_are_no_column_a_token_are_not_cut(in_pieces):
    model, ids = small_model("dense"), tokens(2, LENGTH)
    causal = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out = not_cut(model, ids, in_pieces, attention_mask=causal)
    assert relative_difference(out.logits, model(ids).logits) <= TOLERANCE
    prepared = model.create_masks_for_generate(model.config, model.get_input_embeddings()(ids), None)
    not_cut(model, ids, in_pieces, attention_mask=prepared)


@torch.no_grad()
def test_short_rows_are_not_cut(in_pieces):
    for length in (1, PIECE):
        not_cut(small_model("dense"), tokens(2, length), in_pieces)


@torch.no_grad()
def test_with_the_real_budget_a_small_model_takes_thousands_of_tokens():
    model = small_model("attention", torch.float32)
    with watched(model) as lengths:
        model(tokens(1, 600), logits_to_keep=1)
    assert lengths == [600]


# --------------------------------------------------------------------------------------------------------- refusals


@every_family
@torch.no_grad()
def test_what_does_not_fit_is_refused_before_anything_is_in_the_cache(family, in_pieces):
    model, ids = small_model(family), tokens(2, LENGTH)
    if "attention" in model.config.layers_block_type:
        static = NemotronHCache(model.config, max_cache_len=LENGTH + 2)
        model(ids[:, :3], cache=static)
        before = [layer.state_BHPN.clone() for layer in static.layers if hasattr(layer, "state_BHPN")]
        with in_pieces(model) as lengths, pytest.raises(ValueError, match="room for 31 tokens and 32 are needed"):
            model(ids, cache=static)
        assert not lengths and int(static.get_seq_length()) == 3
        after = [layer.state_BHPN for layer in static.layers if hasattr(layer, "state_BHPN")]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        model(ids[:, :28], cache=static)  # and what fits still does

    cache = NemotronHCache(model.config)
    model(ids[:1, :3], cache=cache)
    with in_pieces(model) as lengths, pytest.raises(ValueError, match="holds 1 rows and the batch has 2"):
        model(ids, cache=cache)
    assert not lengths and int(cache.get_seq_length()) == 3

    cache = NemotronHCache(model.config)
    with in_pieces(model) as lengths, pytest.raises(ValueError, match="attention_mask has 20 columns"):
        model(ids, attention_mask=torch.ones(2, 20), cache=cache)
    assert not lengths and int(cache.get_seq_length()) == 0

    with in_pieces(model) as lengths, pytest.raises(ValueError, match="of another pattern"):
        model(ids, cache=NemotronHCache(small_config("tied" if family != "tied" else "mamba")))
    assert not lengths

    with in_pieces(model), pytest.raises(ValueError, match="pass exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@torch.no_grad()
def test_packed_rows_with_a_cache_are_refused_as_ever(in_pieces):
    model, ids = small_model("dense"), tokens(1, LENGTH)
    cache = NemotronHCache(model.config)
    positions = torch.cat([torch.arange(20), torch.arange(9)])[None]
    with in_pieces(model), pytest.raises(ValueError, match="several packed documents"):
        model(ids, position_ids=positions, cache=cache)
    assert int(cache.get_seq_length()) == 0


# ----------------------------------------------------------------------------------------------- how long a piece is


# That what a layer holds of a piece stays within the budget is in test_cost.py.


def test_a_piece_is_a_multiple_of_256_within_the_budget():
    config, cpu = small_config("dense"), torch.device("cpu")

    def length(batch, dtype=torch.float32):
        return pieces.chunk_length(config, batch, cpu, dtype)

    assert all(length(batch) % 256 == 0 for batch in range(1, 100, 7))
    assert abs(length(1) / 64 - length(64)) <= 256 and abs(length(64, torch.float64) - length(64) / 2) <= 256
    assert length(10**6) == 256  # never fewer: weights are read for each piece


def test_layers_of_their_own_widths_are_counted():
    """The widest MLP of a list, wherever it is."""
    cpu = torch.device("cpu")
    for widths in ([48, 4800], [4800, 48]):
        config = small_config("attention", intermediate_size=widths)
        wide = small_config("attention", intermediate_size=4800)
        lengths = [pieces.chunk_length(each, 8, cpu, torch.float32) for each in (config, wide)]
        assert lengths[0] == lengths[1] < pieces.chunk_length(small_config("attention"), 8, cpu, torch.float32)
