"""What native.c is handed: its structs, and the arguments of its functions."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p


class Mamba(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("heads", "head_dim", "groups", "state", "width")),
        *((name, c_float) for name in ("dt_min", "dt_max", "eps")),
    ]


class Weight(ctypes.Structure):
    """A linear layer's weight; addresses as integers, so that what holds them can be copied."""

    _fields_ = [(name, c_int64) for name in ("type", "N", "K", "weight", "scale")]


class Block(ctypes.Structure):
    """One layer for `blocks`, as `Block` in native.c."""

    _fields_ = [
        *((name, c_int64) for name in ("kind", "norm")),
        *((name, Weight) for name in ("first", "last", "key", "value")),
        *((name, c_int64) for name in ("conv_weight", "conv_bias", "gated_norm", "dt_bias", "A_log", "D")),
        *((name, c_int64) for name in ("window", "state", "record", "key_heads", "head_dim", "length")),
        *((name, c_int64) for name in ("k_row", "k_head", "v_row", "v_head", "keys", "values")),
        ("mamba", Mamba),
        *((name, c_float) for name in ("eps", "scale")),
    ]


MAMBA, ATTENTION, MLP = 0, 1, 2  # Block.kind

_SIGNATURES = {
    "nh_linear": [c_int, c_int, *[c_void_p] * 4, *[c_int64] * 3, c_void_p, c_int64],
    "nh_mamba_step": [c_int, Mamba, c_int64, c_int64, *[c_void_p] * 10],
    "nh_rms_norm": [c_int, *[c_void_p] * 3, c_int64, c_int64, c_float],
    "nh_gated_rms_norm": [c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, *[c_int64] * 3, c_float],
    "nh_causal_conv": [c_int, c_void_p, c_int64, c_int64, *[c_void_p] * 4, *[c_int64] * 4],
    "nh_attend": [c_int, *[c_void_p] * 4, *[c_int64] * 10, c_float],
    "nh_blocks": [c_int, c_void_p, *[c_int64] * 4, c_void_p],
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, once its functions know what they take."""
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library
