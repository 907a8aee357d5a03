"""The old name of `megatron.names` and `megatron.arguments`, for those who import it."""

from .megatron.arguments import *  # noqa: F403
from .megatron.names import *  # noqa: F403
