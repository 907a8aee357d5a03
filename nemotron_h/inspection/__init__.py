"""Looks at models and files, never changes them."""
