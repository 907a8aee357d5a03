"""prompt_cache.PromptCache and generate(prompt_cache=): the same tokens as without, from the longest kept beginning."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from families import relative_difference, small_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemotron_h import NemotronHCache, PromptCache

FAMILIES = ["dense", "moe", "latent", "mamba", "attention"]
pytestmark = pytest.mark.core


def plain(model, ids, **kwargs):
    return model.generate(ids, **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs})


def joined(*parts):
    return torch.cat(parts, dim=1)


class Computed:
    """Counts the tokens that go through the model's layers."""

    def __init__(self, model):
        self.tokens = 0
        model.model.embeddings.register_forward_hook(lambda _module, inputs, _output: self.add(inputs[0]))

    def add(self, ids):
        self.tokens += ids.numel()

    def during(self, function):
        before = self.tokens
        result = function()
        return result, self.tokens - before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_where_it_was(family):
    """Every turn repeats all before it, and computes the new tokens only."""
    model, cache = small_model(family), PromptCache()
    computed, prompt = Computed(model), tokens(1, 40, seed=3)
    for turn in range(3):
        expected, all_of_it = computed.during(lambda prompt=prompt: plain(model, prompt))
        found, some = computed.during(lambda prompt=prompt: plain(model, prompt, prompt_cache=cache))
        assert torch.equal(found, expected)
        # The last token that was generated has not been through the model.
        assert some == all_of_it if turn == 0 else some == 1 + 5 + 5, turn
        prompt = joined(found, tokens(1, 5, seed=10 + turn))
    assert (cache.hits, cache.misses) == (2, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_share_a_beginning_that_nobody_named(family):
    """The first prompt is kept whole, the second shows where they part, the third goes on from there."""
    model, cache = small_model(family), PromptCache(shortest=1)
    computed, document = Computed(model), tokens(1, 50, seed=3)
    counted = []
    for number in range(4):
        prompt = joined(document, torch.tensor([[3 + number]]), tokens(1, 7, seed=20 + number))
        expected = plain(model, prompt)
        found, some = computed.during(lambda prompt=prompt: plain(model, prompt, prompt_cache=cache))
        assert torch.equal(found, expected)
        counted.append(some)
    assert counted == [58 + 5, 58 + 5, 8 + 5, 8 + 5]
    assert cache.lengths.count(50) == 1


def test_a_boundary_that_is_named():
    model, cache = small_model("dense"), PromptCache()
    computed, system = Computed(model), tokens(1, 30, seed=3)
    for number in range(3):
        prompt = joined(system, torch.tensor([[3 + number, 5, 6]]))
        expected = plain(model, prompt)
        found, some = computed.during(
            lambda prompt=prompt: plain(model, prompt, prompt_cache=cache, prompt_boundaries=[30])
        )
        assert torch.equal(found, expected)
        assert some == (33 if number == 0 else 3) + 5
    with pytest.raises(ValueError, match="prompt_boundaries has 99 and the prompt 33 tokens"):
        plain(model, prompt, prompt_cache=cache, prompt_boundaries=[99])


def test_multiples():
    model, cache = small_model("dense"), PromptCache(every=8)
    plain(model, tokens(1, 30), prompt_cache=cache)
    assert cache.lengths == [8, 16, 24, 29, 35]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_prompt_again_computes_its_last_token(family):
    model, cache = small_model(family), PromptCache()
    computed, prompt = Computed(model), tokens(1, 40)
    first = plain(model, prompt, prompt_cache=cache)
    again, some = computed.during(lambda: plain(model, prompt, prompt_cache=cache))
    assert torch.equal(again, first) and some == 6
    # Both were kept from the same text: what is there is not kept twice.
    assert cache.lengths == [39, 45]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_state_is_what_a_full_prefill_comes_to(family):
    """In float64, logits after a restored prefix against those of the whole text without a cache."""
    model, cache = small_model(family), PromptCache(every=16)
    text = tokens(1, 60, seed=5)
    plain(model, text, prompt_cache=cache)
    ours = NemotronHCache(model.config)
    ids = joined(text[:, :50], tokens(1, 9, seed=6))
    at = cache.resume(ours, ids, model)
    assert at == 48 and ours.get_seq_length() == 48
    with torch.no_grad():
        logits = model(ids[:, at:], cache=ours).logits
        expected = model(ids, use_cache=False).logits[:, at:]
    assert relative_difference(logits, expected) <= 1e-9


def test_sampling_beams_and_returned_sequences():
    model, prompt = small_model("dense"), tokens(1, 20)
    for way in (
        {"do_sample": True, "temperature": 1.3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_logits": True},
    ):
        cache = PromptCache()
        for _ in range(2):
            torch.manual_seed(7)
            expected = plain(model, prompt, **way)
            torch.manual_seed(7)
            found = plain(model, prompt, prompt_cache=cache, **way)
            if not isinstance(expected, torch.Tensor):
                assert all(
                    relative_difference(a, b) <= 1e-9 for a, b in zip(found.logits, expected.logits, strict=True)
                )
                expected, found = expected.sequences, found.sequences
            assert torch.equal(found, expected), way
        assert cache.hits == 1
    # What speculation leaves is a state of what it accepted.
    longer = joined(plain(model, prompt, prompt_lookup_num_tokens=3, prompt_cache=cache), tokens(1, 4, seed=9))
    assert torch.equal(plain(model, longer, prompt_cache=cache), plain(model, longer))


def test_a_cache_of_the_callers_own_is_filled():
    model, prompt, cache = small_model("dense"), tokens(1, 20), PromptCache()
    expected = plain(model, prompt)
    for _ in range(2):
        static = NemotronHCache(model.config, max_cache_len=40)
        assert torch.equal(plain(model, prompt, prompt_cache=cache, cache=static), expected)
        assert static.get_seq_length() == 25
    assert torch.equal(plain(model, prompt, prompt_cache=cache), expected)  # out of what a static one left
    used = NemotronHCache(model.config)
    model(prompt, cache=used)
    with pytest.raises(ValueError, match="this one holds 20 tokens: pass a new one"):
        plain(model, prompt, prompt_cache=cache, cache=used)


def test_kept_in_inference_mode_and_used_outside_of_it():
    model, prompt, cache = small_model("dense"), tokens(1, 20), PromptCache()
    with torch.inference_mode():
        plain(model, prompt, prompt_cache=cache)
    longer = joined(prompt, tokens(1, 5))
    assert torch.equal(plain(model, longer, prompt_cache=cache), plain(model, longer))
    ours = NemotronHCache(model.config)
    other = joined(prompt, tokens(1, 5, seed=8))
    at = cache.resume(ours, other, model)
    assert at == 19
    logits = model(other[:, at:], cache=ours).logits
    expected = model(other, use_cache=False).logits[:, at:]
    assert relative_difference(logits, expected) <= 1e-9
    weight = model.model.layers[-1].mixer.up_proj.weight  # the state before is a constant to it
    (found,) = torch.autograd.grad(logits.sum(), weight)
    (wanted,) = torch.autograd.grad(expected.sum(), weight)
    assert relative_difference(found, wanted) <= 1e-9


def test_two_models_and_a_trained_one_do_not_mix():
    cache, prompt = PromptCache(), tokens(1, 20)
    models = [small_model("dense"), small_model("dense", seed=1), small_model("moe")]
    for model in models:
        assert torch.equal(plain(model, prompt, prompt_cache=cache), plain(model, prompt))
    assert cache.hits == 0 and len(cache) == 6
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.mul_(1.01)
    assert torch.equal(plain(models[0], prompt, prompt_cache=cache), plain(models[0], prompt))
    assert cache.hits == 0


def test_an_adapter_that_is_switched_off_is_another_model():
    peft = pytest.importorskip("peft")
    model = small_model("dense")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "q_proj"], init_lora_weights=False))
    cache, prompt = PromptCache(), tokens(1, 20)
    found = adapted.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, prompt_cache=cache)
    with adapted.disable_adapter():
        off = adapted.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, prompt_cache=cache)
        assert torch.equal(off, adapted.generate(input_ids=prompt, max_new_tokens=4, do_sample=False))
    assert cache.hits == 0
    assert torch.equal(found, adapted.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, prompt_cache=cache))
    assert cache.hits == 1


def state_bytes(model):
    """Of one row's Mamba states in a float64 model, counted from the config."""
    config = model.config
    window = config.conv_dim * (config.conv_kernel - 1)
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    return 8 * config.layers_block_type.count("mamba") * (window + state)


def key_bytes(model, length):
    config = model.config
    width = config.num_key_value_heads * config.head_dim
    return 8 * config.layers_block_type.count("attention") * 2 * width * length


def fill(model, cache, lengths, seed=0):
    ids = tokens(1, max(lengths), seed=seed)
    ours = NemotronHCache(model.config)
    at = 0
    with torch.no_grad():
        for length in sorted(lengths):
            model(ids[:, at:length], cache=ours)
            cache.store(ours, ids[:, :length], model)
            at = length
    return ids


def test_the_budget_counts_every_entry():
    """Each has keys, values and a state of its own, whatever text it shares with others."""
    model, cache = small_model("dense"), PromptCache()
    fill(model, cache, [10, 20, 50])
    assert cache.nbytes == 3 * state_bytes(model) + key_bytes(model, 10 + 20 + 50)
    fill(model, cache, [30], seed=1)
    assert cache.nbytes == 4 * state_bytes(model) + key_bytes(model, 110)


def test_the_least_recently_used_goes_first():
    model = small_model("dense")
    cache = PromptCache(max_bytes=3 * state_bytes(model) + key_bytes(model, 30))
    texts = [fill(model, cache, [10], seed=seed) for seed in range(3)]
    assert cache.nbytes == cache.max_bytes
    assert cache.resume(NemotronHCache(model.config), texts[0], model) == 10  # used
    fill(model, cache, [10], seed=3)
    found = [cache.resume(NemotronHCache(model.config), text, model) for text in texts]
    assert found == [10, 0, 10]


@torch.no_grad()
def test_what_is_left_of_a_shared_text_takes_no_more_than_it_needs():
    model = small_model("dense")
    cache = PromptCache(max_bytes=3 * state_bytes(model) + key_bytes(model, 250))
    text = fill(model, cache, [20, 200])
    assert cache.resume(NemotronHCache(model.config), text[:, :30], model) == 20  # now the long one is older
    fill(model, cache, [100], seed=1)
    assert cache.lengths == [20, 100]
    assert cache.nbytes == 2 * state_bytes(model) + key_bytes(model, 120)
    ours = NemotronHCache(model.config)
    assert cache.resume(ours, text, model) == 20
    expected = model(text[:, :25], use_cache=False).logits[:, 20:]
    assert relative_difference(model(text[:, 20:25], cache=ours).logits, expected) <= 1e-9


@torch.no_grad()
def test_a_kept_state_is_nobodys_to_change():
    """Two ways on from one entry, in turns, and the entry afterwards."""
    for family in FAMILIES:
        model, cache = small_model(family), PromptCache()
        text = fill(model, cache, [12])
        before = copy.deepcopy([t.clone() for e in cache._entries.values() for t in e.snapshot.tensors()])
        ways = [tokens(1, 5, seed=seed) for seed in (1, 2)]
        caches = [NemotronHCache(model.config) for _ in ways]
        for each in caches:
            assert cache.resume(each, text, model) == 12
        logits = [[], []]
        for at in range(5):
            for index in range(2):
                logits[index].append(model(ways[index][:, at : at + 1], cache=caches[index]).logits)
        for way, parts in zip(ways, logits, strict=True):
            expected = model(joined(text, way), use_cache=False).logits[:, 12:]
            assert relative_difference(joined(*parts), expected) <= 1e-9
        after = [t for e in cache._entries.values() for t in e.snapshot.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_is_too_large_is_said_once(monkeypatch):
    model, cache, said = small_model("dense"), PromptCache(max_bytes=100), []
    monkeypatch.setattr("nemotron_h.generation.prompt_cache.logger.warning", said.append)
    for _ in range(2):
        assert torch.equal(plain(model, tokens(1, 9), prompt_cache=cache), plain(model, tokens(1, 9)))
    assert len(cache) == 0 and cache.nbytes == 0
    assert len(said) == 1 and "does not fit PromptCache(max_bytes=100)" in said[0]


@pytest.mark.parametrize("family", ["dense", "moe", "mamba"])
def test_a_folder_keeps_what_does_not_fit_and_outlives_the_process(family, tmp_path):
    model = small_model(family)
    cache = PromptCache(max_bytes=0, folder=tmp_path, folder_bytes=1 << 20)
    prompt = tokens(1, 20)
    expected = plain(model, prompt)
    assert torch.equal(plain(model, prompt, prompt_cache=cache), expected)
    assert len(cache) == 0 and len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(plain(model, prompt, prompt_cache=cache), expected) and cache.hits == 1
    later = PromptCache(folder=tmp_path)
    longer = joined(expected, tokens(1, 3))
    computed = Computed(model)
    found, some = computed.during(lambda: plain(model, longer, prompt_cache=later))
    assert later.hits == 1 and some == 4 + 5
    assert torch.equal(found, plain(model, longer))
    assert torch.equal(
        plain(small_model(family, seed=5), prompt, prompt_cache=later), plain(small_model(family, seed=5), prompt)
    )
    assert later.hits == 1


def test_flush_and_files_that_cannot_be_read(tmp_path):
    model, prompt = small_model("dense"), tokens(1, 20)
    cache = PromptCache(folder=tmp_path)
    expected = plain(model, prompt, prompt_cache=cache)
    assert not list(tmp_path.glob("*.safetensors"))
    cache.flush(model)
    files = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert len(files) == 2
    later = PromptCache(folder=tmp_path)
    for file in files:
        file.write_bytes(file.read_bytes()[:-8])
    (tmp_path / "another.safetensors").write_bytes(b"what is this")
    assert torch.equal(plain(model, prompt, prompt_cache=later), expected) and later.hits == 0
    assert torch.equal(plain(model, prompt, prompt_cache=PromptCache(folder=tmp_path)), expected)
    with pytest.raises(ValueError, match="no folder to write to"):
        PromptCache().flush(model)


@torch.no_grad()
def test_a_file_of_what_autocast_computed_is_found_by_another_process(tmp_path):
    model = small_model("dense", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = PromptCache(folder=tmp_path)
        text = fill(model, cache, [20])
        cache.flush(model)
    assert PromptCache(folder=tmp_path).resume(NemotronHCache(model.config), text, model) == 20


def test_files_of_somebody_else_are_passed_over(tmp_path):
    """Of several rows, without ids, with metadata or ids that are not as they should be, and no files at all."""
    model, ids = small_model("dense"), tokens(2, 20)
    cache = PromptCache(folder=tmp_path)
    text = fill(model, cache, [20])
    cache.flush(model)
    (good,) = tmp_path.glob("*.safetensors")
    with safe_open(good, framework="pt") as file:
        said, held = file.metadata(), load_file(good)
    rows = NemotronHCache(model.config)
    with torch.no_grad():
        model(ids, cache=rows)
    rows.save(tmp_path / "rows.safetensors", model=model, token_ids=ids, keep_ids=True)
    rows.save(tmp_path / "no_ids.safetensors", model=model, token_ids=ids)
    for name in set(said) - {"nemotron_h", "pattern"}:
        save_file(held, tmp_path / f"no_{name}.safetensors", metadata={k: v for k, v in said.items() if k != name})
    for name, value in (("config", "[]"), ("config", "{"), ("token_count", "many"), ("batch_size", "-1")):
        save_file(held, tmp_path / f"{name}{len(value)}.safetensors", metadata={**said, name: value})
    for number, wrong in enumerate((torch.zeros(20), torch.zeros(1, 20), held["token_ids"][:, 1:].contiguous())):
        save_file({**held, "token_ids": wrong}, tmp_path / f"ids{number}.safetensors", metadata=said)
    save_file({"token_ids": held["token_ids"]}, tmp_path / "no_tensors.safetensors", metadata=said)
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    later = PromptCache(folder=tmp_path)
    assert list(later._files) == list(cache._files)
    os.utime(good)  # the newest: of two files of one text it is the one
    later = PromptCache(folder=tmp_path)
    assert later.resume(NemotronHCache(model.config), text, model) == 20
    good.unlink()
    assert PromptCache(folder=tmp_path).resume(NemotronHCache(model.config), text, model) == 0  # no tensors in it


@pytest.fixture
def good(tmp_path):
    """A model, a text, the file of its state, and what is in it."""
    model, cache = small_model("dense"), PromptCache(folder=tmp_path)
    text = fill(model, cache, [20])
    cache.flush(model)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return model, text, path, file.metadata(), load_file(path)


def deep(depth, brackets="[]"):
    return brackets[0] * depth + brackets[1] * depth


BAD_FILES = {
    "deep config": lambda said, held: (said | {"config": deep(100_000)}, held),
    "deep part of the config": lambda said, held: (
        said | {"config": said["config"][:-1] + f', "x": {deep(900)}}}'},
        held,
    ),
    "number too long": lambda said, held: (said | {"token_count": "9" * 10_000}, held),
    "superscript": lambda said, held: (said | {"version": "\u00b2"}, held),
    "layers by numbers": lambda said, held: (said | {"config": json.dumps({"layers_block_type": 7})}, held),
    "huge": lambda said, held: (said | {"config": said["config"].replace('"head_dim": 12', '"head_dim": 1e400')}, held),
    "int8": lambda said, held: (said, {k: t.to(torch.int8) if "keys" in k else t for k, t in held.items()}),
    "half": lambda said, held: (said, {k: t.half() if "window" in k else t for k, t in held.items()}),
    "two rows": lambda said, held: (said, {k: torch.cat([t, t]) if "state" in k else t for k, t in held.items()}),
    "numbers": lambda said, held: (said, {k: torch.tensor(1.0) if "values" in k else t for k, t in held.items()}),
    "missing": lambda said, held: (said, {k: t for k, t in held.items() if k != "layers.5.state"}),
    "other ids": lambda said, held: (said, {**held, "token_ids": held["token_ids"] + 1}),
    "ids in int32": lambda said, held: (said, {**held, "token_ids": held["token_ids"].int()}),
}


@torch.no_grad()
@pytest.mark.parametrize("bad", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_passed_over_and_the_good_one_found(bad, good, tmp_path):
    """The bad one is the newer; it would stand for the same text."""
    model, text, path, said, held = good
    metadata, tensors = bad(said, held)
    save_file(tensors, tmp_path / "zz.safetensors", metadata=metadata)
    os.utime(path, (1, 1))
    cache = NemotronHCache(model.config)
    assert PromptCache(folder=tmp_path).resume(cache, text, model) == 20
    ids = joined(text, tokens(1, 4, seed=8))
    expected = model(ids, use_cache=False).logits[:, 20:]
    assert relative_difference(model(ids[:, 20:], past_key_values=cache).logits, expected) <= 1e-9


def test_what_is_no_safetensors_file_is_passed_over(good, tmp_path):
    """Without waiting for a pipe; headers that are longer than the file, or than any memory; no right to read."""
    model, text, path, *_ = good
    header = lambda text: len(text).to_bytes(8, "little") + text  # noqa: E731
    for number, data in enumerate((
        b"",
        b"what is this",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (99_000_000).to_bytes(8, "little") + b"{",
        header(b"[" * 100_000),
        header(b'{"__metadata__": {"format": 5}}'),
        header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'),
        header(b"\xff\xfe"),
        path.read_bytes()[:-1],
        path.read_bytes() + b"more",
    )):  # fmt: skip
        (tmp_path / f"no{number}.safetensors").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.safetensors").symlink_to(tmp_path / "itself.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "locked.safetensors").write_bytes(path.read_bytes()[:200])
    (tmp_path / "locked.safetensors").chmod(0)
    os.utime(path, (1, 1))
    later = PromptCache(folder=tmp_path)
    assert list(later._files.values()) == [path]
    assert later.resume(NemotronHCache(model.config), text, model) == 20


@pytest.mark.parametrize("what", ["removed", "a folder", "a pipe", "cut", "deep", "int8"])
def test_a_file_that_went_bad_after_it_was_found(what, good, tmp_path):
    """The prompt is computed, and gives what it gives without; the shorter beginning of another file serves."""
    model, text, path, said, held = good
    longer = PromptCache(folder=tmp_path)
    fill(model, longer, [30])
    longer.flush(model)
    later, long = PromptCache(folder=tmp_path), tokens(1, 30, seed=0)
    assert torch.equal(long[:, :20], text) and len(later._files) == 2
    (gone,) = (file for file in later._files.values() if file != path)
    gone.unlink()
    if what == "a folder":
        gone.mkdir()
    elif what == "a pipe":
        os.mkfifo(gone)
    elif what == "cut":
        gone.write_bytes(path.read_bytes()[:-9])
    elif what in ("deep", "int8"):
        metadata, tensors = BAD_FILES["deep config" if what == "deep" else "int8"](said, held)
        save_file(tensors, gone, metadata=metadata)
    cache = NemotronHCache(model.config)
    assert later.resume(cache, long, model) == 20 and int(cache.get_seq_length()) == 20


def test_a_full_disk_does_not_stop_who_is_generating(small_disk, monkeypatch):
    """What does not fit into memory is then not kept; `flush`, which was asked to write, says so."""
    said, model, prompt = [], small_model("dense"), tokens(1, 20)
    monkeypatch.setattr("nemotron_h.generation.prompt_cache.logger.warning", said.append)
    (small_disk / "other").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail - 1) * os.statvfs(small_disk).f_bsize)
    expected = plain(model, prompt)
    assert torch.equal(plain(model, prompt, prompt_cache=PromptCache(max_bytes=0, folder=small_disk)), expected)
    assert said and all("not kept: The disk of " in each and "is full; make room" in each for each in said)
    cache = PromptCache(folder=small_disk)
    plain(model, prompt, prompt_cache=cache)
    with pytest.raises(OSError, match=r"The disk of .*\.safetensors is full; make room and run it again\."):
        cache.flush(model)
    assert os.listdir(small_disk) == ["other"]
    (small_disk / "other").unlink()
    cache.flush(model)
    assert len(PromptCache(folder=small_disk)._files) == 2


def test_files_that_were_removed_are_written_again(tmp_path):
    model = small_model("dense")
    cache = PromptCache(folder=tmp_path)
    text = fill(model, cache, [10, 20])
    cache.flush(model)
    (first, second) = tmp_path.glob("*.safetensors")
    first.unlink()
    at = second.stat().st_mtime_ns
    cache.flush(model)
    assert first.exists() and second.stat().st_mtime_ns == at
    first.unlink()
    second.unlink()
    cache.max_bytes = 0
    fill(model, cache, [5], seed=1)
    assert len(cache) == 0
    assert PromptCache(folder=tmp_path).resume(NemotronHCache(model.config), text, model) == 20


@torch.no_grad()
def test_what_another_model_pushes_out_goes_to_the_folder(tmp_path):
    """And is found again there, by the one that it is of and by no other."""
    models = [small_model("dense"), small_model("dense", seed=1), small_model("mamba")]
    cache = PromptCache(max_bytes=state_bytes(models[0]) + key_bytes(models[0], 20), folder=tmp_path)
    cache.folder_bytes = 1 << 30
    texts = [fill(model, cache, [20], seed=number) for number, model in enumerate(models)]
    assert len(cache) == 1 and len(list(tmp_path.glob("*.safetensors"))) == 2
    for model, text in zip(models, texts, strict=True):
        ours = NemotronHCache(model.config)
        assert cache.resume(ours, text, model) == 20
        logits = model(tokens(1, 3), cache=ours).logits
        expected = model(joined(text, tokens(1, 3)), use_cache=False).logits[:, 20:]
        assert relative_difference(logits, expected) <= 1e-9
        assert [cache.resume(NemotronHCache(other.config), text, other) for other in models].count(20) == 1


def test_the_folder_has_a_budget_too(tmp_path):
    model = small_model("dense")
    one = PromptCache(max_bytes=0, folder=tmp_path)
    fill(model, one, [20])
    (first,) = tmp_path.glob("*.safetensors")
    cache = PromptCache(max_bytes=0, folder=tmp_path, folder_bytes=2 * first.stat().st_size + 100)
    texts = [fill(model, cache, [20], seed=seed) for seed in (1, 2)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and not first.exists()
    for text in texts:
        assert cache.resume(NemotronHCache(model.config), text, model) == 20


def test_refused_in_a_sentence():
    model, cache = small_model("dense"), PromptCache()
    prompt = tokens(2, 6)
    wrong = [
        ({"inputs": prompt}, "The batch has 2 prompts"),
        ({"inputs_embeds": torch.zeros(1, 4, 32, dtype=torch.float64)}, "pass input_ids, not embeddings"),
        ({"inputs": prompt[:1], "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "hides 1 of 6 prompt tokens"),
        ({"inputs": prompt[:1], "use_cache": False}, "use_cache is False"),
        ({"inputs": prompt[:1], "cache_implementation": "static"}, "'static': pass an empty NemotronHCache"),
        ({"inputs": prompt[:1, :0]}, "The prompt has no tokens"),
    ]
    for kwargs, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            model.generate(**kwargs, max_new_tokens=3, prompt_cache=cache)
    with pytest.raises(ValueError, match="prompt_cache= is a dict"):
        plain(model, prompt[:1], prompt_cache={"a": 1})
    with pytest.raises(ValueError, match="The cache has seen 0 tokens and token_ids has 3"):
        cache.store(NemotronHCache(model.config), [1, 2, 3], model)
    ours = NemotronHCache(model.config)
    model(prompt, cache=ours)
    with pytest.raises(ValueError, match="the cache has 2: split it first"):
        cache.store(ours, prompt[0], model)
    for kwargs, sentence in (({"max_bytes": -1}, "max_bytes is -1"), ({"every": 0}, "every is 0")):
        with pytest.raises(ValueError, match=sentence):
            PromptCache(**kwargs)
    assert len(cache) == 0


def test_one_token_and_the_models_own_settings():
    model, cache = small_model("dense"), PromptCache()
    one = tokens(1, 1)
    for _ in range(2):
        assert torch.equal(plain(model, one, prompt_cache=cache), plain(model, one))
    model.generation_config.cache_implementation = "dynamic"
    model.generation_config.num_beams = 2
    prompt = tokens(1, 15)
    for _ in range(2):
        assert torch.equal(plain(model, prompt, prompt_cache=cache), plain(model, prompt))
    for _ in range(2):
        chunked = plain(model, prompt, prompt_cache=cache, prefill_chunk_size=4, num_beams=1)
        assert torch.equal(chunked, plain(model, prompt, num_beams=1))
