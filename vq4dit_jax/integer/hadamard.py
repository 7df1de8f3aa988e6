"""Regular Hadamard rotations in groups of inputs: they spread what stands in few channels over all of a group.

H of order n has entries 1 and -1 and H H^T = n 1. A regular one has rows of one sum, sqrt(n), so that it has no row of ones,
which would gather the mean of a group in one channel (Ma et al. 2025, ConvRot, arXiv 2512.03673). Regular ones have orders
4 u^2; those here are Kronecker products of

    order 4     J - 2 P, P a permutation without fixed points: two transpositions
    order 36    J - 2 A, A the graph of the cells of a 6 x 6 square that share their row, column, or symbol (i + j mod 6): it is
                strongly regular with (36, 15, 6, 6), and for such a graph (J - 2 A)^2 = 36 1

All are symmetric, so H / sqrt(n) is its own inverse. With Q = diag(signs) H / sqrt(n) on each group,

    y = x W^T = (x Q) (W Q)^T
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from vq4dit_jax.errors import InputError

GROUPS = (576, 256, 144, 64, 16)
"""Group sizes that are chosen from, the largest first."""


@functools.cache
def regular(order: int) -> np.ndarray:
    """A symmetric regular Hadamard matrix of order 4^a 36^b, int8. Raises InputError for other orders."""
    matrix, left = np.ones((1, 1), np.int8), order
    for size, factor in ((36, _of_36()), (4, _of_4())):
        while left > 1 and left % size == 0:
            matrix, left = np.kron(matrix, factor), left // size
    if left != 1 or order < 4:
        raise InputError(f"no regular Hadamard matrix of order {order} here; wanted 4^a 36^b, such as {_listed()}")
    return matrix


def _of_4() -> np.ndarray:
    return np.ones((4, 4), np.int8) - 2 * np.eye(4, dtype=np.int8)[[1, 0, 3, 2]]


def _of_36() -> np.ndarray:
    row, column = np.divmod(np.arange(36), 6)
    shares = [a[:, None] == a[None] for a in (row, column, (row + column) % 6)]
    graph = np.logical_or.reduce(shares) & ~np.eye(36, dtype=bool)
    return (1 - 2 * graph).astype(np.int8)


def _listed() -> str:
    return ", ".join(map(str, sorted(GROUPS)))


def largest_group(columns: int) -> int:
    """The largest of `GROUPS` that divides a number of inputs; 0 where none does."""
    return next((group for group in GROUPS if columns % group == 0), 0)


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
