"""The mathematics of Nemotron-H: plain tensors in and out, no config, no module, no cache."""

from .attention import causal_attention
from .causal_conv import causal_conv, document_index
from .conditions import FEW_TOKENS, without_autocast
from .cross_entropy import linear_cross_entropy
from .fp8_nvfp4 import low_precision_experts_linear, low_precision_linear
from .int8_int4 import dequantize_weight, quantize_weight, quantized_experts_linear, quantized_linear
from .linear import linear
from .mamba_step import mamba_step
from .moe import routed_experts, router
from .norms import gated_rms_norm, rms_norm
from .ssd import DEFAULT_CHUNK_SIZE, ssd, ssd_step, time_step

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "FEW_TOKENS",
    "causal_attention",
    "causal_conv",
    "dequantize_weight",
    "document_index",
    "gated_rms_norm",
    "linear",
    "linear_cross_entropy",
    "low_precision_experts_linear",
    "low_precision_linear",
    "mamba_step",
    "quantize_weight",
    "quantized_experts_linear",
    "quantized_linear",
    "rms_norm",
    "routed_experts",
    "router",
    "ssd",
    "ssd_step",
    "time_step",
    "without_autocast",
]
