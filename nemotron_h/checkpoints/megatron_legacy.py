"""The old name of `megatron.ranks`, for those who import it."""

from .megatron.ranks import *  # noqa: F403
