"""Whole programs built on vq4dit_jax, to run from the repository and to read; no part of the wheel."""
