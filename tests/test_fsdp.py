"""FSDP2: two processes are one, in loss, gradients and the saved state, by accelerate and by transformers."""

from pathlib import Path

import pytest
import torch
from families import small_model, tokens
from processes import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from nemotron_h.parallel import keep_float32

FAMILIES = ("dense", "moe", "latent", "tied")
# An older transformers gives float32 parameters no FSDP2 groups of their own, and shards a model of one dtype alone.
NATIVE = [torch.float32, torch.bfloat16] if hasattr(PreTrainedModel, "_resolve_parallel_plans") else [torch.float32]
WIDE = {"hidden_size": 40, "vocab_size": 98}


def model_of(family, dtype=torch.float32):
    return small_model(family, dtype=dtype, **WIDE).train()


def batch():
    ids = tokens(2, 15)
    return {"input_ids": ids, "labels": ids}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def half(rank):
    """Each process has one row; the mean of the two losses is the loss of both rows."""
    return {name: value[rank : rank + 1] for name, value in batch().items()}


def accelerated(precision="no"):
    """accelerate shards on accelerators alone: on a CPU its state is told that FSDP was asked for."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if precision != "no":
        plugin.set_mixed_precision(precision)
    return accelerator


def train_step(accelerator, model, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss = model(**half(rank)).loss
    accelerator.backward(loss)
    found = {"loss": loss.item(), "gradients": gradients(model)}
    optimizer.step()
    return model, found


def in_two(rank, folder):
    found = {}
    for family in FAMILIES:
        accelerator = accelerated()
        model, found[family] = train_step(accelerator, model_of(family), rank)
        found[family]["sharded"] = all(hasattr(p, "full_tensor") for p in model.parameters())
        state = accelerator.get_state_dict(model)
        if rank == 0:
            accelerator.unwrap_model(model).save_pretrained(folder / f"{family} trained", state_dict=state)
    accelerator.save_state(folder / "state")
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(folder / "state")
    found["resumed"] = all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())

    found["mixed"] = mixed(rank)
    try:
        train_step(accelerated(), model_of("dense").to(torch.bfloat16), rank)
    except AssertionError as error:
        found["refused"] = str(error)
    for dtype in NATIVE:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "latent", dtype=dtype, distributed_config=DistributedConfig(fsdp_size=2)
        ).train()
        loss = model(**half(rank)).loss
        loss.backward()
        found[dtype] = {"loss": loss.item(), "gradients": gradients(model)}
    model.save_pretrained(folder / "latent saved")
    return found


def record_dtypes(model):
    """The dtypes that the forwards will see, filled in when they run."""
    seen = {}

    def in_proj(mixer):
        return lambda part, args: seen.update(A_log=mixer.A_log.dtype, in_proj=part.weight.dtype)

    for module in model.modules():
        if hasattr(module, "A_log"):
            module.in_proj.register_forward_pre_hook(in_proj(module))
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_pre_hook(lambda part, args: seen.update(gate=part.weight.dtype))
    return seen


def mixed(rank):
    """float32 parameters beside bfloat16 ones, and float32 ones of which most are gathered in bfloat16."""
    found = {}
    for precision, dtype in (("no", torch.bfloat16), ("bf16", torch.float32)):
        accelerator = accelerated(precision)
        model = model_of("latent").to(dtype)
        policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        keep_float32(model, **({"mp_policy": policy} if precision == "bf16" else {}))
        seen = record_dtypes(model)
        _, found[precision] = train_step(accelerator, model, rank)
        found[precision]["seen"] = seen
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    for family in FAMILIES:
        model_of(family).save_pretrained(folder / family)
    return folder, launch(in_two, folder)


def in_one(family, dtype=torch.float32):
    """What both processes have on average, from one process: each row's loss, and the gradients of their mean."""
    model = model_of(family).to(dtype)
    losses = []
    for rank in range(2):
        loss = model(**half(rank)).loss
        (loss / 2).backward()
        losses.append(loss.item())
    return losses, gradients(model)


def assert_same(ranks, losses, expected, tolerance):
    for rank, found in enumerate(ranks):
        assert found["loss"] == pytest.approx(losses[rank], rel=tolerance)
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert found["gradients"][name].dtype == gradient.dtype, name
            difference = (found["gradients"][name] - gradient).abs().max()
            assert difference <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_shards_every_parameter_and_trains_as_one_process(family, runs):
    folder, ranks = runs
    losses, expected = in_one(family)
    assert_same([rank[family] for rank in ranks], losses, expected, 1e-5)
    assert all(rank[family]["sharded"] for rank in ranks)
    stepped = model_of(family)
    with torch.no_grad():
        for name, parameter in stepped.named_parameters():
            parameter -= 0.1 * expected[name]
    stepped.save_pretrained(folder / f"{family} expected")
    expected, found = (load_file(folder / f"{family} {name}" / "model.safetensors") for name in ("expected", "trained"))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_sharded_state_is_saved_and_loaded_back(runs):
    assert all(rank["resumed"] for rank in runs[1])


def test_float32_parameters_stay_float32_beside_bfloat16(runs):
    _, ranks = runs
    for rank in ranks:
        for precision in ("no", "bf16"):
            seen = rank["mixed"][precision]["seen"]
            assert seen == {"A_log": torch.float32, "gate": torch.float32, "in_proj": torch.bfloat16}, precision
        assert "uniform original parameter dtype" in rank["refused"]  # without keep_float32
    losses, expected = in_one("latent", torch.bfloat16)
    # each row alone is the same arithmetic; bfloat16 gradients are summed over the processes in bfloat16
    assert [rank["mixed"]["no"]["loss"] for rank in ranks] == losses
    assert_same([rank["mixed"]["no"] for rank in ranks], losses, expected, 0.02)


def test_transformers_own_fsdp2(runs):
    folder, ranks = runs
    for dtype in NATIVE:
        losses, expected = in_one("latent", dtype)
        assert_same([rank[dtype] for rank in ranks], losses, expected, 1e-5 if dtype == torch.float32 else 0.02)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("latent", "latent saved"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].to(after[name].dtype), after[name]), name


def test_the_example_is_a_configuration_of_accelerate():
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    # refuses keys that it does not know
    config = ClusterConfig.from_yaml_file(Path(__file__).parents[1] / "examples" / "fsdp.yaml")
    settings = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    wrapped = settings.pop("transformer_layer_cls_to_wrap")
    version = settings.pop("version")
    settings |= {"cpu_offload": settings.pop("offload_params"), "fsdp_version": version}
    plugin = FullyShardedDataParallelPlugin(**settings, transformer_cls_names_to_wrap=[wrapped])
    plugin.set_auto_wrap_policy(model_of("dense"))
    assert [kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]] == ["NemotronHBlock"]
