"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), the one place where it is written.

    guided = null + s (conditional - null)

A network is evaluated on R = 2B rows, B with their condition and then the same B with the null.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How the two halves of an evaluation become one prediction.

    Attributes:
      channels: guidance acts on the first so many channels of the prediction, at least 1; None: on all of them.
    """

    channels: int | None = None

    def __post_init__(self):
        if self.channels is not None and self.channels < 1:
            raise InputError(f"guided channels={self.channels}: wanted at least 1, or None for all")

    def rows(self, x: Float[Array, "B *S C"], cond: Any, null: Any) -> tuple[Float[Array, "R *S C"], Any]:
        """(x, cond) of the R = 2B rows. `cond` and `null` are trees whose leaves lead with the sample axis."""
        return jnp.concatenate([x, x]), jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)

    def combine(self, output: Float[Array, "R *S F"], scale: Any, channels: int) -> Float[Array, "B *S F"]:
        """The guided output. The prediction is the first `channels` of `output`; what is not guided is that of the conditional
        half."""
        label, null = jnp.split(output, 2)
        guided = channels if self.channels is None else self.channels
        eps = classifier_free(label[..., :guided], null[..., :guided], scale)
        return jnp.concatenate([eps, label[..., guided:]], axis=-1)


def classifier_free(label: Float[Array, "*S"], null: Float[Array, "*S"], scale: Any) -> Float[Array, "*S"]:
    """null + s (label - null)."""
    return null + jnp.asarray(scale, null.dtype) * (label - null)
