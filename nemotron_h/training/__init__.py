"""What a trainer gains: losses without logits, and LoRA on every part of a layer."""
