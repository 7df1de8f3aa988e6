"""What the rows that a Linear reads go through before they are rounded: a scale and a shift for each input, and a rotation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import hadamard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """z = (x * scale + shift) R of the layers of a stack.

    Invariants: `scale` and `shift` are (L, I) float32, or None for 1 and 0. R is `hadamard.regular(rotation)` over its root for
    each `rotation` consecutive inputs, of which I is a multiple; 0: no rotation.
    """

    scale: Any = None
    shift: Any = None
    rotation: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def has_vectors(self) -> bool:
        """Whether there is a part that works on each input alone, and can go into what comes before."""
        return self.scale is not None or self.shift is not None

    def without_vectors(self) -> "Operand | None":
        return Operand(rotation=self.rotation) if self.rotation else None


def rotate(z: Float[Array, "M I"], rotation: int) -> Float[Array, "M I"]:
    """z R, float32: each `rotation` consecutive inputs times the regular Hadamard matrix of that order over its root."""
    matrix = jnp.asarray(hadamard.regular(rotation) / math.sqrt(rotation), jnp.float32)
    groups = z.astype(jnp.float32).reshape(z.shape[0], -1, rotation)
    return jnp.matmul(groups, matrix, precision=jax.lax.Precision.HIGHEST).reshape(z.shape)


def move(x: Float[Array, "M I"], operand: Operand | None, layer: Int[Array, " 1"]) -> Float[Array, "M I"]:
    """z of one layer, float32; without an operand x as it is."""
    if operand is None:
        return x
    z = x.astype(jnp.float32)
    if operand.scale is not None:
        z = z * operand.scale[layer[0]][None]
    if operand.shift is not None:
        z = z + operand.shift[layer[0]][None]
    return rotate(z, operand.rotation) if operand.rotation else z
