"""`generate()` with every kind of cache and search gives what decoding without a cache gives."""

import copy

import pytest
import torch
from families import FAMILIES, relative_difference, small_model, tokens

from nemotron_h import NemotronHCache

pytestmark = pytest.mark.core
every_family = pytest.mark.parametrize("family", FAMILIES)
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def greedy_without_cache(model, ids, steps=10):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
    ],
    ids=["dynamic", "static", "chunked prefill", "offloaded", "no cache"],
)
def test_greedy(family, options):
    model, ids = small_model(family), tokens(3, 11)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
    assert torch.equal(out, greedy_without_cache(model, ids))


@every_family
def test_greedy_from_a_prompt_of_one_token(family):
    model, ids = small_model(family), tokens(2, 1)
    assert torch.equal(model.generate(ids, **GREEDY), greedy_without_cache(model, ids))


@every_family
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_left_padded_batch(family, options):
    model = small_model(family)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, alone in enumerate(rows):
        ids[row, 9 - len(alone) :], mask[row, 9 - len(alone) :] = alone, 1
    out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    for row, alone in enumerate(rows):
        assert torch.equal(out[row, 9:], greedy_without_cache(model, alone[None])[0, len(alone) :])


def brute_force_beams(model, ids, beams, steps):
    """Beam search over whole rows without any cache, no end token."""
    hypotheses = [(0.0, ids)]
    for _ in range(steps):
        candidates = []
        for score, row in hypotheses:
            log_probs = model(row, use_cache=False).logits[0, -1].float().log_softmax(-1)
            best = log_probs.topk(beams)
            for value, token in zip(best.values, best.indices, strict=True):
                candidates.append((score + value.item(), torch.cat([row, token.view(1, 1)], dim=1)))
        hypotheses = sorted(candidates, key=lambda c: -c[0])[:beams]
    return torch.cat([row for _, row in hypotheses])


@pytest.mark.parametrize("family", ["dense", "moe", "mamba", "attention"])
@torch.no_grad()
def test_beam_search(family):
    model, ids = small_model(family), tokens(2, 7)
    options = {**GREEDY, "max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    out = model.generate(ids, **options)
    expected = torch.cat([brute_force_beams(model, row[None], 4, 5) for row in ids])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("family", ["dense", "mamba"])
def test_sampled_return_sequences_equal_the_sampled_rows(family):
    """`num_return_sequences` repeats the prompt; every continuation must be one its own row can have."""
    model, ids = small_model(family), tokens(2, 6)
    torch.manual_seed(0)
    out = model.generate(
        ids, **{**GREEDY, "do_sample": True}, num_return_sequences=3, output_logits=True, return_dict_in_generate=True
    )
    for step, logits in enumerate(out.logits):
        expected = model(out.sequences[:, : 6 + step], use_cache=False).logits[:, -1]
        assert relative_difference(logits.double(), expected, record=False) <= 1e-6  # generate() hands out float32


@every_family
@torch.no_grad()
def test_a_conversation_that_keeps_its_cache(family):
    model = small_model(family)
    cache, history = NemotronHCache(model.config), torch.empty(2, 0, dtype=torch.long)
    for turn in range(3):
        history = torch.cat([history, tokens(2, 5, seed=turn)], dim=1)
        # a mask of ones: the pad token's id is a word like any other here
        history = model.generate(history, attention_mask=torch.ones_like(history), past_key_values=cache, **GREEDY)
        assert torch.equal(history, greedy_without_cache(model, history[:, :-10]))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
@torch.no_grad()
def test_every_name_of_the_cache(name):
    model, ids = small_model("dense"), tokens(1, 8)
    cache = NemotronHCache(model.config)
    out = model(ids[:, :5], use_cache=True, **{name: cache})
    assert out.cache is out.past_key_values is out.cache_params is cache
    logits = model(ids[:, 5:], **{name: cache}).logits
    assert relative_difference(logits, model(ids).logits[:, 5:]) <= 1e-9
    assert torch.equal(
        model.generate(ids, **{name: NemotronHCache(model.config)}, **GREEDY), greedy_without_cache(model, ids)
    )


def test_two_caches_are_refused():
    model = small_model("dense")
    with pytest.raises(ValueError, match="different caches as cache and past_key_values"):
        model(tokens(1, 3), cache=NemotronHCache(model.config), past_key_values=NemotronHCache(model.config))


@every_family
@torch.no_grad()
def test_cache_made_by_the_library(family):
    from transformers import DynamicCache

    model, ids = small_model(family), tokens(2, 12)
    full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split([5, 1, 6], dim=1)], dim=1)
        assert relative_difference(logits, full) <= 1e-9


@every_family
@torch.no_grad()
def test_rows_of_a_cache_are_rows(family):
    """reorder, select, repeat, deepcopy, reset: equal to having run those rows alone."""
    model, ids, more = small_model(family), tokens(3, 9), tokens(6, 2, seed=8)

    def filled():
        cache = NemotronHCache(model.config)
        model(ids, cache=cache)
        return cache

    def check(cache, rows):
        logits = model(more[: len(rows)], cache=cache).logits
        expected = model(torch.cat([ids[rows], more[: len(rows)]], dim=1), use_cache=False).logits[:, 9:]
        assert relative_difference(logits, expected) <= 1e-9

    cache = filled()
    twin = copy.deepcopy(cache)
    check(cache, [0, 1, 2])
    check(twin, [0, 1, 2])
    cache = filled()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check(cache, [2, 0, 0])
    cache = filled()
    cache.batch_select_indices(torch.tensor([1, 2]))
    check(cache, [1, 2])
    cache = filled()
    cache.batch_repeat_interleave(2)
    check(cache, [0, 0, 1, 1, 2, 2])


@every_family
@pytest.mark.parametrize("max_cache_len", [None, 40])
@torch.no_grad()
def test_reset(family, max_cache_len):
    model, ids = small_model(family), tokens(2, 9)
    cache = NemotronHCache(model.config, max_cache_len=max_cache_len)
    model(tokens(2, 7, seed=5), cache=cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert relative_difference(model(ids, cache=cache).logits, model(ids, use_cache=False).logits) <= 1e-9


@torch.no_grad()
def test_states_are_kept_in_the_configured_dtype():
    model = small_model("dense", dtype=torch.bfloat16)
    for dtype in ("float32", "bfloat16"):
        model.config.mamba_ssm_cache_dtype = dtype
        cache = NemotronHCache(model.config)
        model(tokens(1, 6), cache=cache)
        model(tokens(1, 1), cache=cache)
        states = [layer.state_BHPN for layer in cache.layers if hasattr(layer, "state_BHPN")]
        assert {state.dtype for state in states} == {getattr(torch, dtype)}
        assert {layer.window_BCW.dtype for layer in cache.layers if hasattr(layer, "window_BCW")} == {torch.bfloat16}


def test_cache_sizes():
    model = small_model("dense", dtype=torch.float32)
    config, cache = model.config, NemotronHCache(model.config)
    assert cache.nbytes() == 0
    model(tokens(2, 11), cache=cache)
    mamba = config.conv_dim * (config.conv_kernel - 1) + config.d_inner * config.ssm_state_size
    attention = 2 * 11 * config.num_key_value_heads * config.head_dim
    assert cache.nbytes() == 4 * 2 * (3 * mamba + attention)


def test_what_was_not_recorded_cannot_be_forgotten():
    ids = tokens(1, 6)
    model = small_model("dense", hybrid_override_pattern="*-M")  # keys and values come first, and must not be cut
    cache = NemotronHCache(model.config)
    model(ids, cache=cache)
    with pytest.raises(RuntimeError, match=r"crop\(-2\)"):
        cache.crop(-2)
    # and nothing was forgotten
    assert relative_difference(model(ids, cache=cache).logits, model(ids.repeat(1, 2)).logits[:, 6:]) <= 1e-9


def test_a_cache_that_does_not_fit_is_refused_before_it_changes():
    model, ids = small_model("dense"), tokens(2, 6)
    static = NemotronHCache(model.config, max_cache_len=8)
    model(ids, cache=static)
    with pytest.raises(ValueError, match="room for 8 tokens and 12 are needed"):
        model(ids, cache=static)
    model(ids[:, :2], cache=static)
    cache = NemotronHCache(model.config)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="holds 2 rows and the batch has 1"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="layers of another pattern"):
        model(ids, cache=NemotronHCache(small_model("moe").config))
    with pytest.raises(ValueError, match="no tokens"):
        model(ids[:, :0])


def test_a_library_cache_without_attention_layers():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="DynamicCache does not know its length"):
        small_model("mamba").generate(tokens(1, 3), past_key_values=DynamicCache(), **GREEDY)


def test_an_unknown_argument_is_an_error():
    model = small_model("dense")
    with pytest.raises(TypeError, match="unknown argument attention_msk="):
        model(tokens(1, 3), attention_msk=torch.ones(1, 3))
    with pytest.raises(ValueError, match="attention_msk"):
        model.generate(tokens(1, 3), attention_msk=torch.ones(1, 3), **GREEDY)


@pytest.mark.parametrize("family", ["dense", "moe", "mamba"])
@torch.no_grad()
def test_static_cache_compiles_whole(family):
    model = small_model(family, dtype=torch.float32)
    ids = tokens(1, 9)
    expected = model.generate(ids, **GREEDY)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = NemotronHCache(model.config, max_cache_len=32)
    logits = model(ids, cache=cache).logits
    out = ids
    for _ in range(10):
        out = torch.cat([out, logits[:, -1:].argmax(-1)], dim=1)
        logits = step(input_ids=out[:, -1:], cache=cache).logits
    assert torch.equal(out, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
