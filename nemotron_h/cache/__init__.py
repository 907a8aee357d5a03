"""What has been seen: a layer for each kind, going back, the cache of a model, snapshots and their files."""

from .hybrid import NemotronHCache
from .layers import MambaLayer

__all__ = ["MambaLayer", "NemotronHCache"]
