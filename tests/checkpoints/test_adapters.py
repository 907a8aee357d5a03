"""Adapters under other names are the same function: in PEFT on both classes, and expert by expert by hand."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from families import randomise, relative_difference, small_config, tokens
from safetensors.torch import load_file, save_file
from transformers.models.nemotron_h import NemotronHForCausalLM as TheirForCausalLM

from nemotron_h import NemotronHForCausalLM
from nemotron_h.checkpoints import adapters
from nemotron_h.checkpoints.adapters import convert_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EXPERTS, RANK, ALPHA = 8, 2, 6
IDS = tokens(2, 11)
BOTH = ["experts.up_proj", "experts.down_proj"]
LINEAR = ["in_proj", "q_proj", "shared_experts.up_proj"]


def make_base(folder, family="moe"):
    model = NemotronHForCausalLM(small_config(family)).float().eval()
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "moe")


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "latent", "latent")


def load(base, cls=NemotronHForCausalLM):
    model = cls.from_pretrained(base, dtype=torch.float32).eval()
    for layer in model.model.layers if cls is TheirForCausalLM else ():
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))  # as shipped, small time steps are floored
    return model


@torch.no_grad()
def logits(base, adapter, cls=NemotronHForCausalLM):
    return peft.PeftModel.from_pretrained(load(base, cls), adapter).eval()(IDS).logits


def make_adapter(base, folder, **options):
    """An adapter as PEFT writes it, every factor random."""
    settings = {"target_modules": LINEAR, "target_parameters": BOTH, "r": RANK, "lora_alpha": ALPHA, **options}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    edit(folder, base_model_name_or_path=None)  # or else its shapes were known from there
    return folder


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps({**settings(folder), **changes}))


def rewrite(folder, change):
    changed = change(weights(folder))
    save_file(
        {name: value.clone().contiguous() for name, value in changed.items()}, folder / "adapter_model.safetensors"
    )


def delta_of_expert(stacked, layer, projection, expert, wrapper=None, rank=RANK, scale=ALPHA / RANK):
    """scale * B @ A of one expert, element by element from PEFT's own indices."""
    wrapper = {"up_proj": ".base_layer", "down_proj": ""}[projection] if wrapper is None else wrapper
    name = f"base_model.model.model.layers.{layer}.mixer.experts{wrapper}"
    A, B = (stacked[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
    delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for j in range(rank):
        delta += scale * torch.outer(B[:, j * EXPERTS + expert], A[expert * rank + j])
    return delta


@pytest.mark.parametrize("cls", [NemotronHForCausalLM, TheirForCausalLM])
@pytest.mark.parametrize("family", ["moe", "latent"])
def test_logits_stay_under_every_prefix_and_through_separate_experts(family, cls, request, tmp_path):
    folder = request.getfixturevalue("base" if family == "moe" else "latent")
    adapter = make_adapter(folder, tmp_path / "adapter")
    expected = logits(folder, adapter)
    assert relative_difference(load(folder)(IDS).logits.detach(), expected, record=False) > 0.1  # the adapter speaks
    convert_adapter(adapter, tmp_path / "backbone", prefix="backbone")
    convert_adapter(tmp_path / "backbone", tmp_path / "model")
    convert_adapter(adapter, tmp_path / "separate", prefix="backbone", experts="separate", base=folder)
    convert_adapter(tmp_path / "separate", tmp_path / "again")
    convert_adapter(tmp_path / "separate", tmp_path / "checked", base=folder)
    for kind in ("backbone", "model", "again", "checked"):
        assert relative_difference(logits(folder, tmp_path / kind, cls), expected) <= 1e-5, kind
    for kind in ("model", "again", "checked"):
        back = weights(tmp_path / kind)
        assert back.keys() == weights(adapter).keys()
        assert all(torch.equal(back[name], value) for name, value in weights(adapter).items())
    assert all(".layers." not in n or ".backbone.layers." in n for n in weights(tmp_path / "backbone"))


def test_delta_of_every_expert_by_hand(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    # PEFT's own delta says that the indices in this file are right.
    model = peft.PeftModel.from_pretrained(load(base), adapter)
    wrapper = model.base_model.model.model.layers[1].mixer.experts
    for projection, of in (("down_proj", wrapper), ("up_proj", wrapper.base_layer)):
        theirs = of.get_delta_weight("default")
        for expert in range(EXPERTS):
            mine = delta_of_expert(weights(adapter), 1, projection, expert)
            assert relative_difference(theirs[expert].double(), mine, record=False) <= 1e-6
    convert_adapter(adapter, tmp_path / "separate", prefix="backbone", experts="separate")
    separate = weights(tmp_path / "separate")
    assert sum(".experts." in name for name in separate) == 3 * EXPERTS * 2 * 2
    for layer in (1, 4, 6):
        for expert in range(EXPERTS):
            for projection, shape in (("up_proj", (24, 32)), ("down_proj", (32, 24))):
                name = f"base_model.model.backbone.layers.{layer}.mixer.experts.{expert}.{projection}."
                A, B = separate[name + "lora_A.weight"], separate[name + "lora_B.weight"]
                assert A.shape == (RANK, shape[1]) and B.shape == (shape[0], RANK)
                delta = ALPHA / RANK * B.double() @ A.double()
                assert torch.allclose(delta, delta_of_expert(weights(adapter), layer, projection, expert), atol=1e-12)


def test_separate_experts_open_in_peft_where_the_model_has_a_module_per_expert(base, tmp_path):
    # Ranks and alphas that differ by module, given in the ways that PEFT takes.
    options = {
        "rank_pattern": {"experts.up_proj": 3, r"layers\.4\.mixer\.experts\.down_proj": 4, "q_proj": 1},
        "alpha_pattern": {r"model\.layers\.[16]\.mixer\.experts\.down_proj": 5, "shared_experts.up_proj": 7},
    }
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    convert_adapter(adapter, tmp_path / "separate", prefix="backbone", experts="separate")

    # A tree of the published names, as remote code has it.
    tree = torch.nn.Module()
    for name in weights(tmp_path / "separate"):
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
        if name.endswith("lora_B.weight"):
            continue
        inputs = weights(tmp_path / "separate")[name].shape[1]
        outputs = weights(tmp_path / "separate")[name.replace("lora_A", "lora_B")].shape[0]
        at = tree
        for part in path[:-1]:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(path[-1], torch.nn.Linear(inputs, outputs, bias=False))
    opened = peft.PeftModel.from_pretrained(tree, tmp_path / "separate")
    layers = [n for n, m in opened.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) * 2 == len(weights(tmp_path / "separate"))
    stacked = weights(adapter)
    for layer in (1, 4, 6):
        for projection in ("up_proj", "down_proj"):
            rank = 3 if projection == "up_proj" else 4 if layer == 4 else RANK
            alpha = 5 if projection == "down_proj" and layer != 4 else ALPHA
            for expert in range(EXPERTS):
                module = opened.get_submodule(
                    f"base_model.model.backbone.layers.{layer}.mixer.experts.{expert}.{projection}"
                )
                mine = delta_of_expert(stacked, layer, projection, expert, rank=rank, scale=alpha / rank)
                assert relative_difference(module.get_delta_weight("default").double(), mine, record=False) <= 1e-6
    shared = opened.get_submodule("base_model.model.backbone.layers.1.mixer.shared_experts.up_proj")
    assert shared.scaling["default"] == 7 / RANK
    assert opened.get_submodule("base_model.model.backbone.layers.3.mixer.q_proj").r["default"] == 1
    # And back into PEFT's own form, with the same function.
    convert_adapter(tmp_path / "separate", tmp_path / "again")
    assert relative_difference(logits(base, tmp_path / "again"), logits(base, adapter)) <= 1e-6


def test_a_pattern_of_another_form_keeps_its_scaling(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={r"1\.mixer\.experts\.(up|down)_proj": 3})
    convert_adapter(adapter, tmp_path / "separate", experts="separate")
    expected = {rf"layers\.1\.mixer\.experts\.\d+\.{projection}": 3 for projection in ("up_proj", "down_proj")}
    assert expected.items() <= settings(tmp_path / "separate")["rank_pattern"].items()
    convert_adapter(tmp_path / "separate", tmp_path / "again")
    assert relative_difference(logits(base, tmp_path / "again"), logits(base, adapter)) <= 1e-6


@pytest.mark.parametrize("projection", ["up_proj", "down_proj"])
def test_one_adapted_parameter_has_the_one_wrapper(projection, base, tmp_path):
    adapter = make_adapter(
        base, tmp_path / "adapter", target_parameters=[f"experts.{projection}"], target_modules=["q_proj"]
    )
    convert_adapter(adapter, tmp_path / "separate", experts="separate")
    A = weights(tmp_path / "separate")[f"base_model.model.model.layers.6.mixer.experts.5.{projection}.lora_A.weight"]
    B = weights(tmp_path / "separate")[f"base_model.model.model.layers.6.mixer.experts.5.{projection}.lora_B.weight"]
    mine = delta_of_expert(weights(adapter), 6, projection, 5, wrapper="")
    assert torch.allclose(ALPHA / RANK * B.double() @ A.double(), mine, atol=1e-12)
    convert_adapter(tmp_path / "separate", tmp_path / "again")
    assert relative_difference(logits(base, tmp_path / "again"), logits(base, adapter)) <= 1e-6


@pytest.mark.parametrize("known", [True, False], ids=["base known", "by version"])
def test_transposed_adapters_of_peft_before_0_20_become_those_of_today(known, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")

    def transposed(tensors):
        # delta[e] = sum over j of outer(A_old[e r + j], B_old[:, j E + e]), an (out, in) matrix.
        old = dict(tensors)
        for name, A in tensors.items():
            if "mixer.experts" not in name or "lora_A" not in name:
                continue
            other = name.replace("lora_A", "lora_B")
            B = tensors[other]
            old_A, old_B = torch.zeros(EXPERTS * RANK, B.shape[0]), torch.zeros(A.shape[1], RANK * EXPERTS)
            for expert in range(EXPERTS):
                for j in range(RANK):
                    old_A[expert * RANK + j] = B[:, j * EXPERTS + expert]
                    old_B[:, j * EXPERTS + expert] = A[expert * RANK + j]
            old[name], old[other] = old_A, old_B
        return old

    old = Path(shutil.copytree(adapter, tmp_path / "old"))
    rewrite(old, transposed)
    edit(old, peft_version="0.18.1" if not known else "0.21.0")
    convert_adapter(old, tmp_path / "new", base=base if known else None)
    convert_adapter(old, tmp_path / "separate", experts="separate", base=base if known else None)
    convert_adapter(tmp_path / "separate", tmp_path / "again")
    for kind in ("new", "again"):
        assert all(torch.equal(weights(tmp_path / kind)[n], v) for n, v in weights(adapter).items())
        assert settings(tmp_path / kind)["peft_version"] >= "0.20"
    assert relative_difference(logits(base, tmp_path / "new"), logits(base, adapter)) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.mixer\.(in_proj|down_proj)"},
        {"target_modules": r"model\.layers\.0\.mixer\.in_proj"},
        {"target_modules": ["in_proj", "q_proj"], "layers_to_transform": [2, 3]},
        {"target_modules": ["in_proj", "up_proj"], "exclude_modules": ["layers.0.mixer.in_proj"]},
        {"target_modules": ["model.layers.0.mixer.in_proj", "embeddings"]},
        {"target_modules": ["in_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["in_proj"], "use_rslora": True},
        {"target_modules": ["up_proj"], "target_parameters": ["gate.weight"]},
        {"target_modules": ["in_proj", "q_proj"], "use_dora": True, "target_parameters": None},
    ],
    ids=lambda options: "-".join(options) + "-" + str(options["target_modules"])[:20],
)
def test_ways_of_choosing_modules_stay_the_same_choice(options, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    expected = logits(base, adapter)
    experts = "separate" if options.get("target_parameters", BOTH) == BOTH else "stacked"
    convert_adapter(adapter, tmp_path / "away", prefix="backbone", experts=experts)
    convert_adapter(tmp_path / "away", tmp_path / "back")
    # PEFT would take an expert's number for a layer's.
    assert experts == "stacked" or settings(tmp_path / "away")["layers_to_transform"] is None
    assert experts == "stacked" or settings(tmp_path / "away")["exclude_modules"] is None
    assert weights(tmp_path / "back").keys() == weights(adapter).keys()
    assert relative_difference(logits(base, tmp_path / "back"), expected) <= 1e-6
    convert_adapter(adapter, tmp_path / "renamed", prefix="backbone")
    if not options.get("modules_to_save") and not options.get("use_dora"):
        assert relative_difference(logits(base, tmp_path / "renamed"), expected) <= 1e-6


def test_config_keeps_what_is_not_about_names(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    edit(adapter, base_model_name_or_path="nvidia/somewhere", task_type="CAUSAL_LM", revision="abc")
    (adapter / "README.md").write_text("mine")
    convert_adapter(adapter, tmp_path / "separate", prefix="backbone", experts="separate")
    before, after = settings(adapter), settings(tmp_path / "separate")
    about = {"target_modules", "target_parameters"}
    assert {k: v for k, v in before.items() if k not in about} == {k: v for k, v in after.items() if k not in about}
    assert (tmp_path / "separate" / "README.md").read_text() == "mine"
    # Stacking what was trained with dropout says that it takes it out: PEFT would refuse the folder.
    edit(tmp_path / "separate", lora_dropout=0.1)
    stacked = adapters.conversion(tmp_path / "separate")
    assert any("lora_dropout" in remark for remark in stacked.remarks)
    convert_adapter(tmp_path / "separate", tmp_path / "again")
    assert relative_difference(logits(base, tmp_path / "again"), logits(base, adapter)) <= 1e-6


def refused(source, dest, *words, **options):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        convert_adapter(source, dest, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert not dest.exists()


def test_a_table_that_does_not_hold_names_the_tensor_and_writes_nothing(base, tmp_path):
    adapter, dest = make_adapter(base, tmp_path / "adapter"), tmp_path / "dest"
    convert_adapter(adapter, tmp_path / "separate", experts="separate")

    def broken(change, source=adapter):
        folder = Path(shutil.copytree(source, tmp_path / "broken", dirs_exist_ok=True))
        rewrite(folder, change)
        return folder

    layer = "base_model.model.model.layers"
    plain, stacked = f"{layer}.0.mixer.in_proj.lora_B.weight", f"{layer}.1.mixer.experts.lora_A.weight"
    one = f"{layer}.4.mixer.experts.3.up_proj.lora_A.weight"
    for name, experts, source in (
        (plain, "separate", adapter),
        (stacked, "separate", adapter),
        (one, "stacked", tmp_path / "separate"),
        (one, "separate", tmp_path / "separate"),
    ):
        folder = broken(lambda tensors, name=name: {n: v for n, v in tensors.items() if n != name}, source)
        refused(folder, dest, name, "lacks", experts=experts)
        folder = broken(lambda tensors, name=name: {**tensors, name: torch.zeros(3, 5)}, source)
        refused(folder, dest, name, "(3, 5)", experts=experts, base=base)
    for name in (
        f"{layer}.0.mixer.z_proj.lora_A.weight",
        f"{layer}.0.mixer.in_proj.weight",
        f"{layer}.1.mixer.experts.base_layer.base_layer.lora_A.weight",
    ):
        refused(broken(lambda tensors, name=name: {**tensors, name: torch.zeros(2, 2)}), dest, name)
    # With the base model known: a layer and an expert that it has not.
    for name, source in (
        (f"{layer}.9.mixer.in_proj.lora_A.weight", adapter),
        (f"{layer}.1.mixer.experts.8.up_proj.lora_A.weight", tmp_path / "separate"),
    ):
        folder = broken(lambda tensors, name=name: {**tensors, name: torch.zeros(2, 32)}, source)
        refused(folder, dest, name, base=base)
        edit(folder, base_model_name_or_path=str(base))
        refused(folder, dest, name)
    refused(broken(lambda tensors: {**tensors, "stray": torch.zeros(1)}), dest, "stray")
    untargeted = {f"{layer}.0.mixer.z_proj.lora_{letter}.weight": torch.zeros(2, 2) for letter in "AB"}
    refused(broken(lambda tensors: {**tensors, **untargeted}), dest, f"{layer}.0.mixer.z_proj.lora_A.weight")
    twice = {
        f"{layer}.0.mixer.in_proj.lora_B.weight".replace("model.model.model", "model.model.backbone"): torch.zeros(
            166, 2
        )
    }
    refused(broken(lambda tensors: {**tensors, **twice}), dest, "one tensor")


def test_what_the_config_says_wrongly_is_refused_in_a_sentence(base, tmp_path):
    adapter, dest = make_adapter(base, tmp_path / "adapter"), tmp_path / "dest"
    convert_adapter(adapter, tmp_path / "separate", experts="separate")

    def wrong(source=adapter, **changes):
        folder = Path(shutil.copytree(source, tmp_path / "wrong", dirs_exist_ok=True))
        edit(folder, **changes)
        return folder

    refused(wrong(peft_type="IA3"), dest, "'IA3'")
    refused(wrong(target_parameters=["experts.up_proj"]), dest, "target_parameters")
    refused(wrong(r=3), dest, "lora_A.weight with shape")
    separate = tmp_path / "separate"
    refused(wrong(separate, use_dora=True), dest, "use_dora")
    refused(wrong(separate, alpha_pattern={r"experts\.3\.up_proj": 1}), dest, "experts.3.up_proj", "separate")
    refused(adapter, dest, "'decoder'", prefix="decoder")
    refused(adapter, dest, "'both'", experts="both")
    refused(adapter, dest, "config.json", base=tmp_path)
    refused(base, dest, "adapter_config.json")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, dest, "adapter_model.safetensors")


def test_a_file_cut_short_names_the_tensor(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    with open(adapter / "adapter_model.safetensors", "r+b") as file:
        file.truncate((adapter / "adapter_model.safetensors").stat().st_size - 1)
    refused(adapter, tmp_path / "dest", "adapter_model.safetensors", "base_model.model.model.layers.6")


def test_an_interrupted_run_leaves_nothing_under_the_name_and_a_rerun_completes(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    written = []

    def interrupt(nbytes):
        written.append(nbytes)
        if len(written) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_adapter(adapter, tmp_path / "dest", experts="separate", done=interrupt)
    assert not (tmp_path / "dest").exists()
    convert_adapter(adapter, tmp_path / "dest", experts="separate")
    convert_adapter(adapter, tmp_path / "other", experts="separate")
    assert {f.name: f.read_bytes() for f in (tmp_path / "dest").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "other").iterdir()
    }
    assert sorted(f.name for f in (tmp_path / "dest").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not list(tmp_path.glob(".*.partial"))


def test_the_script_lists_and_converts(base, tmp_path, monkeypatch, capsys):
    adapter = make_adapter(base, tmp_path / "adapter")
    script = Path(__file__).parents[2] / "conversion" / "adapters.py"
    monkeypatch.syspath_prepend(str(script.parent))

    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(script), str(adapter), str(tmp_path / "dest"), *options])
        runpy.run_path(str(script), run_name="__main__")

    run("--prefix", "backbone", "--experts", "separate", "--dry-run")
    listed = capsys.readouterr().out
    assert "base_model.model.backbone.layers.1.mixer.experts.7.down_proj.lora_B.weight [32, 2] float32 <- " in listed
    assert not (tmp_path / "dest").exists()
    run("--prefix", "backbone")
    assert (tmp_path / "dest" / "adapter_config.json").exists()
    with pytest.raises(SystemExit, match="is there already"):
        run()
