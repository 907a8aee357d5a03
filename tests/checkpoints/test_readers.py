"""The doctor's tables, against what the readers do: where one is installed it is asked, else its reading is written
out here by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import small_config, small_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as LibraryModel

from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.bundled import WORD_PROBLEMS
from nemotron_h.checkpoints import formats, writing
from nemotron_h.hub import publish as publishing
from nemotron_h.inspection import readers

LibraryConfig = LibraryModel.config_class
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
ITSELF = readers.ITSELF


def verdicts(folder):
    return {each.reader: each for each in readers.examine(folder)}


def said(verdict, remarks=False):
    return [found.what for found in verdict.findings if found.remark == remarks]


def refusing(folder):
    """The current readers that do not read it."""
    return {name for name, each in verdicts(folder).items() if not each.reads and not each.older}


def save_library_model(family, folder, **overrides):
    config = small_config(family, **overrides).to_dict()
    left_out = ("architectures", "transformers_version", "layers_block_type", "attention_head_dim", "torch_dtype")
    LibraryModel(LibraryConfig(**{k: v for k, v in config.items() if k not in left_out})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return save_library_model("dense", tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """With the tokenizer of the bundled model, which is a whole folder's."""
    folder = tmp_path_factory.mktemp("ours")
    shutil.copytree(WORD_PROBLEMS, folder, dirs_exist_ok=True)
    NemotronHForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(folder)
    return folder


@pytest.fixture
def edited(tmp_path):
    """`edited(folder, key=value)` is a copy with other keys in its config; None takes one out."""

    def edit(folder, **keys):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        fields = json.loads((copy / "config.json").read_text())
        fields = {k: v for k, v in (fields | keys).items() if v is not None}
        (copy / "config.json").write_text(json.dumps(fields))
        return copy

    return edit


# -- the folders that the issue is about -----------------------------------------------------------------------------


@pytest.mark.core
def test_what_transformers_saves(theirs):
    found = verdicts(theirs)
    new_names = "layers_block_type has 'full_attention', 'linear_attention', which it does not know"
    assert said(found["TensorRT-LLM"]) == [
        new_names,
        "config.json has no hybrid_override_pattern, from which alone it reads MLP layers",
    ]
    assert said(found["mlx-lm"]) == [
        new_names,
        "config.json has no num_hidden_layers",
        'time_step_limit is [0.0, {"__float__": "Infinity"}], not two numbers',
    ]
    assert new_names in said(found["SGLang"])
    assert "config.json has no hybrid_override_pattern" in said(found["NVIDIA's remote code"])
    assert any("num_experts_per_tok" in what for what in said(found["llama.cpp's converter"]))
    assert {name for name, each in found.items() if each.reads and not each.older} == {
        ITSELF,
        "vLLM",
        "transformers 5.20 on",
        "this package",
    }


@pytest.mark.parametrize("family", ["dense", "moe", "latent", "mamba", "attention"])
def test_what_this_package_saves(family, tmp_path):
    mtp = {"num_nextn_predict_layers": 1} if family == "latent" else {}
    small_model(family, dtype=torch.float32, **mtp).save_pretrained(tmp_path)
    assert refusing(tmp_path) == set()


@pytest.mark.core
def test_on_a_whole_folder_of_ours_it_finds_nothing(ours):
    found = verdicts(ours)
    assert refusing(ours) == set()
    assert found[ITSELF].findings == ()
    assert stumbling(found) == {}


def stumbling(found):
    """What each reader says, but for what is so of any folder: see `_llama_cpp` and `_before_5_3`; before 5.6,
    transformers knows no MLP layers."""
    lost = ("llama.cpp's converter", "transformers before 5.3", "transformers 5.3 to 5.5")
    return {
        name: each.findings
        for name, each in found.items()
        if each.findings and name not in (ITSELF, *(lost if "'-'" in str(each) else lost[:2]))
    }


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_on_what_is_saved_here_older_readers_find_nothing(family, tmp_path):
    """Made in Python, read from the published config (Nano-30B's), from transformers' folder; saved, converted,
    published and quantized, which all write the config alike."""
    model = small_model(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    writing.convert(formats.conversion(tmp_path / "saved", "huggingface"), tmp_path / "converted")
    publishing.publish(model, tmp_path / "published", base_model=None)
    save_library_model(family, tmp_path / "theirs")
    NemotronHForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "loaded")
    writing.convert(formats.conversion(tmp_path / "theirs", "huggingface"), tmp_path / "theirs converted")
    for name in ("saved", "converted", "published", "loaded", "theirs converted"):
        assert stumbling(verdicts(tmp_path / name)) == {}, name
        LibraryModel.from_pretrained(tmp_path / name)
    NemotronHForCausalLM.from_pretrained(tmp_path / "saved", quantize="int8").save_pretrained(tmp_path / "int8")
    fields = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("int8", "saved")]
    assert fields[0].pop("quantization_config") and fields[0] == fields[1]
    assert all("quantized by" in str(found) for found in stumbling(verdicts(tmp_path / "int8")).values())


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.json")])
def test_a_published_config_saved_here(name, tmp_path):
    """Older readers stumble on the list of Ultra and Lightning alone, and only of folders saved here."""
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    fields.pop("_meta", None)
    NemotronHConfig.from_dict(fields).save_pretrained(tmp_path)
    found = stumbling(verdicts(tmp_path))
    listed = {"NVIDIA's remote code", "vLLM", "transformers 5.13 to 5.19"} if "layers_block_type" in fields else set()
    assert set(found) == listed


def test_the_remedy_works(theirs, tmp_path):
    """A folder of transformers' own class, converted as the doctor says, is read by everybody."""
    remedies = {found.remedy for each in readers.examine(theirs) for found in each.findings if not found.remark}
    assert f"`nemotron-h convert {theirs} NEW --to huggingface` writes it for all readers" in remedies
    writing.convert(formats.conversion(theirs, "huggingface"), tmp_path / "NEW")
    assert refusing(tmp_path / "NEW") == set()


@pytest.mark.parametrize("name", ["NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "NVIDIA-Nemotron-3-Super-120B-A12B"])
def test_published_configs_are_read(name, tmp_path):
    """The two whose files are known whole: every reader was made for them."""
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    fields.pop("_meta", None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert refusing(tmp_path) == {ITSELF}  # there are no weights


# -- each reader's reading -------------------------------------------------------------------------------------------

LIST_OLD = ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "mlp"]
LIST_NEW = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention", "mlp"]
LAYERS = {
    "pattern": {"hybrid_override_pattern": "M-M*-M-"},
    "old list": {"layers_block_type": LIST_OLD},
    "new list": {"layers_block_type": LIST_NEW},
    "pattern and old list": {"hybrid_override_pattern": "M-M*-M-", "layers_block_type": LIST_OLD},
    "pattern and new list": {"hybrid_override_pattern": "M-M*-M-", "layers_block_type": LIST_NEW},
    "neither": {},
}


def fields_of(layers):
    fields = small_config("dense").to_dict()
    return {k: v for k, v in fields.items() if k not in ("hybrid_override_pattern", "layers_block_type")} | layers


def folder_of(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def accepts(read):
    try:
        return read()
    except Exception:
        return False


@pytest.mark.parametrize("layers", LAYERS)
def test_the_installed_transformers(layers, tmp_path):
    fields = fields_of(LAYERS[layers])
    reader = readers.reader_of_transformers(transformers_version)

    def read():
        config = LibraryConfig.from_dict(dict(fields))
        return config.layers_block_type == LIST_NEW and config.hybrid_override_pattern == "M-M*-M-"

    assert verdicts(folder_of(fields, tmp_path))[reader].reads == accepts(read), layers


class RemoteConfig(PreTrainedConfig):
    """As NVIDIA's remote code and vLLM of that time have it: a pattern, and the list as a property."""

    model_type = "remote_of_a_test"

    def __init__(self, hybrid_override_pattern="M" * 52, num_hidden_layers=52, **kwargs):
        assert len(hybrid_override_pattern) == num_hidden_layers and set(hybrid_override_pattern) <= set("M*-E")
        self.hybrid_override_pattern, self.num_hidden_layers = hybrid_override_pattern, num_hidden_layers
        super().__init__(**kwargs)

    @property
    def layers_block_type(self):
        return [{"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}[x] for x in self.hybrid_override_pattern]


@pytest.mark.parametrize("layers", LAYERS)
def test_remote_code(layers, tmp_path):
    fields = fields_of(LAYERS[layers]) | {"model_type": "nemotron_h"}

    def read():
        passed = {k: v for k, v in fields.items() if k not in ("model_type", "torch_dtype")}
        return RemoteConfig(**passed).layers_block_type == LIST_OLD

    verdict = verdicts(folder_of(fields, tmp_path))["NVIDIA's remote code"]
    refuses_list = any("property without a setter" in what for what in said(verdict, remarks=True))
    assert (verdict.reads and not refuses_list) == accepts(read), layers
    if refuses_list:  # the remedy
        del fields["layers_block_type"]
        assert accepts(read)


@pytest.mark.parametrize("layers", LAYERS)
def test_mlx_lm(layers, tmp_path):
    fields = fields_of(LAYERS[layers])
    letters = {"mamba": "M", "attention": "*", "moe": "E", "mlp": "-"}

    def read():
        pattern, listed = fields.get("hybrid_override_pattern"), fields.get("layers_block_type")
        pattern = pattern if pattern is not None else [letters[layer] for layer in listed]
        return list(pattern) == list("M-M*-M-")

    assert verdicts(folder_of(fields, tmp_path))["mlx-lm"].reads == accepts(read), layers


@pytest.mark.parametrize("layers", LAYERS)
def test_sglang(layers, tmp_path):
    fields = fields_of(LAYERS[layers])

    def read():
        listed = fields.get("layers_block_type")
        kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        return (listed or [kinds[letter] for letter in fields["hybrid_override_pattern"]]) == LIST_OLD

    assert verdicts(folder_of(fields, tmp_path))["SGLang"].reads == accepts(read), layers


@pytest.mark.parametrize("layers", LAYERS)
def test_llama_cpp(layers, tmp_path):
    """Which layers its converter takes for MLPs, Mamba and attention where it reads the file itself."""
    fields = fields_of(LAYERS[layers])

    def read():
        pattern = fields.get("hybrid_override_pattern") or fields.get("layers_block_type")
        names = ("M", "*", "-") if isinstance(pattern, str) else ("mamba", "attention", "moe")
        found = [[i for i, layer in enumerate(pattern) if layer == name] for name in names]
        return found == [[0, 2, 5], [3], [1, 4, 6]]

    assert verdicts(folder_of(fields, tmp_path))["llama.cpp's converter"].reads == accepts(read), layers


def test_llama_cpp_beside_transformers(ours):
    """What the remark says of transformers' class, which its converter reads a config through, and of ours."""
    fields = json.loads((ours / "config.json").read_text())
    through_theirs = LibraryConfig.from_dict(dict(fields)).to_dict()
    assert "num_experts_per_tok" in through_theirs
    assert through_theirs.get("hybrid_override_pattern") is None
    through_ours = NemotronHForCausalLM.config_class.from_dict(dict(fields)).to_dict()
    assert "num_experts_per_tok" not in through_ours
    assert through_ours["hybrid_override_pattern"] and through_ours["num_hidden_layers"]


def test_llama_cpp_tensor_names(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = small_model("latent", dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NEMOTRON_H_MOE, len(model.config.layers_block_type))
    known = {}
    for name in ("layers.0.mixer.in_proj", "layers.3.mixer.k_proj", "layers.1.mixer.gate", "embeddings", "embedding"):
        known |= {f"{root}.{name}": names.get_name(f"{root}.{name}") is not None for root in ("backbone", "model")}
    model.save_pretrained(tmp_path)
    for name, is_known in known.items():
        if name.startswith("model.emb"):
            continue  # embeddings have many names there
        save_file({f"{name}.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
        verdict = verdicts(tmp_path)["llama.cpp's converter"]
        assert any("does not look for the tensor" in what for what in said(verdict)) is not is_known, name


@pytest.mark.parametrize(
    ("reader", "keys", "stumbles_on"),
    [
        ("mlx-lm", {"use_conv_bias": None}, "no use_conv_bias"),
        ("mlx-lm", {"time_step_limit": [0.0, "Infinity"]}, "time_step_limit is"),
        ("NVIDIA's remote code", {"num_hidden_layers": 8}, "num_hidden_layers is 8 and"),
        ("NVIDIA's remote code", {"hybrid_override_pattern": "M-M*-M-|"}, "has '|'"),
        ("SGLang", {"head_dim": None}, "no head_dim, for which it takes 128 instead of 12"),
        ("SGLang", {"layer_norm_epsilon": None, "rms_norm_eps": 1e-6, "norm_eps": None}, "no layer_norm_epsilon"),
        ("llama.cpp's converter", {"head_dim": None, "attention_head_dim": None}, "no head_dim or attention_head_dim"),
        ("llama.cpp's converter", {"num_experts_per_tok": 2}, "num_experts_per_tok"),
        ("llama.cpp's converter", {"intermediate_size": [48, 48, 48]}, "intermediate_size is a list"),
        ("TensorRT-LLM", {"intermediate_size": [48, 48, 48]}, "indexes by layer"),
        ("transformers 5.13 to 5.19", {"layers_block_type": LIST_OLD}, "only where there is no pattern"),
        ("transformers 5.3 to 5.5", {}, "'-'"),
        ("transformers before 5.3", {}, "no class"),
        ("this package", {"num_hidden_layers": 9}, "num_hidden_layers is 9"),
    ],
)
def test_keys(reader, keys, stumbles_on, tmp_path):
    fields = {k: v for k, v in (small_config("dense").to_dict() | keys).items() if v is not None}
    verdict = verdicts(folder_of(fields, tmp_path))[reader]
    assert not verdict.reads and any(stumbles_on in what for what in said(verdict)), said(verdict)


def test_expert_keys(tmp_path):
    fields = small_config("moe").to_dict()
    for key in ("n_group", "routed_scaling_factor"):
        without = {k: v for k, v in fields.items() if k != key}
        found = verdicts(folder_of(without, tmp_path))
        for reader in ("mlx-lm", "TensorRT-LLM", "llama.cpp's converter"):
            assert f"config.json has no {key}" in said(found[reader])
    found = verdicts(folder_of(fields | {"n_shared_experts": 2}, tmp_path))
    assert any("n_shared_experts is 2" in what for what in said(found["TensorRT-LLM"]))
    mixed = fields | {"hybrid_override_pattern": "MEM*-ME", "layers_block_type": None}
    found = verdicts(folder_of({k: v for k, v in mixed.items() if v is not None}, tmp_path))
    assert any("both MLP and MoE" in what for what in said(found["llama.cpp's converter"]))


def test_names_of_tensors(tmp_path):
    """A folder with the names in memory: who takes which."""
    model = small_model("moe", dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = verdicts(tmp_path)
    stacked = "model.layers.1.mixer.experts.down_proj"
    for reader in ("NVIDIA's remote code", "llama.cpp's converter", "mlx-lm"):
        assert any(
            "does not look for the tensor lm_head" not in what and "model." in what for what in said(found[reader])
        )
    for reader in ("vLLM", "SGLang", "TensorRT-LLM"):
        assert any(stacked in what for what in said(found[reader])), reader
    for reader in (ITSELF, "this package", "transformers 5.20 on"):
        assert found[reader].reads, reader
    tensors = load_file(tmp_path / "model.safetensors")
    small_model("dense", dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    singular = {name for name, each in verdicts(tmp_path).items() if any("embedding.weight" in w for w in said(each))}
    assert singular == {
        "NVIDIA's remote code",
        "vLLM",
        "SGLang",
        "TensorRT-LLM",
        "mlx-lm",
        "transformers 5.13 to 5.19",
        "transformers 5.20 on",
        "this package",
    }


def test_a_tied_model(tmp_path):
    small_model("tied", dtype=torch.float32).save_pretrained(tmp_path)
    assert refusing(tmp_path) == {"mlx-lm"}
    assert "no lm_head.weight" in said(verdicts(tmp_path)["mlx-lm"])[0]


@pytest.mark.parametrize(
    ("method", "who"),
    [
        ("modelopt", {"vLLM", "SGLang", "TensorRT-LLM", "llama.cpp's converter", "this package"}),
        ("nemotron_h_weight_only", {"this package"}),
        ("something", set()),
    ],
)
def test_quantized_folders(ours, edited, method, who):
    folder = edited(ours, quantization_config={"quant_method": method})
    found = verdicts(folder)
    refuse = {name for name, each in found.items() if any(f"quantized by {method!r}" in what for what in said(each))}
    assert refuse == {name for name in found if name != ITSELF} - who


def test_our_own_quantized_folder(ours, tmp_path):
    NemotronHForCausalLM.from_pretrained(ours, quantize="int4").save_pretrained(tmp_path)
    found = verdicts(tmp_path)
    assert found[ITSELF].reads and found["this package"].reads and not found["vLLM"].reads


# -- the folder itself -----------------------------------------------------------------------------------------------


def rewrite(folder, change, dest):
    shutil.copytree(folder, dest)
    tensors = load_file(dest / "model.safetensors")
    change(tensors)
    save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    return said(verdicts(dest)[ITSELF])


def test_the_tensor_set(ours, tmp_path):
    name = "backbone.norm_f.weight"
    shape = list(load_file(ours / "model.safetensors")[name].shape)
    assert rewrite(ours, lambda t: t.pop(name), tmp_path / "a") == [f"the tensor {name} is missing"]
    assert rewrite(ours, lambda t: t.update(more=torch.ones(1)), tmp_path / "b") == [
        "no layer of its config has the tensor more"
    ]
    assert rewrite(ours, lambda t: t.update({name: torch.ones(3)}), tmp_path / "c") == [
        f"{name} has shape [3] where its config asks for {shape}"
    ]


def test_a_cut_file(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    (finding,) = verdicts(tmp_path / "cut")[ITSELF].findings
    assert "cannot be read, from the tensor" in finding.what and finding.remedy == "fetch or write it again"


def test_mtp_is_missed(tmp_path):
    save_library_model("latent", tmp_path, num_nextn_predict_layers=1)
    itself = verdicts(tmp_path)[ITSELF]
    assert itself.reads and "there are no mtp.* tensors" in said(itself, remarks=True)[0]


def test_the_index(ours, tmp_path):
    small_model("dense", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="60KB")
    assert said(verdicts(tmp_path)[ITSELF]) == []
    index = tmp_path / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    where = stored["weight_map"].pop("backbone.norm_f.weight")
    index.write_text(json.dumps(stored))
    assert said(verdicts(tmp_path)[ITSELF]) == ["the index does not name the tensor backbone.norm_f.weight"]
    stored["weight_map"] |= {"backbone.norm_f.weight": where, "nowhere": where}
    stored["metadata"]["total_size"] += 1
    index.write_text(json.dumps(stored))
    assert said(verdicts(tmp_path)[ITSELF]) == [f"the index has nowhere in {where}, which does not have it"]
    del stored["weight_map"]["nowhere"]
    index.write_text(json.dumps(stored))
    assert any("total_size" in what for what in said(verdicts(tmp_path)[ITSELF], remarks=True))


def test_the_tokenizer(ours, tmp_path):
    def remarks(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(ours, folder)
        change(folder)
        itself = verdicts(folder)[ITSELF]
        return said(itself, remarks=True) + said(itself)

    def json_with(name, **keys):
        def change(folder):
            fields = json.loads((folder / name).read_text()) | keys
            (folder / name).write_text(json.dumps(fields))

        return change

    assert remarks(lambda folder: (folder / "tokenizer.json").unlink()) == ["there is no tokenizer.json"]
    assert remarks(lambda folder: (folder / "chat_template.jinja").unlink()) == [
        "there is no chat template (base models have none)"
    ]
    assert (
        "generation_config.json has eos_token_id [3], and the tokenizer ends texts with"
        in (remarks(json_with("generation_config.json", eos_token_id=3))[0])
    )
    assert "has no eos_token_id" in remarks(json_with("generation_config.json", eos_token_id=None))[0]
    rows = json.loads((ours / "config.json").read_text())["vocab_size"]
    added = {"added_tokens": [{"id": rows, "content": "<too far>"}]}
    assert f"the tokenizer has '<too far>' with id {rows} and vocab_size is {rows}" in (
        remarks(json_with("tokenizer.json", **added))
    )


def test_what_is_no_folder_of_the_family(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        readers.examine(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama' model"):
        readers.examine(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        readers.examine(tmp_path)


@pytest.mark.parametrize(
    ("version", "row"),
    [
        ("4.57.6", "before 5.3"),
        ("5.2.0", "before 5.3"),
        ("5.3.0", "5.3 to 5.5"),
        ("5.6.0", "5.6 to 5.12"),
        ("5.12.1", "5.6 to 5.12"),
        ("5.13.0", "5.13 to 5.19"),
        ("5.20.0.dev0", "5.20 on"),
        ("5.24.0", "5.20 on"),
        ("6.0.0", "5.20 on"),
    ],
)
def test_rows_of_transformers(version, row):
    assert readers.reader_of_transformers(version) == f"transformers {row}"
    assert f"transformers {row}" in {reader.name for reader in readers.READERS}
