"""K-means over sub-vectors: codebooks that minimise sum_p min_k |x_p - c_k|^2, and nearest codewords.

  seeding     k-means++ (Arthur & Vassilvitskii 2007): each next seed is x_p with probability D^2(x_p) / sum D^2,
              D the distance to the nearest seed so far
  Lloyd       a_p = argmin_k |x_p - c_k|^2; c_k = mean of the x_p with a_p = k; and again, until the error
              mean_p |x_p - c_{a_p}|^2 falls by less than `tolerance` of itself
  empty       a codeword that no sub-vector uses moves to the sub-vector with the largest error, the next such
              codeword to the largest error that is then left; no sub-vector used them, so the error cannot rise

Two backends run the same iteration from the same seeds: `kmeans_jax` (any device) and `kmeans_faiss` (CPU, with a
sixth of the other's CPU time there).
"""

import functools
import importlib.util
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vq4dit_jax.codebook import kmeans_faiss, kmeans_jax
from vq4dit_jax.errors import InputError

MAX_CODEWORDS = 1 << 16
# Seeds are drawn from a random subsample of this many sub-vectors a codeword. D^2 sampling needs only the density
# of the sub-vectors: with 64 a codeword the error after Lloyd is that of seeding on all of them (P = 110592, d = 4,
# K = 256: 0.3811 and 0.3810, with a standard deviation of 0.0007 over keys), at the cost of one Lloyd iteration.
_SEEDING_SAMPLES = 64
# ... but at most this many in all, and never fewer than 4 a codeword: K = 65536 takes about a minute.
_MAX_SEEDING_SAMPLES = 1 << 18
# Squares of larger numbers, summed over a sub-vector, overflow float32.
_LARGEST = 1e18
# Sub-vectors whose distances to their n candidates are held at once: 2^22 float32 differences are 16 MiB.
_REFINED_AT_ONCE = 1 << 22


class KMeans(NamedTuple):
    """N solved problems. `assignments` are the nearest codewords, lower index first; `error` is computed from them.

    codebook: (N, K, d); where sub-vectors have fewer than K distinct values, codewords repeat.
    error: (N,) mean over sub-vectors of |x_p - c_{a_p}|^2 (a sum over d, not a mean).
    iterations: (N,) Lloyd iterations that were run.
    """

    codebook: Float[np.ndarray, "N K d"]
    assignments: Int[np.ndarray, "N P"]
    error: Float[np.ndarray, " N"]
    iterations: Int[np.ndarray, " N"]


def kmeans(
    subvectors: jax.typing.ArrayLike,
    num_codewords: int,
    key: PRNGKeyArray,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    backend: str = "auto",
) -> KMeans:
    """Clusters each of N sets of sub-vectors (N, P, d) into `num_codewords` codewords.

    Problem i draws from fold_in(key, i) and is solved by itself, so its bits do not depend on the rest of the batch or on
    the number of threads. The same key gives the same bits.

    max_iterations: at least 1. tolerance: smallest relative fall of the error after which another iteration follows; 0: iterate
      while the error falls.
    backend: "jax", "faiss", or "auto": faiss where it is installed and JAX has no accelerator.

    Raises InputError for sub-vectors that are not (N, P, d), empty, not finite or not below 1e18 in magnitude, and
    for a number of codewords outside 1..65536.
    """
    solver = _solver(backend)
    subvectors = _checked("subvectors", subvectors, ("N", "P", "d"))
    if not 1 <= num_codewords <= MAX_CODEWORDS:
        raise InputError(f"num_codewords={num_codewords}: wanted 1 to {MAX_CODEWORDS}")
    if max_iterations < 1:
        raise InputError(f"max_iterations={max_iterations}: wanted at least 1")
    if not tolerance >= 0:
        raise InputError(f"tolerance={tolerance}: wanted 0 or more")

    def solve(index: int, points: Float[np.ndarray, "P d"]) -> tuple[np.ndarray | np.generic, ...]:
        unit, centre, scale = _unit_frame(points)
        first = seeds(unit, num_codewords, jax.random.fold_in(key, index))
        codebook, ids, iterations = solver.lloyd(unit, first, max_iterations, tolerance)
        codebook = (codebook + centre) * scale
        error = np.square(points - codebook[ids]).mean(dtype=np.float64) * points.shape[1]
        return codebook, ids.astype(np.int32), np.float32(error), np.int32(iterations)

    return KMeans(*map(np.stack, zip(*solver.each(solve, subvectors), strict=True)))


def nearest_codewords(
    subvectors: jax.typing.ArrayLike, codebook: jax.typing.ArrayLike, n: int, backend: str = "auto"
) -> tuple[Int[np.ndarray, "P n"], Float[np.ndarray, "P n"]]:
    """The `n` codewords of `codebook` (K, d) nearest to each of `subvectors` (P, d): ids int32, squared distances.

    Nearest first, equals in the order of their ids. The n are chosen by |c|^2 - 2 x.c in float32, up to its rounding;
    their distances and order are computed from x - c. Raises InputError as `kmeans` does, and for n outside 1..K.

    backend: as in `kmeans`, but "auto" is "jax" for n > 1, where faiss is slower (3 times at K = 256).
    """
    solver = _solver("jax" if backend == "auto" and n > 1 else backend)
    subvectors = _checked("subvectors", subvectors, ("P", "d"))
    codebook = _checked("codebook", codebook, ("K", "d"))
    if subvectors.shape[1] != codebook.shape[1]:
        raise InputError(
            f"subvectors have length {subvectors.shape[1]}, codewords {codebook.shape[1]}: wanted the same"
        )
    if not 1 <= n <= len(codebook):
        raise InputError(f"n={n}: wanted 1 to {len(codebook)}, the number of codewords")
    both, _, scale = _unit_frame(np.concatenate([subvectors, codebook]))
    points, codewords = np.split(both, [len(subvectors)])
    ids = solver.nearest(points, codewords, n).astype(np.int32)
    squared = np.empty(ids.shape, np.float32)
    rows = max(1, _REFINED_AT_ONCE // (n * points.shape[1]))
    for start in range(0, len(points), rows):
        part = slice(start, start + rows)
        offsets = points[part, None] - codewords[ids[part]]
        distances = np.einsum("pnd,pnd->pn", offsets, offsets)
        order = np.lexsort((ids[part], distances), axis=-1)
        ids[part] = np.take_along_axis(ids[part], order, -1)
        squared[part] = np.take_along_axis(distances, order, -1) * scale * scale
    return ids, squared


def seeds(points: Float[np.ndarray, "P d"], num_codewords: int, key: PRNGKeyArray) -> Float[np.ndarray, "K d"]:
    """K-means++ seeds. Where fewer than K sub-vectors differ, all distinct ones are there and the rest repeat."""
    most = max(min(_SEEDING_SAMPLES * num_codewords, _MAX_SEEDING_SAMPLES), 4 * num_codewords)
    if len(points) > most:
        points = points[np.asarray(jax.random.randint(jax.random.split(key)[0], (most,), 0, len(points)))]
    chosen = _draw_seeds(tuple(np.ascontiguousarray(points.T)), key, num_codewords)
    return points[np.asarray(chosen)]


@functools.partial(jax.jit, static_argnames="num_codewords")
def _draw_seeds(columns: tuple[Float[Array, " M"], ...], key: PRNGKeyArray, num_codewords: int) -> Int[Array, " K"]:
    """Indices of the seeds. One array a dimension: XLA:CPU does not vectorise a sum over a short last axis."""
    first_key, key = jax.random.split(jax.random.split(key)[1])
    uniform = jax.random.uniform(key, (num_codewords,))

    def squared_to(index: Int[Array, ""]) -> Float[Array, " M"]:
        return sum(jnp.square(column - column[index]) for column in columns)

    def draw(k: Int[Array, ""], state):
        chosen, squared = state
        index = _draw_in_proportion(squared, uniform[k])
        return chosen.at[k].set(index), jnp.minimum(squared, squared_to(index))

    first = jax.random.randint(first_key, (), 0, len(columns[0]))
    chosen = jnp.full((num_codewords,), first)
    return jax.lax.fori_loop(1, num_codewords, draw, (chosen, squared_to(first)))[0]


def _draw_in_proportion(weights: Float[Array, " M"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """An index with probability weights / sum(weights), by inversion: first a row of 128, then a place in it.

    An index of weight zero is drawn only if all are zero: rounding can make a cumulative sum rise at one.
    """
    rows = jnp.pad(weights, (0, -len(weights) % 128)).reshape(-1, 128)
    totals = rows.sum(1)
    cumulative = jnp.cumsum(totals)
    target = uniform * cumulative[-1]
    row = _first(cumulative > target, totals)
    rest = target - (cumulative[row] - totals[row])
    return row * 128 + _first(jnp.cumsum(rows[row]) > rest, rows[row])


def _first(hit: Bool[Array, " M"], weights: Float[Array, " M"]) -> Int[Array, ""]:
    """First index that hits among the positive weights; the largest weight where rounding leaves none."""
    hit = hit & (weights > 0)
    return jnp.where(hit.any(), jnp.argmax(hit), jnp.argmax(weights))


def _unit_frame(
    vectors: Float[np.ndarray, "P d"],
) -> tuple[Float[np.ndarray, "P d"], Float[np.ndarray, " d"], np.float32]:
    """(vectors / scale - centre, centre, scale), so that distances by |c|^2 - 2 x.c neither overflow nor cancel.

    Both steps are exact. scale is a power of two that brings magnitudes to 1 at most. A dimension is centred only
    where all its values lie within half its mean of the mean: far from the origin, where cancellation would be large,
    and where a float32 subtraction does not round (Sterbenz's lemma).
    """
    scale = np.ldexp(np.float32(1), np.frexp(np.abs(vectors).max())[1])
    unit = vectors / scale
    mean = unit.mean(0, dtype=np.float64).astype(np.float32)
    centre = np.where(np.abs(unit - mean).max(0) <= np.abs(mean) / 2, mean, np.float32(0))
    return unit - centre, centre, scale


def _checked(name: str, values: jax.typing.ArrayLike, axes: tuple[str, ...]) -> Float[np.ndarray, "..."]:
    """float32 on the host, row-major."""
    values = np.ascontiguousarray(values, np.float32)
    wanted = f"({', '.join(axes)})"
    if values.ndim != len(axes) or values.size == 0:
        raise InputError(f"{name} have shape {values.shape}: wanted {wanted} with no axis of length 0")
    if not max(values.max(), -values.min()) < _LARGEST:
        where = np.unravel_index(np.argmin(np.abs(values) < _LARGEST), values.shape)
        place = ", ".join(map(str, where))
        raise InputError(
            f"{name}[{place}] is {values[where]}: wanted finite numbers below {_LARGEST:g} in magnitude;"
            " correct the weights it comes from"
        )
    return values


def _solver(backend: str) -> ModuleType:
    installed = importlib.util.find_spec("faiss") is not None
    if backend == "auto":
        backend = "faiss" if installed and jax.default_backend() == "cpu" else "jax"
    if backend == "faiss" and not installed:
        raise InputError("backend='faiss': faiss is not installed; `pip install faiss-cpu`, or take backend='jax'")
    solvers = {"faiss": kmeans_faiss, "jax": kmeans_jax}
    if backend not in solvers:
        raise InputError(f"backend={backend!r}: wanted 'auto', 'jax' or 'faiss'")
    return solvers[backend]
