"""Megatron-Core's checkpoints, in its two file formats: `torch_dist` (this package's functions) and `ranks`.

names.py       what Megatron calls each tensor, and its layout     arguments.py   its arguments <-> a config
torch_dist.py  distributed checkpoints                             ranks.py       a file per rank
folders.py     the way there and back, for both
"""

from .folders import EXPERTS
from .torch_dist import OPTIONS, DistFolder, from_huggingface, recognises, to_huggingface

__all__ = ["EXPERTS", "OPTIONS", "DistFolder", "from_huggingface", "recognises", "to_huggingface"]
