"""A model and its card, published."""
