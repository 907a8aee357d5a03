"""The old name of `gguf.header`, for those who import it."""

from .gguf.header import *  # noqa: F403
