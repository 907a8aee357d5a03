"""`publish()`: what is in the folder or repository, that everybody loads it, and that none of it is of this machine."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from families import small_config, small_model
from hub import Hub
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemotron_h
from nemotron_h.bundled import WORD_PROBLEMS, held_out
from nemotron_h.hub.card import model_card
from nemotron_h.hub.publish import _base_model, hub_id
from nemotron_h.inspection import readers

peft = pytest.importorskip("peft")

BASE = "me/base"
MESSAGES = [{"role": "user", "content": held_out()[1]["question"]}]
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def adapted(adapter_name: str = "default"):
    """The bundled model with an adapter that changes what it says."""
    config = peft.LoraConfig(target_modules=["in_proj", "q_proj", "up_proj"], r=2)
    base = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    torch.manual_seed(3)  # of lora_A, which PEFT draws
    model = peft.get_peft_model(base, config, adapter_name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORD_PROBLEMS)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A whole model, an adapter and the two merged, each published as a folder."""
    root = tmp_path_factory.mktemp("published")
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    model.config.use_cache = False  # as Trainer leaves it
    about = {"tokenizer": tokenizer, "base_model": BASE, "data": ["me/sums", "words"], "metrics": {"accuracy": 0.985}}
    nemotron_h.publish(model, root / "full", **about)
    lora = adapted()
    nemotron_h.publish(lora, root / "adapter", **about)
    nemotron_h.publish(lora.merge_and_unload(), root / "merged", **about)
    return root


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def run(code: str, *arguments: object, **environment: str) -> str:
    """What a new process prints, which has none of this one's modules, nor this machine's settings of the hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.core
def test_files(folders) -> None:
    whole = {"README.md", "config.json", "generation_config.json", "model.safetensors"} | TOKENIZER_FILES
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    for name, files in {"full": whole, "merged": whole, "adapter": adapter | TOKENIZER_FILES}.items():
        assert {path.name for path in (folders / name).iterdir()} == files
    assert sorted(path.name for path in folders.iterdir()) == ["adapter", "full", "merged"]  # nothing half-written
    assert json.loads((folders / "full" / "config.json").read_text())["use_cache"] is True
    stop = json.loads((folders / "full" / "generation_config.json").read_text())["eos_token_id"]
    assert stop == [2, 12]


def test_nothing_of_this_machine(folders) -> None:
    here = [str(folders), WORD_PROBLEMS, str(Path(WORD_PROBLEMS).parents[2]), str(Path.home()) + "/", os.getcwd()]
    for path in (path for path in folders.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [each for each in here if each.encode() in content], path
        assert b"local_files_only" not in content and b"is_local" not in content, path
    config = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    # what AutoPeftModelForCausalLM would import, which others do not have
    assert config["auto_mapping"] is None and config["task_type"] == "CAUSAL_LM"


@pytest.mark.core
def test_the_same_function(folders, ids) -> None:
    plain = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folders / "full"), ids), logits(plain, ids), rtol=0, atol=0
    )
    wanted = logits(adapted(), ids)
    assert (wanted - logits(plain, ids)).abs().max() > 0.1
    lora = peft.PeftModel.from_pretrained(plain, folders / "adapter")
    torch.testing.assert_close(logits(lora, ids), wanted, rtol=0, atol=0)
    merged = AutoModelForCausalLM.from_pretrained(folders / "merged")
    torch.testing.assert_close(logits(merged, ids), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.core
def test_transformers_own_class_answers_the_same(folders, ids, tmp_path) -> None:
    """In a process without this package: the same function once its clamp is lifted, and nearly the same replies."""
    code = f"""
        import json, sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        said = {{}}
        for name in ("full", "merged", "adapter"):
            folder = sys.argv[1] + "/" + name
            if name == "adapter":
                base = AutoModelForCausalLM.from_pretrained(sys.argv[2])
                model = PeftModel.from_pretrained(base, folder)
            else:
                model = base = AutoModelForCausalLM.from_pretrained(folder)
            ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
                {MESSAGES!r}, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            reply = model.generate(**ids, max_new_tokens=24)[0].tolist()
            for layer in base.model.layers:
                if hasattr(layer.mixer, "time_step_limit"):
                    layer.mixer.time_step_limit = (0.0, float("inf"))
            with torch.no_grad():
                logits = model(**ids, use_cache=False).logits[0]
            said[name] = [type(base).__module__, ids["input_ids"][0].tolist(), reply, logits.tolist()]
        assert "nemotron_h" not in sys.modules
        print(json.dumps(said))
    """
    copies = shutil.copytree(folders, tmp_path / "published")
    said = json.loads(run(code, copies, WORD_PROBLEMS, HF_HUB_OFFLINE="1").splitlines()[-1])
    models = {"full": AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS), "merged": adapted(), "adapter": adapted()}
    for name, model in models.items():
        module, prompt, theirs, library = said[name]
        assert module == "transformers.models.nemotron_h.modeling_nemotron_h"
        assert prompt == ids[0].tolist()
        ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24)[0].tolist()
        # As shipped, its time steps have a floor in the prompt: the whole model answers with a margin, the random
        # adapter's model part from it later.
        same = 24 if name == "full" else 4
        assert theirs[: ids.shape[1] + same] == ours[: ids.shape[1] + same]
        torch.testing.assert_close(torch.tensor(library), logits(model, ids)[0], rtol=1e-4, atol=1e-3)


def test_the_doctor_lets_it_pass(folders) -> None:
    """No reader takes less of it than of the folder that it was trained from."""

    def stumbles(folder) -> dict[str, list[str]]:
        return {each.reader: [finding.what for finding in each.findings] for each in readers.examine(folder)}

    assert stumbles(folders / "merged") == stumbles(WORD_PROBLEMS)
    assert readers.examine(folders / "merged")[0].reads


def test_card(folders, tokenizer) -> None:
    cards = {name: (folders / name / "README.md").read_text() for name in ("full", "adapter", "merged")}
    for name, card in cards.items():
        _, head, body = card.split("---\n", 2)
        tags = yaml.safe_load(head)
        assert tags["base_model"] == BASE and tags["datasets"] == ["me/sums"]
        assert tags["license"] == "apache-2.0"  # of the bundled model's own card
        assert tags["base_model_relation"] == ("adapter" if name == "adapter" else "finetune")
        assert tags["library_name"] == ("peft" if name == "adapter" else "transformers")
        assert "| accuracy | 0.985 |" in body and "Trained on: me/sums, words." in body
        for think in (True, False):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": "How are you?"}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=think,
            )
            assert prompt in body
    assert f"{sum(p.numel() for p in adapted().parameters() if p.requires_grad):,} weights" in cards["adapter"]
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    bare = model_card(model, "me/x", base_model="nvidia/y")
    assert "license" in bare and "That of [nvidia/y]" in bare and "Chat format" not in bare


def published_card(model, folder, **about) -> tuple[dict, str]:
    """The tags and the text of the card that a model is published with."""
    nemotron_h.publish(model, folder, **about)
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.core
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_card_of_packed_weights(bits, tmp_path) -> None:
    """The library's own class would read them without their scales, and say nothing."""
    small_model("dense", torch.float32).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantize=bits)
    _, body = published_card(model, tmp_path / "packed", base_model=BASE)
    assert "`nemotron_h_weight_only`" in body.replace('"', "`") and "The package is needed" in body
    assert "reads the same files" not in body
    config = peft.LoraConfig(target_modules=["in_proj"], r=2)
    # what was packed while it was loaded is plain at the hub, and what was packed before is not
    _, body = published_card(peft.get_peft_model(model, config), tmp_path / "of-plain", base_model=BASE)
    assert "reads the same files" in body
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    _, body = published_card(peft.get_peft_model(model, config), tmp_path / "of-packed", base_model=BASE)
    assert "The base model's weights are quantized" in body and "reads the same files" not in body


def test_card_of_packed_fp8(tmp_path) -> None:
    model = small_model("dense", torch.float32)
    model.config.quantization_config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    body = model_card(model, "me/x")
    assert '(`quant_method` "modelopt")' in body and "reads the same files" not in body


@pytest.mark.core
@pytest.mark.parametrize("kind, task", [("Sequence", "SEQ_CLS"), ("Token", "TOKEN_CLS")])
def test_classifiers(kind, task, tokenizer, tmp_path, monkeypatch) -> None:
    """The card's code gives back the model, its head included, and the adapter's config says the task."""
    name = f"For{kind}Classification"
    small_model("dense", torch.float32).save_pretrained(tmp_path / "base")
    model = getattr(nemotron_h, f"NemotronH{name}").from_pretrained(tmp_path / "base", num_labels=3).eval()
    tags, body = published_card(model, tmp_path / "whole", tokenizer=tokenizer, base_model=BASE)
    assert tags["pipeline_tag"] == f"{kind.lower()}-classification".replace("sequence", "text")
    assert "Chat format" not in body and "reads the same files" not in body and "package is needed" in body
    config = peft.LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)
    lora = peft.get_peft_model(getattr(nemotron_h, type(model).__name__)(model.config), config).eval()
    _, with_adapter = published_card(lora, tmp_path / "adapter", tokenizer=tokenizer, base_model=BASE)
    assert f'AutoModel{name}.from_pretrained("{BASE}", num_labels=3, dtype="auto")' in with_adapter
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == task
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(body.split("```python\n")[1].split("```")[0], names)
    row = torch.arange(5, 20)[None]
    torch.testing.assert_close(logits(names["model"], row), logits(model, row), rtol=0, atol=0)


def test_license_in_words(tmp_path) -> None:
    """NVIDIA's models have the tag "other", with a name and a link that the hub shows in its place."""
    model = small_model("dense", torch.float32)
    model.save_pretrained(tmp_path / "base")
    link = "https://example.com/license"
    head = f"license: other\nlicense_name: nvidia-open-model-license\nlicense_link: >-\n  x\nlicense_link: '{link}'\n"
    (tmp_path / "base" / "README.md").write_text(f"---\n{head}---\n# Base\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tags, body = published_card(model, tmp_path / "a", base_model="nvidia/X")
    assert (tags["license"], tags["license_name"], tags["license_link"]) == ("other", "nvidia-open-model-license", link)
    assert f"## License\n\n[nvidia-open-model-license]({link})." in body
    tags, body = published_card(model, tmp_path / "b", base_model="nvidia/X", license="mit")
    assert tags["license"] == "mit" and "license_name" not in tags and "## License" not in body
    # a link to a file of the base's repository
    snapshot = tmp_path / "models--nvidia--X" / "snapshots" / "0"
    shutil.copytree(tmp_path / "base", snapshot)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    assert published_card(model, tmp_path / "c", base_model="nvidia/X")[0]["license_link"] == (
        "https://huggingface.co/nvidia/X/blob/main/LICENSE"
    )


def test_configs_keep_what_only_looks_like_a_path(tmp_path) -> None:
    config = small_config("dense", num_labels=2)
    config.id2label, config.label2id = {0: "./x/y", 1: "/a/b/c"}, {"./x/y": 0, "/a/b/c": 1}
    config.note, config.seen_at = "./neither/here", str(tmp_path / "train")
    nemotron_h.publish(nemotron_h.NemotronHForSequenceClassification(config), tmp_path / "a")
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["id2label"] == {"0": "./x/y", "1": "/a/b/c"} and written["label2id"] == {"./x/y": 0, "/a/b/c": 1}
    assert written["note"] == "./neither/here" and "seen_at" not in written


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_the_cards_code_runs(folders, name, ids, monkeypatch) -> None:
    """With the names that it has: the working directory is where it was published, and the base is at hand."""
    card = (folders / name / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace(f'"{BASE}"', repr(WORD_PROBLEMS))
    monkeypatch.chdir(folders)
    names: dict = {}
    exec(code, names)
    wanted = adapted() if name == "adapter" else AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    torch.testing.assert_close(logits(names["model"], ids), logits(wanted, ids))
    assert names["tokenizer"].chat_template


PUSHED = """
    import sys
    sys.path[:0] = sys.argv[1:3]
    import nemotron_h, peft, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from test_publish import BASE, WORD_PROBLEMS, adapted
    tokenizer = AutoTokenizer.from_pretrained(WORD_PROBLEMS)
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    about = dict(tokenizer=tokenizer, base_model=BASE, data=["me/sums", "words"], metrics={"accuracy": 0.985})
    print(nemotron_h.publish(model, "me/full", private=True, commit_message="Sums", **about))
    nemotron_h.publish(adapted(), "me/adapter", **about)
    nemotron_h.publish(adapted().merge_and_unload(), "me/merged", **about)
    # and what transformers and PEFT do by themselves
    model.push_to_hub("me/plain")
    tokenizer.push_to_hub("me/plain")
    plain = AutoModelForCausalLM.from_pretrained("me/plain")
    assert AutoTokenizer.from_pretrained("me/plain").chat_template == tokenizer.chat_template
    lora = peft.get_peft_model(plain, nemotron_h.lora_config(plain, r=2, report=False, init_lora_weights=False)).eval()
    lora.push_to_hub("me/plain-adapter")
    arguments = TrainingArguments(
        sys.argv[3], push_to_hub=True, hub_model_id="me/trained", max_steps=1, per_device_train_batch_size=1,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )
    row = torch.arange(5, 25)
    row = {"input_ids": row, "labels": row}
    trainer = Trainer(AutoModelForCausalLM.from_pretrained("me/plain"), arguments, train_dataset=[row])
    trainer.train()
    trainer.push_to_hub()
    # each from the hub again
    ids = row["input_ids"][None]

    def whole(name):
        return AutoModelForCausalLM.from_pretrained(name)

    named = peft.PeftConfig.from_pretrained("me/plain-adapter").base_model_name_or_path
    pairs = {
        "me/plain": (whole("me/plain"), model),
        "me/merged": (whole("me/merged"), adapted().merge_and_unload()),
        "me/trained": (whole("me/trained"), trainer.model.eval()),
        "me/adapter": (peft.PeftModel.from_pretrained(whole("me/plain"), "me/adapter"), adapted()),
        "me/plain-adapter": (peft.PeftModel.from_pretrained(whole(named), "me/plain-adapter"), lora),
    }
    with torch.no_grad():
        for name, (loaded, wanted) in pairs.items():
            inner = getattr(loaded, "get_base_model", lambda: loaded)()
            assert type(inner) is nemotron_h.NemotronHForCausalLM, name
            print(name, (loaded(ids).logits - wanted(ids).logits).abs().max().item())
        print((trainer.model(ids).logits - model(ids).logits).abs().max().item())
"""


@pytest.mark.core
def test_the_hub(folders, tmp_path) -> None:
    """publish(), plain push_to_hub() and Trainer's against a stand-in, and what was pushed is loaded from it."""
    with Hub() as hub:
        output = run(
            PUSHED,
            Path(nemotron_h.__file__).parents[1],
            Path(__file__).parent,
            tmp_path / "trained",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN="hf_none",
            HF_HUB_DISABLE_XET="1",
        ).splitlines()
    assert output[0] == f"{hub.url}/me/full"
    differences = dict(line.split() for line in output if line.startswith("me/"))
    assert len(differences) == 5 and {float(each) for each in differences.values()} == {0.0}, differences
    assert float(output[-1]) > 0.01  # the trainer's step is in what it pushed
    assert not hub.unauthorised
    assert hub.private["me/full"] in (True, "private") and hub.private["me/adapter"] not in (True, "private")
    assert hub.messages[:2] == [("me/full", "Sums"), ("me/adapter", "Upload model")]
    for name in ("full", "adapter", "merged"):
        committed = hub.files[f"me/{name}"]
        assert set(committed) == {path.name for path in (folders / name).iterdir()}
        for file, content in committed.items():
            if file == "adapter_config.json":  # PEFT writes its targets in any order
                written, wanted = json.loads(content), json.loads((folders / name / file).read_text())
                assert sorted(written.pop("target_modules")) == sorted(wanted.pop("target_modules"))
                assert written == wanted
            elif file != "README.md":
                assert content == (folders / name / file).read_bytes(), file
        assert f'"me/{name}"' in committed["README.md"].decode()
    full, plain, trained = (hub.files[f"me/{name}"] for name in ("full", "plain", "trained"))
    assert plain["config.json"] == full["config.json"] and plain["model.safetensors"] == full["model.safetensors"]
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "README.md"} <= plain.keys()
    # the published layout, whoever pushes it
    names = {
        repository["model.safetensors"][8:].partition(b"}}")[0].count(b'"backbone.') for repository in (full, trained)
    }
    assert len(names) == 1 and names != {0}
    assert json.loads(trained["config.json"]).keys() == json.loads(full["config.json"]).keys()
    for name in ("plain", "plain-adapter", "trained"):
        for file, content in hub.files[f"me/{name}"].items():
            # of what Trainer keeps for itself, this alone names the folder that it trained in
            assert file == "training_args.bin" or str(tmp_path).encode() not in content, (name, file)
    assert json.loads(hub.files["me/plain-adapter"]["adapter_config.json"])["base_model_name_or_path"] == "me/plain"


REPLACED = """
    import sys
    sys.path[:0] = sys.argv[1:3]
    import functools, nemotron_h, torch
    from families import small_model, tokens
    from test_publish import AutoModelForCausalLM, BASE, WORD_PROBLEMS, adapted

    def difference(name, model, ids):
        with torch.no_grad():
            return (AutoModelForCausalLM.from_pretrained(name)(ids).logits - model(ids).logits).abs().max().item()

    nemotron_h.publish(adapted(), "me/x", base_model=BASE)
    merged = adapted().merge_and_unload()
    nemotron_h.publish(merged, "me/x", base_model=BASE)
    print(difference("me/x", merged, torch.arange(5, 25)[None]))
    nemotron_h.publish(merged, "me/z", base_model=BASE)
    nemotron_h.publish(adapted(), "me/z", base_model=BASE)
    one, sharded = (small_model("dense", torch.float32, seed=seed) for seed in (0, 1))
    nemotron_h.publish(one, "me/y")
    sharded.save_pretrained = functools.partial(sharded.save_pretrained, max_shard_size="50KB")
    nemotron_h.publish(sharded, "me/y")
    print(difference("me/y", sharded, tokens(1, 9)))
"""


@pytest.mark.core
def test_an_upload_over_another_one(tmp_path) -> None:
    """A repository holds what was published last alone: readers prefer an adapter, or a single file, that is left."""
    with Hub() as hub:
        for name in "xy":
            hub.files[f"me/{name}"] = {"notes.md": b"mine", "onnx/model.safetensors": b"mine"}
        output = run(
            REPLACED,
            Path(nemotron_h.__file__).parents[1],
            Path(__file__).parent,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN="hf_none",
            HF_HUB_DISABLE_XET="1",
        ).splitlines()
    assert output == ["0.0", "0.0"]
    whole, mine = {"README.md", "config.json", "generation_config.json"}, {"notes.md", "onnx/model.safetensors"}
    assert set(hub.files["me/x"]) == whole | mine | {"model.safetensors"}
    shards = {name for name in hub.files["me/y"] if name.startswith("model-0")}
    assert len(shards) > 1 and set(hub.files["me/y"]) == whole | mine | shards | {"model.safetensors.index.json"}
    adapter = {"README.md", "generation_config.json", "adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files["me/z"]) == adapter


def test_an_adapter_of_another_name(tmp_path) -> None:
    nemotron_h.publish(adapted("sums"), tmp_path / "sums", base_model=BASE)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "sums").iterdir()}


def test_the_base_model(tmp_path) -> None:
    """Known of what was loaded by a hub id, and of what was made here; of a folder it has to be said."""
    assert hub_id("nvidia/NVIDIA-Nemotron-Nano-9B-v2") == "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
    for name in ("/h/.cache/huggingface/hub/models--nvidia--Nano-9B-v2/snapshots/abc", WORD_PROBLEMS, "nano", "", None):
        assert hub_id(name) is None
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    with pytest.raises(ValueError, match="is no hub id: name its hub id with base_model=, or write base_model=None"):
        nemotron_h.publish(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    assert "base_model" not in published_card(model, tmp_path / "a", base_model=None)[0]
    model.config._name_or_path = "nvidia/X"
    assert published_card(model, tmp_path / "b")[0]["base_model"] == "nvidia/X"
    assert "base_model" not in published_card(small_model("dense", torch.float32), tmp_path / "c")[0]
    assert _base_model("auto", "nvidia/X", adapter=True) == "nvidia/X"  # PEFT would ask the network for it


def test_refusals(tmp_path, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    for given in ({}, {"base_model": None}):
        with pytest.raises(ValueError, match="name its hub id with base_model="):
            nemotron_h.publish(adapted(), tmp_path / "a", **given)
    for given in (
        {"base_model": str(tmp_path)},
        {"base_model": "~/model"},
        {"base_model": "../model"},
        {"data": "/data/mine/train.jsonl"},
        {"data": "./train.jsonl"},
        {"metrics": {"log": str(tmp_path)}},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(given))}='.*is a path on this machine"):
            nemotron_h.publish(model, tmp_path / "a", **{"base_model": BASE, **given})
    with pytest.raises(ValueError, match="base_model='nano' is no hub id, which is written owner/name"):
        nemotron_h.publish(model, tmp_path / "a", base_model="nano")
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nvidia" / "nano").mkdir(parents=True)
    (tmp_path / "mine.jsonl").touch()
    for given in ({"base_model": "nvidia/nano"}, {"data": "mine.jsonl"}):
        with pytest.raises(ValueError, match="is a path on this machine"):
            nemotron_h.publish(model, tmp_path / "a", **{"base_model": BASE, **given})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    with pytest.raises(ValueError, match="is there already"):
        nemotron_h.publish(model, tmp_path / "b", base_model=BASE)
    model.peft_config = {}  # as of transformers' own add_adapter
    with pytest.raises(ValueError, match=r"has adapters by add_adapter\(\).*peft.get_peft_model"):
        nemotron_h.publish(model, tmp_path / "a")
    with pytest.raises(ValueError, match="knows nemotron_h alone"):
        nemotron_h.publish(torch.nn.Linear(1, 1), tmp_path / "a")


def test_an_interrupted_one_leaves_nothing(tmp_path) -> None:
    class Full:
        chat_template = None

        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    with pytest.raises(OSError, match="No space left"):
        nemotron_h.publish(model, tmp_path / "a", tokenizer=Full(), base_model=BASE)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(small_disk) -> None:
    model = AutoModelForCausalLM.from_pretrained(WORD_PROBLEMS)
    with pytest.raises(OSError, match=rf"^The disk of {small_disk}/a is full; make room and run it again\.$"):
        nemotron_h.publish(model, small_disk / "a", base_model=BASE)
    assert not list(small_disk.iterdir())
