"""What `generate()` gains with this package."""

from .reasoning import (
    ReasoningStreamer,
    ReasoningSwitchWarning,
    Split,
    opens_reasoning,
    reasoning_switch,
    split_reasoning,
)

__all__ = [
    "ReasoningStreamer",
    "ReasoningSwitchWarning",
    "Split",
    "opens_reasoning",
    "reasoning_switch",
    "split_reasoning",
]
