"""One model on many devices."""

from .fsdp import keep_float32

__all__ = ["keep_float32"]
