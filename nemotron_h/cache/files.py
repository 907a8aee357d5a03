"""What a cache holds, kept apart from it: taken, put back into any cache of its pattern, written to a file, read back.

A recurrent state cannot be cut, so going back to an earlier point of a text takes a copy of the state there. For a
Mamba layer it has the same size after any number of tokens; keys and values are shared with the cache, not copied.

B batch, C convolution channels, W window, H Mamba heads, P head dim, N state size, K key heads, Q key dim, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import StaticLayer

from .._version import __version__
from ..files import atomic_write
from ..sizes import DTYPES, Shape, Spec
from .hybrid import GrowingLayer, MambaLayer, NemotronHCache, check_whole
from .quantized import is_quantised

if TYPE_CHECKING:
    from ..configuration import NemotronHConfig

Pair = tuple[Tensor, Tensor]

FORMAT = "nemotron_h.cache"
VERSION = 2
_NAMES = {"mamba": ("window", "state"), "attention": ("keys", "values")}
# What of a config their shapes are made of.
_SIZES = {
    "mamba": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "attention": ("num_key_value_heads", "head_dim"),
}
_LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}

# What a file has to say of itself: how each is written, and what else it is called.
_DIGEST, _NUMBER, _FLOAT = "([0-9a-f]{64})?", "[1-9][0-9]{0,14}", "(float64|float32|bfloat16|float16)"
_SAID = {
    "config": (r"(?s).*", ""),
    "weights": (_DIGEST, "digest"),
    "dtype": (r"[a-z0-9_]{1,40}", "dtype"),
    "computed_dtype": (f"{_FLOAT}(,{_FLOAT})*", "dtype of a cache"),
    "state_dtype": (f"({_FLOAT}(,{_FLOAT})*)?", "dtype of a state"),
    "batch_size": (_NUMBER, "number"),
    "token_count": (_NUMBER, "number"),
    "tokens": (_DIGEST, "digest"),
}

# What a state depends on beside the weights. The state's own dtype is said apart.
_ESSENTIALS = (
    "layers_block_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "time_step_limit",
    "layer_norm_epsilon",
    "mamba_hidden_act",
    "mlp_hidden_act",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)


@dataclass(frozen=True)
class Snapshot:
    """A cache's tensors after `length` tokens: for each layer (window BCW, state BHPN), (keys BKLQ, values BKLQ) or
    None. Nothing writes into them. Tokens recorded for taking back are not part of it."""

    kinds: tuple[str, ...]
    length: int
    layers: tuple[Pair | None, ...]

    def tensors(self) -> Iterator[Tensor]:
        for pair in self.layers:
            yield from pair or ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def batch_size(self) -> int:
        """Rows, or -1 in the snapshot of an empty cache."""
        return next((tensor.shape[0] for tensor in self.tensors()), -1)


@torch.no_grad()
def take(cache: NemotronHCache) -> Snapshot:
    """The state of `cache` now. Mamba states are copied, keys and values that grow are shared, static ones copied.

    Raises:
        ValueError: a layer keeps its keys and values in a form that cannot be taken out, such as quantised ones.
        RuntimeError: a call was interrupted in the cache.
    """
    check_whole(cache)
    length = int(cache.get_seq_length())
    return Snapshot(tuple(cache.kinds), length, tuple(_taken(layer, length) for layer in cache.layers))


def _taken(layer: Any, length: int) -> Pair | None:
    if isinstance(layer, MambaLayer):
        window, state = layer.window_BCW, layer.state_BHPN
        return None if window is None or state is None else (window.clone(), state.clone())
    _check_kind(layer)
    if length == 0 or not getattr(layer, "is_initialized", False) or layer.keys is None:
        return None
    if isinstance(layer, StaticLayer):
        return layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone()
    # Whoever goes on from these buffers writes after what this one sees: see cache._Room.
    if isinstance(layer, GrowingLayer):
        layer.share()
    return layer.keys, layer.values


def _check_kind(layer: Any) -> None:
    if not hasattr(layer, "keys") or is_quantised(layer):
        raise ValueError(
            f"A {type(layer).__name__} has no plain keys and values to take a snapshot of or to put one into: use a "
            "cache that is not quantised."
        )


@torch.no_grad()
def put(cache: NemotronHCache, snapshot: Snapshot) -> None:
    """Make `cache` what the snapshot's was, whatever it holds; refused with nothing changed.

    A static cache keeps its tensors where they are. What is recorded is dropped, so that nothing before this point can
    be taken back.

    Raises:
        ValueError: another pattern, other sizes than the cache's config has, too many tokens for a static cache, other
            rows than its buffers have, or another dtype of the SSM state.
    """
    _check_fits(cache, snapshot)
    cache.interrupted = "restore()"
    for layer, pair in zip(cache.layers, snapshot.layers, strict=True):
        if isinstance(layer, MambaLayer):
            _put_state(layer, pair, snapshot.length)
        elif isinstance(layer, StaticLayer):
            _put_static(layer, pair, snapshot.length)
        else:
            layer.reset()
            if pair is not None:
                layer.lazy_initialization(*pair)  # type: ignore[union-attr]
                layer.keys, layer.values = pair  # type: ignore[union-attr]
    cache.interrupted, cache.padding_BP, cache.padding_is_known = None, None, False


def _check_fits(cache: NemotronHCache, snapshot: Snapshot) -> None:
    if tuple(cache.kinds) != snapshot.kinds:
        raise ValueError(
            f"The snapshot is of a model with the pattern {_pattern(snapshot.kinds)} and the cache is of one with "
            f"{_pattern(cache.kinds)}: restore it into a cache of its own model."
        )
    if wrong := _misfit(_named(snapshot), cache.config, snapshot.batch_size, snapshot.length):
        raise ValueError(f"The snapshot's {wrong} in the cache's config: restore it into a cache of its own model.")
    for index, (layer, pair) in enumerate(zip(cache.layers, snapshot.layers, strict=True)):
        if not isinstance(layer, MambaLayer):
            _check_kind(layer)
        room = getattr(layer, "max_cache_len", None)
        if room is not None and snapshot.length > room:
            raise ValueError(
                f"The snapshot holds {snapshot.length} tokens and the static cache has room for {room}: make it longer."
            )
        if pair is None:
            continue
        held: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(layer, MambaLayer):
            state = pair[1].dtype
            if state not in (layer.state_dtype, torch.float64):
                raise ValueError(
                    f"The snapshot's SSM states are {_short(state)} and the cache keeps {_short(layer.state_dtype)}: "
                    "set mamba_ssm_cache_dtype in the config to the snapshot's, or compute it again."
                )
            if layer.static:
                held = layer.conv_states[0], layer.recurrent_states[0]
        elif isinstance(layer, StaticLayer) and layer.is_initialized:
            held = layer.keys, layer.values
        for ours, theirs in zip(held, pair, strict=True):
            if ours is None:
                continue
            shape = list(ours.shape)
            if isinstance(layer, StaticLayer):
                shape[-2] = snapshot.length
            if shape != list(theirs.shape) or ours.dtype != theirs.dtype:
                raise ValueError(
                    f"Layer {index} of the snapshot is {_short(theirs.dtype)} {tuple(theirs.shape)} and the static "
                    f"cache's buffers take {_short(ours.dtype)} {tuple(shape)}: restore it into a new cache."
                )


def _named(snapshot: Snapshot) -> dict[str, Tensor]:
    return {
        f"layers.{index}.{name}": tensor
        for index, (kind, pair) in enumerate(zip(snapshot.kinds, snapshot.layers, strict=True))
        if pair is not None
        for name, tensor in zip(_NAMES[kind], pair, strict=True)
    }


def _misfit(tensors: Mapping[str, Tensor | Spec], config: Any, rows: int, length: int) -> str:
    """The first tensor whose shape is not what the config says, or ""."""
    # A layer that is split over processes holds a part of the heads, of which the config says nothing.
    split = torch.distributed.is_available() and torch.distributed.is_initialized()
    for index, kind in enumerate(config.layers_block_type):
        for name, size in _shapes(kind, config, length).items():
            tensor, wanted = tensors.get(f"layers.{index}.{name}"), (rows, *size)
            if tensor is None:
                continue
            found = tuple(tensor.shape)
            if split and len(found) > 1:
                wanted = (rows, found[1], *size[1:])
            if found != wanted:
                return f"{name} of layer {index} is {found} and would be {wanted}"
    return ""


def _shapes(kind: str, config: Any, length: int) -> dict[str, Shape]:
    """Of a layer's tensors, without the rows."""
    if kind == "mamba":
        heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        channels = heads * width + 2 * config.n_groups * state
        return {"window": (channels, config.conv_kernel - 1), "state": (heads, width, state)}
    if kind == "attention":
        size = config.num_key_value_heads, length, config.head_dim
        return {"keys": size, "values": size}
    return {}


def _put_state(layer: MambaLayer, pair: Pair | None, length: int) -> None:
    if not layer.static:
        # New tensors: those it has may be another's, or inference mode's; and copies, which it may move on in place.
        layer.conv_states[0] = layer.recurrent_states[0] = None
        layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = False
        pair = None if pair is None else (pair[0].clone(), pair[1].clone())
    layer.reset()
    if pair is not None:
        layer.update(*pair, length)


def _put_static(layer: StaticLayer, pair: Pair | None, length: int) -> None:
    if pair is None:
        layer.reset()
        layer.cumulative_length.zero_()
        return
    if not layer.is_initialized:
        layer.lazy_initialization(*pair)
    assert layer.keys is not None and layer.values is not None
    for buffer, saved in zip((layer.keys, layer.values), pair, strict=True):
        buffer[..., :length, :] = saved
    layer.cumulative_length.fill_(length)


# ---- which model


@dataclass(frozen=True)
class Origin:
    """Whose a snapshot is, in what a file says of it: what of the config a state depends on, the model's dtype and its
    weights' digest; both "" for a config alone."""

    essentials: dict[str, Any]
    dtype: str = ""
    weights: str = ""


def origin(model: Any, digest: str = "") -> Origin:
    """Of a model, whose `weights_digest` may be known already, or of a config."""
    config, module = _config_of(model)
    if module is None:
        return Origin(essentials(config))
    return Origin(essentials(config), _short(module.dtype), digest or weights_digest(module))


def essentials(config: NemotronHConfig) -> dict[str, Any]:
    """What of a config a state depends on, as JSON has it."""
    return dict(json.loads(json.dumps({name: getattr(config, name, None) for name in _ESSENTIALS})))


@torch.no_grad()
def weights_digest(model: torch.nn.Module) -> str:
    """A digest of every parameter and buffer, and of which adapters are on; 0.15 s for a GB on one CPU core.

    Of each tensor it takes a sum of all its bytes, the same on every device, and a few of its numbers. A change of one
    number, or a step of training, makes it another one; two models with the same are equal in all likelihood, which is
    no proof. Parameters that are not in memory (offloaded ones) go in by name and shape.
    """
    digest = hashlib.sha256()
    pieces: dict[torch.device, list[Tensor]] = {}
    for name, tensor in _named_tensors(model):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if _here(tensor):
            pieces.setdefault(tensor.device, []).extend((_summed(tensor), *_few(tensor)))
    for together in pieces.values():
        digest.update(torch.cat(together).cpu().numpy().tobytes())
    digest.update(_adapters(model).encode())
    return digest.hexdigest()


_KNOWN: WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = WeakKeyDictionary()


@torch.no_grad()
def known_digest(model: torch.nn.Module) -> str:
    """`weights_digest`, worked out again only where a tensor has been written into since, or is another one.

    Writing through `tensor.data` is not counted by PyTorch, and is seen here by the few numbers alone.
    """
    digest = hashlib.sha256(_adapters(model).encode())
    pieces: dict[torch.device, list[Tensor]] = {}
    for name, tensor in _named_tensors(model):
        if tensor.is_inference():  # its changes are not counted
            return weights_digest(model)
        at = tensor.data_ptr() if _here(tensor) else None
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor._version}{at}".encode())
        if _here(tensor):
            pieces.setdefault(tensor.device, []).extend(_few(tensor))
    for together in pieces.values():
        digest.update(torch.cat(together).cpu().numpy().tobytes())
    now = digest.hexdigest()
    before, known = _KNOWN.get(model, ("", ""))
    if before != now:
        known = weights_digest(model)
        _KNOWN[model] = now, known
    return known


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        tensor: Tensor = parameter.detach()
        yield name, getattr(tensor, "to_local", lambda kept=tensor: kept)()


def _here(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0


def _adapters(model: torch.nn.Module) -> str:
    return "".join(
        f"{module.disable_adapters}{module.active_adapters}"
        for module in model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
    )


def _summed(tensor: Tensor) -> Tensor:
    """Eight bytes that change with any one number: the sums of 8 KiB each as int64, the i-th taken 2 i + 1 times."""
    data = tensor.reshape(-1).view(torch.uint8)
    if len(data) % 8:
        data = F.pad(data, (0, -len(data) % 8))
    if data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    even = len(words) // 1024 * 1024
    sums = torch.cat([words[:even].view(-1, 1024).sum(1), words[even:].sum().view(1)])
    odd = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    return (sums * odd).sum().view(1).view(torch.uint8)


def _few(tensor: Tensor) -> Iterator[Tensor]:
    """Bytes of up to eight numbers of up to four rows."""
    while tensor.dim() > 2:
        tensor = tensor[tensor.shape[0] // 2]
    rows = [tensor] if tensor.dim() < 2 else [tensor[i * (len(tensor) - 1) // 3] for i in range(min(4, len(tensor)))]
    for row in rows:
        row = row.reshape(-1)
        step = max(1, len(row) // 8)
        yield row[::step][:8].contiguous().view(torch.uint8)


# ---- files


@torch.no_grad()
def save(
    cache: NemotronHCache,
    path: str | Path,
    *,
    model: Any,
    token_ids: Any = None,
    keep_ids: bool = False,
) -> None:
    """Write what `cache` holds to a safetensors file, whole or not at all.

    Args:
        model: whose cache it is, or its config (then any weights may load it).
        token_ids: (B, L) the tokens it has seen, or (L,) of one row; their number is checked, and a digest
            of them kept.
        keep_ids: write the ids themselves too.

    Raises:
        ValueError: the cache is empty or of another model, or has seen another number of tokens.
    """
    write(take(cache), path, origin=origin(model), token_ids=token_ids, keep_ids=keep_ids)


def write(
    snapshot: Snapshot, path: str | Path, *, origin: Origin, token_ids: Any = None, keep_ids: bool = False
) -> None:
    """As `save`, of a snapshot."""
    if snapshot.length == 0:
        raise ValueError("The cache is empty: there is nothing to save before the first token.")
    kinds = tuple(origin.essentials["layers_block_type"])
    if snapshot.kinds != kinds:
        raise ValueError(
            f"The cache is of the pattern {_pattern(snapshot.kinds)} and the model's is {_pattern(kinds)}: pass the "
            "model that filled it."
        )
    ids = None if token_ids is None else _ids(token_ids, snapshot.batch_size, snapshot.length)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _named(snapshot).items()}
    if ids is not None and keep_ids:
        tensors["token_ids"] = ids
    computed, state_dtype = _dtypes(snapshot)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "nemotron_h": __version__,
        "pattern": _pattern(snapshot.kinds),
        "config": json.dumps(origin.essentials),
        "weights": origin.weights,
        "dtype": origin.dtype or computed.split(",")[0],
        "computed_dtype": computed,  # another one than the model's under autocast
        "state_dtype": state_dtype,
        "batch_size": str(snapshot.batch_size),
        "token_count": str(snapshot.length),
        "tokens": "" if ids is None else _ids_digest(ids),
    }
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load(
    path: str | Path, model: Any, *, token_ids: Any = None, max_cache_len: int | None = None, offloading: bool = False
) -> NemotronHCache:
    """A new cache with what a file holds, on the model's devices; going on from it is going on from the saved one.

    Nothing before this point can be taken back: recorded tokens are not saved.

    Args:
        model: the model, or its config (then the weights and the dtype are not checked, and the tensors are on the
            CPU).
        token_ids: the tokens that the file should be the state after; checked where the file knows them.
        max_cache_len: make the cache static, with room for so many tokens.

    Raises:
        ValueError: in one sentence, a file that is cut or no saved cache, of another format version, model, dtype or
            text.
        FileNotFoundError: there is no such file.
    """
    config, _ = _config_of(model)
    snapshot = read(path, model, token_ids=token_ids)
    cache = NemotronHCache(config, max_cache_len=max_cache_len, offloading=offloading)
    put(cache, snapshot)
    return cache


def header(path: str | Path) -> dict[str, str]:
    """The metadata of a file that `save` wrote, whose tensors are as it says. Raises as `load`."""
    if (path := Path(path)).exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise ValueError(f"{path} is no file: pass one that NemotronHCache.save wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            found = dict(file.metadata() or {})
            parts = {name: file.get_slice(name) for name in file.keys()}
            stored = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut or no saved cache ({_first(error)}): save the cache again.") from error
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file but no saved cache: pass one that NemotronHCache.save wrote.")
    if (version := found.get("version", "")) != str(VERSION):
        number = re.fullmatch("[0-9]{1,9}", version)
        remedy = "install a newer nemotron-h" if number and int(version) > VERSION else "save the cache again"
        version = version if number else reprlib.repr(version)
        raise ValueError(f"{path} is of format version {version} and this package reads version {VERSION}: {remedy}.")
    if wrong := _unsaid(found) or _unlike(found, stored):
        raise ValueError(f"{path} {wrong}: save the cache again.")
    return found


def _unsaid(found: dict[str, str]) -> str:
    """What is missing in a file's metadata, or is not what it is called; or ""."""
    for name, (form, kind) in _SAID.items():
        if name not in found:
            return f"says nothing of its {name}"
        if not re.fullmatch(form, found[name]):
            return f"has {reprlib.repr(found[name])} as its {name}, which is no {kind}"
    if not isinstance(config := _json(found["config"]), dict):
        return "has a config that is no JSON object"
    for name in _ESSENTIALS:
        if name not in config:
            return f"says nothing of its {name}"
    kinds = config["layers_block_type"]
    if (
        not isinstance(kinds, list)
        or not kinds
        or any(not isinstance(kind, str) or kind not in _LETTERS for kind in kinds)
    ):
        return f"has {reprlib.repr(kinds)} as its layers_block_type, which is no list of layers"
    for name in sorted({name for kind in kinds for name in _SIZES.get(kind, ())}):
        if type(config[name]) is not int or not 0 < config[name] < 1 << 31:
            return f"has {reprlib.repr(config[name])} as its {name}, which is no size"
    return ""


def _unlike(found: dict[str, str], stored: dict[str, tuple[str, Shape]]) -> str:
    """Which tensor of a file is missing, too many or not what its metadata says; or ""."""
    config, rows, length = (
        SimpleNamespace(**_json(found["config"])),
        int(found["batch_size"]),
        int(found["token_count"]),
    )
    wanted = {
        f"layers.{index}.{name}": found["state_dtype" if name == "state" else "computed_dtype"].split(",")
        for index, kind in enumerate(config.layers_block_type)
        for name in _NAMES.get(kind, ())
    }
    if missing := next((name for name in wanted if name not in stored), ""):
        return f"has no tensor {missing}"
    if extra := next((name for name in stored if name not in wanted and name != "token_ids"), ""):
        return f"has the tensor {reprlib.repr(extra)}, which no layer of its config has"
    for name, dtypes in wanted.items():
        dtype = DTYPES.get(stored[name][0])
        if dtype is None or _short(dtype) not in dtypes:
            said = " or ".join(filter(None, dtypes)) or "no dtype"
            return f"has {stored[name][0]} numbers in {name} and says {said}"
    if wrong := _misfit({name: Spec(shape, torch.uint8) for name, (_, shape) in stored.items()}, config, rows, length):
        return f"does not fit the config, as its {wrong}"
    if "token_ids" in stored and stored["token_ids"] != ("I64", (rows, length)):
        dtype_, shape = stored["token_ids"]
        return f"has {dtype_} {shape} as its token_ids, which would be I64 {(rows, length)}"
    return ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read(path: str | Path, model: Any, *, token_ids: Any = None, digest: str = "") -> Snapshot:
    """The snapshot in a file; arguments and errors as `load`."""
    config, module = _config_of(model)
    found = header(path)
    _check_model(path, found, config)
    if module is not None:
        if found["dtype"] and found["dtype"] != _short(module.dtype):
            raise ValueError(
                f"{path} was saved by a {found['dtype']} model and this one is {_short(module.dtype)}: load the model "
                f"with dtype={found['dtype']}, or save the cache again."
            )
        if found["weights"] and found["weights"] != (digest or weights_digest(module)):
            raise ValueError(
                f"{path} was saved by a model with the same config and other weights: load that checkpoint (and its "
                "adapter), or save the cache again."
            )
    _check_dtypes(path, found, config)
    length = int(found["token_count"])
    if token_ids is not None:
        ids, rows = _flat(token_ids), int(found["batch_size"])
        if ids.shape != (rows, length):
            raise ValueError(
                f"{path} is the state after {(rows, length)} tokens and token_ids is {tuple(ids.shape)}: pass the same."
            )
        if found["tokens"] and found["tokens"] != _ids_digest(ids):
            raise ValueError(f"{path} is the state after {length} other tokens: pass those that it was saved with.")
    kinds = tuple(config.layers_block_type)
    layers: list[Pair | None] = []
    try:
        with safe_open(path, framework="pt") as file:
            for index, kind in enumerate(kinds):
                device = _device(module, index)
                pair = [file.get_tensor(f"layers.{index}.{name}").to(device) for name in _NAMES.get(kind, ())]
                layers.append((pair[0], pair[1]) if pair else None)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut or no saved cache ({_first(error)}): save the cache again.") from error
    return Snapshot(kinds, length, tuple(layers))


def saved_ids(path: str | Path) -> Tensor | None:
    """The (B, L) token ids in a file that was written with `keep_ids`. Raises as `load`."""
    found = header(path)
    with safe_open(path, framework="pt") as file:
        ids: Tensor | None = file.get_tensor("token_ids") if "token_ids" in file.keys() else None
    if ids is not None and _ids_digest(ids) != found["tokens"]:
        raise ValueError(f"{path} has other token_ids than it is the state after: save the cache again.")
    return ids


def _device(module: Any, index: int) -> torch.device:
    if module is None:
        return torch.device("cpu")
    layer = module.get_decoder().layers[index] if hasattr(module, "get_decoder") else module
    parameter = next((p for p in layer.parameters() if p.device.type != "meta"), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _check_model(path: Any, found: dict[str, str], config: NemotronHConfig) -> None:
    theirs, ours = json.loads(found["config"]), essentials(config)
    for name in (*_ESSENTIALS, *theirs):
        if theirs[name] != ours.get(name):
            ours_, theirs_ = reprlib.repr(ours.get(name)), reprlib.repr(theirs[name])
            if name == "layers_block_type":
                name, theirs_, ours_ = "pattern", _pattern(theirs[name])[:200], _pattern(ours[name])
            raise ValueError(
                f"{path} was saved by a model whose {name} is {theirs_} and this one's is {ours_}: load it with its "
                "own model."
            )


def _check_dtypes(path: Any, found: dict[str, str], config: NemotronHConfig) -> None:
    computed, states = (set(found[name].split(",")) for name in ("computed_dtype", "state_dtype"))
    if "float64" in computed and found["dtype"] != "float64":
        raise ValueError(f"{path} has float64 tensors and is of a {found['dtype']} model: save the cache again.")
    usual = {str(config.mamba_ssm_cache_dtype), "", *({"float64"} & computed)}
    if other := sorted(states - usual):
        raise ValueError(
            f"{path} has {other[0]} SSM states and this config keeps {config.mamba_ssm_cache_dtype}: set "
            f"mamba_ssm_cache_dtype={other[0]}, or save the cache again."
        )


def _config_of(model: Any) -> tuple[Any, Any]:
    """(config, module or None) of a model, a wrapped one (PEFT's), or a config."""
    config = getattr(model, "config", model)
    if not hasattr(config, "layers_block_type"):
        raise ValueError(
            f"A cache is saved and loaded with its model or its config, not with a {type(model).__name__}: pass "
            "model=model."
        )
    return config, model if config is not model else None


def _dtypes(snapshot: Snapshot) -> tuple[str, str]:
    """Of what the model computed (windows, keys, values) and of the SSM states; "" where there is none, joined by
    commas in the cache of a model that was under autocast for a part of a text."""
    named = [(name.endswith(".state"), _short(tensor.dtype)) for name, tensor in _named(snapshot).items()]
    computed, states = (sorted({dtype for state, dtype in named if state is which}) for which in (False, True))
    return ",".join(computed), ",".join(states)


def _flat(token_ids: Any) -> Tensor:
    ids = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
    return (ids.view(1, -1) if ids.dim() < 2 else ids).contiguous()


def _ids(token_ids: Any, rows: int, length: int) -> Tensor:
    ids = _flat(token_ids)
    if ids.shape != (rows, length):
        raise ValueError(
            f"token_ids is {tuple(ids.shape)} and the cache has seen {(rows, length)}: pass those that are in it."
        )
    return ids


def _ids_digest(ids: Tensor) -> str:
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()


def _pattern(kinds: Sequence[str]) -> str:
    return "".join(_LETTERS.get(kind, "?") for kind in kinds)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


__all__ = ["Snapshot", "header", "known_digest", "load", "origin", "put", "read", "save", "take", "weights_digest"]
