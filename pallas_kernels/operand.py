"""What the rows that a Linear reads go through before they are rounded: a scale and a shift for each input, and a rotation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """z = (x * scale + shift) R of the layers of a stack.

    Invariants: `scale` and `shift` are (L, I) float32, or None for 1 and 0; `rotation` is R (g, g) float32, orthogonal, of each g
    consecutive inputs, or None; g divides I.
    """

    scale: Any = None
    shift: Any = None
    rotation: Any = None

    @property
    def is_vectors(self) -> bool:
        """Whether it works on each input alone, so that it can go into what comes before."""
        return self.rotation is None


def move(x: Float[Array, "M I"], operand: Operand | None, layer: Int[Array, " 1"]) -> Float[Array, "M I"]:
    """z of one layer, float32; without an operand x as it is."""
    if operand is None:
        return x
    z = x.astype(jnp.float32)
    if operand.scale is not None:
        z = z * operand.scale[layer[0]][None]
    if operand.shift is not None:
        z = z + operand.shift[layer[0]][None]
    if operand.rotation is None:
        return z
    groups = z.reshape(z.shape[0], -1, operand.rotation.shape[0])
    return jnp.matmul(groups, operand.rotation, precision=jax.lax.Precision.HIGHEST).reshape(z.shape)
