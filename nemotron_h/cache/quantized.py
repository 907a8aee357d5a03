"""Attention layers that keep keys and values in few bits: the library's own, beside Mamba states as they are.

`transformers.QuantizedCache` takes models of attention layers only; a layer of it does not mind its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_CLASSES = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer", "fp8": "Fp8QuantizedLayer"}


def new_layer(options: Mapping[str, Any]) -> DynamicLayer:
    """A layer as `cache_config` describes it: `backend` (quanto unless given), and what its class takes, as `nbits`,
    `axis_key`, `axis_value`, `q_group_size` and `residual_length`.

    Raises:
        ValueError: a backend or an option that this version of transformers does not have.
        ImportError: the backend's package is not installed.
    """
    given = {name: value for name, value in options.items() if name != "config" and value is not None}
    backend = given.pop("backend", "quanto")
    made = getattr(cache_utils, _CLASSES.get(backend, ""), None)
    if made is None:
        there = ", ".join(name for name, cls in _CLASSES.items() if hasattr(cache_utils, cls))
        raise ValueError(f"There is no backend {backend!r} for quantised keys and values here: use one of {there}.")
    try:
        layer: DynamicLayer = type(made.__name__, (_FewBits, made), {})(**given)
    except TypeError as error:
        raise ValueError(f"The backend {backend} does not take these options: {error}.") from error
    return layer


class _FewBits:
    """What a layer of the cache answers, of one whose form only its backend can read."""

    def held(self, length: int) -> None:
        raise ValueError(
            f"A {type(self).__name__} has no plain keys and values to take a snapshot of or to put one into: use a "
            "cache that is not quantised."
        )

    def check_hold(self, pair: Any, length: int) -> None:
        self.held(length)

    def nbytes(self) -> int:
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        return sum(_nbytes(getattr(self, name, None)) for name in names)


def check_rows(layers: Any, reorder: bool) -> None:
    """Refuse to change the rows of what only the backend can read.

    Raises:
        ValueError: a quantised layer that cannot do it.
    """
    for layer in layers:
        if not isinstance(layer, _FewBits):
            continue
        if not reorder or getattr(type(layer), "reorder_cache", None) is CacheLayerMixin.reorder_cache:
            what = "reordered by this version of transformers" if reorder else "repeated or selected"
            raise ValueError(
                f"The rows of a {type(layer).__name__} cannot be {what}: use a cache that is not quantised."
            )


def _nbytes(held: Any) -> int:
    """Bytes of a backend's form of keys or values: tensors, wherever they are in it."""
    if isinstance(held, Mapping):
        return sum(map(_nbytes, held.values()))
    if isinstance(held, (tuple, list)):
        return sum(map(_nbytes, held))
    inner = [value for name in ("_data", "_scale", "_shift") if (value := getattr(held, name, None)) is not None]
    return sum(map(_nbytes, inner)) if inner else int(getattr(held, "nbytes", 0))
