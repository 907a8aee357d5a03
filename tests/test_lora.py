"""LoRA: what a config reaches, that every adapter is in the path forward and backward, merging, packed experts.

The oracles are plain models whose weights are W + s B A, worked out below from the adapter's tensors, and the chain
rule from those weights' gradients to A's and B's.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from families import relative_difference, small_model, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemotron_h import NemotronHForCausalLM, NemotronHForSequenceClassification, lora_config, lora_coverage
from nemotron_h.training import losses

peft = pytest.importorskip("peft", minversion="0.20", reason="stacked experts lie in memory as since PEFT 0.20")

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
FAMILIES = ("dense", "moe", "latent", "mamba", "attention", "tied")
# Every weight that multiplies, by the end of its name in the published layout, and what each kind has of them.
ATTENTION = r"(q|k|v|o)_proj\.weight"
MIXERS = rf"{ATTENTION}|mixer\.(in|out)_proj\.weight"
EXPERTS = r"mixer\.experts\.(up|down)_proj|shared_experts\.(up|down)_proj\.weight|fc[12]_latent_proj\.weight"
KINDS = {
    "attention": ATTENTION,
    "mixers": MIXERS,
    "experts": EXPERTS,
    "all-linear": rf"{MIXERS}|{EXPERTS}|mixer\.(up|down)_proj\.weight",
}


def expected_names(model: torch.nn.Module, kind: str) -> set[str]:
    pattern = re.compile(rf"layers\.\d+\..*?({KINDS[kind]})$")
    return {name for name, _ in model.named_parameters() if pattern.search(name) and not name.startswith("mtp.")}


def adapted_names(wrapped: torch.nn.Module) -> set[str]:
    """The base model's names of the weights that have adapters, read off the adapter's tensors."""
    names = set()
    for name, _ in wrapped.named_parameters():
        if found := re.fullmatch(r"(?:base_model\.model\.)?(.*)\.lora_A\.default\.weight", name):
            module = found[1]
            if module.endswith("experts.base_layer"):
                names.add(module.removesuffix("base_layer") + "up_proj")
            elif module.endswith(".experts"):
                names.add(f"{module}.down_proj")
            else:
                names.add(f"{module}.weight")
    return names


def wrap(model: torch.nn.Module, kind: str = "all-linear", seed: int = 0, **options) -> peft.PeftModel:
    """An adapter that says something: B starts at zero, which would leave A without a gradient."""
    wrapped = peft.get_peft_model(model, lora_config(model, kind, report=False, **{"r": 3, **options}))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (0.2 * drawn).to(dtype)
    return wrapped


def factors(wrapped: peft.PeftModel) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Weight's name -> its A and B."""
    tensors = dict(wrapped.named_parameters())
    found = {}
    for name in adapted_names(wrapped):
        if name.endswith("experts.up_proj"):
            stem = name.removesuffix("up_proj") + "base_layer"
        else:
            stem = name.removesuffix(".down_proj") if ".experts.down" in name else name.removesuffix(".weight")
        stem = f"base_model.model.{stem}"
        found[name] = tensors[f"{stem}.lora_A.default.weight"], tensors[f"{stem}.lora_B.default.weight"]
    return found


def per_expert(A: torch.Tensor, B: torch.Tensor, experts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row e r + j of A and column j E + e of B are expert e's."""
    r = len(A) // experts
    return [(A[e * r : (e + 1) * r], B[:, [j * experts + e for j in range(r)]]) for e in range(experts)]


@torch.no_grad()
def with_products(model: torch.nn.Module, wrapped: peft.PeftModel, scaling: float = 2.0) -> torch.nn.Module:
    """`model` with each adapted weight W replaced by W + s B A, in place."""
    weights = dict(model.named_parameters())
    for name, (A, B) in factors(wrapped).items():
        W = weights[name]
        if W.ndim == 2:
            W += scaling * B @ A
        else:
            for e, (A_e, B_e) in enumerate(per_expert(A, B, len(W))):
                W[e] += scaling * B_e @ A_e
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Without a gradient other kernels run, with other roundings: what is compared bit for bit runs alike."""
    return model.eval()(ids).logits


# What is reached


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kind_reaches_all_of_its_weights_and_no_others(family, kind):
    model = small_model(family, torch.float32)
    expected = expected_names(model, kind)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    layers = model.config.layers_block_type
    if not expected:
        with pytest.raises(ValueError, match=f"'{kind}'.*has none of them"):
            lora_config(model, kind)
        return
    wrapped = peft.get_peft_model(model, lora_config(model, kind, r=2, report=False))
    assert adapted_names(wrapped) == expected
    coverage = lora_coverage(wrapped)
    touched = {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in expected}
    assert [count > 0 for _, count in coverage.layers] == [idx in touched for idx in range(len(layers))]
    assert [kind for kind, _ in coverage.layers] == list(layers)
    assert sum(count for _, count in coverage.layers) == len(expected)
    assert coverage.adapted_parameters == sum(sizes[name] for name in expected)
    assert coverage.parameters == parameters
    assert coverage.trained_parameters == sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    assert not coverage.unmatched and not coverage.idle


def test_the_report_is_printed_and_equals_the_wrapped_models(capsys):
    model = small_model("latent", torch.float32)
    config = lora_config(model, "all-linear", r=4)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "lora_config(kind='all-linear', r=4): 7 of 7 layers (mamba 3/3, moe 3/3, attention 1/1); "
    )
    before = lora_coverage(model, config)
    after = lora_coverage(peft.get_peft_model(model, config))
    assert (before.layers, before.adapted_parameters, before.parameters) == (
        after.layers,
        after.adapted_parameters,
        after.parameters,
    )
    assert f"{before.adapted_parameters:,} of {before.parameters:,} weights ({before.parameter_share:.1%})" in printed
    assert before.trained_parameters == 0 < after.trained_parameters
    lora_config(model, report=False)
    assert not capsys.readouterr().out


def test_names_that_match_nothing_are_said():
    """PEFT passes them over where others match: TRL's example names gate_proj, which no model of the family has."""
    model = small_model("moe", torch.float32)
    config = peft.LoraConfig(
        target_modules=["q_proj", "gate_proj"], target_parameters=["experts.up_proj", "experts.gate_up_proj"]
    )
    assert lora_coverage(model, config).unmatched == ("gate_proj", "experts.gate_up_proj")
    coverage = lora_coverage(peft.get_peft_model(model, config))
    assert coverage.unmatched == ("gate_proj", "experts.gate_up_proj")
    assert "MATCHED NOTHING: gate_proj, experts.gate_up_proj" in str(coverage)
    assert coverage.adapted_layers == 4  # of seven: one attention layer and three of experts
    regex = peft.LoraConfig(target_modules=r".*\.gate_proj")
    assert lora_coverage(small_model("moe"), regex).unmatched == (r".*\.gate_proj",)


def test_a_tied_head_is_counted_once():
    model = small_model("tied", torch.float32)
    parameters, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight.numel()
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    before = lora_coverage(model, config)
    after = lora_coverage(peft.get_peft_model(model, config))
    for coverage in (before, after):
        assert (coverage.adapted_parameters, coverage.parameters) == (head, parameters)
        assert coverage.adapted_layers == 0 and not coverage.unmatched
    both = peft.LoraConfig(target_modules=["lm_head", "embeddings"], r=2)
    assert lora_coverage(small_model("tied", torch.float32), both).adapted_parameters == head


def test_a_module_without_a_weight_is_not_covered():
    """PEFT refuses it by name, and what it would cover is none of its parts."""
    model = small_model("dense", torch.float32)
    config = peft.LoraConfig(target_modules=["mixer"])
    coverage = lora_coverage(model, config)
    assert coverage.unmatched == ("mixer",) and coverage.adapted_parameters == 0
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_beginnings_that_experts_cannot_have(init):
    model = small_model("moe", torch.float32)
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}' cannot be had on routed experts.*'gaussian'"):
        lora_config(model, "experts", init_lora_weights=init)
    peft.get_peft_model(model, lora_config(model, "mixers", r=2, report=False, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian"])
def test_beginnings_that_experts_can_have(init):
    model = small_model("moe", torch.float32)
    peft.get_peft_model(model, lora_config(model, "experts", r=2, report=False, init_lora_weights=init))


@pytest.mark.parametrize("family", ["dense", "latent"])
def test_peft_s_own_all_linear_string(family):
    """Everything but what is a parameter: the routed experts."""
    model = small_model(family, torch.float32)
    expected = {name for name in expected_names(model, "all-linear") if ".experts." not in name}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert adapted_names(wrapped) == expected
    assert not lora_coverage(wrapped).unmatched


def test_multi_token_prediction_is_left_out_and_said_where_it_is_not():
    """No forward calls it: an adapter there would have no gradient."""
    model = small_model("latent", torch.float32, **MTP)
    expected = expected_names(model, "all-linear")
    config = lora_config(model, report=False)
    assert lora_coverage(model, config).idle == ()
    assert adapted_names(peft.get_peft_model(model, config)) == expected
    plain = peft.get_peft_model(
        small_model("latent", torch.float32, **MTP), peft.LoraConfig(target_modules=["q_proj", "in_proj"])
    )
    assert lora_coverage(plain).idle == ("mtp.layers.0.mixer.q_proj.weight",)
    assert "mtp.layers.0.mixer.q_proj.weight" in str(lora_coverage(plain))
    excluded = lora_config(small_model("latent", **MTP), report=False, exclude_modules=["q_proj"])
    assert re.fullmatch(excluded.exclude_modules, "model.layers.3.mixer.q_proj")
    assert re.fullmatch(excluded.exclude_modules, "mtp.layers.0.mixer.k_proj")
    assert not re.fullmatch(excluded.exclude_modules, "model.layers.3.mixer.k_proj")


def test_what_is_wrong_is_said_in_one_sentence():
    model = small_model("moe", torch.float32)
    with pytest.raises(ValueError, match=r"kind='linear' is not known: write one of 'all-linear'"):
        lora_config(model, "linear")
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\]: leave target_modules out"):
        lora_config(model, target_modules=["q_proj"])
    for name in ("lora_dropout", "use_dora", "lora_bias"):
        with pytest.raises(ValueError, match=rf"{name}=.*routed experts.*kind='mixers'"):
            lora_config(model, **{name: 1})
        lora_config(model, "mixers", report=False, **{name: True if name != "lora_dropout" else 0.1})
    with pytest.raises(ValueError, match="has no adapter: wrap it"):
        lora_coverage(model)
    with pytest.raises(ValueError, match="no adapter 'other': the model has 'default'"):
        lora_coverage(wrap(model), adapter_name="other")


def test_the_task_is_known_from_the_model():
    model = small_model("dense", torch.float32)
    assert lora_config(model, report=False).task_type == "CAUSAL_LM"
    assert lora_config(model.model, report=False).task_type == "FEATURE_EXTRACTION"
    model.config.num_labels = 3
    classifier = NemotronHForSequenceClassification(model.config)
    wrapped = peft.get_peft_model(classifier, lora_config(classifier, report=False))
    assert wrapped.base_model.model.score.modules_to_save["default"].weight.requires_grad
    assert lora_coverage(wrapped).adapted_layers == 7


def test_a_loss_without_logits_is_asked_for_on_the_base_model(monkeypatch, caplog):
    """An attribute of the wrapper stays there, which the warning and the class say."""
    wrapped = wrap(small_model("dense", torch.float32)).train()
    monkeypatch.setattr(losses, "_said", set())
    monkeypatch.setattr(losses, "_WORTH_SAYING", 0)
    ids = tokens(1, 9)
    whole = wrapped(input_ids=ids, labels=ids)
    assert whole.logits is not None and "on `model.get_base_model()` where PEFT has wrapped it" in caplog.text
    assert "`model.get_base_model()`" in NemotronHForCausalLM.__doc__
    wrapped.get_base_model().chunked_loss = True
    chunked = wrapped(input_ids=ids, labels=ids)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, whole.loss)


# out_proj


def test_out_proj_by_name_in_this_package_s_class_and_in_no_other(tmp_path):
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as Own

    model = small_model("dense", torch.float32)
    model.save_pretrained(tmp_path)
    config = {"target_modules": ["in_proj", "out_proj"], "r": 2}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    assert adapted_names(wrapped) == {
        n for n, _ in small_model("dense").named_parameters() if re.search("(in|out)_proj.w", n)
    }
    own = Own.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'out_proj' is incompatible"):
        peft.get_peft_model(own, peft.LoraConfig(**config))
    with pytest.raises(ValueError, match="'conv1d' is incompatible"):
        peft.get_peft_model(small_model("dense"), peft.LoraConfig(target_modules=["conv1d"]))
    # without PEFT's model around it, as transformers' add_adapter does it, and a second adapter
    model = small_model("dense", torch.float32)
    peft.inject_adapter_in_model(peft.LoraConfig(**config), model)
    assert adapted_names(model) == adapted_names(wrapped)
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["out_proj"]))
    assert lora_coverage(wrapped, adapter_name="second").adapted_layers == 3


DOORS = """
    import sys
    from pathlib import Path
    if {first}:
        import peft
    import torch
    import transformers.integrations.peft as integration
    from nemotron_h import NemotronHForCausalLM
    folder = Path({folder!r})
    doors = ("get_peft_model", "inject", "PeftModel", "add_adapter", "load_adapter", "prefix")
    models = {{door: NemotronHForCausalLM.from_pretrained(folder / "base", quantize="int8") for door in doors}}
    assert {first} == ("peft" in sys.modules)
    import peft
    integration.check_peft_version = lambda *_, **__: None  # its newest version asks for one that is newer than this

    def config():
        return peft.LoraConfig(target_modules=["out_proj"], target_parameters=["experts.up_proj"], r=2)

    peft.get_peft_model(models["get_peft_model"], config()).save_pretrained(folder / "adapter")
    peft.inject_adapter_in_model(config(), models["inject"])
    peft.PeftModel.from_pretrained(models["PeftModel"], folder / "adapter")
    models["add_adapter"].add_adapter(config())
    models["load_adapter"].load_adapter(folder / "adapter")
    for door in doors[:-1]:
        layers = {{type(m) for m in models[door].modules() if isinstance(m, peft.tuners.lora.LoraLayer)}}
        print(door, *sorted(f"{{layer.__module__}}.{{layer.__name__}}" for layer in layers))
    try:
        peft.PeftModelForCausalLM(models["prefix"], peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=5))
    except ValueError as error:
        print("prefix", error)
"""


@pytest.mark.parametrize("first", [True, False], ids=["PEFT first", "PEFT last"])
def test_every_way_in_reaches_out_proj_and_packed_experts(first, tmp_path):
    """TRL's is get_peft_model."""
    small_model("moe", torch.float32).save_pretrained(tmp_path / "base")
    script = textwrap.dedent(DOORS.format(first=first, folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    *doors, prefix = done.stdout.splitlines() or [""]
    ours = "nemotron_h.training.lora_quantized.Linear nemotron_h.training.lora_quantized.ParamWrapper"
    assert [door.partition(" ")[2] for door in doors] == [ours] * 5, done.stdout + done.stderr
    assert prefix.startswith("prefix PREFIX_TUNING learns keys and values")


# In the path, forward and backward


@pytest.mark.parametrize(
    ("kernels", "checkpointing"),
    [("0", None), ("auto", None), ("auto", False), ("auto", True)],
    ids=["torch", "kernels", "checkpoint", "reentrant"],
)
@pytest.mark.parametrize("family", ["dense", "moe", "latent"])
def test_every_adapter_has_the_gradient_of_the_chain_rule(family, kernels, checkpointing, monkeypatch):
    """dL/dA = s B' dL/dW and dL/dB = s dL/dW A', with dL/dW of the plain model with the weights W + s B A."""
    monkeypatch.setenv("NEMOTRON_H_KERNELS", kernels)
    wrapped = wrap(small_model(family))
    plain = with_products(small_model(family), wrapped)
    ids = tokens(2, 19)
    if checkpointing is not None:
        wrapped.enable_input_require_grads()
        wrapped.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss = wrapped.train()(ids, labels=ids).loss
    loss.backward()
    expected = plain.train()(ids, labels=ids).loss
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-10 * abs(expected.item())
    weights = dict(plain.named_parameters())
    assert len(factors(wrapped)) == len(expected_names(plain, "all-linear"))
    for name, (A, B) in factors(wrapped).items():
        gradient = weights[name].grad
        if gradient.ndim == 2:
            dA, dB = 2 * B.T @ gradient, 2 * gradient @ A.T
        else:
            dA, dB, experts = torch.zeros_like(A), torch.zeros_like(B), len(gradient)
            r = len(A) // experts
            for e, (A_e, B_e) in enumerate(per_expert(A, B, experts)):
                dA[e * r : (e + 1) * r] = 2 * B_e.T @ gradient[e]
                dB[:, [j * experts + e for j in range(r)]] = 2 * gradient[e] @ A_e.T
        assert A.grad is not None and A.grad.abs().max() > 0 and B.grad.abs().max() > 0, name
        assert relative_difference(A.grad, dA.detach()) <= 1e-9, name
        assert relative_difference(B.grad, dB.detach()) <= 1e-9, name
    frozen = [name for name, p in wrapped.named_parameters() if "lora_" not in name and p.grad is not None]
    assert not frozen


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["0", "auto"])
@pytest.mark.parametrize("family", ["dense", "moe", "latent"])
def test_after_one_step_every_matrix_has_a_gradient(family, kernels, dtype, monkeypatch):
    """As PEFT initialises it: B is zero, so A's first gradient is. Half precision: the adapters are in float32."""
    monkeypatch.setenv("NEMOTRON_H_KERNELS", kernels)
    model = small_model(family, dtype).train()
    wrapped = peft.get_peft_model(model, lora_config(model, r=4, report=False))
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(expected_names(small_model(family), "all-linear"))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = tokens(2, 40)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(ids, labels=ids).loss.backward()
        optimizer.step()
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    assert all(p.grad.isfinite().all() for p in trained.values())


@pytest.mark.parametrize("kernels", ["0", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_decoding_are_those_of_the_weights_with_the_products(family, kernels, monkeypatch):
    """float32, where one token at a time takes the fast paths of decoding.py and ops/experts.py."""
    monkeypatch.setenv("NEMOTRON_H_KERNELS", kernels)
    wrapped = wrap(small_model(family, torch.float32)).eval()
    plain = with_products(small_model(family, torch.float32), wrapped)
    untouched = small_model(family, torch.float32)
    ids = tokens(1, 11)
    with torch.no_grad():
        logits, expected = wrapped(ids).logits, plain(ids).logits
        assert relative_difference(logits, expected, record=False) <= 1e-5
        assert relative_difference(untouched(ids).logits, expected, record=False) > 1e-2
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for batch in (1, 2):
        ours, theirs = (m.generate(input_ids=tokens(batch, 5), **settings) for m in (wrapped, plain))
        assert torch.equal(ours.sequences, theirs.sequences)
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            assert relative_difference(a, b, record=False) <= 2e-5
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.equal(wrapped(ids).logits, untouched(ids).logits)


# Merging, saving


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unmerge(family, tmp_path):
    model = small_model(family, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    wrapped = wrap(model).eval()
    ids = tokens(2, 17)
    with torch.no_grad():
        adapted = wrapped(ids).logits
        wrapped.merge_adapter()
        assert relative_difference(wrapped(ids).logits, adapted, record=False) <= 1e-5
        wrapped.unmerge_adapter()
    back = {
        re.sub(r"^base_model\.model\.", "", name).replace(".base_layer", ""): p
        for name, p in wrapped.named_parameters()
        if ".lora_" not in name
    }
    assert back.keys() == before.keys()
    for name, weight in before.items():  # to the rounding of one addition
        assert relative_difference(back[name], weight, record=False) <= 1e-6, name
    merged = wrapped.merge_and_unload()
    assert type(merged) is NemotronHForCausalLM
    oracle = with_products(small_model(family, torch.float32), wrap(small_model(family, torch.float32)))
    with torch.no_grad():
        assert relative_difference(merged(ids).logits, oracle(ids).logits, record=False) <= 1e-5
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("family", ["dense", "latent"])
def test_the_adapters_folder_opens_again(family, tmp_path):
    small_model(family, torch.float32, **(MTP if family == "latent" else {})).save_pretrained(tmp_path / "base")
    wrapped = wrap(NemotronHForCausalLM.from_pretrained(tmp_path / "base")).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = tokens(1, 9)
    opened = peft.PeftModel.from_pretrained(
        NemotronHForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(opened, ids), logits(wrapped, ids))
    assert lora_coverage(opened).adapted_layers == 7
    # by the adapter's folder alone
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), ids), logits(wrapped, ids))


def test_an_adapter_that_an_earlier_version_wrote_opens():
    """tests/data/adapter, with the logits of that version: r=1 on every kind of layer, A and B drawn."""
    folder, ids = Path(__file__).parent / "data" / "adapter", tokens(1, 9)
    model, plain = (small_model("latent", torch.float32, hybrid_override_pattern="ME*-") for _ in range(2))
    opened = peft.PeftModel.from_pretrained(model, folder).eval()
    saved, held = load_file(folder / "adapter_model.safetensors"), peft.get_peft_model_state_dict(opened)
    assert saved.keys() == held.keys() and all(torch.equal(saved[name], held[name]) for name in saved)
    assert adapted_names(opened) == expected_names(plain, "all-linear")
    expected = load_file(folder / "logits.safetensors")["logits"]
    assert relative_difference(logits(opened, ids)[0, -1], expected, record=False) <= 1e-5
    assert relative_difference(logits(with_products(plain, opened), ids)[0, -1], expected, record=False) <= 1e-5


# Packed experts


@pytest.mark.parametrize(("family", "quantize"), [("moe", "int8"), ("latent", "int4")])
def test_adapters_on_packed_experts(family, quantize, tmp_path):
    """Loss, gradients and decoding are those of the same adapter on the plain model with the rounded weights."""
    small_model(family).save_pretrained(tmp_path / "plain")
    quantised = NemotronHForCausalLM.from_pretrained(tmp_path / "plain", quantize=quantize)
    rounded = NemotronHForCausalLM.from_pretrained(tmp_path / "plain", quantize=quantize).dequantize()
    model, oracle = wrap(quantised).double(), wrap(rounded).double()
    assert adapted_names(model) == adapted_names(oracle) == expected_names(small_model(family), "all-linear")
    assert [p.shape for pair in factors(model).values() for p in pair] == [
        p.shape for pair in (factors(oracle)[name] for name in factors(model)) for p in pair
    ]
    assert lora_coverage(model).adapted_parameters == lora_coverage(oracle).adapted_parameters
    assert lora_coverage(model).parameters == lora_coverage(oracle).parameters
    ids = tokens(2, 17)
    for mode in (True, False):
        loss, expected = model.train(mode)(ids, labels=ids).loss, oracle.train(mode)(ids, labels=ids).loss
        assert abs(loss.item() - expected.item()) <= 1e-9 * abs(expected.item())
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    for name, parameter in trained.items():
        assert relative_difference(parameter.grad, gradients[name], record=False) <= 1e-7, name
    with torch.no_grad(), model.disable_adapter(), oracle.disable_adapter():
        assert relative_difference(model(ids).logits, oracle(ids).logits, record=False) <= 1e-9
    # checkpointing runs the experts twice
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train().zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in trained.items():
        assert relative_difference(parameter.grad, gradients[name], record=False) <= 1e-7, name
    before = {name: p.clone() for name, p in model.named_parameters()}
    for layer in (model.base_model.model.model.layers[1].mixer.experts, model):
        with pytest.raises(ValueError, match=r"cannot be merged into packed weights .*without quantisation"):
            layer.merge() if layer is not model else layer.merge_and_unload()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_goes_from_packed_experts_to_plain_ones_and_back(tmp_path):
    small_model("moe", torch.float32).save_pretrained(tmp_path / "base")

    def load(**options):
        return NemotronHForCausalLM.from_pretrained(tmp_path / "base", **options)

    packed = wrap(load(quantize="int8")).eval()
    packed.save_pretrained(tmp_path / "adapter")
    ids = tokens(1, 9)
    again = peft.PeftModel.from_pretrained(load(quantize="int8"), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(packed, ids))
    plain = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    oracle = with_products(load(), packed)
    assert relative_difference(logits(plain, ids), logits(oracle, ids), record=False) <= 1e-5


def test_two_adapters_on_packed_experts(tmp_path):
    small_model("moe", torch.float32).save_pretrained(tmp_path)
    model = NemotronHForCausalLM.from_pretrained(tmp_path, quantize="int8")
    wrapped = wrap(model)
    ids = tokens(1, 9)
    first = logits(wrapped, ids)
    wrapped.add_adapter("second", lora_config(wrapped.base_model.model, r=3, report=False))
    assert lora_coverage(wrapped, adapter_name="second").layers == lora_coverage(wrapped).layers
    assert torch.equal(logits(wrapped, ids), first)
    wrapped.set_adapter("second")  # B is zero
    with wrapped.disable_adapter():
        none = logits(wrapped, ids)
    assert torch.equal(logits(wrapped, ids), none)
    assert not torch.equal(none, first)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped, ids), first)


def test_linear_layers_are_plain_for_libraries_that_know_no_others():
    """`transformers` puts bitsandbytes' layers in the place of `nn.Linear`, and of no subclass of it."""
    from transformers import BitsAndBytesConfig

    ours = small_model("latent", torch.float32)
    config = copy.deepcopy(ours.config)
    config.quantization_config = BitsAndBytesConfig()
    model = NemotronHForCausalLM(config).eval()
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    model.load_state_dict(ours.state_dict())
    assert relative_difference(logits(model, tokens(2, 12)), logits(ours, tokens(2, 12)), record=False) <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_covers_linear_layers(bits, tmp_path):
    """Its classes replace linear layers alone: routed experts stay as they are, and take PEFT's wrapper."""
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    small_model("moe", torch.float32).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    linears = [name for name, module in model.named_modules() if isinstance(module, kind)]
    expected = [n.removesuffix(".weight") for n in expected_names(model, "all-linear") if n.endswith(".weight")]
    assert sorted(linears) == sorted(expected)
    assert type(model) is NemotronHForCausalLM
    ids = tokens(2, 12)
    if bits == 4:
        plain = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for name in linears:
            packed = model.get_submodule(name).weight
            weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
        assert relative_difference(logits(model, ids), logits(plain, ids), record=False) <= 1e-4
    wrapped = wrap(model)
    wrapped.train()(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(expected_names(small_model("moe"), "all-linear"))
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert lora_coverage(wrapped).adapted_layers == 7
    assert wrapped.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


def replicated(model: torch.nn.Module, order: list[int]) -> NemotronHForCausalLM:
    """A model of its own whose layers are copies of the layers of another, in this order."""
    config = copy.deepcopy(model.config)
    kinds = config.layers_block_type
    if isinstance(config.intermediate_size, list):
        config.intermediate_size = [config.mlp_intermediate_size(i) for i in order if kinds[i] == "mlp"]
    config.layers_block_type = [kinds[i] for i in order]
    copied = NemotronHForCausalLM(config).to(model.dtype).eval()
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    for to, of in enumerate(order):
        start = f"model.layers.{of}."
        own |= {name.replace(start, f"model.layers.{to}."): t for name, t in state.items() if name.startswith(start)}
    copied.load_state_dict(own)
    return copied


@pytest.mark.parametrize(
    ("family", "layers", "overrides"),
    [
        ("dense", [[0, 4], [2, 7]], {"intermediate_size": [48, 40, 36]}),
        ("latent", [[0, 5], [1, 7]], {}),
        ("mamba", [[0, 2], [0, 4]], {}),
        ("tied", [[0, 3], [0, 3], [1, 2]], {}),
        ("attention", [[2, 4]], {}),
    ],
)
def test_replicated_layers(family, layers, overrides, tmp_path):
    """PEFT's `layer_replication`: the layers' kinds are repeated with them, and every copy has a cache of its own."""
    base = small_model(family, **overrides)
    plain = replicated(base, [i for start, end in layers for i in range(start, end)])
    wrapped = wrap(copy.deepcopy(base), layer_replication=layers)
    with_products(plain, wrapped)
    ids = tokens(2, 11)
    assert wrapped.config.hybrid_override_pattern == plain.config.hybrid_override_pattern
    assert relative_difference(logits(wrapped, ids), logits(plain, ids)) <= 1e-9
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(wrapped.generate(input_ids=ids, **options), plain.generate(ids, **options))
    wrapped.train()(ids, labels=ids).loss.backward()
    assert not [n for n, p in wrapped.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again, ids), logits(wrapped, ids))
