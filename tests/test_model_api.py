"""What a model promises its users beyond the logits: recorded outputs, losses, checkpointing, loading, tracing.

The library's own tests (tests/library) ask that these run; here they are compared with what they must be.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
from unittest import mock

import accelerate
import pytest
import torch
from families import FAMILIES, randomise, relative_difference, small_config, small_model, tokens
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from nemotron_h import (
    NemotronHCache,
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHForTokenClassification,
    NemotronHModel,
)
from nemotron_h.modeling import NemotronHBlock, NemotronHPreTrainedModel

TOLERANCE = 1e-9
every_family = pytest.mark.parametrize("family", FAMILIES)
moe_families = pytest.mark.parametrize("family", ["moe", "latent"])
# Tracing is slow and not a matter of the library's version.
core = pytest.mark.core


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and expected
    for name in expected:
        assert relative_difference(got[name], expected[name]) <= TOLERANCE, name


# Gradient checkpointing


@core
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("batch", ["plain", "padded", "packed"])
@every_family
def test_gradient_checkpointing_changes_nothing(family, batch, use_reentrant):
    model, ids = small_model(family).train(), tokens(2, 19)
    inputs = {
        "plain": {},
        "padded": {"attention_mask": left_padded(ids)},
        "packed": {"position_ids": torch.cat([torch.arange(7), torch.arange(12)]).expand(2, -1)},
    }[batch]
    expected = model(ids, labels=ids, **inputs)
    expected_gradients = gradients(model, expected.loss)
    calls: list[None] = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(None))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # A cache would be updated twice, so none is made, asked for or not.
    out = model(ids, labels=ids, use_cache=True, **inputs)
    assert out.past_key_values is None
    assert relative_difference(out.logits, expected.logits) <= TOLERANCE
    assert_same_gradients(gradients(model, out.loss), expected_gradients)
    assert len(calls) == 2  # forward, and again in backward


@core
def test_gradient_checkpointing_and_a_cache():
    """The recomputation would update it twice: an empty one stays empty, one to go on from is refused."""
    model, ids = small_model("dense").train(), tokens(2, 9)
    model.gradient_checkpointing_enable()
    cache = NemotronHCache(model.config)
    out = model(ids, cache=cache, use_cache=True)
    assert out.past_key_values is None and int(cache.get_seq_length()) == 0
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="cannot go on from a cache, and this one has 9 tokens"):
        model(ids, cache=cache)


@core
@every_family
def test_generating_between_training_steps(family):
    """`generate()` of a model in training mode with checkpointing on, as reinforcement learning calls it."""
    model, ids = small_model(family), tokens(2, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.train()
    model.gradient_checkpointing_enable()
    for extra in ({}, {"past_key_values": NemotronHCache(model.config)}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **options, **extra), expected)


# Recorded outputs


@core
@every_family
@torch.no_grad()
def test_hidden_states_are_what_each_layer_reads(family):
    """The embeddings, then what a model of the first k layers has before its final norm, and the normed one last."""
    model, ids = small_model(family), tokens(2, 11)
    mask = left_padded(ids)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    layers = model.model.layers
    assert len(states) == len(layers) + 1
    assert torch.equal(states[0], model.model.embeddings(ids))
    seen = []
    model.model.norm_f.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for k in range(1, len(layers)):
        model.model.layers = layers[:k]
        model(ids, attention_mask=mask, use_cache=False)
        assert torch.equal(states[k], seen[-1]), k
    model.model.layers = layers
    assert torch.equal(states[-1], model.model(ids, attention_mask=mask).last_hidden_state)


@core
@torch.no_grad()
def test_attentions_are_the_softmax_of_the_scores():
    model, ids = small_model("dense", attn_implementation="eager"), tokens(2, 11)
    config, mask = model.config, left_padded(ids)
    out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    where = [idx for idx, kind in enumerate(config.layers_block_type) if kind == "attention"]
    assert len(out.attentions) == len(where) == 1
    layer, x = model.model.layers[where[0]], out.hidden_states[where[0]]
    normed = x * (x.pow(2).mean(-1, keepdim=True) + config.layer_norm_epsilon).rsqrt() * layer.norm.weight
    q, k = normed @ layer.mixer.q_proj.weight.T, normed @ layer.mixer.k_proj.weight.T
    for row in range(2):
        for head in range(config.num_attention_heads):
            group = head // (config.num_attention_heads // config.num_key_value_heads)
            q_head = q[row, :, head * config.head_dim : (head + 1) * config.head_dim]
            k_head = k[row, :, group * config.head_dim : (group + 1) * config.head_dim]
            scores = q_head @ k_head.T / math.sqrt(config.head_dim)
            visible = torch.ones(11, 11).tril().bool() & mask[row].bool()
            expected = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            rows = mask[row].bool()  # what a padding position attends to is nobody's business
            assert relative_difference(out.attentions[0][row, head][rows], expected[rows]) <= TOLERANCE


@core
def test_sdpa_has_no_attentions_and_says_so(caplog):
    """As everywhere in the library: a warning and nothing recorded; the logits are the same."""
    model, ids = small_model("dense"), tokens(1, 5)
    logging.Logger.warning_once.cache_clear()  # the library says it once a process, and another test may have heard it
    library = logging.getLogger("transformers")  # the command line, run in this process, turns its voice down
    with caplog.at_level(logging.WARNING, logger="transformers"), mock.patch.object(library, "propagate", True):
        out = model(ids, output_attentions=True)
    assert not out.attentions
    assert "`sdpa` attention does not support `output_attentions=True`" in caplog.text
    assert torch.equal(out.logits, model(ids).logits)


@core
@moe_families
@torch.no_grad()
def test_router_logits(family):
    model, ids = small_model(family), tokens(2, 9)
    assert model(ids).router_logits is None
    out = model(ids, output_router_logits=True, output_hidden_states=True)
    where = [idx for idx, kind in enumerate(model.config.layers_block_type) if kind == "moe"]
    assert len(out.router_logits) == len(where) > 0
    for idx, logits in zip(where, out.router_logits, strict=True):
        layer, x = model.model.layers[idx], out.hidden_states[idx]
        normed = x * (x.pow(2).mean(-1, keepdim=True) + model.config.layer_norm_epsilon).rsqrt() * layer.norm.weight
        expected = (normed @ layer.mixer.gate.weight.T).flatten(0, 1)
        assert relative_difference(logits, expected) <= TOLERANCE


@core
@every_family
@torch.no_grad()
def test_logits_to_keep(family):
    model, ids = small_model(family), tokens(2, 9)
    full = model(ids).logits
    assert full.shape == (2, 9, 97)
    for keep in (1, 4, 9, 20):
        assert relative_difference(model(ids, logits_to_keep=keep).logits, full[:, -keep:]) <= TOLERANCE
    for index in ([0], [8, 2, 2], []):
        kept = model(ids, logits_to_keep=torch.tensor(index, dtype=torch.long)).logits
        assert kept.shape == (2, len(index), 97)
        torch.testing.assert_close(kept, full[:, index], rtol=0, atol=1e-12)


@core
@pytest.mark.parametrize("frozen", [False, True])
def test_last_logits_take_two_dimensional_input(frozen):
    """With a frozen weight torch turns a linear of a 3-D slice into a batched product that copies the weight first."""
    model, ids = small_model("tied"), tokens(2, 9)
    model.requires_grad_(not frozen)
    seen, linear = [], F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is model.lm_head.weight:
            seen.append(tuple(x.shape))
        return linear(x, weight, bias)

    with mock.patch.object(F, "linear", spy):
        model(ids, logits_to_keep=1)
        model(ids)
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert seen == [(2, 32), (18, 32), (2, 32), (2, 32), (2, 32)]


# Losses


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the targets that are not -100, one at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.flatten(0, -2).double(), targets.flatten(), strict=True):
        if target != -100:
            total = total + row.exp().sum().log() - row[target]
    return total


@core
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_loss(family):
    """The library's loss is float32 in a float64 model too, hence the tolerance."""
    model, ids = small_model(family), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, -1] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    out = model(ids, labels=labels)
    total, count = cross_entropy(out.logits, shifted), int((shifted != -100).sum())
    assert count == 2 * 8 - 4 + 1 - 1 and model(ids).loss is None
    for loss, expected in [
        (out.loss, total / count),
        (model(ids, labels=labels, num_items_in_batch=torch.tensor(29)).loss, total / 29),
        (model(ids, shift_labels=shifted).loss, total / count),
        (model(ids, labels=labels.flip(0), shift_labels=shifted, num_items_in_batch=7).loss, total / 7),
    ]:
        assert relative_difference(loss.double(), expected, record=False) <= 1e-6
    got = torch.autograd.grad(out.loss, out.logits, retain_graph=True)[0]
    expected = torch.autograd.grad(total / count, out.logits)[0]
    assert relative_difference(got, expected, record=False) <= 1e-6


@core
def test_classification_losses():
    ids = tokens(3, 7)
    for cls, labels in (
        (NemotronHForSequenceClassification, torch.tensor([0, 2, 1])),
        (NemotronHForTokenClassification, ids % 3),
    ):
        model = cls(small_config("dense", num_labels=3)).double().eval()
        randomise(model)
        out = model(ids, labels=labels)
        expected = cross_entropy(out.logits, labels) / labels.numel()
        assert relative_difference(out.loss.double(), expected, record=False) <= 1e-6


# Inputs


@core
@every_family
@torch.no_grad()
def test_embeddings_in_place_of_ids(family):
    model, ids = small_model(family), tokens(2, 9)
    mask, embeds = left_padded(ids), model.model.embeddings(ids)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **options), generated[:, 9:])


@core
def test_neither_or_both_inputs_are_refused():
    model, ids = small_model("dense"), tokens(1, 3)
    with pytest.raises(ValueError, match="got neither: pass exactly one"):
        model()
    with pytest.raises(ValueError, match="got both: pass exactly one"):
        model(ids, inputs_embeds=model.model.embeddings(ids))


@core
@pytest.mark.parametrize("batch", ["plain", "padded", "packed"])
@torch.no_grad()
def test_flex_attention(batch):
    """Uncompiled: compiled it says the same after a minute of C++. Its backward needs an accelerator."""
    sdpa, flex = small_model("dense"), small_model("dense", attn_implementation="flex_attention")
    ids = tokens(2, 13)
    mask = left_padded(ids) if batch == "padded" else torch.ones_like(ids)
    inputs = {"attention_mask": mask}
    if batch == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
    with torch.compiler.set_stance("force_eager"):
        logits = flex(ids, **inputs).logits
        generated = flex.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert relative_difference(logits[mask.bool()], sdpa(ids, **inputs).logits[mask.bool()]) <= TOLERANCE
    assert torch.equal(
        generated, sdpa.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    )


# What other people's code hands over and reads by convention

FOR_A_HEAD = (
    {"logits_to_keep": 4},
    {"logits_to_keep": torch.tensor([0, 2])},
    {"labels": torch.zeros(2, 9, dtype=torch.long), "num_items_in_batch": 3},
    {"shift_labels": torch.zeros(2, 9, dtype=torch.long), "skip_logits": True},
    {"labels": None, "logits_to_keep": None, "return_dict": True},
)


@core
@every_family
@pytest.mark.parametrize("given", FOR_A_HEAD, ids=lambda given: "+".join(given))
def test_the_backbone_passes_over_what_is_a_head_s(family, given):
    model, ids = small_model(family).train(), tokens(2, 9)
    mask = left_padded(ids)
    expected = model.model(ids, attention_mask=mask).last_hidden_state
    got = model.model(ids, attention_mask=mask, **given).last_hidden_state
    assert torch.equal(got, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(x.sin().sum(), model.model.norm_f.weight) for x in (got, expected))
    assert torch.equal(grad, expected_grad)
    with pytest.raises(TypeError, match="unknown argument logits_to_kep=4: leave it out"):
        model.model(ids, logits_to_kep=4, **given)


@core
@torch.no_grad()
def test_a_renamed_argument_names_its_successor():
    model, ids = small_model("dense"), tokens(1, 5)
    for call in (model, model.model, model.generate, NemotronHForSequenceClassification(model.config)):
        with pytest.raises(TypeError, match=r"num_logits_to_keep=3 .* write logits_to_keep=3\."):
            call(ids, num_logits_to_keep=3)


class InTheRemoteCodesWay(NemotronHPreTrainedModel):
    base_model_prefix = "backbone"

    def __init__(self, config):
        super().__init__(config)
        self.backbone = NemotronHModel(config)
        self.post_init()


@core
@torch.no_grad()
def test_the_backbone_by_its_published_name():
    model, ids = small_model("dense"), tokens(2, 7)
    for one in (model, NemotronHForSequenceClassification(model.config), NemotronHForTokenClassification(model.config)):
        assert one.backbone is one.model and one.get_submodule("backbone.layers.0") is one.model.layers[0]
        assert not [name for name, _ in one.named_modules(remove_duplicate=False) if "backbone" in name]
        assert not [name for name in one.state_dict() if "backbone" in name]
    assert model.model.backbone is model.model
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.backbone is twin.model and twin.backbone is not model.model
    other, names = small_model("dense", seed=1), set(model.state_dict())
    model.backbone = other.backbone
    assert model.model is other.model and set(model.state_dict()) == names
    model.lm_head = other.lm_head
    assert torch.equal(model(ids).logits, other(ids).logits)
    own = InTheRemoteCodesWay(model.config)
    assert type(own.backbone) is NemotronHModel and own.base_model is own.backbone
    assert [name for name, _ in own.named_children()] == ["backbone"]
    peft = pytest.importorskip("peft")
    for settings in (
        peft.LoraConfig(r=2, target_modules=["in_proj"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ):
        assert peft.get_peft_model(other, settings).backbone is other.model


@core
@torch.no_grad()
def test_tuples_because_the_config_says_so():
    model, ids = small_model("dense"), tokens(2, 7)
    expected = model(ids, labels=ids)
    model.config.return_dict = False
    loss, logits, *_ = model(ids, labels=ids)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert torch.equal(model(ids, labels=ids, return_dict=True).logits, expected.logits)


# Sizes and dtypes that kernels do not like

ODD = {
    "vocab_size": 101,
    "hidden_size": 35,
    "intermediate_size": 47,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 11,
    "mamba_num_heads": 9,
    "mamba_head_dim": 7,
    "n_groups": 3,
    "ssm_state_size": 13,
    "conv_kernel": 3,
    "chunk_size": 5,
}
ODD_MOE = {
    "n_routed_experts": 9,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 23,
    "moe_shared_expert_intermediate_size": 37,
}


def odd_model(family: str, dtype: torch.dtype) -> NemotronHForCausalLM:
    extra = ODD_MOE if family in ("moe", "latent") else {}
    return small_model(family, dtype=dtype, **ODD, **extra, **({"moe_latent_size": 19} if family == "latent" else {}))


@core
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_family
def test_odd_sizes_in_every_dtype(family, dtype):
    ids = tokens(2, 13)
    model, exact = odd_model(family, dtype).train(), odd_model(family, torch.float64)
    # The same numbers, rounded once: what is left is the arithmetic's own error.
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    logits = model(ids).logits
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    expected = exact(ids).logits
    # The median over the positions: rounding moves a few tokens to other experts.
    error = ((logits - expected).abs().amax(-1) / expected.abs().amax()).median().item()
    # seen: 4e-7, 9e-3, 1e-3
    limit = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    assert error <= limit
    for name, gradient in gradients(model, logits.float().square().mean()).items():
        assert gradient.isfinite().all(), name


@core
@moe_families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_experts_implementation_is_the_same_function(family, dtype):
    """Widths that torch's grouped GEMM takes and widths that it refuses, forward and backward."""
    ids = tokens(2, 13)
    for make in (small_model, odd_model):
        model = make(family, dtype=dtype)
        results = {}
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            logits = model(ids).logits
            results[implementation] = logits.detach().double(), gradients(model, logits.sin().sum())
        limit = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        expected, expected_gradients = results.pop("eager")
        for implementation, (logits, got) in results.items():
            assert relative_difference(logits, expected, record=False) <= limit, implementation
            for name in got.keys() | expected_gradients.keys() if dtype != torch.bfloat16 else ():
                assert relative_difference(got[name], expected_gradients[name], record=False) <= limit, name


class Subclass(NemotronHForCausalLM):
    """A user's, in a file that says nothing of either interface."""


@core
def test_both_interfaces_can_be_set():
    """The library looks for them in the source of the model's file, where the layers are not."""
    ids, expected = tokens(2, 13), small_model("moe")
    for cls in (NemotronHForCausalLM, Subclass):
        model = cls(copy.deepcopy(expected.config)).double().eval()
        model.load_state_dict(expected.state_dict())
        model.set_attn_implementation("eager")
        model.set_experts_implementation("batched_mm")
        assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "batched_mm")
        assert relative_difference(model(ids).logits, expected(ids).logits) <= TOLERANCE


# Tracing


@pytest.mark.parametrize("family", ["dense", "latent"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_export(family, masked):
    model, ids = small_model(family), tokens(2, 13)
    inputs = {"attention_mask": left_padded(ids)} if masked else {}
    program = torch.export.export(model, (ids,), {"use_cache": False, **inputs}, strict=False)
    # other values than those it was traced with
    ids = tokens(2, 13, seed=5)
    if masked:
        inputs = {"attention_mask": left_padded(ids).flip(0, 1)}
    got = program.module()(ids, use_cache=False, **inputs).logits
    expected = model(ids, use_cache=False, **inputs).logits
    visible = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    assert relative_difference(got[visible], expected[visible]) <= TOLERANCE


@pytest.mark.parametrize("family", ["dense", "moe", "latent", "attention"])
def test_a_training_step_compiles_whole(family):
    model, ids = small_model(family).train(), tokens(2, 13)
    inputs = {"labels": ids, "attention_mask": left_padded(ids)}
    expected = model(ids, **inputs).loss
    expected_gradients = gradients(model, expected)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    loss = step(tokens(2, 13), **inputs).loss
    assert relative_difference(loss, expected, record=False) <= 1e-6  # the library's loss is float32
    assert_same_gradients(gradients(model, loss), expected_gradients)


def test_a_packed_training_step_compiles_whole():
    model, ids = small_model("dense").train(), tokens(2, 13)
    position_ids = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
    expected = model(ids, position_ids=position_ids).logits
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_difference(step(tokens(2, 13), position_ids=position_ids).logits, expected) <= TOLERANCE


# Copies, sizes, ties


@core
@every_family
@torch.no_grad()
def test_copies(family):
    model, ids = small_model(family), tokens(2, 9)
    expected = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        tied = model.config.tie_word_embeddings
        assert (twin.lm_head.weight is twin.model.embeddings.weight) == tied
        twin.model.embeddings.weight.zero_()
        assert torch.equal(model(ids).logits, expected)


@core
@pytest.mark.parametrize("family", ["dense", "tied"])
@torch.no_grad()
def test_resized_vocabulary(family, tmp_path):
    model, ids = small_model(family), tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(110)
    out = model(ids, labels=ids)
    assert model.config.vocab_size == 110 and out.logits.shape == (2, 9, 110)
    assert relative_difference(out.logits[..., :97], before) <= TOLERANCE
    assert torch.isfinite(out.loss)
    assert (model.lm_head.weight is model.model.embeddings.weight) == (family == "tied")
    model.save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert relative_difference(loaded(ids).logits, out.logits) <= TOLERANCE
    model.resize_token_embeddings(97)
    assert relative_difference(model(ids).logits, before) <= TOLERANCE


@core
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}])
def test_tied_embeddings_are_one_tensor_after_loading(options, tmp_path):
    small_model("tied", dtype=torch.float32).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = NemotronHForCausalLM.from_pretrained(tmp_path, **options)
    assert model.lm_head.weight is model.model.embeddings.weight
    model(tokens(1, 5)).logits.sum().backward()
    assert sum("embeddings" in name or "lm_head" in name for name, _ in model.named_parameters()) == 1


# Loading


def published_name(name: str) -> str:
    return name.replace("model.", "backbone.", 1) if name.startswith("model.") else name


def tensor_of_file(file: dict[str, Tensor], name: str, experts: int) -> Tensor:
    """The tensor that a file in the published layout has for a name in memory."""
    name = published_name(name)
    if not name.endswith(("experts.up_proj", "experts.down_proj")):
        return file[name]
    prefix, projection = name.rsplit(".", 1)
    return torch.stack([file[f"{prefix}.{expert}.{projection}.weight"] for expert in range(experts)])


@core
@pytest.mark.parametrize(
    "options",
    [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"dtype": torch.float64}],
    ids=str,
)
@pytest.mark.parametrize("family", ["dense", "latent", "tied"])
def test_nothing_is_initialised_over_what_was_loaded(family, options, tmp_path):
    small_model(family, dtype=torch.float32).save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    model = NemotronHForCausalLM.from_pretrained(tmp_path, **options)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        expected = tensor_of_file(file, name, getattr(model.config, "n_routed_experts", 0))
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    # Initialisation runs on a module of which one tensor is new, and must leave the others as they were loaded.
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in model.modules():
        model._init_weights(module)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@core
@pytest.mark.parametrize("cls", [NemotronHForSequenceClassification, NemotronHForTokenClassification])
def test_only_a_new_head_is_initialised(cls, tmp_path):
    small_model("latent", dtype=torch.float32).save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    model = cls.from_pretrained(tmp_path, num_labels=50)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, tensor_of_file(file, f"model.{name}", model.config.n_routed_experts)), name
    assert 0.5 < model.score.weight.std() / model.config.initializer_range < 2
    assert torch.isfinite(model(tokens(2, 5)).logits).all()


@core
@pytest.mark.parametrize("family", ["dense", "latent", "tied"])
@torch.no_grad()
def test_a_model_made_without_memory_takes_a_state_dict(family):
    model, ids = small_model(family), tokens(2, 9)
    with torch.device("meta"):
        empty = NemotronHForCausalLM(model.config)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


@core
@pytest.mark.parametrize("where", ["auto", "half on disk", "all on disk", "accelerate, cpu", "accelerate, disk"])
@pytest.mark.parametrize("family", ["dense", "latent", "tied"])
@torch.no_grad()
def test_offloaded_weights(family, where, tmp_path):
    """Weights that come in for a module's call alone give what weights in memory give."""
    plain, ids = small_model(family, dtype=torch.float32), tokens(2, 9)
    plain.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in plain.parameters())
    options = {
        "auto": {"device_map": "auto"},
        "half on disk": {"device_map": "auto", "max_memory": {"cpu": int(0.6 * size)}},
        "all on disk": {"device_map": {"": "disk"}},
    }.get(where, {})
    if "disk" in where:
        options["offload_folder"] = str(tmp_path / "offload")
    if where.startswith("accelerate"):
        model = NemotronHForCausalLM.from_pretrained(tmp_path / "model")
        if where.endswith("cpu"):
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, options["offload_folder"], execution_device="cpu")
    else:
        model = NemotronHForCausalLM.from_pretrained(tmp_path / "model", **options)
    if where == "half on disk":
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    if where != "auto":
        assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(ids).logits, plain(ids).logits)
    generation = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **generation), plain.generate(ids, **generation))


@core
def test_a_block_is_never_split_over_devices():
    """`x + mixer(norm(x))` has its two sides on one device."""
    model = small_model("latent", dtype=torch.float32)
    blocks = {name for name, module in model.named_modules() if isinstance(module, NemotronHBlock)}
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": sum(p.nbytes for p in model.parameters()) // 2, "disk": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    assert len(set(device_map.values())) == 2
    assert not [name for name in device_map if any(name.startswith(f"{block}.") for block in blocks)]
