"""The names that a config file imports. `vq4dit_jax.run.config` documents the keys."""

from vq4dit_jax.run.config import cifar10, default, xl2

__all__ = ["cifar10", "default", "xl2"]
