"""What native.c does of this package's mathematics, where it could be built."""

from . import load
from .calls import (
    MOST_TAPS,
    attend,
    blocks,
    causal_conv,
    gated_rms_norm,
    linear,
    mamba_step,
    rms_norm,
    serves,
    serves_rows,
    weight,
)
from .load import ENVIRONMENT_VARIABLE, library, reason, switched_off
from .signatures import ATTENTION, MAMBA, MLP, Block, Mamba, Weight

__all__ = [
    "ATTENTION",
    "ENVIRONMENT_VARIABLE",
    "MAMBA",
    "MLP",
    "MOST_TAPS",
    "Block",
    "Mamba",
    "Weight",
    "attend",
    "blocks",
    "causal_conv",
    "gated_rms_norm",
    "library",
    "linear",
    "load",
    "mamba_step",
    "reason",
    "rms_norm",
    "serves",
    "serves_rows",
    "switched_off",
    "weight",
]
