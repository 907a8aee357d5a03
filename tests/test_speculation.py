"""generate() with drafts is generate(): the same tokens, scores, streams, stops and cache, or the same distribution."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from families import relative_difference, small_model, tokens
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.streamers import BaseStreamer

from nemotron_h import NemotronHCache, NemotronHForCausalLM
from nemotron_h.bundled import WORD_PROBLEMS, held_out
from nemotron_h.cache.layers import GrowingLayer, MambaLayer
from nemotron_h.cache.rollback import DRAFT, ROLLBACK
from nemotron_h.compat import CACHE_NAME
from nemotron_h.generation import chunked_prefill as pieces
from nemotron_h.generation import speculation
from nemotron_h.generation.speculation import Lookup, Speculation

pytestmark = pytest.mark.core

FAMILIES = ["dense", "moe", "latent", "mamba", "attention"]
DRAWS = int(os.environ.get("SPECULATION_DRAWS", "2000"))  # 20,000 for the record
PROMPTS = int(os.environ.get("SPECULATION_PROMPTS", "1"))  # a family, dtype and way; 200 for the record
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model_of(family: str = "dense", dtype=torch.float64, seed: int = 0, **overrides):
    return small_model(family, dtype, seed, **{"head_dim": 16, **overrides})


def prompt(seed: int, length: int = 16) -> torch.Tensor:
    """Tokens, some of which come twice: there is something to look up."""
    ids = tokens(1, length, seed=seed)
    return torch.cat([ids, ids[:, : length // 2]], dim=1)


def noisy(model, seed: int = 3, share: float = 0.02):
    """A model that nearly is the given one: an assistant of whose drafts some are kept."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += share * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return other


def ways(model) -> dict[str, dict]:
    return {
        "lookup": {"prompt_lookup_num_tokens": 6},
        "assistant": {"assistant_model": noisy(model)},
        "near assistant": {"assistant_model": noisy(model, share=0.002)},
        "another assistant": {"assistant_model": model_of("tied", model.dtype, seed=1)},
    }


def both(model, ids, way, **settings):
    settings = {**GREEDY, "max_new_tokens": 24, **settings}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    drafted = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings, **way)
    return plain, drafted


# -- the same tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family, dtype):
    model = model_of(family, dtype)
    kept, settings = dict.fromkeys(ways(model), 0), {**GREEDY, "max_new_tokens": 20, "return_dict_in_generate": True}
    for seed in range(PROMPTS):
        ids = prompt(seed)
        plain = model.generate(ids, **settings).sequences
        for name, way in ways(model).items():
            drafted = model.generate(ids, **settings, **way)
            assert torch.equal(plain, drafted.sequences), (name, seed)
            kept[name] += drafted.speculation.accepted
    print(f"{family} {dtype}: drafted tokens kept {kept}")
    assert sum(kept.values()) > 10  # there was something to go wrong


@torch.no_grad()
@pytest.mark.parametrize("family", ["dense", "latent"])
def test_greedy_is_what_no_cache_gives(family):
    model, ids = model_of(family), prompt(50)
    expected = ids
    for _ in range(16):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    for name, way in ways(model).items():
        assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=16, **way), expected), name


@pytest.mark.parametrize("family", ["dense", "mamba", "attention"])
def test_the_same_seed_samples_the_same_text(family):
    """Where a draft has no probabilities, a token is drawn as plain sampling draws it."""
    model = model_of(family)
    for seed in range(2):
        found = []
        for way in ({}, ways(model)["lookup"]):
            torch.manual_seed(seed)
            settings = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 20}
            found.append(model.generate(prompt(seed), **settings, **way))
        assert torch.equal(*found), seed


@pytest.fixture(scope="module")
def bundled():
    return NemotronHForCausalLM.from_pretrained(WORD_PROBLEMS).eval(), AutoTokenizer.from_pretrained(WORD_PROBLEMS)


def asked(tokenizer, number: int):
    messages = [{"role": "user", "content": held_out()[number]["question"]}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_bundled(bundled):
    model, tokenizer = bundled
    counted = {}
    for number in range(PROMPTS):
        inputs = asked(tokenizer, number)
        plain = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        for name, way in {
            "lookup": {"prompt_lookup_num_tokens": 8},
            "assistant": {"assistant_model": noisy(model, share=0.005)},
        }.items():
            output = model.generate(**inputs, max_new_tokens=200, do_sample=False, return_dict_in_generate=True, **way)
            assert torch.equal(plain, output.sequences), (number, name)
            total = counted.setdefault(name, Speculation())
            for field in ("steps", "tokens", "drafted", "accepted"):
                setattr(total, field, getattr(total, field) + getattr(output.speculation, field))
    for name, total in counted.items():
        print(f"{name}: {total.acceptance_rate:.0%} kept, {total.tokens_per_step:.2f} tokens per step")
    assert counted["assistant"].acceptance_rate > 0.4 and counted["assistant"].tokens_per_step > 1.5


def test_stop_strings_and_the_end(bundled):
    model, tokenizer = bundled
    inputs = asked(tokenizer, 1)
    for stop in ([" = "], ["so "], ["138"]):
        settings = {"max_new_tokens": 150, "do_sample": False, "tokenizer": tokenizer, "stop_strings": stop}
        plain = model.generate(**inputs, **settings)
        for way in ({"prompt_lookup_num_tokens": 12}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(plain, model.generate(**inputs, **settings, **way)), (stop, way)
    whole = model.generate(**inputs, max_new_tokens=150, do_sample=False, prompt_lookup_num_tokens=12)
    assert int(whole[0, -1]) in model.generation_config.eos_token_id and whole.shape[1] < 300


# -- other assistants --------------------------------------------------------------------------------------------------


def llama(vocab: int = 97, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_a_llama_drafts(sample):
    model = model_of("dense")
    plain, drafted = both(model, prompt(1), {"assistant_model": llama()}, do_sample=sample)
    assert drafted.speculation.drafted > 0 and plain.shape == drafted.sequences.shape
    assert sample or torch.equal(plain, drafted.sequences)


@pytest.mark.parametrize("family", ["dense", "mamba"])
def test_drafts_for_a_llama(family):
    """The library's own loop, and a Nemotron-H that has to take back what it drafted."""
    model, assistant = llama(), model_of(family)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    plain = model.generate(prompt(2), **GREEDY, max_new_tokens=40)
    assert torch.equal(plain, model.generate(prompt(2), **GREEDY, max_new_tokens=40, assistant_model=assistant))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["llama", "nemotron-h"])
def test_an_assistant_with_another_tokenizer(bundled, byte_tokenizer, kind):
    model, tokenizer = bundled
    # A copy: the library keeps what it makes of two tokenizers, with the first assistant's head cut to it.
    byte_tokenizer, vocab = copy.deepcopy(byte_tokenizer), len(byte_tokenizer)
    assistant = llama(vocab).float() if kind == "llama" else model_of("dense", torch.float32, vocab_size=vocab)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    drafts = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": byte_tokenizer}
    inputs = asked(tokenizer, 3)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, **drafts)
    assert torch.equal(plain, output.sequences) and output.speculation.drafted > 0
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, **drafts)
    assert sampled.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_assistant_that_drafts_long(schedule):
    """More tokens than a record of single steps could take back, were schedules not held."""
    model = model_of("mamba")
    assistant = copy.deepcopy(model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = DRAFT
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    plain, drafted = both(model, prompt(5), {"assistant_model": assistant}, max_new_tokens=110)
    assert torch.equal(plain, drafted.sequences)
    assert drafted.speculation.acceptance_rate == 1 and drafted.speculation.tokens_per_step > 16
    assert assistant.generation_config.num_assistant_tokens == DRAFT
    plain, drafted = both(model, prompt(6), {"assistant_model": noisy(assistant, share=0.1)}, max_new_tokens=40)
    assert torch.equal(plain, drafted.sequences) and drafted.speculation.drafted > drafted.speculation.accepted


# -- the same distribution ---------------------------------------------------------------------------------------------


class Guess(CandidateGenerator):
    """Drafts drawn from probabilities that depend on the token before, and the logits that they were drawn from."""

    def __init__(self, vocab: int, number: int = 4, seed: int = 0):
        self.logits_VV = 1.5 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.number = number

    def get_candidates(self, input_ids, **_):
        ids, logits = input_ids, []
        for _step in range(self.number):
            logits.append(self.logits_VV[ids[:, -1]])
            ids = torch.cat([ids, torch.multinomial(logits[-1].softmax(-1), 1)], dim=1)
        return ids, torch.stack(logits, dim=1)

    def update_candidate_strategy(self, *_):
        """Nothing; abstract in older versions."""


@torch.no_grad()
def uniforms(model, sequences: torch.Tensor, start: int, generator: torch.Generator) -> torch.Tensor:
    """Where each token lies in the distribution that the model gives it, with a random place in its own share: uniform
    and independent if and only if the tokens were drawn from those distributions."""
    p = model(sequences, use_cache=False).logits[:, start - 1 : -1].float().softmax(-1)
    chosen = sequences[:, start:, None]
    upto = p.cumsum(-1).gather(-1, chosen)[..., 0]
    share = p.gather(-1, chosen)[..., 0]
    return (upto - share * torch.rand(share.shape, generator=generator)).reshape(-1).double()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    _, order = torch.cat([a, b]).sort()
    step = torch.where(order < len(a), 1 / len(a), -1 / len(b)).double()
    return float(step.cumsum(0).abs().max())


def test_sampling_with_a_draft_is_sampling(monkeypatch):
    """A two-sample test, and one against the model's own probabilities. Bounds of one in ten thousand; seeds fixed."""
    model = small_model("mamba", torch.float32, hybrid_override_pattern="M*", vocab_size=8, head_dim=16)
    ids, generator = torch.tensor([[3, 4, 5, 6, 7, 3, 4]]), torch.Generator().manual_seed(1)
    settings = {**GREEDY, "do_sample": True, "top_k": 0, "max_new_tokens": 500}
    found = {}
    for name in ("plain", "drafted"):
        torch.manual_seed(7)
        sequences, kept = [], Speculation()
        for _ in range(-(-DRAWS // 500)):
            if name == "plain":
                sequences.append(model.generate(ids, **settings))
                continue
            with monkeypatch.context() as patch:
                patch.setattr(type(model), "_get_candidate_generator", lambda *_args, **_kwargs: Guess(8))
                output = model.generate(
                    ids, **settings, assistant_model=model, return_dict_in_generate=True
                )  # the assistant only says that there is one
            sequences.append(output.sequences)
            kept = output.speculation
        found[name] = uniforms(model, torch.cat(sequences), ids.shape[1], generator)
    assert 0.1 < kept.acceptance_rate < 0.9
    number = len(found["plain"])
    bound = math.sqrt(math.log(2 / 1e-4) / 2)
    even = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:]
    distances = {
        "two samples": apart(found["plain"], found["drafted"]) / math.sqrt(2 / number),
        "the model's": apart(found["drafted"], even) * math.sqrt(number),
        "plain and the model's": apart(found["plain"], even) * math.sqrt(number),
    }
    # Neighbours are independent as well: the distance round the circle from one to the next is uniform too.
    for name, sample in found.items():
        distances[f"neighbours, {name}"] = apart((sample[1:] - sample[:-1]) % 1, even) * math.sqrt(number - 1)
    shown = {name: round(value, 2) for name, value in distances.items()}
    print(f"{number} draws, distances over their scale, below {bound:.2f}: {shown}")
    assert max(distances.values()) < bound


# -- the same calls ----------------------------------------------------------------------------------------------------


class Calls(LogitsProcessor):
    """Remembers its calls, and forbids a token that depends on their number."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, scores.argmax(-1) if len(self.seen) % 3 == 0 else 5] = -torch.inf
        return scores


class Enough(StoppingCriteria):
    """Stops at its n-th call, and looks at the scores of every one."""

    def __init__(self, number):
        self.number, self.seen = number, []

    def __call__(self, input_ids, scores, **_):
        self.seen.append((input_ids.tolist(), len(scores), float(scores[-1].max())))
        return torch.tensor([len(self.seen) == self.number])


class Heard(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append((tuple(value.shape), value.tolist()))

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("name", ["lookup", "assistant"])
def test_processors_criteria_and_streamers_see_what_they_see_without(name):
    model = model_of("dense", attn_implementation="eager")
    seen = []
    for way in ({}, ways(model)[name]):
        calls, enough, heard = Calls(), Enough(13), Heard()
        output = model.generate(
            prompt(4),
            **GREEDY,
            max_new_tokens=30,
            # An assistant is given the processors as well, and asks them what it likes.
            logits_processor=[] if name == "assistant" else [calls],
            stopping_criteria=[enough],
            streamer=heard,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            output_attentions=True,
            return_dict_in_generate=True,
            **way,
        )
        seen.append((calls.seen, enough.seen, heard.seen, output))
    (plain, drafted) = seen
    assert plain[2] == drafted[2] and plain[3].sequences.equal(drafted[3].sequences)
    assert plain[0] == drafted[0]
    assert [call[:2] for call in plain[1]] == [call[:2] for call in drafted[1]] and len(drafted[1]) == 13
    for field in ("scores", "logits"):
        for a, b in zip(getattr(plain[3], field), getattr(drafted[3], field), strict=True):
            finite = a.isfinite()
            assert torch.equal(finite, b.isfinite()) and torch.allclose(a[finite], b[finite], atol=1e-5)
    for field in ("hidden_states", "attentions"):
        for a, b in zip(getattr(plain[3], field), getattr(drafted[3], field), strict=True):
            assert all(x.shape == y.shape and (x - y).abs().max() <= 1e-9 for x, y in zip(b, a, strict=True)), field


def test_what_is_counted():
    model = model_of("dense")
    for name, way in ways(model).items():
        _, output = both(model, prompt(3), way, max_new_tokens=25)
        found = output.speculation
        assert found.tokens == 25 and 0 < found.accepted <= found.drafted, name
        assert found.accepted + found.steps - found.tokens in (0, 1)  # 1: the last token of all was a drafted one
        assert found.acceptance_rate == found.accepted / found.drafted
        assert found.tokens_per_step == found.tokens / found.steps > 1
    assert speculation.report(output)["accepted"] == found.accepted
    plain = model.generate(prompt(3), **GREEDY, max_new_tokens=2, return_dict_in_generate=True)
    assert speculation.report(plain) is None
    assert Speculation().acceptance_rate == Speculation().tokens_per_step == 0


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "mamba"])
def test_a_conversation_that_keeps_its_cache(family):
    model = model_of(family)
    for name in ("lookup", "assistant"):
        way = ways(model)[name]
        caches, histories = [], []
        for drafts in ({}, way):
            cache, history = NemotronHCache(model.config), torch.empty(1, 0, dtype=torch.long)
            for turn in range(2):
                history = torch.cat([history, prompt(turn, 6)], dim=1)
                mask = torch.ones_like(history)
                history = model.generate(
                    history, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=12, **drafts
                )
            caches.append(cache), histories.append(history)
        assert torch.equal(*histories), name
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == histories[0].shape[1] - 1
        assert caches[0].nbytes() == caches[1].nbytes()  # nothing is recorded any longer
        for ours, theirs in zip(*[reversed(cache.layers) for cache in caches], strict=True):
            assert not getattr(ours, "record_past", False) and not getattr(theirs, "record_past", False)
            if isinstance(ours, MambaLayer):
                assert relative_difference(ours.state_BHPN, theirs.state_BHPN) <= 1e-9
                with pytest.raises(RuntimeError, match="recorded none"):
                    theirs.crop(-1)


def test_a_cache_that_was_recording_still_is():
    model, cache = model_of("dense"), NemotronHCache(model_of("dense").config)
    cache.activate_past_recording()
    model.generate(prompt(1), past_key_values=cache, **GREEDY, max_new_tokens=9, prompt_lookup_num_tokens=4)
    cache.crop(-3)
    assert cache.get_seq_length() == 24 + 8 - 3


def test_a_cache_of_the_librarys():
    model = model_of("dense")
    plain = model.generate(prompt(7), **GREEDY, max_new_tokens=20)
    for make in (DynamicCache, lambda: DynamicCache(config=model.config)):
        settings = {**GREEDY, "max_new_tokens": 20, "prompt_lookup_num_tokens": 5}
        assert torch.equal(plain, model.generate(prompt(7), past_key_values=make(), **settings))


@pytest.mark.skipif(CACHE_NAME != "cache", reason="transformers before 5.24 refuses a static cache here")
@pytest.mark.parametrize("family", ["dense", "mamba"])
def test_a_static_cache_of_just_the_length(family):
    model = model_of(family)
    plain, drafted = both(model, prompt(8), {**ways(model)["lookup"], "cache_implementation": "static"})
    assert torch.equal(plain, drafted.sequences)


def test_padding_on_the_left_and_a_prompt_that_ends_with_the_end():
    model = model_of("dense")
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt(9), torch.tensor([[2]])], dim=1)
    mask = (torch.arange(ids.shape[1]) >= 5).long()[None]
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 20, "attention_mask": mask}
    plain = model.generate(ids, **settings)
    assert plain.shape[1] > ids.shape[1]
    alone = model.generate(ids[:, 5:], **{**settings, "attention_mask": mask[:, 5:]})
    assert torch.equal(plain[:, 5:], alone)
    for name, way in ways(model).items():
        assert torch.equal(plain, model.generate(ids, **settings, **way)), name


def test_a_prompt_in_pieces(monkeypatch):
    """The last piece may be one token, and the draft of the step that sees the prompt longer."""
    model = model_of("dense")
    for length in (64, 65):
        ids = tokens(1, 16, seed=length).repeat(1, 5)[:, :length]
        plain = model.generate(ids, **GREEDY, max_new_tokens=12)
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "_STEP", 8)
            patch.setattr(pieces, "_BUDGET", {"cpu": 1})
            assert torch.equal(plain, model.generate(ids, **GREEDY, max_new_tokens=12, prompt_lookup_num_tokens=15))


@torch.no_grad()
def test_single_steps_are_taken_back():
    """Whatever came before: as many as a draft may have."""
    model = model_of("mamba")
    for before in (1, 5, 17, 31, 32, 33, 47, 48, 49, 64, 70):
        cache = NemotronHCache(model.config)
        cache.activate_past_recording()
        ids = tokens(1, before + DRAFT, seed=before)
        for length in (before // 2, before - before // 2):
            if length:
                model(ids[:, cache.get_seq_length() :][:, :length], **{CACHE_NAME: cache})
        expected = cache.layers[0].state_BHPN.clone()
        for token in ids[:, before:].split(1, dim=1):
            model(token, **{CACHE_NAME: cache})
        cache.crop(-DRAFT)
        assert relative_difference(cache.layers[0].state_BHPN, expected) <= 1e-10


@torch.no_grad()
def test_keys_go_back_in_place():
    def new(length, seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(1, 2, length, 4, generator=generator) for _ in range(2)]

    layer = GrowingLayer()
    layer.update(*new(10, 0)), layer.update(*new(1, 1))
    old = layer.keys, layer.keys.clone()
    layer.activate_past_recording()
    layer.update(*new(5, 2))
    address = layer.keys.data_ptr()
    layer.crop(-3)
    layer.update(*new(4, 3))
    assert layer.keys.data_ptr() == address  # no copy of what was there
    expected = torch.cat([new(10, 0)[0], new(1, 1)[0], new(5, 2)[0][:, :, :2], new(4, 3)[0]], dim=2)
    assert torch.equal(layer.keys, expected)
    # What somebody else sees stays: what was there when recording began, and a copy's tokens.
    other = copy.copy(layer)
    layer.crop(-2)
    layer.update(*new(3, 4))
    assert torch.equal(other.keys, expected)
    layer.crop(-9)
    layer.update(*new(9, 5))
    assert torch.equal(old[0], old[1]) and torch.equal(other.keys, expected)


def test_a_snapshot_taken_while_recording_stays():
    model, cache = model_of("dense"), NemotronHCache(model_of("dense").config)
    ids = tokens(1, 30)
    with torch.no_grad():
        cache.activate_past_recording()
        model(ids[:, :20], **{CACHE_NAME: cache})
        snapshot = cache.snapshot()
        expected = copy.deepcopy(snapshot)
        cache.crop(-5)
        model(ids[:, 20:], **{CACHE_NAME: cache})
    for ours, theirs in zip(snapshot.layers, expected.layers, strict=True):
        assert ours is None or all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- looking up --------------------------------------------------------------------------------------------------------


def looked_up(ids: list[int], number: int, longest: int) -> list[int]:
    """By trying: the longest end that came before, its last place, and what came after, going on in the draft."""
    for matched in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - matched - 1, -1, -1):
            if ids[start : start + matched] == ids[-matched:]:
                text = list(ids)
                for i in range(min(number, 2 * matched)):
                    text.append(text[start + matched + i])
                return text[len(ids) :]
    return []


def test_lookup():
    generator, found = torch.Generator().manual_seed(0), 0
    for trial in range(300):
        length, vocab = 1 + trial % 40, 2 + trial % 7
        ids = torch.randint(vocab, (1, length), generator=generator)
        number, longest = 1 + trial % 9, 1 + trial % 5
        drafted, logits = Lookup(number, longest).get_candidates(ids)
        assert logits is None and torch.equal(drafted[:, :length], ids)
        expected = looked_up(ids[0].tolist(), number, longest)
        assert drafted[0, length:].tolist() == expected
        found += len(expected) > 0
    assert found > 250


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refused():
    model = model_of("dense")
    long = noisy(model)
    long.generation_config.num_assistant_tokens = DRAFT + 1
    exit_ = "assistant_early_exit=3 would draft with some of the model's own layers.* pass prompt_lookup_num_tokens="
    for way, words in (
        ({"prompt_lookup_num_tokens": ROLLBACK + 1}, f"prompt_lookup_num_tokens={ROLLBACK + 1} .* at most {ROLLBACK}"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens=0 drafts nothing"),
        ({"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 0}, "max_matching_ngram_size=0"),
        ({"assistant_model": long}, f"num_assistant_tokens={DRAFT + 1} .* at most {DRAFT}"),
        ({"assistant_early_exit": 3}, exit_),
        ({"assistant_early_exit": 3, "use_cache": False}, exit_),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(prompt(0), **GREEDY, max_new_tokens=4, **way)
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(tokens(2, 5), **GREEDY, max_new_tokens=4, prompt_lookup_num_tokens=4)
    # Without Mamba layers a cache goes back as far as anyone likes.
    attention = model_of("attention")
    attention.generate(prompt(0), **GREEDY, max_new_tokens=4, prompt_lookup_num_tokens=ROLLBACK + 1)
