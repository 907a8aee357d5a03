"""Megatron's checkpoints, both kinds: layouts by an oracle that goes index by index, round trips, and wrong inputs."""

import argparse
import enum
import json
import pickle
import shutil
import sys
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from families import small_config, tokens
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from transformers import AutoModelForCausalLM

from nemotron_h import NemotronHConfig
from nemotron_h.checkpoints import formats, megatron, published
from nemotron_h.checkpoints.megatron import ranks as rank_files
from nemotron_h.checkpoints.writing import convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Sizes that eight ranks can share out; two KV heads, which is fewer than ranks.
DIVISIBLE = {"mamba_num_heads": 16, "mamba_head_dim": 4, "n_groups": 8, "num_attention_heads": 8, "head_dim": 4}
MTP = {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E"}
CASES = {"dense": {}, "moe": {}, "latent": MTP, "tied": {}}
KINDS = ("megatron", "megatron-legacy")
FLOAT32 = ("A_log", ".D", "dt_bias", "e_score_correction_bias")


def config_of(family, **overrides):
    return small_config(family, **{**DIVISIBLE, **CASES[family], "dtype": "bfloat16", **overrides})


def random_tensors(config, seed=0):
    """Published tensors, every element another number."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
        for name, shape in published.tensors(config).items()
    }


def write_folder(folder, config, tensors):
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(params=list(CASES))
def model(request, tmp_path):
    config = config_of(request.param)
    tensors = random_tensors(config)
    return config, tensors, write_folder(tmp_path / "hf", config, tensors)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_announced_mtp_that_is_not_there(kind, tmp_path):
    config = config_of("latent")
    tensors = {name: t for name, t in random_tensors(config).items() if not name.startswith("mtp.")}
    folder = write_folder(tmp_path / "hf", config, tensors)
    conversion = formats.conversion(folder, kind)
    assert "has no mtp.* tensors, which its config announces" in conversion.remarks[0]
    convert(conversion, tmp_path / "theirs")
    convert(formats.conversion(tmp_path / "theirs", "huggingface"), tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert not NemotronHConfig.from_pretrained(tmp_path / "back").has_mtp


# -- the oracle: Megatron's layout, written down row by row ------------------------------------------------------------


def oracle_qkv(config, q, k, v):
    """For each KV head its query heads one after the other, then its key head, then its value head."""
    rows, size = [], config.head_dim
    per_group = config.num_attention_heads // config.num_key_value_heads
    for group in range(config.num_key_value_heads):
        for head in range(group * per_group, (group + 1) * per_group):
            for d in range(size):
                rows.append(q[head * size + d])
        for d in range(size):
            rows.append(k[group * size + d])
        for d in range(size):
            rows.append(v[group * size + d])
    return torch.stack(rows)


def oracle_mamba_rows(config, rank, ranks, first="z"):
    """Which rows of the published in_proj (from z on) or conv1d (from x on) a rank has."""
    d, states = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
    sizes = {"z": d, "x": d, "B": states, "C": states, "dt": config.mamba_num_heads}
    names = ["z", "x", "B", "C", "dt"] if first == "z" else ["x", "B", "C"]
    rows, start = [], 0
    for name in names:
        piece = sizes[name] // ranks
        for i in range(piece):
            rows.append(start + rank * piece + i)
        start += sizes[name]
    return rows


def oracle_rank(config, tensors, rank, ranks, experts="grouped", expert_ranks=None, padded=None):
    """The state dict of one rank."""
    expert_ranks = ranks if expert_ranks is None else expert_ranks
    padded = padded or -(-config.vocab_size // (128 * ranks)) * 128 * ranks

    def rows(tensor, n=ranks):
        size = tensor.shape[0] // n
        return torch.stack([tensor[(rank % n) * size + i] for i in range(size)])

    def columns(tensor, n=ranks):
        size = tensor.shape[1] // n
        return torch.stack([tensor[:, (rank % n) * size + i] for i in range(size)], dim=1)

    def vocabulary(tensor):
        zero = torch.zeros(tensor.shape[1], dtype=tensor.dtype)
        return rows(torch.stack([*tensor, *[zero] * (padded - len(tensor))]))

    model = {}

    def layer(ours, theirs, kind):
        get, norm = (lambda name: tensors[f"{theirs}mixer.{name}"]), tensors[f"{theirs}norm.weight"]
        if kind == "mamba":
            model[f"{ours}mixer.in_proj.layer_norm_weight"] = norm
            model[f"{ours}mixer.in_proj.weight"] = get("in_proj.weight")[oracle_mamba_rows(config, rank, ranks)]
            for name in ("weight", "bias"):
                model[f"{ours}mixer.conv1d.{name}"] = get(f"conv1d.{name}")[oracle_mamba_rows(config, rank, ranks, "x")]
            for name in ("dt_bias", "A_log", "D", "norm.weight"):
                model[f"{ours}mixer.{name}"] = rows(get(name))
            model[f"{ours}mixer.out_proj.weight"] = columns(get("out_proj.weight"))
        elif kind == "attention":
            model[f"{ours}self_attention.linear_qkv.layer_norm_weight"] = norm
            whole = oracle_qkv(config, *(get(f"{name}_proj.weight") for name in "qkv"))
            model[f"{ours}self_attention.linear_qkv.weight"] = rows(whole)
            model[f"{ours}self_attention.linear_proj.weight"] = columns(get("o_proj.weight"))
        elif kind == "mlp":
            model[f"{ours}mlp.linear_fc1.layer_norm_weight"] = norm
            model[f"{ours}mlp.linear_fc1.weight"] = rows(get("up_proj.weight"))
            model[f"{ours}mlp.linear_fc2.weight"] = columns(get("down_proj.weight"))
        else:
            model[f"{ours}pre_mlp_layernorm.weight"] = norm
            model[f"{ours}mlp.router.weight"] = get("gate.weight")
            model[f"{ours}mlp.router.expert_bias"] = get("gate.e_score_correction_bias")
            for i in range(config.n_routed_experts):
                up, down = (get(f"experts.{i}.{name}_proj.weight") for name in ("up", "down"))
                for linear, value in {"fc1": rows(up, expert_ranks), "fc2": columns(down, expert_ranks)}.items():
                    name = f"linear_{linear}.weight{i}"
                    if experts == "sequential":
                        name = f"local_experts.{i}.linear_{linear}.weight"
                    model[f"{ours}mlp.experts.{name}"] = value
            model[f"{ours}mlp.shared_experts.linear_fc1.weight"] = rows(get("shared_experts.up_proj.weight"))
            model[f"{ours}mlp.shared_experts.linear_fc2.weight"] = columns(get("shared_experts.down_proj.weight"))
            if config.moe_latent_size:
                for name in ("fc1_latent_proj.weight", "fc2_latent_proj.weight"):
                    model[f"{ours}mlp.{name}"] = get(name)

    model["embedding.word_embeddings.weight"] = vocabulary(tensors["backbone.embeddings.weight"])
    for index, kind in enumerate(config.layers_block_type):
        layer(f"decoder.layers.{index}.", f"backbone.layers.{index}.", kind)
    model["decoder.final_norm.weight"] = tensors["backbone.norm_f.weight"]
    if not config.tie_word_embeddings:
        model["output_layer.weight"] = vocabulary(tensors["lm_head.weight"])
    for depth in range(config.num_nextn_predict_layers):
        for i, kind in enumerate(config.mtp_layers_block_type):
            index = depth * len(config.mtp_layers_block_type) + i
            layer(f"mtp.layers.{depth}.mtp_model_layer.layers.{i}.", f"mtp.layers.{index}.", kind)
        for name in ("enorm", "hnorm"):
            model[f"mtp.layers.{depth}.{name}.weight"] = tensors[f"mtp.layers.{2 * depth}.{name}.weight"]
        model[f"mtp.layers.{depth}.eh_proj.weight"] = rows(tensors[f"mtp.layers.{2 * depth}.eh_proj.weight"])
        last = f"mtp.layers.{2 * depth + 1}.final_layernorm.weight"
        model[f"mtp.layers.{depth}.final_layernorm.weight"] = tensors[last]
    return model


def oracle_dist(config, tensors, experts="grouped"):
    """The tensors of a distributed checkpoint."""
    d, states = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
    starts = {"z": 0, "x": d, "B": 2 * d, "C": 2 * d + states, "dt": 2 * d + 2 * states}
    ends = [*list(starts.values())[1:], 2 * d + 2 * states + config.mamba_num_heads]
    model, stacks = {}, {}
    for name, tensor in oracle_rank(config, tensors, 0, 1).items():
        if name.endswith("in_proj.weight"):
            for (part, start), end in zip(starts.items(), ends, strict=True):
                model[f"{name}.{part}"] = tensor[start:end]
        elif ".conv1d." in name:
            for part, start, end in (("x", 0, d), ("B", d, d + states), ("C", d + states, d + 2 * states)):
                model[f"{name}.{part}"] = tensor[start:end]
        elif ".experts.linear_" in name:
            base, _, expert = name.rpartition(".weight")
            if experts == "sequential":
                model[base.replace(".experts.", f".experts.experts.{expert}.") + ".weight"] = tensor
            else:
                stacks.setdefault(base.replace(".experts.", ".experts.experts.") + ".weight", []).append(tensor)
        else:
            model[name] = tensor
    return model | {name: torch.stack(parts) for name, parts in stacks.items()}


# -- layouts and round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_rank_has_what_the_oracle_says(model, tmp_path, ranks):
    config, tensors, folder = model
    experts = "sequential" if ranks == 4 else "grouped"
    parts = 1 if ranks == 2 else ranks
    options = {"tensor_parallel": ranks, "experts": experts, "expert_tensor_parallel": parts}
    convert(rank_files.from_huggingface(folder, **options), tmp_path / "m")
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    for rank in range(ranks):
        path = tmp_path / "m" / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, weights_only=True)  # the plain way, not mapped
        same(contents["model"], oracle_rank(config, tensors, rank, ranks, experts, parts))
        assert contents["args"].tensor_model_parallel_size == ranks and contents["checkpoint_version"] == 3.0
    assert len(list((tmp_path / "m" / "iter_0000001").iterdir())) == ranks


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
def test_torch_reads_a_distributed_checkpoint_as_the_oracle_has_it(model, tmp_path, experts):
    config, tensors, folder = model
    convert(megatron.from_huggingface(folder, experts=experts, shard_bytes=20_000), tmp_path / "m")
    inner = tmp_path / "m" / "iter_0000001"
    assert len(list(inner.glob("*.distcp"))) > 1
    assert sorted(path.name for path in inner.iterdir() if not path.name.endswith(".distcp")) == [
        ".metadata", "common.pt", "metadata.json"
    ]  # fmt: skip
    expected = oracle_dist(config, tensors, experts)
    index = dcp.FileSystemReader(inner).read_metadata()
    assert index.state_dict_metadata.keys() == expected.keys()
    for where, info in index.storage_data.items():  # nothing but the tensor, or its one expert, and the zip around it
        experts_in_it = len(expected[where.fqn]) if len(where.offset) == 3 and "experts.linear" in where.fqn else 1
        assert info.length < expected[where.fqn].nbytes / experts_in_it + 2500, where
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=inner, no_dist=True)
    same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_way_back_loses_nothing(model, tmp_path, kind, ranks):
    _, tensors, folder = model
    convert(formats.conversion(folder, kind, tensor_parallel=ranks), tmp_path / "m")
    assert formats.detect(tmp_path / "m") == kind
    conversion = formats.conversion(tmp_path / "m", "huggingface", shard_bytes=30_000)
    convert(conversion, tmp_path / "back")
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= load_file(file)
    same(found, tensors)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert not conversion.remarks


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_and_arguments_are_enough(tmp_path, kind):
    config = config_of("latent")
    folder = write_folder(tmp_path / "hf", config, random_tensors(config))
    convert(formats.conversion(folder, kind, tensor_parallel=2), tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    convert(formats.conversion(tmp_path / "m", "huggingface"), tmp_path / "back")
    ids = tokens(2, 19)
    before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, tmp_path / "back"))
    assert equal(before, after)


# -- what others write ----------------------------------------------------------------------------------------------


def save_ranks(folder, models, args):
    for rank, model in enumerate(models):
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        contents = {"model": model, "args": args, "iteration": 7, "optimizer": {"exp_avg": torch.ones(3)}}
        torch.save(contents, folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")


def fake_megatron(monkeypatch):
    """Classes of a module that is gone when the file is read."""
    module = types.ModuleType("megatron_that_is_not_here")
    module.ModelType = enum.Enum("ModelType", "encoder encoder_and_decoder", module=module.__name__)
    module.SavePlan = type("SavePlan", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def real_args(config, ranks, **more):
    """Arguments as a training run has them, typed here by Megatron's names."""
    return argparse.Namespace(
        hybrid_override_pattern="|".join([config.hybrid_override_pattern[:3], config.hybrid_override_pattern[3:]]),
        mtp_hybrid_override_pattern=config.mtp_hybrid_override_pattern if config.has_mtp else None,
        mtp_num_layers=config.num_nextn_predict_layers or None,
        hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size, kv_channels=config.head_dim,
        num_attention_heads=config.num_attention_heads, group_query_attention=True,
        num_query_groups=config.num_key_value_heads, norm_epsilon=1e-5, normalization="RMSNorm", squared_relu=True,
        mamba_state_dim=config.ssm_state_size, mamba_head_dim=config.mamba_head_dim,
        mamba_num_heads=config.mamba_num_heads, mamba_num_groups=config.n_groups,
        num_experts=config.n_routed_experts, moe_router_topk=config.num_experts_per_tok,
        moe_ffn_hidden_size=config.moe_intermediate_size, moe_latent_size=config.moe_latent_size,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_router_num_groups=config.n_group, moe_router_group_topk=config.topk_group,
        moe_router_topk_scaling_factor=config.routed_scaling_factor, moe_router_score_function="sigmoid",
        untie_embeddings_and_output_weights=True, position_embedding_type="none", add_bias_linear=False,
        max_position_embeddings=512, params_dtype=torch.bfloat16, padded_vocab_size=128 * ranks, vocab_size=None,
        tensor_model_parallel_size=ranks, pipeline_model_parallel_size=1, expert_model_parallel_size=1, **more,
    )  # fmt: skip


def test_a_training_run_in_files_per_rank_is_read(tmp_path, monkeypatch):
    """New and old names, norms that are not fused, states to be left, padding that is not zero, Megatron's classes."""
    config = config_of("latent")
    tensors = random_tensors(config)
    models = []
    for rank in range(2):
        model = {}
        for name, tensor in oracle_rank(config, tensors, rank, 2, "sequential", padded=256).items():
            name = name.replace("conv1d.weight", "conv1d_weight").replace("conv1d.bias", "conv1d_bias")
            name = name.replace("mixer.in_proj.layer_norm_weight", "norm.weight")
            name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
            name = name.replace("final_norm", "final_layernorm")
            if name in ("embedding.word_embeddings.weight", "output_layer.weight") and rank == 1:
                assert not tensor.any()  # 97 tokens, 128 rows a rank: rank 1 has padding alone
                tensor = torch.full_like(tensor, 3.0)
            model["module." + name] = tensor
            if name.endswith("linear_proj.weight"):
                model["module." + name.replace("weight", "_extra_state")] = torch.zeros(5, dtype=torch.uint8)
        model["module.decoder.layers.0.mixer.in_proj._extra_state"] = None
        models.append(model)
    fake = fake_megatron(monkeypatch)
    save_ranks(tmp_path / "m" / "iter_0000007", models, real_args(config, 2, model_type=fake.ModelType.encoder))
    monkeypatch.delitem(sys.modules, fake.__name__)
    (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_text("7")
    conversion = formats.conversion(tmp_path / "m", "huggingface", vocab_size=97)
    assert set(conversion.plan.unused.values()) == {"rank 0 has the same", "the state of TransformerEngine"}
    convert(conversion, tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    found = NemotronHConfig.from_pretrained(tmp_path / "back")
    assert found.dtype == torch.bfloat16 and found.architectures == ["NemotronHForCausalLM"]
    assert (found.vocab_size, found.num_nextn_predict_layers) == (97, 2)
    # Without the tokenizer's size the padded rows stay, and it is said.
    padded = formats.conversion(tmp_path / "m", "huggingface")
    assert "padded vocabulary of 256 is kept" in padded.remarks[0]
    assert padded.plan.entries[0].spec.shape == (256, 32)


def save_chunks(folder, ranks):
    """A distributed checkpoint as `ranks` write it: each a dict of name -> (shape over all, [(offsets, tensor)])."""

    class Planner(dcp.DefaultSavePlanner):
        def resolve_data(self, item):
            return data[item.index.fqn, tuple(item.index.offset)]

    writer, data, metadata, results = dcp.FileSystemWriter(folder), {}, Metadata({}), []
    plans = []
    for rank in ranks:
        items = []
        for name, (shape, chunks) in rank.items():
            for offsets, tensor in chunks:
                chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
                properties = TensorProperties(tensor.dtype)
                empty = TensorStorageMetadata(properties, torch.Size(shape), [])
                metadata.state_dict_metadata.setdefault(name, empty).chunks.append(chunk)
                index = MetadataIndex(name, torch.Size(offsets))
                item = TensorWriteData(chunk, properties, torch.Size(shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=item))
                data[name, tuple(offsets)] = tensor.contiguous()
        plans.append(dcp.SavePlan(items))
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, Planner()).wait() for plan in plans]
    writer.finish(metadata, results)


def test_a_distributed_checkpoint_in_pieces_is_read(tmp_path, monkeypatch):
    """Two ranks, pieces that cut experts and columns, NeMo's folder and prefix, states to be left, no arguments."""
    config = config_of("latent")
    tensors = random_tensors(config)
    ranks = [{}, {}]
    for name, tensor in oracle_dist(config, tensors).items():
        stored = "module." + name
        axis = 2 if name.endswith("linear_fc2.weight") and tensor.dim() == 3 else tensor.dim() - 1
        half = tensor.shape[axis] // 2
        for rank in range(2):
            piece = tensor.narrow(axis, rank * half, half)
            offsets = [0] * tensor.dim()
            offsets[axis] = rank * half
            if tensor.dim() == 3 and ".experts.experts." in name:  # a chunk per expert as well
                chunks = [([i, *offsets[1:]], piece[i : i + 1]) for i in range(len(piece))]
            else:
                chunks = [(offsets, piece)]
            ranks[rank][stored] = tuple(tensor.shape), chunks
    ranks[0]["optimizer.state.exp_avg.module.decoder.layers.0.mlp.experts.experts.linear_fc1.weight"] = (
        (3,), [([0], torch.ones(3))],
    )  # fmt: skip
    ranks[1]["module.decoder.layers.0.mixer.in_proj._extra_state"] = ((3,), [([0], torch.ones(3))])
    folder = tmp_path / "nemo" / "weights"
    save_chunks(folder, ranks)
    fake = fake_megatron(monkeypatch)
    index = dcp.FileSystemReader(folder).read_metadata()
    index.planner_data = {"plans": [fake.SavePlan()]}  # older Megatrons leave objects of their own there
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.delitem(sys.modules, fake.__name__)
    with pytest.raises(ValueError, match=r"no Megatron arguments and no config.json; name the model's with --config"):
        formats.conversion(tmp_path / "nemo", "huggingface")
    config.save_pretrained(tmp_path / "config")
    conversion = formats.conversion(tmp_path / "nemo", "huggingface", config=tmp_path / "config" / "config.json")
    assert sorted(conversion.plan.unused.values()) == ["the state of TransformerEngine", "the state of an optimizer"]
    convert(conversion, tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


@pytest.mark.parametrize("spelling", ["local_experts.{i}.{linear}.weight", "{linear}.weight{i}", "all in one piece"])
def test_a_checkpoint_that_torch_saves_is_read_with_a_prefix_and_any_spelling_of_experts(tmp_path, spelling):
    config = config_of("moe")
    tensors = random_tensors(config)
    state = {}
    for name, tensor in oracle_dist(config, tensors).items():
        if ".experts.experts." in name and spelling != "all in one piece":
            base, linear = name.removesuffix(".weight").split("experts.experts.")
            for i, expert in enumerate(tensor):
                state[f"model.{base}experts." + spelling.format(i=i, linear=linear)] = expert.clone()
        else:
            state["model." + name] = tensor.clone()
    state["rng_state"] = {"torch": torch.ones(2)}
    dcp.save(state, checkpoint_id=tmp_path / "m", no_dist=True)
    torch.save({"args": real_args(config, 1)}, tmp_path / "m" / "common.pt")
    convert(formats.conversion(tmp_path / "m", "huggingface", vocab_size=97), tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_nothing_that_a_file_names_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (__import__("os").mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        megatron.DistFolder(tmp_path / "m")
    save_ranks(tmp_path / "r", [{"a": torch.ones(2)}], Trap())
    assert "mp_rank_00/a" in rank_files.RankFolders(tmp_path / "r").specs
    assert not (tmp_path / "ran").exists()


# -- wrong inputs ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def broken(request, tmp_path):
    """A checkpoint of two ranks that can be written anew with its tensors changed."""
    config = config_of("moe")
    tensors = random_tensors(config)
    config.save_pretrained(tmp_path / "config")

    def write(change=lambda state: None):
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        if request.param == "megatron":
            state = {name: tensor.clone() for name, tensor in oracle_dist(config, tensors, "sequential").items()}
            change(state)
            dcp.save(state, checkpoint_id=folder, no_dist=True)
        else:
            models = [oracle_rank(config, tensors, rank, 2) for rank in range(2)]
            change(models[1])
            save_ranks(folder, models, None)
        return folder

    write.kind, write.config = request.param, tmp_path / "config" / "config.json"
    return write


def refused(write, tmp_path, match):
    with pytest.raises(ValueError, match=match) as error:
        conversion = formats.conversion(tmp_path / "m", "huggingface", config=write.config)
        convert(conversion, tmp_path / "back")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "back").exists()


def test_a_tensor_that_is_missing_too_many_or_of_another_shape_is_named(broken, tmp_path):
    expert = r"mlp\.experts\.(experts\.7\.linear_fc1\.weight|linear_fc1\.weight7)"

    def drop(state):
        del state[next(name for name in state if "fc1" in name and "7" in name)]

    broken(drop)
    refused(broken, tmp_path, rf"lacks the tensor \S*decoder\.layers\.1\.{expert}, which its config asks for")

    broken(lambda state: state.update({"decoder.layers.9.mlp.linear_fc1.weight": torch.ones(2)}))
    refused(broken, tmp_path, r"has the tensor \S*decoder\.layers\.9\.mlp\.linear_fc1\.weight, which no layer")

    wrong = torch.ones(2, 3, dtype=torch.bfloat16)
    broken(lambda state: state.update({"decoder.layers.3.self_attention.linear_proj.weight": wrong}))
    refused(broken, tmp_path, r"decoder\.layers\.3\.self_attention\.linear_proj\.weight with shape \(2, 3\) where")

    broken()
    convert(formats.conversion(tmp_path / "m", "huggingface", config=broken.config), tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").exists()


def test_files_that_are_cut_short_or_gone_are_named(broken, tmp_path):
    folder = broken()
    files = sorted([*folder.glob("*.distcp"), *folder.glob("*/model_optim_rng.pt")])
    whole = files[-1].read_bytes()
    files[-1].write_bytes(whole[: len(whole) - 100])
    if broken.kind == "megatron":
        refused(broken, tmp_path, r"__0_0\.distcp, which has the tensor \S+\.weight\S*, is cut short: fetch or write")
        files[-1].unlink()
        refused(broken, tmp_path, r"__0_0\.distcp, which has the tensor \S+, is not there")
        broken()
        index = dcp.FileSystemReader(folder).read_metadata()
        index.state_dict_metadata["decoder.final_norm.weight"].chunks.clear()
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        refused(broken, tmp_path, r"has only a part of the tensor decoder\.final_norm\.weight")
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:200])
        refused(broken, tmp_path, r"\.metadata cannot be read")
    else:
        refused(broken, tmp_path, r"mp_rank_01/model_optim_rng\.pt cannot be read \(.*: fetch or write it again")
        files[-1].write_bytes(whole[: len(whole) // 2])
        refused(broken, tmp_path, r"mp_rank_01/model_optim_rng\.pt cannot be read, from the tensor decoder\.\S+ on")
        files[0].unlink()
        refused(broken, tmp_path, r"lacks mp_rank_00/model_optim_rng\.pt, a rank's file")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back", [False, True])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, kind, back):
    config = config_of("moe")
    tensors = random_tensors(config)
    source = write_folder(tmp_path / "hf", config, tensors)
    options = {"tensor_parallel": 2}
    if kind == "megatron":
        options["shard_bytes"] = 30_000
    if back:
        convert(formats.conversion(source, kind, **options), tmp_path / "m")
        source, kind, options = tmp_path / "m", "huggingface", {"shard_bytes": 30_000}

    class Stop(Exception):
        pass

    conversion = formats.conversion(source, kind, **options)
    total, seen = conversion.plan.nbytes, 0

    def stop(nbytes):
        nonlocal seen
        seen += nbytes
        if seen > 0.7 * total:
            raise Stop

    with pytest.raises(Stop):
        convert(conversion, tmp_path / "dest", stop)
    assert not (tmp_path / "dest").exists()
    reads = []
    conversion = formats.conversion(source, kind, **options)
    read = type(conversion.plan.source).read
    monkeypatch.setattr(type(conversion.plan.source), "read", lambda self, name: reads.append(name) or read(self, name))
    counted = []
    convert(conversion, tmp_path / "dest", counted.append)
    assert sum(counted) == total
    assert 0 < len(reads) < 0.8 * sum(len(entry.sources) for entry in conversion.plan.entries)
    if not back:
        convert(formats.conversion(tmp_path / "dest", "huggingface"), tmp_path / "again")
    found = {}
    for file in (tmp_path / ("dest" if back else "again")).glob("*.safetensors"):
        found |= load_file(file)
    same(found, tensors)
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob(".written*"))


@pytest.mark.parametrize(
    "family, options, overrides, match",
    [
        ("dense", {"tensor_parallel": 3}, {}, r"tensor_parallel is 3; give one of \(1, 2, 4, 8\)"),
        ("dense", {"tensor_parallel": 4}, {"n_groups": 2}, r"n_groups is 2, which 4 ranks cannot share out"),
        ("dense", {"tensor_parallel": 4}, {"num_attention_heads": 6}, r"num_attention_heads is 6"),
        ("moe", {"tensor_parallel": 8}, {"moe_intermediate_size": 20}, r"moe_intermediate_size is 20"),
        ("dense", {"tensor_parallel": 4}, {"num_attention_heads": 12, "num_key_value_heads": 6},
         r"num_key_value_heads is 6, neither a multiple nor a divisor of tensor_parallel 4"),
        ("moe", {"experts": "both"}, {}, r"experts is 'both'; give one of grouped, sequential"),
        ("dense", {}, {"mlp_bias": True}, r"mlp_bias is True where Megatron builds in False"),
        ("dense", {}, {"time_step_limit": (0.0, 0.1)}, r"time_step_limit is \(0\.0, 0\.1\)"),
        ("dense", {}, {"hybrid_override_pattern": "M-*-M-", "intermediate_size": [48, 40, 8]},
         r"intermediate_size is \[48, 40, 8\] but Megatron has one"),
    ],
)  # fmt: skip
def test_what_megatron_has_no_place_for_is_refused(tmp_path, family, options, overrides, match):
    config = config_of(family, **overrides)
    folder = write_folder(tmp_path / "hf", config, random_tensors(config))
    for kind in KINDS:
        with pytest.raises(ValueError, match=match):
            formats.conversion(folder, kind, **options)


def test_other_parallelism_and_other_backends_are_refused(tmp_path):
    config = config_of("dense")
    models = [oracle_rank(config, random_tensors(config), rank, 2) for rank in range(2)]
    save_ranks(tmp_path / "a", models, real_args(config, 4))
    with pytest.raises(ValueError, match=r"has 2 ranks but its arguments say tensor_model_parallel_size 4"):
        rank_files.to_huggingface(tmp_path / "a")
    (tmp_path / "a" / "mp_rank_01").rename(tmp_path / "a" / "mp_rank_00_001")
    with pytest.raises(ValueError, match=r"mp_rank_00_001 is of a run with pipeline or expert parallelism"):
        rank_files.to_huggingface(tmp_path / "a")
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "z", no_dist=True)
    (tmp_path / "z" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ValueError, match=r"was written with 'zarr'"):
        megatron.to_huggingface(tmp_path / "z")


def test_a_config_that_says_otherwise_than_the_arguments_is_refused(tmp_path):
    config = config_of("dense")
    folder = write_folder(tmp_path / "hf", config, random_tensors(config))
    convert(megatron.from_huggingface(folder), tmp_path / "m")
    config_of("dense", num_key_value_heads=4).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"config.json with num_key_value_heads 4 while its Megatron arguments say 2"):
        megatron.to_huggingface(tmp_path / "m")


def test_tensors_of_two_dtypes_are_not_put_into_one(tmp_path):
    config = config_of("dense")
    tensors = random_tensors(config)
    name = "backbone.layers.3.mixer.k_proj.weight"
    tensors[name] = tensors[name].float()
    folder = write_folder(tmp_path / "hf", config, tensors)
    with pytest.raises(
        ValueError, match=r"bfloat16 and backbone.layers.3.mixer.k_proj.weight in torch.float32|float32"
    ):
        megatron.from_huggingface(folder)
