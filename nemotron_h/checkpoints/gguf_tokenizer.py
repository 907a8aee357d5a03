"""The old name of `gguf.tokenizer`, for those who import it."""

from .gguf.tokenizer import *  # noqa: F403
