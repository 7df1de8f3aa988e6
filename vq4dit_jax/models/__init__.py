"""Networks in flax.linen."""

from vq4dit_jax.models.dit import DIT_VARIANTS, DiT, guide, variant

__all__ = ["DIT_VARIANTS", "DiT", "guide", "variant"]
