"""One model on many devices."""

from .tensor import keep_float32

__all__ = ["keep_float32"]
