"""Regular Hadamard rotations in groups of inputs: they spread what stands in few channels over all of a group.

With Q = diag(signs) H / sqrt(n) on each group, and H a matrix of `pallas_kernels.hadamard`,

    y = x W^T = (x Q) (W Q)^T
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from pallas_kernels import hadamard
from vq4dit_jax.errors import InputError

GROUPS = (576, 256, 144, 64, 16)
"""Group sizes that are chosen from, the largest first."""
HEAD_GROUPS = (144, 64, 36, 16, 4)
"""The same inside a head of attention."""


def regular(order: int) -> np.ndarray:
    """A symmetric regular Hadamard matrix of order 4^a 36^b, int8. Raises InputError for other orders."""
    try:
        return hadamard.regular(order)
    except ValueError as error:
        raise InputError(f"{error}, such as {_listed()}") from error


def _listed() -> str:
    return ", ".join(map(str, sorted(GROUPS)))


def largest_group(columns: int, groups: Sequence[int] = GROUPS) -> int:
    """The largest of `groups` that divides a number of inputs; 0 where none does."""
    return next((group for group in sorted(groups, reverse=True) if columns % group == 0), 0)


def check(group: int, columns: int) -> None:
    """InputError for a group without a matrix, or that does not divide the inputs."""
    regular(group)
    if columns % group:
        raise InputError(f"rotation in groups of {group} with {columns} inputs: wanted a divisor of {columns}")


def rotate(
    x: Float[Array, "*batch I"], group: int, signs: Num[Array, "#*batch I"] | None = None
) -> Float[Array, "*batch I"]:
    """x Q in the dtype of x: one batched product with H, after the signs (of as many axes as x)."""
    if signs is not None:
        x = x * signs.astype(x.dtype)
    matrix = jnp.asarray(regular(group) / math.sqrt(group), x.dtype)
    return jnp.matmul(x.reshape(*x.shape[:-1], -1, group), matrix, precision="highest").reshape(x.shape)


def rotate_back(
    x: Float[Array, "*batch I"], group: int, signs: Num[Array, "#*batch I"] | None = None
) -> Float[Array, "*batch I"]:
    """x Q^T, the inverse of `rotate`."""
    x = rotate(x, group)
    return x if signs is None else x * signs.astype(x.dtype)
