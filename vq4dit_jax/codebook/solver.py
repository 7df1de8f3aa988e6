"""Codebooks and assignments that keep a layer's outputs, instead of its weights.

A Linear's mean squared output error under inputs with second moments H = E[x x^T] is

    e(C, A) = tr((W - C[A]) H (W - C[A])^T)

k-means minimises it for H = I. Three steps, each of a few matrix products, minimise it for any H:

  feedback       A, from left to right; the error of a sub-vector is compensated in those to its right
                 (`integer.feedback`): a = argmin_k |(w_b - c_k) U_bb^-1|^2 for the columns b of a sub-vector
                 (van Baalen et al. 2024, GPTVQ, arXiv 2402.15319, algorithm 1)
  descend        A, one sub-vector of each row at a time, the others held: e is a square with curvature H_bb around the
                 target t_b = c_a + ((W - C[A]) H)_b H_bb^-1, so a = argmin_k (t_b - c_k) H_bb (t_b - c_k)^T
  fit_codebook   C for given A: linear least squares, by conjugate gradients

`descend` and `fit_codebook` never raise e. With H = I they are the two halves of Lloyd's iteration.

`solve` computes in full float32: in TF32, XLA's default on NVIDIA GPUs, H^-1 loses its small directions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.soft_weights import soft_weights
from vq4dit_jax.codebook.first_smallest import first_smallest
from vq4dit_jax.integer.feedback import feed_back

DAMPING = 1e-3
"""Added to the diagonal of H, in units of its mean: it gives directions without inputs a small weight and makes H
invertible. (Ten times more or less changes e by less than a hundredth on the built-in model.)"""
FEEDBACKS, ROUNDS, _SWEEPS, _CG_STEPS = 2, 5, 2, 15

Weight = Float[Array, "O I"]
Moments = Float[Array, "I I"]
Codebook = Float[Array, "G K d"]
Codes = Int[Array, "O S"]
Integer = int | Int[Array, ""]


def condition(moments: Moments) -> Moments:
    """H with a mean of 1 on its diagonal, and `DAMPING` more; the functions below take it in this form."""
    width = len(moments)
    return moments * (width / jnp.trace(moments)) + DAMPING * jnp.eye(width)


def decode(codebook: Codebook, codes: Codes) -> Weight:
    """C[A]; differentiable in the codebook."""
    return soft_weights(codebook, codes[None], jnp.ones((1, *codes.shape), jnp.float32))


def error(weight: Weight, moments: Moments, codebook: Codebook, codes: Codes) -> Float[Array, ""]:
    """e(C, A) / e(0): the relative squared error of the outputs."""
    lost = weight - decode(codebook, codes)
    return ((lost @ moments) * lost).sum() / ((weight @ moments) * weight).sum()


def feedback(weight: Weight, moments: Moments, codebook: Codebook) -> Codes:
    """Assignments from left to right with error feedback (GPTVQ)."""
    d, width = codebook.shape[-1], weight.shape[1]
    # The Cholesky factor in reverse order: H = R R^T with R upper triangular, hence U = R^-1, and U_bb^-1 = R_bb.
    root = jnp.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    upper = jax.scipy.linalg.solve_triangular(root, jnp.eye(width), lower=False)

    def choose(wanted: Float[Array, "d O"], b: Int[Array, ""]) -> tuple[Int[Array, "1 O"], Float[Array, "d O"]]:
        inverse = lax.dynamic_slice(root, (b * d, b * d), (d, d))
        chosen = _nearest(wanted.T, inverse @ inverse.T, codebook)
        return chosen[None], ((wanted.T - decode(codebook, chosen[:, None])) @ inverse).T

    return feed_back(weight, upper, choose, d=d)[0].T


def descend(weight: Weight, moments: Moments, codebook: Codebook, codes: Codes) -> Codes:
    """One sweep of coordinate descent over the sub-vectors; never raises `error`."""
    d = codebook.shape[-1]
    blocks, inverses = _diagonal_blocks(moments, d)

    def step(b: Int[Array, ""], state: tuple[Weight, Codes]) -> tuple[Weight, Codes]:
        lost, codes = state
        now = lax.dynamic_slice(codes, (0, b), (len(codes), 1))
        kept = decode(codebook, now)
        pull = lost @ lax.dynamic_slice(moments, (0, b * d), (len(moments), d))
        chosen = _nearest(kept + pull @ inverses[b], blocks[b], codebook)[:, None]
        own = lax.dynamic_slice(lost, (0, b * d), (len(lost), d)) + kept - decode(codebook, chosen)
        return lax.dynamic_update_slice(lost, own, (0, b * d)), lax.dynamic_update_slice(codes, chosen, (0, b))

    return lax.fori_loop(0, codes.shape[1], step, (weight - decode(codebook, codes), codes))[1]


def fit_codebook(
    weight: Weight, moments: Moments, codebook: Codebook, codes: Codes, steps: int = _CG_STEPS
) -> Codebook:
    """The codebook after `steps` of conjugate gradients on e from the given one, each group on its own.

    Preconditioned with the number of uses of each codeword; an unused codeword does not change.
    """
    _, gather = jax.vjp(lambda c: decode(c, codes), codebook)
    adjoint = lambda dense: gather(dense @ moments)[0]
    scale = gather(jnp.ones_like(weight))[0]
    scale = jnp.where(scale > 0, 1 / jnp.maximum(scale, 1.0), 0.0)
    dot = lambda a, b: (a * b).sum((1, 2), keepdims=True)
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    def step(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        found, residual, direction, size = state
        image = adjoint(decode(direction, codes))
        length = ratio(size, dot(direction, image))
        found, residual = found + length * direction, residual - length * image
        next_size = dot(residual, scale * residual)
        return found, residual, scale * residual + ratio(next_size, size) * direction, next_size

    residual = adjoint(weight - decode(codebook, codes))
    direction = scale * residual
    return lax.fori_loop(0, steps, step, (codebook, residual, direction, dot(residual, direction)))[0]


@jax.jit
def solve(
    weight: Weight, moments: Moments, codebook: Codebook, *, feedbacks: Integer = FEEDBACKS, rounds: Integer = ROUNDS
) -> tuple[Codebook, Codes, Float[Array, ""]]:
    """(codebook, assignments, `error`) of one layer, from a k-means codebook. `moments` as `condition` gives them.

    `feedbacks` times `feedback` and `fit_codebook`, then `rounds` of two sweeps of `descend` and `fit_codebook`. One row of
    W holds I = S d inputs; row o reads codebook o // (O / G).
    """

    # Loops of any length, not unrolled: programs are compiled for every shape and codebook, and each half stands in them once.
    def fed_back(_: Any, state: tuple[Codebook, Codes]) -> tuple[Codebook, Codes]:
        codes = feedback(weight, moments, state[0])
        return fit_codebook(weight, moments, state[0], codes), codes

    def descended(_: Any, state: tuple[Codebook, Codes]) -> tuple[Codebook, Codes]:
        codebook, codes = state
        codes = lax.fori_loop(0, _SWEEPS, lambda _, codes: descend(weight, moments, codebook, codes), codes)
        return fit_codebook(weight, moments, codebook, codes), codes

    with jax.default_matmul_precision("highest"):
        nothing = jnp.zeros((len(weight), weight.shape[1] // codebook.shape[-1]), jnp.int32)
        state = lax.fori_loop(0, feedbacks, fed_back, (codebook, nothing))
        codebook, codes = lax.fori_loop(0, rounds, descended, state)
        return codebook, codes, error(weight, moments, codebook, codes)


def _diagonal_blocks(moments: Moments, d: int) -> tuple[Float[Array, "S d d"], Float[Array, "S d d"]]:
    """The blocks H_bb, and their inverses."""
    columns = jnp.arange(len(moments)).reshape(-1, d)
    blocks = moments[columns[:, :, None], columns[:, None, :]]
    return blocks, jnp.linalg.inv(blocks)


def _errors(target: Float[Array, "O d"], metric: Float[Array, "d d"], codebook: Codebook) -> Float[Array, "O K"]:
    """(t - c_k) M (t - c_k)^T less its part t M t^T, which all codewords share."""
    groups, num_codewords, d = codebook.shape
    squares = ((codebook @ metric) * codebook).sum(-1)
    cross = jnp.einsum("gpd,gkd->gpk", (target @ metric).reshape(groups, -1, d), codebook)
    return (squares[:, None] - 2 * cross).reshape(len(target), num_codewords)


def _nearest(target: Float[Array, "O d"], metric: Float[Array, "d d"], codebook: Codebook) -> Int[Array, " O"]:
    return first_smallest(_errors(target, metric, codebook), axis=1)
