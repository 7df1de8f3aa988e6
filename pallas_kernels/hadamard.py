"""Regular Hadamard matrices: entries 1 and -1, H H^T = n 1, and rows of one sum, sqrt(n).

A regular one has no row of ones, which would gather the mean of a group in one channel (Ma et al. 2025, ConvRot, arXiv
2512.03673). They have orders 4 u^2; those here are Kronecker products of

    order 4     J - 2 P, P a permutation without fixed points: two transpositions
    order 36    J - 2 A, A the graph of the cells of a 6 x 6 square that share their row, column, or symbol (i + j mod 6): it is
                strongly regular with (36, 15, 6, 6), and for such a graph (J - 2 A)^2 = 36 1

All are symmetric, so H / sqrt(n) is its own inverse.
"""

import functools

import numpy as np


@functools.cache
def regular(order: int) -> np.ndarray:
    """A symmetric regular Hadamard matrix of order 4^a 36^b, int8. Raises ValueError for other orders."""
    matrix, left = np.ones((1, 1), np.int8), order
    for size, factor in ((36, _of_36()), (4, _of_4())):
        while left > 1 and left % size == 0:
            matrix, left = np.kron(matrix, factor), left // size
    if left != 1 or order < 4:
        raise ValueError(f"no regular Hadamard matrix of order {order} here; wanted 4^a 36^b")
    return matrix


def _of_4() -> np.ndarray:
    return np.ones((4, 4), np.int8) - 2 * np.eye(4, dtype=np.int8)[[1, 0, 3, 2]]


def _of_36() -> np.ndarray:
    row, column = np.divmod(np.arange(36), 6)
    shares = [a[:, None] == a[None] for a in (row, column, (row + column) % 6)]
    graph = np.logical_or.reduce(shares) & ~np.eye(36, dtype=bool)
    return (1 - 2 * graph).astype(np.int8)


ROW_OF_36 = 1152
"""Columns that a warp takes at once where the order has a factor 36: 32 lanes of 18 pairs."""


def fits_warp(rotation: int, columns: int) -> bool:
    """Whether the kernels, which hold rows of so many numbers in the registers of a warp, rotate them in such groups.

    A group of 4^k lies in one register of neighbouring lanes, one of 36 * 4^k in 18 of them (`mosaic.rows`).
    """
    if rotation % 36 == 0:
        return rotation in (144, 576) and columns % ROW_OF_36 == 0
    return rotation in (16, 64, 256) and columns % 64 == 0 and columns % rotation == 0
