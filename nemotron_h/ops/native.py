"""native.c, built where a C compiler is found and left out where none is.

Nothing needs it: every function here has a torch implementation beside its caller, which computes the same. It is
built once a machine, in 10 to 20 seconds from the first decoded token on, and kept in the user's cache folder. Nothing
waits for it: until it is there everything goes on in torch, and a process that ends sooner drops it.
`NEMOTRON_H_KERNELS=0` keeps to torch; `CC` names another compiler, `XDG_CACHE_HOME` another cache.

It takes plain CPU tensors outside autograd and tracing (`serves`), float32 and bfloat16.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._device import DeviceContext

from .blocks import wants_gradient

logger = logging.getLogger("nemotron_h")
SOURCE = Path(__file__).with_suffix(".c")
ENVIRONMENT_VARIABLE = "NEMOTRON_H_KERNELS"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_NO_SUCH_EXPERT = 2
_lock = threading.Lock()
_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)  # RuntimeError: no home folder


class Mamba(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "groups", "state", "width")),
        *((name, ctypes.c_float) for name in ("dt_min", "dt_max", "eps")),
    ]


class Weight(ctypes.Structure):
    """A linear layer's weight; addresses as integers, so that what holds them can be copied."""

    _fields_ = [(name, ctypes.c_int64) for name in ("type", "N", "K", "weight", "scale")]


class Block(ctypes.Structure):
    """One layer for `blocks`, as `Block` in native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "norm")),
        *((name, Weight) for name in ("first", "last", "key", "value")),
        *((name, ctypes.c_int64) for name in ("conv_weight", "conv_bias", "gated_norm", "dt_bias", "A_log", "D")),
        *((name, ctypes.c_int64) for name in ("window", "state", "record", "key_heads", "head_dim", "length")),
        *((name, ctypes.c_int64) for name in ("k_row", "k_head", "v_row", "v_head", "keys", "values")),
        ("mamba", Mamba),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


MAMBA, ATTENTION, MLP = 0, 1, 2  # Block.kind


# The plain dictionary on CPython, whose keys are encoded; elsewhere os.environ itself.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_ENVIRONMENT_KEY: Any = (
    ENVIRONMENT_VARIABLE if _ENVIRONMENT is os.environ else os.environ.encodekey(ENVIRONMENT_VARIABLE)
)


def switched_off() -> bool:
    """Whether the environment keeps every op to torch."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto").lower() in ("0", "off", "false", "no")


def library() -> ctypes.CDLL | None:
    return _library()[0]


def reason() -> str:
    """Why there is a library, or why not, in words."""
    return _library()[1]


_loaded: Any = None  # what `serves` found, for the functions below
_thread: threading.Thread | None = None
_building: str | None = None


def _ready() -> bool:
    """Whether the library is there. Where it has to be built first, that begins now, beside whatever is going on."""
    global _thread
    if _ENVIRONMENT.get(_ENVIRONMENT_KEY) is not None and switched_off():
        return False
    if _loaded is not None:
        return True
    if _thread is None:
        compiler = _compiler()
        if compiler is None:
            return library() is not None
        try:
            waits = not _path(compiler).exists()
        except _FAILURES:
            waits = False
        if not waits:
            return library() is not None
        with _lock:
            if _thread is None:
                _thread = threading.Thread(target=_library, name="nemotron_h native.c", daemon=True)
                _thread.start()
                atexit.register(_drop)
    return False


def _drop() -> None:
    """At exit: what a compiler is still writing goes nowhere, and its folder goes."""
    if _building is not None:
        shutil.rmtree(_building, ignore_errors=True)


def _library() -> tuple[ctypes.CDLL | None, str]:
    global _loaded
    # Looked up at every call, so that it may change; in the dictionary behind os.environ, whose own look-up, which
    # encodes the name and decodes the value, costs more than choosing a linear layer's path.
    if _ENVIRONMENT.get(_ENVIRONMENT_KEY) is not None and switched_off():
        return None, f"{ENVIRONMENT_VARIABLE}={os.environ[ENVIRONMENT_VARIABLE]}"
    if _loaded is not None:
        return _loaded
    with _lock:
        found = _built()
    if found[0] is not None:
        _loaded = found
    return found


@functools.cache
def _built() -> tuple[ctypes.CDLL | None, str]:
    compiler = _compiler()
    if compiler is None:
        return None, "no C compiler was found (cc, gcc, clang), so decoding on this CPU runs in torch, slower"
    try:
        native = ctypes.CDLL(str(_cached(compiler)))
    except _FAILURES as error:
        said = getattr(error, "stderr", None) or b""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        # The compiler's own words first; it may have failed without any.
        words = " ".join((said or str(error)).split())
        words = words if len(words) <= 200 else f"{words[:100]} ... {words[-100:]}"
        logger.info("native.c was not built with %s: %s", compiler, words)
        return None, f"{compiler} cannot build native.c ({words}), so decoding on this CPU runs in torch, slower"
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    native.nh_linear.argtypes = [number, number, *[address] * 4, *[size] * 3, address, size]
    native.nh_mamba_step.argtypes = [number, Mamba, size, size, *[address] * 10]
    native.nh_rms_norm.argtypes = [number, *[address] * 3, size, size, ctypes.c_float]
    native.nh_gated_rms_norm.argtypes = [number, address, address, size, address, address, *[size] * 3, ctypes.c_float]
    native.nh_causal_conv.argtypes = [number, address, size, size, *[address] * 4, *[size] * 4]
    native.nh_attend.argtypes = [number, *[address] * 4, *[size] * 10, ctypes.c_float]
    native.nh_blocks.argtypes = [number, address, *[size] * 4, address]
    return native, f"native.c, built with {Path(compiler).name}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def _path(compiler: str) -> Path:
    """Where the built library is, or will be; its name says what it is built from, by what, on which processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, errors="replace", check=True, timeout=60
    ).stdout
    what = repr((SOURCE.read_text(), _FLAGS, version, _processor(), torch.__version__))
    name = f"native-{hashlib.sha256(what.encode()).hexdigest()[:20]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemotron_h"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK) or folder.stat().st_uid != os.getuid():
            raise PermissionError
    except OSError:
        folder = _own_folder(tempfile.gettempdir())
    return folder / name


@functools.cache
def _own_folder(parent: str) -> Path:
    """Of this process, gone with it: where the cache folder cannot be written."""
    folder = tempfile.mkdtemp(prefix="nemotron_h-", dir=parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cached(compiler: str) -> Path:
    path = _path(compiler)
    if not path.exists():
        _build(compiler, path)
    return path


def _build(compiler: str, path: Path) -> None:
    global _building
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as building:
        _building = building
        compiled, linked = Path(building) / "native.o", Path(building) / path.name
        # Linked without -fopenmp: the OpenMP that torch has loaded serves, so there is one pool of threads, whose
        # number `torch.set_num_threads` sets.
        for command in (
            [compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=120)
        os.replace(linked, path)
    _building = None


def _processor() -> str:
    """What -march=native means here: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()


def serves(*tensors: Tensor | None) -> bool:
    """Whether these are tensors that C may read: plain, on the CPU, contiguous, nobody tracing or differentiating."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None:
            kind = type(t)
            if (kind is not Tensor and kind is not torch.nn.Parameter) or not t.is_cpu:
                return False
            if t.layout is not torch.strided or not t.is_contiguous() or t.is_neg():
                return False
    return (
        not wants_gradient(*tensors)
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and (torch._C._len_torch_function_stack() == 0 or not _functions_are_watched())
        and (F.relu, F.silu, F.softplus) == _TORCHS
        and torch.autograd.forward_ad._current_level < 0
        and _ready()  # last, and before `_loaded` is used
    )


# What C computes as torch does, where they are torch's own, now and when this was imported.
_TORCHS: Any = F.relu, F.silu, F.softplus
if {f.__code__.co_filename for f in _TORCHS[:2]} != {F.__file__} or F.softplus is not torch._C._nn.softplus:
    _TORCHS = None


def _functions_are_watched() -> bool:
    """Whether a mode is to see torch's functions called; the one behind `torch.set_default_device` only creates."""
    return any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext
        for i in range(torch._C._len_torch_function_stack())
    )


def serves_rows(x: Tensor) -> bool:
    """Whether C may read a tensor whose rows may lie apart; the rest of `serves` is asked of what goes with it."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and x.is_cpu and x.layout is torch.strided and x.stride(-1) == 1 and not x.is_neg()


def linear(x_MK: Tensor, weight: Tensor, scale: Tensor | None = None, experts_M: Tensor | None = None) -> Tensor:
    """x W^T for few rows: (M, N) in x's dtype. Sums in float32.

    Args:
        x_MK: (M, K) float32 or bfloat16; M may be several dimensions.
        weight: (N, K) float32 or bfloat16, int8, or int32 with int4 in it (N, ceil(K / 64) * 8); see `quantized.py`.
            With `experts_M`, (E, ...).
        scale: int8: float32 (N,); int4: bfloat16 (N, ceil(K / 64) * 2).
        experts_M: (M,) int64; row m meets weight[experts_M[m]].
    """
    native: Any = (_loaded or _library())[0]
    *lead, K = x_MK.shape
    N, M = weight.shape[-2], x_MK.numel() // K
    kind = _TYPES.get(weight.dtype, _INT8 if weight.dtype == torch.int8 else _INT4)
    blocks = -(-K // 64)
    scales = {_INT8: (*weight.shape[:-1],), _INT4: (*weight.shape[:-1], 2 * blocks)}.get(kind)
    if weight.shape[-1] != (8 * blocks if kind == _INT4 else K) or (None if scale is None else scale.shape) != scales:
        raise ValueError(
            f"A weight stored as {tuple(weight.shape)}, its scales as {None if scale is None else tuple(scale.shape)}, "
            f"does not multiply rows of {K}: correct the layer's weight."
        )
    if experts_M is not None and experts_M.dtype != torch.int64:
        experts_M = experts_M.long()
    y_MN = x_MK.new_empty(*lead, N)
    failed = native.nh_linear(
        kind,
        _TYPES[x_MK.dtype],
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        x_MK.data_ptr(),
        y_MN.data_ptr(),
        M,
        N,
        K,
        None if experts_M is None else experts_M.data_ptr(),
        weight.shape[0],  # Tensor's `len` is Python, and this is called for every layer
    )
    if failed == _NO_SUCH_EXPERT:
        raise IndexError(f"Experts {experts_M} are asked for of {len(weight)}: the router gives their indices.")
    if failed:
        raise MemoryError(f"No memory for {M} rows of {K} inputs.")
    return y_MN


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension; x and weight float32 or both bfloat16."""
    width = x.shape[-1]
    y = torch.empty_like(x)
    (_loaded or _library())[0].nh_rms_norm(  # type: ignore[union-attr]
        _TYPES[x.dtype], x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x.numel() // width, width, eps
    )
    return y


def gated_rms_norm(y_RD: Tensor, z_RD: Tensor, weight_D: Tensor, eps: float, groups: int) -> Tensor:
    """`weight * RMSNorm(y * silu(z))` in groups: (R, D). y contiguous, the rows of z apart or not; all of one dtype."""
    rows, width = y_RD.shape
    out_RD = torch.empty_like(y_RD)
    native: Any = (_loaded or _library())[0]
    addresses = y_RD.data_ptr(), z_RD.data_ptr(), z_RD.stride(0), weight_D.data_ptr(), out_RD.data_ptr()
    if native.nh_gated_rms_norm(_TYPES[y_RD.dtype], *addresses, rows, width, groups, eps):
        raise MemoryError(f"No memory for groups of {width // groups}.")
    return out_RD


MOST_TAPS = 8  # of a convolution


def causal_conv(x_BLC: Tensor, weight_KC: Tensor, bias_C: Tensor, window_BWC: Tensor) -> Tensor:
    """silu of the convolution: (B, L, C). x and the window have one dtype; x's channels lie one after the other, its
    rows apart or not; weight and bias are float32; at most `MOST_TAPS` taps."""
    batch, length, channels = x_BLC.shape
    y_BLC = x_BLC.new_empty(x_BLC.shape)
    native: Any = (_loaded or _library())[0]
    native.nh_causal_conv(
        _TYPES[x_BLC.dtype],
        x_BLC.data_ptr(),
        x_BLC.stride(0),
        x_BLC.stride(1),
        window_BWC.data_ptr(),
        weight_KC.data_ptr(),
        bias_C.data_ptr(),
        y_BLC.data_ptr(),
        batch,
        length,
        channels,
        weight_KC.shape[0],
    )
    return y_BLC


def mamba_step(
    projected: Tensor,
    window_BCW: Tensor,
    state_BHPN: Tensor,
    conv_weight_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    *,
    groups: int,
    time_step_limit: tuple[float, float],
    eps: float,
) -> Tensor:
    """A Mamba-2 mixer between its projections, for T tokens one after the other: y (B, T, I). The window and the state
    move on in place.

    Args:
        projected: (B, T, 2 I + 2 G N + H), what in_proj gave.
        window_BCW, state_BHPN: the cache's; the state float32; W less than `MOST_TAPS`.
    """
    native: Any = (_loaded or _library())[0]
    batch, heads, head_dim, state_size = state_BHPN.shape
    length = projected.shape[1]
    y_BTI = projected.new_empty(batch, length, heads * head_dim)
    sizes = Mamba(heads, head_dim, groups, state_size, window_BCW.shape[-1], *time_step_limit, eps)
    failed = native.nh_mamba_step(
        _TYPES[projected.dtype],
        sizes,
        batch,
        length,
        projected.data_ptr(),
        window_BCW.data_ptr(),
        conv_weight_CK.data_ptr(),
        None if conv_bias_C is None else conv_bias_C.data_ptr(),
        dt_bias_H.data_ptr(),
        A_log_H.data_ptr(),
        D_H.data_ptr(),
        state_BHPN.data_ptr(),
        norm_weight_I.data_ptr(),
        y_BTI.data_ptr(),
    )
    if failed:
        raise MemoryError(f"No memory for {batch} rows of {heads} heads.")
    return y_BTI


def weight(weight_NK: Tensor, in_features: int, scale: Tensor | None = None) -> Weight:
    """A weight as `linear` takes it, for `blocks`."""
    kind = _TYPES.get(weight_NK.dtype, _INT8 if weight_NK.dtype == torch.int8 else _INT4)
    return Weight(kind, weight_NK.shape[0], in_features, weight_NK.data_ptr(), 0 if scale is None else scale.data_ptr())


def blocks(layers: ctypes.Array[Block], count: int, x_BTD: Tensor) -> None:
    """T tokens through `count` layers; x (B, T, D) float32 or bfloat16, keys, values, windows and states in place."""
    native: Any = (_loaded or _library())[0]
    batch, length, width = x_BTD.shape
    if native.nh_blocks(_TYPES[x_BTD.dtype], ctypes.addressof(layers), count, batch, length, width, x_BTD.data_ptr()):
        raise MemoryError(f"No memory for {batch * length} rows of {width} in {count} layers.")


def attend(q_BATQ: Tensor, k_BALQ: Tensor, v_BALQ: Tensor, scale: float) -> Tensor:
    """The last T query positions over all keys up to their own: (B, A, T, Q). The rows of keys and values lie one after
    the other; their heads and batch rows may lie apart (a longer buffer)."""
    native: Any = (_loaded or _library())[0]
    batch, heads, queries, head_dim = q_BATQ.shape
    key_heads, length = k_BALQ.shape[1:3]
    y_BATQ = torch.empty_like(q_BATQ)
    strides = [t.stride(dim) for t in (k_BALQ, v_BALQ) for dim in (0, 1)]
    addresses = [t.data_ptr() for t in (q_BATQ, k_BALQ, v_BALQ, y_BATQ)]
    sizes = [batch, key_heads, heads // key_heads, queries, length, head_dim]
    if native.nh_attend(_TYPES[q_BATQ.dtype], *addresses, *sizes, *strides, scale):
        raise MemoryError(f"No memory for {heads} heads over {length} keys.")
    return y_BATQ
