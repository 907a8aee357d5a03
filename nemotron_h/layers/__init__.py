"""One layer: its parts, its mixers, the masks they see, and several layers in one call."""
