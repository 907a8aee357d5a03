"""Why `generate_batch` refuses this family: what `transformers`' continuous batching has a place for."""

from __future__ import annotations

from typing import Any

import transformers


def check(config: Any) -> None:
    """Raises `ValueError` where a layer's memory is not among those that continuous batching can page.

    Its cache is pages of keys and values, one allocator for each type of attention; a recurrent state, which is not
    made of tokens, and a layer without a cache have none.
    """
    from transformers.generation.continuous_batching import cache

    known = set(getattr(cache, "ATTN_TYPE_TO_ALLOCATOR", ("full_attention", "sliding_attention")))
    missing = sorted(set(config.layer_types) - known)
    if missing:
        raise ValueError(
            f"Continuous batching in transformers {transformers.__version__} keeps pages of keys and values only "
            f"({', '.join(sorted(known))}), and this model has layers of the types {', '.join(missing)}: pass the "
            "prompts to generate() as a left-padded batch."
        )
