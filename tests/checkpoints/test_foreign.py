"""Names in files lead to plain files of their folder, and to nothing else; JSON that is none is said in a sentence."""

import json
import os
import shutil

import pytest
import torch
from families import small_model

from nemotron_h import NemotronHForCausalLM
from nemotron_h.checkpoints import foreign, formats
from nemotron_h.checkpoints.tensors import SafetensorsFolder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    small_model("mamba", torch.float32, hybrid_override_pattern="MM").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def elsewhere(model, tmp_path):
    """The model's weights outside of its folder."""
    (tmp_path / "outside").mkdir()
    return shutil.move(model / "model.safetensors", tmp_path / "outside" / "x.safetensors")


def index(folder, name):
    tensors = SafetensorsFolder(folder).specs if list(folder.glob("*.safetensors")) else ["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))


NAMES = ["../outside/x.safetensors", "{outside}/x.safetensors", "a/../../outside/x.safetensors", "link/x.safetensors",
         "..\\outside\\x.safetensors", "C:x.safetensors", "\\\\host\\share\\x.safetensors", ".", "..", "", "a\0b",
         "a" * 5000, "/dev/zero", 5, None, ["x"], {"x": 1}]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
def test_a_name_in_an_index_stays_in_its_folder(name, model, elsewhere, tmp_path):
    if isinstance(name, str):
        name = name.replace("{outside}", str(tmp_path / "outside"))
    (model / "link").symlink_to(tmp_path / "outside")
    index(model, name)
    for read in (SafetensorsFolder, NemotronHForCausalLM.from_pretrained, lambda f: formats.conversion(f, "gguf")):
        with pytest.raises(ValueError, match=rf"{INDEX} names the file [^\n]*(out of its folder|no name)[^\n]*\.$"):
            read(model)


def test_one_name_among_many_is_enough(model, elsewhere):
    shutil.copy(elsewhere, model / "x.safetensors")
    index(model, "x.safetensors")
    found = json.loads((model / INDEX).read_text())
    found["weight_map"]["lm_head.weight"] = "../outside/x.safetensors"
    (model / INDEX).write_text(json.dumps(found))
    for read in (SafetensorsFolder, NemotronHForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="leads out"):
            read(model)


def test_the_file_itself_may_be_a_link_as_in_the_hubs_snapshots(model, elsewhere):
    (model / "x.safetensors").symlink_to(elsewhere)
    index(model, "x.safetensors")
    expected = SafetensorsFolder(model).read("lm_head.weight")
    loaded = NemotronHForCausalLM.from_pretrained(model)
    assert torch.equal(loaded.lm_head.weight, expected)
    (model / "part").mkdir()
    shutil.move(model / "x.safetensors", model / "part" / "x.safetensors")
    index_of_part = dict.fromkeys(json.loads((model / INDEX).read_text())["weight_map"], "part/x.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": index_of_part}))
    assert torch.equal(SafetensorsFolder(model).read("lm_head.weight"), expected)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a folder"])
@pytest.mark.parametrize("indexed", [False, True])
def test_what_is_no_plain_file_is_not_opened(kind, indexed, model, elsewhere):
    path = model / "model.safetensors"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
     "link to a folder": lambda: path.symlink_to(model.parent)}[kind]()  # fmt: skip
    if indexed:
        (model / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": path.name}}))
    for read in (SafetensorsFolder, NemotronHForCausalLM.from_pretrained, lambda f: formats.conversion(f, "megatron")):
        with pytest.raises(ValueError, match=r"model\.safetensors is no plain file"):
            read(model)


@pytest.mark.parametrize(
    "contents", ["[]", '{"weight_map": []}', '{"weight_map": {}}', "null", "[" * 100_000, "", b"\xff\xfe"]
)
def test_an_index_that_is_none(contents, model):
    (model / INDEX).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    for read in (SafetensorsFolder, NemotronHForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"^[^\n]*{INDEX} [^\n]*: fetch or write it again\.$"):
            read(model)


@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "configuration_files"), ("tokenizer_config.json", "fast_tokenizer_files")]
)
@pytest.mark.parametrize("name", ["../config.4.0.0.json", "/etc/tokenizer.4.0.0.json", 5])
def test_further_files_that_transformers_looks_for_are_in_the_folder(file, key, name, model):
    fields = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps({**fields, key: [name]}))
    with pytest.raises(ValueError, match=rf"{file} names the file"):
        foreign.check_folder(model)


def test_a_config_asks_for_no_more_than_its_files_can_hold(model):
    fields = json.loads((model / "config.json").read_text())
    for change in ({"vocab_size": 1 << 30}, {"hidden_size": 1 << 30}, {"mamba_num_heads": 1 << 26, "n_groups": 1}):
        (model / "config.json").write_text(json.dumps({**fields, **change}))
        for read in (NemotronHForCausalLM.from_pretrained, lambda f: formats.conversion(f, "huggingface")):
            with pytest.raises(ValueError, match=r"config\.json asks for \d+ parameters, and the files beside it have"):
                read(model)


def test_whatever_else_goes_wrong_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("")
    for wrong in (RecursionError("too deep"), KeyError("model"), TypeError("an 'int'\nhas no items"), MemoryError()):
        with pytest.raises(ValueError, match=r"^[^\n]*tokenizer\.json is no JSON") as error, foreign.sound(tmp_path):
            raise wrong
        assert error.value.__cause__ is wrong
        with (
            pytest.raises(ValueError, match=r"^one\.gguf [^\n]*: fetch or write it again\.$"),
            foreign.sound("one.gguf"),
        ):
            raise wrong
    for right in (ValueError("a sentence"), OSError("another"), KeyboardInterrupt()):
        with pytest.raises(type(right)) as error, foreign.sound(tmp_path):
            raise right
        assert error.value is right
