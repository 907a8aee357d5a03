"""Packed weights in a layer's place."""

from .int8_int4 import NemotronHQuantizationConfig, config_for

__all__ = ["NemotronHQuantizationConfig", "config_for"]
