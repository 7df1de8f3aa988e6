"""Lloyd's iteration in JAX: on any device, in memory that does not grow with (number of sub-vectors) x K.

Sub-vectors are processed in tiles of T. A tile's distances are a (K, T) matrix product. So is its part of the cluster
sums, one-hot (K, T) times the sub-vectors (T, d), because scatter-adds to few codewords would wait for the same
addresses. The float32 error of a sum of tiles is that of a blocked sum.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from vq4dit_jax.codebook.first_smallest import first_smallest

# Elements of a (K, T) tile. On a CPU 4 MiB stay in the caches (measured at K = 256: T = 4096 is best, 512 a third
# slower, 12288 twice as slow). An accelerator wants few, large products, and a few arrays of 64 MiB are little there.
_TILE_ELEMENTS = {"cpu": 1 << 20}
_TILE_ELEMENTS_ACCELERATOR = 1 << 24


class _Clusters(NamedTuple):
    """A codebook and the result of assigning all sub-vectors to it; `sums` has the counts in its last column."""

    codebook: Float[Array, "K d"]
    sums: Float[Array, "K d1"]
    ids: Int[Array, "tiles T"]
    squared: Float[Array, "tiles T"]
    error: Float[Array, ""]


def each(solve: Callable[[int, Any], Any], problems: Iterable[Any]) -> list[Any]:
    """[solve(i, problem i), ...], one after the other: one compiled program, the memory of one problem."""
    return [solve(i, problem) for i, problem in enumerate(problems)]


def lloyd(
    points: Float[np.ndarray, "P d"], codebook: Float[np.ndarray, "K d"], max_iterations: int, tolerance: float
) -> tuple[Float[np.ndarray, "K d"], Int[np.ndarray, " P"], int]:
    """Iterates from `codebook`; returns the codebook, the assignments to it and the iterations run."""
    marked = np.concatenate([points, np.ones((len(points), 1), np.float32)], 1)
    tiles = _tiles(marked, len(codebook))
    final, iterations = _lloyd(tiles, codebook, max_iterations, tolerance)
    return np.asarray(final.codebook), np.asarray(final.ids).reshape(-1)[: len(points)], int(iterations)


def nearest(points: Float[np.ndarray, "P d"], codebook: Float[np.ndarray, "K d"], n: int) -> Int[np.ndarray, "P n"]:
    """Ids of the n nearest codewords, nearest first."""
    ids = _nearest(_tiles(points, len(codebook)), codebook, n)
    return np.asarray(ids).reshape(-1, n)[: len(points)]


@jax.jit
def _lloyd(
    tiles: Float[Array, "tiles T d1"],
    codebook: Float[Array, "K d"],
    max_iterations: Int[Array, ""],
    tolerance: Num[Array, ""],
) -> tuple[_Clusters, Int[Array, ""]]:
    """`tiles` hold sub-vectors with a 1 appended, and rows of zeros as padding."""

    def unfinished(state):
        _, iteration, falling = state
        return falling & (iteration < max_iterations)

    def iterate(state):
        old, iteration, _ = state
        new = _assign(tiles, _means(old, tiles))
        fall = old.error - new.error
        better = jax.tree.map(lambda a, b: jnp.where(fall > 0, a, b), new, old)
        return better, iteration + 1, fall > tolerance * old.error

    start = (_assign(tiles, codebook), jnp.int32(0), jnp.bool_(True))
    clusters, iterations, _ = lax.while_loop(unfinished, iterate, start)
    return clusters, iterations


def _assign(tiles: Float[Array, "tiles T d1"], codebook: Float[Array, "K d"]) -> _Clusters:
    def tile(sums, marked):
        points, real = marked[:, :-1], marked[:, -1]
        ids = first_smallest(_distances(points, codebook), axis=0)
        onehot = (ids[None, :] == jnp.arange(len(codebook))[:, None]).astype(jnp.float32)
        sums = sums + jnp.matmul(onehot, marked, precision=lax.Precision.HIGHEST)
        return sums, (ids, jnp.square(points - codebook[ids]).sum(1) * real)

    sums, (ids, squared) = lax.scan(tile, jnp.zeros((len(codebook), tiles.shape[2])), tiles)
    error = squared.sum(1).sum() / tiles[..., -1].sum()
    return _Clusters(codebook, sums, ids, squared, error)


def _means(clusters: _Clusters, tiles: Float[Array, "tiles T d1"]) -> Float[Array, "K d"]:
    """The mean of each cluster; an empty one gets the sub-vector with the largest error that is then left, if any."""
    sums, counts = clusters.sums[:, :-1], clusters.sums[:, -1]
    used = counts > 0

    def refill(means):
        marked = tiles.reshape(-1, tiles.shape[2])
        empty_first = jnp.argsort(used, stable=True)

        def some_left(state):
            j, _, squared = state
            return (j < (~used).sum()) & (squared.max() > 0)

        def place(state):
            j, means, squared = state
            farthest = marked[jnp.argmax(squared)]
            squared = jnp.minimum(squared, jnp.square(marked - farthest[None]).sum(1))
            return j + 1, means.at[empty_first[j]].set(farthest[:-1]), squared

        return lax.while_loop(some_left, place, (0, means, clusters.squared.reshape(-1)))[1]

    means = jnp.where(used[:, None], sums / jnp.maximum(counts, 1)[:, None], clusters.codebook)
    return lax.cond(used.all(), lambda means: means, refill, means)


@functools.partial(jax.jit, static_argnames="n")
def _nearest(tiles: Float[Array, "tiles T d"], codebook: Float[Array, "K d"], n: int) -> Int[Array, "tiles T n"]:
    def tile(points):
        def take(distances, _):
            ids = first_smallest(distances, axis=0)
            taken = ids[None, :] == jnp.arange(len(codebook))[:, None]
            return jnp.where(taken, jnp.inf, distances), ids

        return lax.scan(take, _distances(points, codebook), length=n)[1].T

    return lax.map(tile, tiles)


def _distances(points: Float[Array, "T d"], codebook: Float[Array, "K d"]) -> Float[Array, "K T"]:
    """|c|^2 - 2 c.x: squared distances less |x|^2, which does not change the order."""
    products = jnp.matmul(codebook, points.T, precision=lax.Precision.HIGHEST)
    return jnp.square(codebook).sum(1, keepdims=True) - 2 * products


def _tiles(rows: Float[np.ndarray, "P d"], num_codewords: int) -> Float[np.ndarray, "tiles T d"]:
    """Cuts into equal tiles; the last is filled up with zeros."""
    elements = _TILE_ELEMENTS.get(jax.default_backend(), _TILE_ELEMENTS_ACCELERATOR)
    count = -(-len(rows) // max(1, elements // num_codewords))
    length = -(-len(rows) // count)
    return np.pad(rows, ((0, count * length - len(rows)), (0, 0))).reshape(count, length, rows.shape[1])
