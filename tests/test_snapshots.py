"""NemotronHCache.snapshot, restore, save and load: going on from a kept state is going on from the text before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from families import relative_difference, small_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemotron_h import NemotronHCache
from nemotron_h.cache import fingerprint

FAMILIES = ["dense", "moe", "latent", "mamba", "attention"]
pytestmark = pytest.mark.core


def new_cache(model, kind="growing", room=64):
    return NemotronHCache(model.config, max_cache_len=room if kind == "static" else None)


def filled(model, ids, kind="growing", recording=False):
    cache = new_cache(model, kind)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model(ids, cache=cache)
    return cache


@torch.no_grad()
def going_on(model, cache, ids):
    """Logits of further tokens: some at once, then one at a time."""
    parts = [ids[:, :4], *ids[:, 4:].split(1, dim=1)]
    return torch.cat([model(part, cache=cache).logits for part in parts], dim=1)


@torch.no_grad()
def whole(model, ids, start):
    """The logits of the text in one go, without a cache."""
    return model(ids, use_cache=False).logits[:, start:]


def tensors(cache):
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            yield from (tensor for tensor in getattr(layer, name, {}).values() if tensor is not None)
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                yield getattr(layer, name)


@pytest.mark.parametrize("into", ["growing", "static"])
@pytest.mark.parametrize("out_of", ["growing", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_snapshot_goes_on_as_the_text_would(family, out_of, into):
    """Into the cache it is of, which has gone on, and into a new one; twice each."""
    model, ids, other = small_model(family), tokens(2, 30), tokens(2, 30, seed=9)
    cache = filled(model, ids[:, :20], out_of)
    snapshot = cache.snapshot()
    assert (snapshot.length, snapshot.batch_size) == (20, 2)
    assert (
        relative_difference(
            going_on(model, cache, other[:, 20:]), whole(model, torch.cat([ids[:, :20], other[:, 20:]], 1), 20)
        )
        <= 1e-9
    )
    expected = whole(model, ids, 20)
    new = new_cache(model, into)
    for target in (cache, new, cache, new):
        target.restore(snapshot)
        assert int(target.get_seq_length()) == 20
        assert relative_difference(going_on(model, target, ids[:, 20:]), expected) <= 1e-9


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_goes_on_as_the_text_would(family, kind, tmp_path):
    """Through a file, by a model of the same weights made anew; left-padded rows with their mask."""
    model, ids = small_model(family), tokens(3, 30)
    mask = torch.ones(3, 30, dtype=torch.int64)
    mask[1, :7] = 0
    cache = new_cache(model, kind)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], cache=cache)
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 20:]
    cache.save(tmp_path / "state.safetensors", model=model, token_ids=ids[:, :20])
    again = small_model(family)
    for room in (None, 40):
        loaded = NemotronHCache.load(tmp_path / "state.safetensors", again, token_ids=ids[:, :20], max_cache_len=room)
        assert int(loaded.get_seq_length()) == 20 and loaded.batch_size == 3
        with torch.no_grad():
            logits = again(ids[:, 20:], attention_mask=mask, cache=loaded).logits
        assert relative_difference(logits, expected) <= 1e-9
    assert os.listdir(tmp_path) == ["state.safetensors"]


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_half_precision_is_bit_for_bit(state, tmp_path):
    model = small_model("dense", torch.bfloat16, mamba_ssm_cache_dtype=state)
    ids = tokens(2, 30)
    cache = filled(model, ids[:, :20])
    cache.save(tmp_path / "a", model=model)
    loaded = NemotronHCache.load(tmp_path / "a", model)
    for a, b in zip(tensors(cache), tensors(loaded), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert {tensor.dtype for tensor in tensors(loaded)} == {torch.bfloat16, getattr(torch, state)}
    assert torch.equal(going_on(model, loaded, ids[:, 20:]), going_on(model, cache, ids[:, 20:]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["dense", "mamba", "attention"])
def test_what_autocast_computed_is_a_cache_of_the_model(family, tmp_path):
    model, ids, path = small_model(family, torch.float32), tokens(1, 30), tmp_path / "a"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = filled(model, ids[:, :20])
        cache.save(path, model=model)
        loaded = NemotronHCache.load(path, model)
        assert all(a.dtype == b.dtype for a, b in zip(tensors(cache), tensors(loaded), strict=True))
        assert torch.equal(going_on(model, loaded, ids[:, 20:]), going_on(model, cache, ids[:, 20:]))
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    assert (said["dtype"], said["computed_dtype"]) == ("float32", "bfloat16")
    after = NemotronHCache.load(path, model)
    assert relative_difference(going_on(model, after, ids[:, 20:]), whole(model, ids, 20), record=False) < 0.1
    load_refused(path, small_model(family, torch.bfloat16), "saved by a float32 model and this one is bfloat16")


def test_gradients_after_a_restored_state():
    model, ids = small_model("dense"), tokens(2, 16)
    snapshot = filled(model, ids[:, :10]).snapshot()
    weight = model.model.layers[-1].mixer.up_proj.weight
    cache = new_cache(model)
    cache.restore(snapshot)
    (found,) = torch.autograd.grad(model(ids[:, 10:], cache=cache).logits.sin().sum(), weight)
    (expected,) = torch.autograd.grad(model(ids, use_cache=False).logits[:, 10:].sin().sum(), weight)
    assert relative_difference(found, expected) <= 1e-9


@torch.no_grad()
def test_nothing_writes_into_a_snapshot():
    for family in FAMILIES:
        model, ids = small_model(family), tokens(2, 40)
        cache = filled(model, ids[:, :10])
        model(ids[:, 10:11], cache=cache)  # room after the keys
        snapshot = cache.snapshot()
        before = [tensor.clone() for tensor in snapshot.tensors()]
        going_on(model, cache, ids[:, 11:20])
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.reset()
        other = new_cache(model)
        other.restore(snapshot)
        going_on(model, other, ids[:, 20:30])
        other.batch_repeat_interleave(2)
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot.tensors(), strict=True))


@torch.no_grad()
def test_what_is_recorded_stays_behind(tmp_path):
    """After restore and load nothing before can be taken back; what comes after can, where it is recorded."""
    model, ids = small_model("dense"), tokens(1, 20)
    cache = filled(model, ids[:, :10])
    cache.activate_past_recording()
    going_on(model, cache, ids[:, 10:15])
    snapshot = cache.snapshot()
    cache.save(tmp_path / "a", model=model)
    loaded = NemotronHCache.load(tmp_path / "a", model)
    loaded.activate_past_recording()
    cache.restore(snapshot)
    for target in (cache, loaded):
        with pytest.raises(RuntimeError, match="asks a Mamba layer to forget 1 tokens and 0 are recorded"):
            target.crop(-1)
        model(tokens(1, 3, seed=5), cache=target)
        target.crop(-3)
        assert relative_difference(going_on(model, target, ids[:, 15:]), whole(model, ids, 15)) <= 1e-9


def test_the_size_does_not_grow_with_the_text(tmp_path):
    """Of a model without attention, bit for bit the number that the config says; with it, by the keys alone."""
    for family in ("mamba", "dense"):
        model = small_model(family)
        config = model.config
        window = config.conv_dim * (config.conv_kernel - 1)
        state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
        sizes = {}
        for length in (30, 300):
            cache = filled(model, tokens(1, length))
            mamba = config.layers_block_type.count("mamba") * 8 * (window + state)
            keys = config.layers_block_type.count("attention") * 8 * 2 * config.num_key_value_heads * config.head_dim
            assert cache.snapshot().nbytes == mamba + keys * length
            cache.save(tmp_path / str(length), model=model)
            sizes[length] = (tmp_path / str(length)).stat().st_size
        assert abs(sizes[300] - sizes[30] - 270 * keys) <= 64, sizes  # the header's numbers


def test_an_empty_cache():
    model = small_model("dense")
    snapshot = new_cache(model).snapshot()
    assert (snapshot.length, snapshot.nbytes, snapshot.batch_size) == (0, 0, -1)
    for kind in ("growing", "static"):
        cache = filled(model, tokens(2, 10), kind)
        cache.restore(snapshot)
        assert int(cache.get_seq_length()) == 0
        ids = tokens(2, 12, seed=4)
        assert relative_difference(going_on(model, cache, ids), whole(model, ids, 0)) <= 1e-9
    with pytest.raises(ValueError, match="The cache is empty: there is nothing to save"):
        new_cache(model).save("nowhere", model=model)


def refused(cache, snapshot, match):
    before = [tensor.clone() for tensor in tensors(cache)]
    length = int(cache.get_seq_length())
    with pytest.raises(ValueError, match=match) as error:
        cache.restore(snapshot)
    assert "\n" not in str(error.value)
    assert int(cache.get_seq_length()) == length
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache), strict=True))


def test_a_snapshot_that_does_not_fit_changes_nothing():
    model, ids = small_model("dense"), tokens(2, 20)
    snapshot = filled(model, ids).snapshot()
    refused(
        filled(small_model("moe"), ids), snapshot, r"with the pattern M-M\*-M- and the cache is of one with MEM\*EME"
    )
    short = NemotronHCache(model.config, max_cache_len=15)
    with torch.no_grad():
        model(ids[:, :9], cache=short)
    refused(short, snapshot, "holds 20 tokens and the static cache has room for 15: make it longer")
    refused(filled(model, ids[:1], "static"), snapshot, r"buffers take float64 \(1, ")
    halves = small_model("dense", torch.float32, mamba_ssm_cache_dtype="bfloat16")
    singles = filled(small_model("dense", torch.float32), ids).snapshot()
    refused(filled(halves, ids), singles, "SSM states are float32 and the cache keeps bfloat16: set mamba_ssm_cache")


OTHER_SIZES = [
    {"ssm_state_size": 8},
    {"mamba_head_dim": 16},
    {"mamba_num_heads": 4},
    {"n_groups": 3},
    {"conv_kernel": 3},
    {"num_key_value_heads": 4},
    {"head_dim": 8},
]


@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=str)
def test_a_snapshot_of_other_sizes_changes_nothing(sizes, tmp_path):
    """Kernels take their sizes from the config, and would read and write beyond what is there."""
    model, other, ids = small_model("dense"), small_model("dense", **sizes), tokens(1, 12)
    snapshot = filled(model, ids).snapshot()
    for kind in ("growing", "static"):
        for cache in (new_cache(other, kind), filled(other, ids[:, :5], kind)):
            refused(cache, snapshot, r"of layer [03] is \(1, .*\) and would be \(1, .*: restore it into")
    path = tmp_path / "state.safetensors"
    filled(model, ids).save(path, model=model.config)
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    rewritten(path, config=json.dumps({**config, **sizes}))  # what is not so
    load_refused(path, other, r"does not fit the config, as its \w+ of layer [03] is \(1, ")
    rewritten(path, config=json.dumps({name: config[name] for name in config.keys() - sizes}))  # and nothing
    load_refused(path, other, f"says nothing of its {next(iter(sizes))}: save the cache again")


@pytest.fixture
def saved(tmp_path):
    """A model, the ids and the file of its state."""
    model, ids = small_model("dense"), tokens(1, 20)
    path = tmp_path / "state.safetensors"
    filled(model, ids).save(path, model=model, token_ids=ids)
    return model, ids, path


def rewritten(path, **changes):
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, metadata=metadata)


def load_refused(path, model, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        NemotronHCache.load(path, model, **options)
    assert "\n" not in str(error.value)


def test_files_that_are_cut(saved):
    model, _ids, path = saved
    whole_file = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole_file) // 2, len(whole_file) - 1):
        path.write_bytes(whole_file[:length])
        load_refused(path, model, "is cut or no saved cache .*: save the cache again")
    path.write_bytes(whole_file)
    NemotronHCache.load(path, model)
    with pytest.raises(FileNotFoundError):
        NemotronHCache.load(path.with_name("nowhere"), model)
    save_file({"a": torch.zeros(2)}, path)
    load_refused(path, model, "is a safetensors file but no saved cache")


def test_files_that_do_not_say_enough(saved):
    model, _ids, path = saved
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    held = load_file(path)
    for name in ("config", "weights", "dtype", "computed_dtype", "state_dtype", "batch_size", "token_count", "tokens"):
        save_file(held, path, metadata={key: value for key, value in said.items() if key != name})
        load_refused(path, model, f"says nothing of its {name}: save the cache again")
    save_file(held, path, metadata={**said, "config": "[]"})
    load_refused(path, model, "has a config that is no JSON object: save the cache again")
    save_file(held, path, metadata={**said, "token_count": "many"})
    load_refused(path, model, "has 'many' as its token_count, which is no number")


def double(tensor):
    return torch.cat([tensor, tensor])


# Of the dense model: layers 0, 2 and 5 are Mamba, 3 is attention.
CHANGED_TENSORS = {
    "keys in int8": {"layers.3.keys": lambda keys: keys.to(torch.int8)},
    "values in bool": {"layers.3.values": lambda values: values > 0},
    "one window in float16": {"layers.2.window": torch.Tensor.half},
    "complex state": {"layers.5.state": lambda state: state.to(torch.complex64)},
    "float8 state": {"layers.0.state": lambda state: state.to(torch.float8_e4m3fn)},
    "keys and values in float32": {"layers.3.keys": torch.Tensor.float, "layers.3.values": torch.Tensor.float},
    "uint16 window": {"layers.0.window": lambda window: window.to(torch.uint16)},
    "two rows in one layer": {"layers.2.window": double, "layers.2.state": double},
    "two rows in all": {f"layers.{i}.{name}": double for i in (0, 2, 5) for name in ("window", "state")}
    | {"layers.3.keys": double, "layers.3.values": double},
    "two rows of keys": {"layers.3.keys": double},
    "no rows": {"layers.0.state": lambda state: state[:0]},
    "longer values": {"layers.3.values": lambda values: torch.cat([values, values[..., :1, :]], 2)},
    "both shorter": {f"layers.3.{name}": lambda keys: keys[..., :-1, :].contiguous() for name in ("keys", "values")},
    "a number": {"layers.0.window": lambda window: torch.tensor(1.0, dtype=torch.float64)},
    "transposed": {"layers.2.state": lambda state: state.mT.contiguous()},
    "flat": {"layers.2.state": torch.Tensor.flatten},
    "missing": {"layers.5.state": lambda state: None},
    "another's": {"layers.1.keys": lambda none: torch.zeros(1)},
    "too many": {"lm_head": lambda none: torch.zeros(1)},
}


@pytest.mark.parametrize("changes", CHANGED_TENSORS.values(), ids=CHANGED_TENSORS)
def test_every_tensor_is_what_the_header_says(saved, changes):
    model, ids, path = saved
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    held = load_file(path)
    for name, change in changes.items():
        held[name] = change(held.get(name))
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path, metadata=said)
    load_refused(path, model, "state.safetensors (has|does not fit).*: save the cache again", token_ids=ids)
    load_refused(path, model.config, "state.safetensors (has|does not fit).*: save the cache again", max_cache_len=30)


def test_a_file_that_says_of_itself_what_another_model_holds(saved):
    """Tensors and header agree, and are not of this model."""
    model, _ids, path = saved
    held = load_file(path)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    states = {name: t.bfloat16() if name.endswith("state") else t for name, t in held.items()}
    save_file(states, path, metadata={**said, "state_dtype": "bfloat16"})
    load_refused(path, model, "has bfloat16 SSM states and this config keeps float32")
    save_file(held, path, metadata={**said, "dtype": "float32"})
    load_refused(path, model.config, "has float64 tensors and is of a float32 model: save the cache again")
    save_file({name: t.half() for name, t in held.items()}, path, metadata={**said, "computed_dtype": "int8"})
    load_refused(path, model, "has 'int8' as its computed_dtype, which is no dtype of a cache")
    config = {**json.loads(said["config"]), "layers_block_type": ["mamba"] * 7}
    save_file(held, path, metadata={**said, "config": json.dumps(config)})
    load_refused(path, model, r"has no tensor layers\.1\.window: save the cache again")


SAID_WRONGLY = [
    ("config", ["", "5", "null", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"hidden_size": 32', "{}", "\n{}\n"]),
    ("weights", ["no digest", "0" * 63, "0" * 64 + "\n", "A" * 64, "a" * 100_000]),
    ("tokens", ["x", "f" * 65]),
    ("dtype", ["", "float 32", "x" * 100_000, "float32\nfloat64"]),
    ("computed_dtype", ["", "complex64", "float64,", "int8,float64"]),
    ("state_dtype", ["int32", "float65", ","]),
    ("batch_size", ["", "0", "-1", "1.0", "1e400", "x", "9" * 10_000, "\u0661", "01", "NaN"]),
    ("token_count", ["", "0", "-20", "20.0", "1e400", "many", "\u00b2", "2" * 5_000, " 20", "20\n"]),
    ("version", ["", "2.0", "\u00b2", "9" * 10_000, "two\nlines", "-1"]),
]
WRONG_IN_A_CONFIG = [
    ("layers_block_type", [None, "M-M*-M-", [], 5, {}, [["mamba"]], ["mamba", "conv"], [None] * 7]),
    ("mamba_num_heads", ["6", -6, 0, 6.0, True, None, 10**30, [6], {"a": 1}, float("nan"), float("inf")]),
    ("head_dim", ["x" * 100_000, [[[[]]]], 1 << 31]),
    ("time_step_limit", [None, [0], [0.0, 1e308], "x\ny"]),
    ("n_routed_experts", ["many", {"deep": [[[[[[[[]]]]]]]]}]),
]


@pytest.mark.parametrize("name, values", SAID_WRONGLY + WRONG_IN_A_CONFIG)
def test_whatever_is_wrong_in_a_header_is_a_sentence(saved, name, values):
    model, ids, path = saved
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    held, config = load_file(path), json.loads(said["config"])
    for value in values:
        changes = {name: value} if name in said else {"config": json.dumps({**config, name: value})}
        save_file(held, path, metadata={**said, **changes})
        for given in (model, model.config):
            with pytest.raises(ValueError, match=r"state\.safetensors .*: (save|load|install)") as error:
                NemotronHCache.load(path, given, token_ids=ids)
            assert "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)[:1000]
    for missing in () if name in said else (name,):
        left = {key: value for key, value in config.items() if key != missing}
        save_file(held, path, metadata={**said, "config": json.dumps(left)})
        load_refused(path, model, f"says nothing of its {missing}: save the cache again")


def test_what_is_no_file_is_not_waited_for(saved, tmp_path):
    """A pipe nobody writes into, a folder, a device."""
    model, _ids, path = saved
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        load_refused(tmp_path / f"{name}.safetensors", model, "is no file: pass one that NemotronHCache.save wrote")
    (tmp_path / "link.safetensors").symlink_to(path)  # as the hub's snapshots are
    assert int(NemotronHCache.load(tmp_path / "link.safetensors", model).get_seq_length()) == 20


@torch.no_grad()
def test_autocast_for_a_part_of_a_text(tmp_path):
    """Layers may then hold two dtypes; a file of that is the cache of its model, too."""
    model, ids, path = small_model("dense", torch.float32), tokens(1, 30), tmp_path / "a"
    cache = filled(model, ids[:, :15])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids[:, 15:20], cache=cache)
    cache.save(path, model=model)
    loaded = NemotronHCache.load(path, model)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors(cache), tensors(loaded), strict=True))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["computed_dtype"] == "bfloat16,float32"
    assert relative_difference(going_on(model, loaded, ids[:, 20:]), whole(model, ids, 20), record=False) < 0.1


def test_files_of_another_model(saved):
    model, _ids, path = saved
    load_refused(path, small_model("moe"), r"whose pattern is M-M\*-M- and this one's is MEM\*EME")
    load_refused(path, small_model("dense", ssm_state_size=8), "whose ssm_state_size is 16 and this one's is 8")
    load_refused(path, small_model("dense", seed=1), "the same config and other weights")
    load_refused(path, small_model("dense").float(), "saved by a float64 model and this one is float32")
    NemotronHCache.load(path, model.config)  # a config has no weights
    one_step = small_model("dense")
    optimizer = torch.optim.SGD(one_step.parameters(), lr=1e-3)
    one_step(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    optimizer.step()
    load_refused(path, one_step, "the same config and other weights")
    single = small_model("dense", torch.float32)
    filled(single, tokens(1, 9)).save(path, model=single)
    other = small_model("dense", torch.float32, mamba_ssm_cache_dtype="bfloat16")
    load_refused(path, other, "has float32 SSM states and this config keeps bfloat16")
    load_refused(path, {"a": 1}, "not with a dict: pass model=model")


def test_files_of_another_version(saved):
    model, _ids, path = saved
    rewritten(path, version="1")
    load_refused(path, model, "of format version 1 and this package reads version 2: save the cache again")
    rewritten(path, version="3")
    load_refused(path, model, "of format version 3 and this package reads version 2: install a newer nemotron-h")


def test_the_digest_sees_every_number():
    """Of a tensor of any size and dtype; and a step of training that only some rows of the embedding take part in."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for size in ((1,), (7,), (1025,), (3, 5), (40, 257), (3, 33, 65)):
            weights = torch.nn.ParameterList([torch.randn(size).to(dtype)])
            before, flat = fingerprint.weights_digest(weights), weights[0].data.view(-1)
            for place in range(0, len(flat), max(1, len(flat) // 29)):
                was = flat[place].clone()
                flat[place] = -was
                assert fingerprint.weights_digest(weights) != before, (dtype, size, place)
                flat[place] = was
            assert fingerprint.weights_digest(weights) == before
    for seed in range(3):
        model = small_model("dense", torch.float32, vocab_size=1000)
        embeddings = model.get_input_embeddings().weight
        before = fingerprint.weights_digest(model), fingerprint.known_digest(model)
        model(tokens(1, 9, seed=seed), labels=tokens(1, 9, seed=seed)).loss.backward()
        torch.optim.SGD([embeddings], lr=1e-3).step()
        after = fingerprint.weights_digest(model), fingerprint.known_digest(model)
        assert before[0] == before[1] != after[0] == after[1]


def test_a_known_digest_is_worked_out_once(monkeypatch):
    model, worked_out, real = small_model("dense"), [], fingerprint.weights_digest
    monkeypatch.setattr(fingerprint, "weights_digest", lambda model: worked_out.append(1) or real(model))
    first = fingerprint.known_digest(model)
    assert fingerprint.known_digest(model) == first == real(model) and len(worked_out) == 1
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[50, 3] += 1
    assert fingerprint.known_digest(model) == real(model) != first and len(worked_out) == 2
    with torch.no_grad():
        model.get_input_embeddings().weight = torch.nn.Parameter(weight.clone().index_fill_(0, torch.tensor([51]), 0))
    assert fingerprint.known_digest(model) == real(model) and len(worked_out) == 3
    with torch.inference_mode():
        made = small_model("dense")
        before = fingerprint.known_digest(made)
        made.get_input_embeddings().weight[50, 3] += 1
        assert fingerprint.known_digest(made) == real(made) != before


def test_files_of_another_text(saved):
    model, ids, path = saved
    NemotronHCache.load(path, model, token_ids=ids)
    NemotronHCache.load(path, model, token_ids=ids[0].tolist())
    load_refused(path, model, r"after \(1, 20\) tokens and token_ids is \(1, 19\)", token_ids=ids[:, :19])
    load_refused(path, model, "after 20 other tokens", token_ids=tokens(1, 20, seed=3))
    with pytest.raises(ValueError, match=r"token_ids is \(1, 3\) and the cache has seen \(1, 20\)"):
        filled(model, ids).save(path, model=model, token_ids=[1, 2, 3])
    with pytest.raises(ValueError, match=r"pattern M-M\*-M- and the model's is MM-M"):
        filled(model, ids).save(path, model=small_model("mamba"))
    NemotronHCache.load(path, model, token_ids=ids)  # what was refused left the file alone
    two = tokens(2, 20)
    for wrong in (two[:1], two[0], two[[0, 1, 0]], two[None]):
        with pytest.raises(ValueError, match=r"and the cache has seen \(2, 20\): pass those"):
            filled(model, two).save(path, model=model, token_ids=wrong)
    filled(model, two).save(path, model=model)
    load_refused(path, model, r"after \(2, 20\) tokens and token_ids is \(1, 20\)", token_ids=two[:1])
    NemotronHCache.load(path, model, token_ids=two)


def test_what_a_file_says_of_itself(saved):
    _model, _ids, path = saved
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    assert found["pattern"] == "M-M*-M-" and found["dtype"] == "float64" and found["token_count"] == "20"
    assert found["version"] == "2" and json.loads(found["config"])["hidden_size"] == 32
    assert len(found["weights"]) == len(found["tokens"]) == 64


def test_a_wrapped_model(saved):
    peft = pytest.importorskip("peft")
    model, ids, path = saved
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False))
    load_refused(path, adapted, "other weights")
    cache = NemotronHCache(model.config)
    with torch.no_grad():
        adapted(input_ids=ids, cache=cache)
    cache.save(path, model=adapted)
    loaded = NemotronHCache.load(path, adapted)
    with torch.no_grad():
        logits = adapted(input_ids=ids[:, :3], cache=loaded).logits
        expected = adapted(input_ids=torch.cat([ids, ids[:, :3]], 1), use_cache=False).logits[:, 20:]
    assert relative_difference(logits, expected) <= 1e-9


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_file(saved, tmp_path):
    """A process writes the file over and over, of a longer text; it is killed while a temporary file is half there."""
    model, ids, path = saved
    model.save_pretrained(tmp_path / "model")
    old = path.read_bytes()
    script = textwrap.dedent("""
        import sys, time, torch, nemotron_h
        from nemotron_h import NemotronHCache, NemotronHForCausalLM
        from nemotron_h.cache import files as snapshots
        torch.set_num_threads(1)
        model = NemotronHForCausalLM.from_pretrained(sys.argv[1]).eval()
        cache = NemotronHCache(model.config)
        with torch.no_grad():
            model(torch.arange(3, 63)[None], cache=cache)
        real = snapshots.save_file
        def slowly(tensors, name, metadata):
            real(tensors, name, metadata=metadata)
            data = open(name, "rb").read()
            with open(name, "wb") as file:  # as a slow disk would: half of it, and no more for a long time
                file.write(data[: len(data) // 2])
                file.flush()
                print("half", flush=True)
                time.sleep(60)
        snapshots.save_file = slowly
        cache.save(sys.argv[2], model=model)
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(path)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().strip() == "half"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert path.read_bytes() == old
    NemotronHCache.load(path, model, token_ids=ids)
    # What is left behind is in nobody's way.
    cache = filled(model, tokens(1, 25))
    cache.save(path, model=model)
    assert int(NemotronHCache.load(path, model).get_seq_length()) == 25
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "state.safetensors"]


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
    model, ids, path = saved
    old = path.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("nemotron_h.cache.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        filled(model, ids).save(path, model=model)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_said_and_leaves_the_old_file(saved, small_disk):
    model, ids, _path = saved
    path = small_disk / "state.safetensors"
    filled(model, ids).save(path, model=model, token_ids=ids)
    (small_disk / "other").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail - 1) * os.statvfs(small_disk).f_bsize)
    old = path.read_bytes()
    with pytest.raises(OSError, match=r"^The disk of .*state\.safetensors is full; make room and run it again\.$"):
        filled(model, tokens(1, 60)).save(path, model=model)
    assert path.read_bytes() == old and sorted(os.listdir(small_disk)) == ["other", "state.safetensors"]
    (small_disk / "other").unlink()
    filled(model, tokens(1, 60)).save(path, model=model)
    assert int(NemotronHCache.load(path, model).get_seq_length()) == 60
