"""Files from elsewhere: every command that reads says what is wrong in one sentence, in bounded memory and time."""

import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import child
import pytest
import torch
from conftest import TEMPLATE, save_random_model

BASE_JSON = ("config.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A new folder of the model, in which a file has other contents; the model's config is `make.fields`."""
    top = tmp_path_factory.mktemp("foreign")
    base = Path(save_random_model(top / "base", TEMPLATE))

    def make(name, **changes):
        folder = top / name
        shutil.copytree(base, folder)
        for file, contents in changes.get("files", {}).items():
            path = folder / file
            path.unlink(missing_ok=True)
            if callable(contents):
                contents(path)
            else:
                path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        if "config" in changes:
            kept = {
                k: v for k, v in make.fields.items() if not ("layers" in k or "pattern" in k) or k in changes["keep"]
            }
            (folder / "config.json").write_text(json.dumps({**kept, **changes["config"]}))
        return folder

    make.fields = json.loads((base / "config.json").read_text())
    make.top, make.base = top, base
    return make


def reading(folder):
    """A command line for each way in which a folder is read; nothing is written where it is refused."""
    out = str(folder.parent / "out" / folder.name)
    return [
        ["info", str(folder)],
        ["doctor", str(folder)],
        ["generate", "hi", "--model", str(folder), "--max-new-tokens", "1"],
        ["logprobs", str(folder), "--text", "hi"],
        ["verify", str(folder), str(folder)],
        ["quantize", str(folder), out + "-int8", "--to", "int8", "--dry-run"],
        ["publish", str(folder), out + "-published", "--to-folder", "--base-model", "none"],
        *(
            ["convert", str(folder), f"{out}.{to}", "--to", to, "--dry-run"]
            for to in ("huggingface", "gguf", "megatron", "megatron-legacy", "mamba-ssm", "fp8", "nvfp4")
        ),
    ]


def refused(make, commands, words):
    """Each of the command lines ends with code 2 and one sentence, with the words."""
    found = child.run(commands, make.top)
    for command, result, wanted in zip(commands, found, words, strict=True):
        said = result["stderr"].strip()
        assert result["code"] == 2, (command, said, result["stdout"])
        assert re.fullmatch(r"nemotron-h: [^\n]{10,500}\.", said), (command, said)
        assert not re.search(r"unexpected \w+Error|Traceback", said), (command, said)
        assert re.search(wanted, said), (command, said)
    assert not (make.top / "out").exists()


def test_json_that_is_none(make):
    """config.json and its neighbours: too deep, empty, not UTF-8, something else, no file."""
    contents = {"deep": '{"a":' * 100_000, "array": "[" * 100_000, "empty": "", "latin": b"\xff\xfe{}", "list": "[]",
                "null": "null", "folder": Path.mkdir, "pipe": os.mkfifo}  # fmt: skip
    commands = []
    for number, (kind, content) in enumerate(contents.items()):
        folders = [make(f"{kind}-{file}", files={file: content}) for file in BASE_JSON]
        # Each command meets each kind in one of the files, and each file in one of the kinds.
        commands += [line for at, line in enumerate(reading(folders[0])) if at % 2 == number % 2]
        for at, folder in enumerate(folders[1:]):
            commands.append(reading(folder)[2 + (number + at) % 3])
    refused(make, commands, [r"\.json (is|has)"] * len(commands))


WRONG = {
    "hidden_size": 10**12, "quantization_config": 5, "tie_word_embeddings": "no", "layers_block_type": 7,
    "vocab_size": -1, "hybrid_override_pattern": "M" * 200_000, "num_nextn_predict_layers": 10**9,
    "to_dict": 5, "attribute_map": 5, "__class__": "x", "id2label": {"a": []}, "text_config": 5,
    "layer_norm_epsilon": "x", "time_step_limit": 7, "architectures": 5, "eos_token_id": 10**12, "num_labels": 10**12,
}  # fmt: skip


def test_configs_with_a_wrong_value(make):
    commands, words = [], []
    for number, (key, value) in enumerate(WRONG.items()):
        keep = () if key in ("layers_block_type", "hybrid_override_pattern") else make.fields
        folder = make(f"wrong-{key}", config={key: value}, keep=keep)
        lines = [line for line in reading(folder) if line[0] != "doctor"]  # which has a finding
        some = [lines[(number + step) % len(lines)] for step in (0, 3, 6)] + [lines[1]]
        commands, words = commands + some, words + [key if "layers" not in key else "layers"] * len(some)
    refused(make, commands, words)


def test_what_transformers_opens_in_its_own_words(make):
    """Templates, which are programs, and values of other kinds beside the config."""
    lines = {
        r"The chat template cannot render the messages": [
            {"chat_template.jinja": text}
            for text in ("{{", "{% for i in range(10000000000) %}x{% endfor %}", "{{ 1 / 0 }}", "{{ x.y.z }}")
        ],
        r"tokenizer_config\.json has the (chat_template|model_max_length)": [
            {"tokenizer_config.json": '{"chat_template": 5}'}, {"tokenizer_config.json": '{"model_max_length": "x"}'}
        ],
        r"generation_config\.json has the (eos_token_id|temperature)": [
            {"generation_config.json": '{"do_sample": true, "eos_token_id": "x"}'},
            {"generation_config.json": '{"eos_token_id": [[1]]}'}, {"generation_config.json": '{"temperature": "x"}'}
        ],
    }  # fmt: skip
    commands, words = [], []
    for number, (said, all_files) in enumerate(lines.items()):
        for at, files in enumerate(all_files):
            commands.append(["generate", "hi", "--model", str(make(f"spoken-{number}-{at}", files=files))])
            words.append(said)
    refused(make, commands, words)


def test_sizes_that_the_files_do_not_have(make):
    """They could be a model's, and would take memory without end."""
    commands = []
    for key, value in {"hidden_size": 10**9, "vocab_size": 10**9, "ssm_state_size": 1 << 30}.items():
        commands += reading(make(f"large-{key}", config={key: value}, keep=make.fields))[2:]
    commands += reading(make("many", config={"hybrid_override_pattern": "M" * 9_000}, keep=()))[2:]
    refused(make, commands, [r"config\.json asks for \d+ parameters"] * len(commands))


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, end=4):
    return header(json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode(), b"1234")


def test_damaged_safetensors(make):
    damaged = {"long header": struct.pack("<Q", 1 << 62) + b"{}", "deep": header(b'{"a":' * 100_000), "none": b"",
               "large": entry([10**12, 10**12]), "negative": entry([-1]), "past the end": entry([10**9], 4 * 10**9),
               "list": header(b"[]"), "pipe": os.mkfifo}  # fmt: skip
    commands = []
    for number, (kind, contents) in enumerate(damaged.items()):
        lines = reading(make(f"damaged-{kind}", files={"model.safetensors": contents}))
        commands += [lines[2 + (number + step) % 3] for step in range(2)] + [lines[6], lines[7 + number % 7]]
    refused(make, commands, [r"model\.safetensors.* (cannot be read|is no plain file)"] * len(commands))


def test_an_index_that_leads_out(make):
    (make.top / "outside").mkdir()
    shutil.copy(make.base / "model.safetensors", make.top / "outside" / "x.safetensors")
    commands = []
    for number, name in enumerate(
        ("../outside/x.safetensors", str(make.top / "outside" / "x.safetensors"), "/dev/zero")
    ):
        index = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}})
        folder = make(f"index-{number}", files={"model.safetensors.index.json": index})
        commands += [line for at, line in enumerate(reading(folder)) if line[0] != "doctor" and at % 3 == number]
    refused(make, commands, ["leads out of its folder"] * len(commands))


def test_other_formats(make):
    """Megatron's pickles, GGUF, recordings, mamba-ssm's config, ModelOpt's: read by convert and verify."""
    folders = {}
    for name, file in {"ranks": "mp_rank_00/model_optim_rng.pt", "dist": "common.pt", "metadata": ".metadata"}.items():
        folders[name] = make.top / name / file
        folders[name].parent.mkdir(parents=True)
    (make.top / "dist" / ".metadata").write_bytes(pickle.dumps(5))
    torch.save([1], folders["ranks"])
    torch.save({"args": 5}, folders["dist"])
    folders["metadata"].write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60))
    gguf = struct.pack("<IIQQ", 0x46554747, 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 10**12)
    (make.top / "long.gguf").write_bytes(gguf.ljust(4096, b"\0"))
    (make.top / "long.npz").write_bytes(b"PK\x03\x04" + bytes(100))
    pickle.dump({"input_ids": [1]}, open(make.top / "pickled.npz", "wb"))
    (make.top / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 62))
    (make.top / "mamba").mkdir()
    fields = {"d_model": 64, "n_layer": 10**12, "vocab_size": 100, "ssm_cfg": {"layer": "Mamba2"}}
    (make.top / "mamba" / "config.json").write_text(json.dumps(fields))
    quant = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": 5}
    modelopt = make("modelopt", config={"quantization_config": quant}, keep=make.fields)
    (make.top / "deep.json").write_text("[" * 100_000)
    sources = ["ranks", "dist", "metadata", "long.gguf", "mamba", "modelopt"]
    commands = [["convert", str(make.top / each), str(make.top / "out"), "--to", "huggingface"] for each in sources]
    read = [*sources, "long.npz", "pickled.npz", "long.safetensors"]
    commands += [["verify", str(make.top / each), str(make.base)] for each in read]
    commands += [["generate", "hi", "--model", str(modelopt)], ["logprobs", str(make.top / "deep.json")]]
    words = [*sources, *read, "modelopt", r"deep\.json"]
    refused(make, commands, words)


def test_dest_of_quantize_is_there_where_it_is_a_link(make):
    link = make.top / "link"
    link.symlink_to(make.top / "nowhere")
    refused(make, [["quantize", str(make.base), str(link), "--to", "int8"]], ["is there already"])
    assert link.is_symlink() and not os.path.lexists(make.top / "nowhere")
