"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): columns are rounded in turn, and the others compensate the error.

`feedback.feed_back` with the nearest point of column j's grid to w_j, where H, the second moments of the inputs, is dampened
by a share of its mean diagonal. The columns go by in the order of falling H_jj (act-order). Grids are those of W before any
update (static groups), so they do not depend on the order.

Rows do not depend on each other, so each takes, of several clipped grids, the one with the smallest error for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int, UInt8

from vq4dit_jax.integer.feedback import feed_back
from vq4dit_jax.integer.grids import Grid, codes, expand, fit_grid, quantize

DAMPENING = 0.01
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Shares of the range that a row chooses its grids from."""
_BLOCK = 128


def inverse_factor(moments: Float[np.ndarray, "I I"], dampening: float = DAMPENING) -> Float[np.ndarray, "I I"]:
    """U, upper triangular with U^T U = (H + dampening mean(diag H) 1)^-1, in float64.

    With H = R R^T, R upper triangular, U is R^-1: one factorization, and no inverse of H.
    """
    h = np.array(moments, np.float64)
    diagonal = np.einsum("ii->i", h)  # a view
    mean = diagonal.mean()
    diagonal[diagonal <= 0] = mean or 1.0  # an input that is always 0
    diagonal += dampening * mean
    r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return scipy.linalg.solve_triangular(r, np.eye(len(h)))


@functools.partial(jax.jit, static_argnames=("bits", "block"))
def round_columns(
    weight: Float[Array, "O I"], factor: Float[Array, "I I"], grid: Grid, bits: int, block: int = _BLOCK
) -> tuple[Float[Array, "O I"], Float[Array, " O"]]:
    """(Q, error of each row) for columns in their order, U and the grid of every weight (`grids.expand`)."""
    scale, zero = (a.T for a in grid)

    def choose(w: Float[Array, "1 O"], j: Int[Array, ""]) -> tuple[Float[Array, "1 O"], Float[Array, "1 O"]]:
        q = scale[j] * (quantize(w[0], scale[j], zero[j], bits) - zero[j])
        return q[None], ((w[0] - q) / factor[j, j])[None]

    rounded, total = feed_back(weight, factor, choose, block=block)
    return rounded.T, total


def quantize_weight(
    weight: Float[Array, "O I"],
    moments: Float[np.ndarray, "I I"],
    bits: int,
    group: int | None = None,
    kind: str = "asymmetric",
    shares: tuple[float, ...] = SHARES,
    act_order: bool = True,
    dampening: float = DAMPENING,
) -> tuple[UInt8[Array, "O I"], Grid]:
    """(codes, grid of each row and group) for a weight and the second moments of its inputs; grids as in `grids.fit_grid`.

    shares: of the ranges, for each row to choose one from; (1.0,) for none. act_order: False for the order of the inputs.
    """
    columns = weight.shape[1]
    order = np.argsort(-np.diagonal(moments), kind="stable") if act_order else np.arange(columns)
    factor = jnp.asarray(inverse_factor(moments[np.ix_(order, order)], dampening), jnp.float32)
    best, least = None, None
    for share in shares:
        grid = fit_grid(weight, bits, group, kind, (share,))
        every = expand(grid, columns, group)
        found, error = round_columns(weight[:, order], factor, Grid(*(a[:, order] for a in every)), bits)
        new = (found, *grid)
        if best is None:
            best, least = new, error
            continue
        best = jax.tree.map(lambda a, b, better=error < least: jnp.where(better[:, None], a, b), new, best)
        least = jnp.minimum(error, least)
    found, grid = best[0][:, np.argsort(order)], Grid(*best[1:])
    return codes(found, grid, bits, group), grid
