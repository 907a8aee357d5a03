"""Snapshots in safetensors files, with whose they are and after which tokens."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._version import __version__
from ..configuration import NemotronHConfig
from ..files import atomic_write
from .fingerprint import ESSENTIALS, Origin, config_of, essentials, weights_digest
from .snapshot import LETTERS, NAMES, SIZES, Pair, Shape, Snapshot, misfit, named, pattern, short

FORMAT = "nemotron_h.cache"
VERSION = 2
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

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


def write(
    snapshot: Snapshot, path: str | Path, *, origin: Origin, token_ids: Any = None, keep_ids: bool = False
) -> None:
    """Write a snapshot to a safetensors file, atomically.

    Args:
        origin: whose it is; see `fingerprint.origin`.
        token_ids: (B, L) the tokens it has seen, or (L,) of one row; their number is checked, and a digest of them
            kept.
        keep_ids: write the ids themselves too.

    Raises:
        ValueError: the snapshot is empty or of another model, or has seen another number of tokens.
    """
    if snapshot.length == 0:
        raise ValueError("The cache is empty: there is nothing to save before the first token.")
    kinds = tuple(origin.essentials["layers_block_type"])
    if snapshot.kinds != kinds:
        raise ValueError(
            f"The cache is of the pattern {pattern(snapshot.kinds)} and the model's is {pattern(kinds)}: pass the "
            "model that filled it."
        )
    ids = None if token_ids is None else _ids(token_ids, snapshot.batch_size, snapshot.length)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named(snapshot).items()}
    if ids is not None and keep_ids:
        tensors["token_ids"] = ids
    computed, state_dtype = _dtypes(snapshot)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "nemotron_h": __version__,
        "pattern": pattern(snapshot.kinds),
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


def header(path: str | Path) -> dict[str, str]:
    """The metadata of a file that `save` wrote, whose tensors are as it says. Raises as `read`."""
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
    for name in ESSENTIALS:
        if name not in config:
            return f"says nothing of its {name}"
    kinds = config["layers_block_type"]
    if (
        not isinstance(kinds, list)
        or not kinds
        or any(not isinstance(kind, str) or kind not in LETTERS for kind in kinds)
    ):
        return f"has {reprlib.repr(kinds)} as its layers_block_type, which is no list of layers"
    for name in sorted({name for kind in kinds for name in SIZES.get(kind, ())}):
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
        for name in NAMES.get(kind, ())
    }
    if missing := next((name for name in wanted if name not in stored), ""):
        return f"has no tensor {missing}"
    if extra := next((name for name in stored if name not in wanted and name != "token_ids"), ""):
        return f"has the tensor {reprlib.repr(extra)}, which no layer of its config has"
    for name, dtypes in wanted.items():
        if _DTYPES.get(stored[name][0]) not in dtypes:
            said = " or ".join(filter(None, dtypes)) or "no dtype"
            return f"has {stored[name][0]} numbers in {name} and says {said}"
    if wrong := misfit({name: shape for name, (_, shape) in stored.items()}, config, rows, length):
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
    """The snapshot in a file, on the model's devices.

    Args:
        model: the model, or its config (then the weights and the dtype are not checked, and the tensors are on the
            CPU).
        token_ids: the tokens that the file should be the state after; checked where the file knows them.
        digest: the model's `weights_digest` where it is known already.

    Raises:
        ValueError: in one sentence, a file that is cut or no saved cache, of another format version, model, dtype or
            text.
        FileNotFoundError: there is no such file.
    """
    config, module = config_of(model)
    found = header(path)
    _check_model(path, found, config)
    if module is not None:
        if found["dtype"] and found["dtype"] != short(module.dtype):
            raise ValueError(
                f"{path} was saved by a {found['dtype']} model and this one is {short(module.dtype)}: load the model "
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
                pair = [file.get_tensor(f"layers.{index}.{name}").to(device) for name in NAMES.get(kind, ())]
                layers.append((pair[0], pair[1]) if pair else None)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut or no saved cache ({_first(error)}): save the cache again.") from error
    return Snapshot(kinds, length, tuple(layers))


def saved_ids(path: str | Path) -> Tensor | None:
    """The (B, L) token ids in a file that was written with `keep_ids`. Raises as `read`."""
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
    for name in (*ESSENTIALS, *theirs):
        if theirs[name] != ours.get(name):
            ours_, theirs_ = reprlib.repr(ours.get(name)), reprlib.repr(theirs[name])
            if name == "layers_block_type":
                name, theirs_, ours_ = "pattern", pattern(theirs[name])[:200], pattern(ours[name])
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


def _dtypes(snapshot: Snapshot) -> tuple[str, str]:
    """Of what the model computed (windows, keys, values) and of the SSM states; "" where there is none, joined by
    commas in the cache of a model that was under autocast for a part of a text."""
    found = [(name.endswith(".state"), short(tensor.dtype)) for name, tensor in named(snapshot).items()]
    computed, states = (sorted({dtype for state, dtype in found if state is which}) for which in (False, True))
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


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
