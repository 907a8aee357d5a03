"""What a cache promises beside going on: rows repeated, selected, joined and taken apart are what each would be alone;
keys in few bits or on another device; what it weighs; what it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import relative_difference, small_model, tokens
from packaging import version
from transformers import cache_utils
from transformers.cache_utils import QuantizedLayer

from nemotron_h import NemotronHCache
from nemotron_h.cache.layers import MambaLayer
from nemotron_h.compat import CACHE_NAME

FAMILIES = ["dense", "moe", "latent", "mamba", "attention"]
NEW = version.parse(transformers.__version__) >= version.parse("5.24")
pytestmark = pytest.mark.core


@torch.no_grad()
def filled(model, ids, mask=None):
    cache = NemotronHCache(model.config)
    model(ids, attention_mask=mask, cache=cache)
    return cache


@torch.no_grad()
def alone(model, prompt, rest):
    """A row's logits by a full forward without a cache."""
    row = torch.cat([prompt, rest])[None]
    return model(row, use_cache=False).logits[0, len(prompt) :]


@torch.no_grad()
def on(model, cache, rest, mask=None):
    """Logits of (B, L) more tokens, the first three at once, then one at a time."""
    parts, at = [rest[:, :3], *rest[:, 3:].split(1, dim=1)], 0
    logits = []
    for part in parts:
        at += part.shape[1]
        grown = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), at)], dim=1)
        logits.append(model(part, attention_mask=grown, cache=cache).logits)
    return torch.cat(logits, dim=1)


def worst(model, logits, prompts, rest):
    expected = [alone(model, prompt, row) for prompt, row in zip(prompts, rest, strict=True)]
    return max(relative_difference(a, b) for a, b in zip(logits, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_repeated_selected_and_reordered(family):
    model, prompts, rest = small_model(family), tokens(3, 17), tokens(8, 6, seed=2)
    cache = filled(model, prompts)
    cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1, 2, 2]
    assert cache.batch_size == 6
    assert worst(model, on(model, cache, rest[:6]), prompts[rows], rest[:6]) <= 1e-9
    cache = filled(model, prompts)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert worst(model, on(model, cache, rest[:2]), prompts[[2, 0]], rest[:2]) <= 1e-9
    for static in (False, True):
        cache = NemotronHCache(model.config, max_cache_len=30 if static else None)
        with torch.no_grad():
            model(prompts, cache=cache)
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        assert worst(model, on(model, cache, rest[:3]), prompts[[1, 1, 0]], rest[:3]) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(5, 17, 9), (1, 2, 30), (8, 8, 8)], ids=str)
def test_caches_of_unequal_lengths_in_one(family, lengths):
    """Joined, gone on from together, taken apart, gone on from alone: each row as if it had always been alone."""
    model = small_model(family)
    prompts = [tokens(1, length, seed=length + at)[0] for at, length in enumerate(lengths)]
    caches = [filled(model, prompt[None]) for prompt in prompts]
    joined, mask = NemotronHCache.concat(caches)
    longest = max(lengths)
    assert mask.tolist() == [[0] * (longest - length) + [1] * length for length in lengths]
    assert (joined.batch_size, joined.get_seq_length()) == (3, longest)
    rest = tokens(3, 7, seed=50)
    assert worst(model, on(model, joined, rest, mask), prompts, rest) <= 1e-9
    # What was joined is not touched by it.
    assert worst(model, on(model, caches[0], rest[:1]), prompts[:1], rest[:1]) <= 1e-9

    grown = torch.cat([mask, mask.new_ones(3, 7)], dim=1)
    texts = [torch.cat([prompt, row]) for prompt, row in zip(prompts, rest, strict=True)]
    more = tokens(3, 5, seed=60)
    for row, part in enumerate(joined.split(attention_mask=grown)):
        assert (part.batch_size, part.get_seq_length()) == (1, lengths[row] + 7)
        assert worst(model, on(model, part, more[row : row + 1]), texts[row : row + 1], more[row : row + 1]) <= 1e-9
    first, last = joined.split([2, 1], attention_mask=grown)
    here = grown[:2, grown.shape[1] - first.get_seq_length() :]
    assert worst(model, on(model, first, more[:2], here), texts[:2], more[:2]) <= 1e-9
    assert worst(model, on(model, last, more[2:]), texts[2:], more[2:]) <= 1e-9


@pytest.mark.parametrize("family", ["dense", "moe", "mamba"])
def test_batches_join_with_their_masks(family):
    """A left-padded batch, a static cache and a single row; and generate() goes on from all of them at once."""
    model = small_model(family)
    prompts = [tokens(1, length, seed=length)[0] for length in (4, 11, 9, 6)]
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :7] = 0
    batch = torch.stack([torch.cat([torch.zeros(7, dtype=torch.int64), prompts[0]]), prompts[1]])
    static = NemotronHCache(model.config, max_cache_len=20)
    with torch.no_grad():
        model(prompts[2][None], cache=static)
    caches = [filled(model, batch, mask), static, filled(model, prompts[3][None])]
    joined, whole = NemotronHCache.concat(caches, [mask, None, None])
    assert whole.sum(1).tolist() == [4, 11, 9, 6]
    rest = tokens(4, 6, seed=9)
    assert worst(model, on(model, joined, rest, whole), prompts, rest) <= 1e-9

    joined, whole = NemotronHCache.concat(caches, [mask, None, None])
    ids = torch.zeros(4, 12, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 11 - len(prompt) : 11] = prompt
    ids[:, 11] = rest[:, 0]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    attention_mask = torch.cat([whole, whole.new_ones(4, 1)], dim=1)
    found = model.generate(ids, attention_mask=attention_mask, cache=joined, **settings)
    for row, prompt in enumerate(prompts):
        expected = model.generate(torch.cat([prompt, rest[row, :1]])[None], **settings)
        assert torch.equal(found[row, 12:], expected[0, len(prompt) + 1 :])


def by_hand(model, prompt, beams, new):
    """Beam search with full forwards only: `new` tokens, no end of text, scores summed; the best text first."""
    kept = [(0.0, prompt)]
    for _ in range(new):
        tried = []
        for score, ids in kept:
            with torch.no_grad():
                logits = model(ids[None], use_cache=False).logits[0, -1].double()
            logprobs = logits.log_softmax(-1)
            logprobs[model.config.eos_token_id] = -torch.inf  # after the softmax, as the library's processors
            best = logprobs.topk(beams + 1)
            tried += [
                (score + float(value), torch.cat([ids, index[None]]))
                for value, index in zip(best.values, best.indices, strict=True)
            ]
        kept = sorted(tried, key=lambda each: -each[0])[:beams]
    return [ids for _score, ids in kept]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_those_of_full_forwards(family):
    model, prompts = small_model(family), tokens(2, 7)
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "num_return_sequences": 3}
    config = transformers.GenerationConfig(**settings, suppress_tokens=[model.config.eos_token_id], pad_token_id=0)
    found = model.generate(prompts, generation_config=config)
    for row, prompt in enumerate(prompts):
        expected = by_hand(model, prompt, 3, 5)
        assert torch.equal(found[3 * row : 3 * row + 3], torch.stack(expected))


def test_returned_sequences_are_samples_of_the_one_row():
    """Each has, under the model, the probabilities that it was drawn with; and they differ."""
    model, prompt = small_model("dense"), tokens(1, 9)
    torch.manual_seed(3)
    output = model.generate(
        prompt, do_sample=True, top_k=0, num_return_sequences=4, max_new_tokens=6, min_new_tokens=6,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    with torch.no_grad():
        expected = model(output.sequences, use_cache=False).logits[:, 8:-1]
    found = torch.stack(output.logits, dim=1)  # which generate() makes float32
    assert relative_difference(found, expected, record=False) <= 1e-6
    assert len({tuple(row) for row in output.sequences.tolist()}) == 4


@torch.no_grad()
def test_gradients_go_through_rows():
    """Of what was repeated, to what comes before: a row's gradient is the sum of its copies'."""
    model, prompts, rest = small_model("dense"), tokens(2, 6), tokens(4, 3, seed=2)
    weight = model.model.layers[0].mixer.in_proj.weight

    def gradient(run):
        with torch.enable_grad():
            return torch.autograd.grad(run().sin().sum(), weight)[0]

    def repeated():
        cache = NemotronHCache(model.config)
        model(prompts, cache=cache)
        cache.batch_repeat_interleave(2)
        return model(rest, cache=cache).logits

    rows = torch.cat([prompts[[0, 0, 1, 1]], rest], dim=1)
    expected = gradient(lambda: model(rows, use_cache=False).logits[:, 6:])
    assert relative_difference(gradient(repeated), expected) <= 1e-9


# ---- keys in few bits


class Rounded(QuantizedLayer):
    """A backend of this test's own: keys and values in float16 steps, from the library's base class."""

    def _quantize(self, tensor, axis):
        return tensor.to(torch.float16), {"axis": axis, "scale": torch.ones(1)}

    def _dequantize(self, quantised):
        return quantised[0].to(torch.float64)


@pytest.fixture
def rounded(monkeypatch):
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Rounded)


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("family", ["dense", "moe", "latent", "mamba", "attention"])
def test_quantised_keys_beside_mamba_states(family):
    """The states are exact, the keys as rough as the backend makes them; a residue of 4 tokens is kept as it is."""
    model, ids = small_model(family), tokens(2, 30)
    cache = NemotronHCache(model.config, quantized={"backend": "quanto", "residual_length": 4, "nbits": 4})
    kinds = [type(layer) for layer in cache.layers]
    assert sum(issubclass(kind, Rounded) for kind in kinds) == model.config.layers_block_type.count("attention")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        logits = torch.cat([model(part, cache=cache).logits for part in ids.split([20, *[1] * 10], dim=1)], dim=1)
    rough = relative_difference(logits, expected, record=False)
    assert rough <= 1e-2 and (rough > 1e-9) is ("attention" in model.config.layers_block_type)
    assert relative_difference(logits[:, :20], expected[:, :20]) <= 1e-9  # a prompt sees its own keys as they are
    assert int(cache.get_seq_length()) == 30
    for index, kind in enumerate(model.config.layers_block_type[:1]):
        assert kind != "mamba" or isinstance(cache.layers[index], MambaLayer)


@pytest.mark.usefixtures("rounded")
def test_generate_makes_a_quantised_cache():
    model, ids = small_model("dense"), tokens(2, 20)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(
        ids, cache_implementation="quantized", cache_config={"backend": "quanto", "residual_length": 4}, **settings
    )
    cache = output[CACHE_NAME]
    assert sum(isinstance(layer, Rounded) for layer in cache.layers) == 1
    assert torch.equal(output.sequences, model.generate(ids, **settings).sequences)
    plain = NemotronHCache(model.config)
    with torch.no_grad():
        model(output.sequences[:, :-1], cache=plain)
    layer = cache.layers[model.config.layers_block_type.index("attention")]
    ours, theirs = cache.nbytes(), plain.nbytes()
    keys = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim  # of both rows, keys and values
    held = layer._quantized_keys[0].shape[-2]
    assert theirs - ours == keys * (held * (8 - 2)) - 2 * 4  # float16 in place of float64, and two scales of float32


@pytest.mark.skipif(not NEW, reason="transformers has FP8 keys from 5.24")
def test_fp8_keys():
    model, ids = small_model("dense", torch.float32), tokens(2, 20)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(ids, cache_implementation="quantized", cache_config={"backend": "fp8"}, **settings)
    assert output.sequences.shape == (2, 26)
    plain = NemotronHCache(model.config)
    with torch.no_grad():
        model(output.sequences[:, :-1], cache=plain)
    width = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim
    assert plain.nbytes() - output.cache.nbytes() == width * 25 * (4 - 1) - 2 * 4
    beams = model.generate(
        ids, cache_implementation="quantized", cache_config={"backend": "fp8"}, num_beams=2, **settings
    )
    assert beams.sequences.shape == (2, 26)


@pytest.mark.usefixtures("rounded")
def test_quantised_keys_refuse_what_they_cannot(monkeypatch):
    model, ids = small_model("dense"), tokens(2, 9)
    cache = NemotronHCache(model.config, quantized={})
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="rows of a Rounded cannot be repeated or selected: use a cache that is not"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="A Rounded has no plain keys and values to take a snapshot of"):
        cache.snapshot()
    with pytest.raises(
        ValueError, match="no backend 'mine' for quantised keys and values here: use one of quanto, hqq"
    ):
        NemotronHCache(model.config, quantized={"backend": "mine"})
    with pytest.raises(ValueError, match="The backend quanto does not take these options"):
        NemotronHCache(model.config, quantized={"bits": 3})
    with pytest.raises(ValueError, match="A quantised cache grows, and max_cache_len is 9"):
        NemotronHCache(model.config, max_cache_len=9, quantized={})
    monkeypatch.undo()
    for backend, package in (("quanto", "optimum"), ("hqq", "hqq")):
        if getattr(transformers.utils, f"is_{'optimum_quanto' if backend == 'quanto' else backend}_available")():
            continue
        with pytest.raises(ImportError, match=package.upper() if package == "hqq" else package):
            NemotronHCache(model.config, quantized={"backend": backend})


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_the_real_backends(backend):
    pytest.importorskip("optimum.quanto" if backend == "quanto" else "hqq")
    model, ids = small_model("dense", torch.float32, head_dim=64), tokens(2, 80)
    options = {"backend": backend, "nbits": 4}
    if backend == "hqq":
        options |= {"axis_key": 1, "axis_value": 1}
    cache = NemotronHCache(model.config, quantized=options)
    plain = NemotronHCache(model.config)
    with torch.no_grad():
        for part in ids.split([76, 4], dim=1):
            a, b = model(part, cache=cache).logits, model(part, cache=plain).logits
    assert relative_difference(a, b, record=False) <= 0.5
    assert cache.nbytes() < plain.nbytes()


# ---- where and how large


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_nbytes_is_what_the_config_says(state):
    for family in FAMILIES:
        model = small_model(family, torch.bfloat16, mamba_ssm_cache_dtype=state)
        config, cache = model.config, filled(model, tokens(2, 13))
        window = config.conv_dim * (config.conv_kernel - 1) * 2
        states = (
            config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * (4 if state == "float32" else 2)
        )
        keys = 2 * config.num_key_value_heads * config.head_dim * 13 * 2
        kinds = config.layers_block_type
        assert cache.nbytes() == 2 * (kinds.count("mamba") * (window + states) + kinds.count("attention") * keys)


@torch.no_grad()
def test_offloaded_keys():
    """Asked for without an accelerator it is the plain cache; layer by layer, moved away and back between steps."""
    model, ids = small_model("dense"), tokens(2, 16)
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="offloaded", **settings), expected)
    cache = NemotronHCache(model.config)
    logits = []
    for part in ids.split([9, *[1] * 7], dim=1):
        logits.append(model(part, cache=cache).logits)
        for layer in cache.layers:
            layer.offload(), layer.prefetch()
    whole = model(ids, use_cache=False).logits
    assert relative_difference(torch.cat(logits, dim=1), whole) <= 1e-9


@torch.no_grad()
def test_only_mamba_layers_with_a_cache_given():
    """The library takes a cache of linear layers alone not to know its length: the prompt is cut all the same."""
    model, ids = small_model("mamba", hybrid_override_pattern="MMM"), tokens(1, 12)
    settings = {"max_new_tokens": 8, "do_sample": False}
    cache = filled(model, ids[:, :9])
    assert torch.equal(model.generate(ids, cache=cache, **settings), model.generate(ids, **settings))


# ---- what is refused


def test_refused_in_a_sentence():
    model, ids = small_model("dense"), tokens(2, 9)
    static = NemotronHCache(model.config, max_cache_len=12)
    with torch.no_grad():
        model(ids, cache=static)
    for change in (lambda: static.batch_repeat_interleave(2), lambda: static.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(ValueError, match="The cache is static, so its number of rows cannot change"):
            change()
    assert static.batch_size == 2
    cache, empty = filled(model, ids), NemotronHCache(model.config)
    single = filled(small_model("dense", torch.float32), ids)
    wrong = [
        (lambda: NemotronHCache.concat([]), "There are no caches to join"),
        (lambda: NemotronHCache.concat([cache, empty]), "Cache 1 is empty: join caches that have seen tokens"),
        (lambda: NemotronHCache.concat([cache, filled(small_model("moe"), ids)]), "Cache 1 is of another pattern"),
        (lambda: NemotronHCache.concat([cache, single]), "Cache 1 has torch.float32 tensors on cpu where cache 0 has"),
        (lambda: NemotronHCache.concat([cache], [torch.ones(2, 8)]), r"mask of cache 0 is \(2, 8\) and its rows are"),
        (lambda: NemotronHCache.concat([cache], []), "There are 0 attention masks for 1 caches"),
        (lambda: empty.split(), "The cache is empty: it has no rows"),
        (lambda: cache.split([1, 2]), r"The sizes \[1, 2\] do not add up to the cache's 2 rows"),
        (lambda: cache.split(attention_mask=torch.ones(2, 3)), r"mask is \(2, 3\) and the cache \(2, 9\)"),
    ]
    for call, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            call()


def test_caches_of_other_sizes_do_not_join():
    cache = filled(small_model("dense"), tokens(1, 9))
    for name, value in (
        ("ssm_state_size", 8),
        ("mamba_head_dim", 16),
        ("conv_kernel", 3),
        ("num_key_value_heads", 4),
        ("head_dim", 8),
    ):
        other = filled(small_model("dense", **{name: value}), tokens(1, 5))
        with pytest.raises(
            ValueError, match=r"A row of layer [03] is .* in cache 1 and .* in cache 0: join caches of one"
        ):
            NemotronHCache.concat([cache, other])


def test_continuous_batching_says_what_stops_it():
    """And the library's own words, which are what it would say if we let it try."""
    model = small_model("dense")
    with pytest.raises(ValueError) as error:
        model.generate_batch([[3, 4, 5], [6, 7]], max_new_tokens=2)
    said = str(error.value)
    assert f"transformers {transformers.__version__} keeps pages of keys and values only" in said
    assert "layers of the types linear_attention, mlp: pass the prompts to generate() as a left-padded batch" in said
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    if NEW:
        with pytest.raises(ValueError, match="Invalid layer type: linear_attention"):
            group_layers_by_attn_type(model.config)
