"""The mathematics of Nemotron-H: plain tensors in and out, no config, no module, no cache."""

from .causal_conv import causal_conv
from .documents import document_index
from .gated_norm import gated_rms_norm, rms_norm
from .moe import router
from .precision import without_autocast
from .ssd import DEFAULT_CHUNK_SIZE, ssd, ssd_step, time_step

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "causal_conv",
    "document_index",
    "gated_rms_norm",
    "rms_norm",
    "router",
    "ssd",
    "ssd_step",
    "time_step",
    "without_autocast",
]
