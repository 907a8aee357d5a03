"""A model changed in any way between two decoded tokens: what is decoded is what the model now computes.

A few hundred changes drawn with a fixed seed, `EACH` of each kind, on plain, int8 and LoRA models. Before each of them
the one call for several layers (decoding.py) is seen to run, so that nothing passes by never using it; after it,
decoding equals a full forward of the changed model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from families import small_model, tokens
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from transformers.activations import ReLUSquaredActivation

from nemotron_h import NemotronHCache, modeling
from nemotron_h.layers.parts import NemotronHConv1d, NemotronHRMSNorm, NemotronHRMSNormGated
from nemotron_h.ops import native
from nemotron_h.quantization.int8_int4 import config_for

pytestmark = [pytest.mark.core, pytest.mark.skipif(native.library() is None, reason=native.reason())]

EACH = 25
IDS = tokens(1, 13)
FIRST = 9  # of the prompt
# Largest difference over largest logit between decoding and a full forward; a change that counts makes it far larger.
TOLERANCE = {"plain": 2e-4, "lora": 2e-4, "int8": 6e-2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    small_model("dense", torch.bfloat16, head_dim=16).save_pretrained(folder)
    made = {
        "plain": small_model("dense", torch.float32, head_dim=16),
        "int8": modeling.NemotronHForCausalLM.from_pretrained(
            folder, quantization_config=config_for("int8", folder, {})
        ).eval(),
    }
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    made["lora"] = peft.get_peft_model(copy.deepcopy(made["plain"]), config).eval()
    return made


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    counts: list[int] = []
    original = native.blocks
    monkeypatch.setattr(native, "blocks", lambda layers, count, x: (counts.append(count), original(layers, count, x)))
    return counts


@torch.no_grad()
def decoded(model: Any) -> torch.Tensor:
    cache = NemotronHCache(model.config)
    logits = [model(input_ids=IDS[:, :FIRST], past_key_values=cache).logits]
    logits += [model(input_ids=token, past_key_values=cache).logits for token in IDS[:, FIRST:].split(1, dim=1)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def whole(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# -- the kinds of change: each takes the backbone and a random generator, and may be a context -------------------------


def _layers(model: Any, *kinds: str) -> list[Any]:
    return [block.mixer for block in model.layers if block.block_type in kinds]


def _linears(model: Any) -> list[Any]:
    # The last of a name: PEFT's own layer is passed over for the linear inside it.
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]


def _plain_linears(model: Any) -> list[Any]:
    return [m for m in _linears(model) if m.weight.is_floating_point()]


def _speaking(model: Any) -> list[Any]:
    kinds = (modeling.NemotronHBlock, NemotronHRMSNorm, NemotronHRMSNormGated, modeling.NemotronHMLP, nn.Linear)
    return [m for n, m in model.named_modules() if isinstance(m, kinds) and "lora_" not in n]


def attribute(model: Any, draw: random.Random) -> None:
    mamba = draw.choice(_layers(model, "mamba"))
    draw.choice(
        [
            lambda: setattr(mamba, "time_step_limit", (0.3, 0.5 + draw.random())),
            lambda: setattr(mamba, "time_step_limit", [0.3, 0.5 + draw.random()]),
            lambda: setattr(mamba.norm, "variance_epsilon", 0.5 + draw.random()),
            lambda: setattr(mamba.norm, "n_groups", 1),
            lambda: setattr(mamba.conv1d, "activation", torch.tanh),
            lambda: setattr(draw.choice(model.layers).norm, "variance_epsilon", 1 + draw.random()),
            lambda: setattr(_layers(model, "attention")[0], "scaling", 2 + draw.random()),
            lambda: setattr(draw.choice(_layers(model, "mlp")), "act_fn", nn.Tanh()),
        ]
    )()


def parameter_in_place(model: Any, draw: random.Random) -> None:
    tensors = [p for n, p in model.layers.named_parameters() if p.is_floating_point() and "lora_" not in n]
    draw.choice(tensors).data.mul_(1.5 + draw.random()).add_(0.1)


def parameter_replaced(model: Any, draw: random.Random) -> None:
    modules = [
        m for m in model.layers.modules() if any(p.is_floating_point() for p in m._parameters.values() if p is not None)
    ]
    module = draw.choice(modules)
    name = draw.choice([n for n, p in module._parameters.items() if p is not None and p.is_floating_point()])
    setattr(module, name, nn.Parameter(module._parameters[name].detach() * 2 + 0.1, requires_grad=False))


def data_replaced(model: Any, draw: random.Random) -> None:
    """The same parameter, seeing other memory in another way."""
    tensor = draw.choice([m.weight for m in _linears(model)])
    n, k = tensor.shape
    doubled = tensor.data * 2 if tensor.is_floating_point() else tensor.data.flip(0)
    wide = doubled.new_zeros(n + 3, k + 5)
    wide[2 : n + 2, 1 : k + 1] = doubled
    views: list[Callable[[], torch.Tensor]] = [
        lambda: doubled.t().contiguous().t(),
        lambda: wide[2 : n + 2, 1 : k + 1],
        lambda: wide[:, 1 : k + 1].contiguous()[2 : n + 2],
        lambda: doubled.repeat(1, 2)[:, :k],
        lambda: doubled.flip(0),
    ]
    if tensor.is_floating_point():
        views.append(lambda: torch._neg_view(tensor.data))
        if n == k:
            views.append(lambda: tensor.data.t())
    tensor.data = draw.choice(views)()


def bias(model: Any, draw: random.Random) -> None:
    linear = draw.choice(_linears(model))
    value = torch.randn(linear.out_features, generator=torch.Generator().manual_seed(draw.randrange(99)))
    linear.bias = nn.Parameter(value.to(model.dtype) * 2, requires_grad=False)


def forward_hook(model: Any, draw: random.Random) -> Any:
    module = draw.choice(_speaking(model))
    factor = 1.5 + draw.random()
    return module.register_forward_hook(lambda m, args, out: out * factor)


def forward_pre_hook(model: Any, draw: random.Random) -> Any:
    module = draw.choice([m for m in _speaking(model) if not isinstance(m, NemotronHRMSNorm)])  # which undoes a factor
    factor = 1.5 + draw.random()
    return module.register_forward_pre_hook(lambda m, args: (args[0] * factor + 0.1, *args[1:]))


def global_hook(model: Any, draw: random.Random) -> Any:
    wanted, factor = draw.choice(_speaking(model)), 1.5 + draw.random()
    if draw.random() < 0.5:
        return register_module_forward_hook(lambda m, args, out: out * factor if m is wanted else None)
    return register_module_forward_pre_hook(
        lambda m, args: (args[0] * factor + 0.1, *args[1:]) if m is wanted else None
    )


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def class_patch(model: Any, draw: random.Random) -> Any:
    classes = [modeling.NemotronHMLP, modeling.NemotronHBlock, modeling.NemotronHMamba2Mixer, NemotronHRMSNorm,
               NemotronHRMSNormGated, ReLUSquaredActivation, nn.Linear]  # fmt: skip
    classes += [type(m) for m in _linears(model)]
    cls = draw.choice(classes)
    forward, factor = cls.forward, 1.5 + draw.random()
    if draw.random() < 0.25:  # as tracers do: the way into every module
        name = draw.choice(["__call__", "_call_impl"])
        call = getattr(nn.Module, name)
        module = draw.choice([m for m in _speaking(model) if not isinstance(m, modeling.NemotronHBlock)])

        def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = call(self, *args, **kwargs)
            return result * factor if self is module else result

        return _patched(nn.Module, name, watched)
    return _patched(cls, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * factor)


def instance_patch(model: Any, draw: random.Random) -> None:
    module, factor = draw.choice(_speaking(model)), 1.5 + draw.random()
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * factor


class _Scaled(nn.Module):
    def __init__(self, inner: nn.Module, factor: float):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner(*args, **kwargs) * self.factor


class _Steered(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.7


def module_replaced(model: Any, draw: random.Random) -> None:
    mixer = draw.choice(_layers(model, "mamba", "mlp", "attention"))
    name = draw.choice([n for n, m in mixer.named_children() if n != "conv1d"])
    child, factor = getattr(mixer, name), 1.5 + draw.random()
    if type(child) is nn.Linear and draw.random() < 0.5:
        child.__class__ = _Steered
    elif name == "norm":
        child.weight = nn.Parameter(child.weight.detach() * factor, requires_grad=False)
    else:
        setattr(mixer, name, _Scaled(child, factor))


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def parametrised(model: Any, draw: random.Random) -> None:
    candidates = _plain_linears(model.layers) or [
        m for m in model.modules() if isinstance(m, (NemotronHRMSNorm, NemotronHConv1d))
    ]
    module = draw.choice([*candidates, *(m for m in model.modules() if isinstance(m, NemotronHConv1d))])
    if draw.random() < 0.5:
        parametrize.register_parametrization(module, "weight", _Doubled())
    else:
        prune.random_unstructured(module, "weight", amount=0.5)


def pruned(model: Any, draw: random.Random) -> None:
    """Fewer features inside an MLP or fewer heads, while every attribute says what it said."""
    mixer = draw.choice(_layers(model, "mlp"))
    keep = draw.randrange(8, 40)
    with torch.no_grad():
        for linear, dim in ((mixer.up_proj, 0), (mixer.down_proj, 1)):
            linear.weight = nn.Parameter(linear.weight.narrow(dim, 0, keep).clone(), requires_grad=False)
            if dim == 0 and "weight_scale" in linear._parameters:
                linear.weight_scale = nn.Parameter(linear.weight_scale[:keep].clone(), requires_grad=False)


class _Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 1.2 if func is F.linear or func is torch.rsqrt else result


def function_patch(model: Any, draw: random.Random) -> Any:
    if draw.random() < 0.3:
        return _Watching()
    name, factor = draw.choice(["linear", "relu", "silu", "softplus"]), 1.2 + draw.random() / 2
    function = getattr(F, name)
    return _patched(F, name, lambda *args, **kwargs: function(*args, **kwargs) * factor)


def harmless(model: Any, draw: random.Random) -> Any:
    """What looks on and changes nothing."""
    module = draw.choice(_speaking(model))
    return draw.choice(
        [
            lambda: module.register_full_backward_hook(lambda *_: None),
            lambda: module.register_full_backward_pre_hook(lambda *_: None),
            lambda: module.register_forward_hook(lambda *_: None),
            lambda: setattr(module, "a_note", 1),
            lambda: model.train() and None,
            lambda: model.requires_grad_(False) and None,
        ]
    )()


# A change that must show, unless it is named here; where int8 has no such parameters it is left out below.
HARMLESS = {harmless}
KINDS = [
    *(attribute, parameter_in_place, parameter_replaced, data_replaced, bias, forward_hook, forward_pre_hook),
    *(global_hook, class_patch, instance_patch, module_replaced, parametrised, pruned, function_patch, harmless),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("which", ["plain", "int8", "lora"])
def test_decoding_is_of_the_model_as_it_is(which, kind, models, runs):
    draw = random.Random(f"{which} {kind.__name__}")
    worst = shown = 0.0
    for number in range(EACH):
        model = copy.deepcopy(models[which])
        runs.clear()
        before = decoded(model)
        assert sum(runs) >= (3 if which == "lora" else 4) * (len(IDS[0]) - FIRST - 1), "the one call did not run"
        backbone = (model.get_base_model() if which == "lora" else model).model
        with ExitStack() as stack:
            done = kind(backbone, draw)
            if hasattr(done, "remove"):
                stack.callback(done.remove)
            elif done is not None:
                stack.enter_context(done)
            after, wanted = decoded(model), whole(model)
        worst, shown = max(worst, gap(after, wanted)), shown + (gap(wanted, before) > 3 * TOLERANCE[which])
        assert gap(after, wanted) <= TOLERANCE[which], f"change {number}"
    assert kind in HARMLESS or shown >= EACH / 2, f"only {shown} of {EACH} changes show"
