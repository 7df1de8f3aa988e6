"""Mean and covariance of a stream of feature vectors, the same to the last bit however the stream is cut.

A sum of floating-point numbers depends on the order of its terms, so the order is fixed here by the global index of a
row. Rows 1024 c ... 1024 c + 1023 are chunk c. The mean mu and the scatter S = sum (x - mu)(x - mu)^T of a chunk are
computed from all of its rows at once, in float64; then chunks are merged in pairs, pairs in pairs of pairs and so on
(a binary tree over c), by the formulas of Chan, Golub and LeVeque (1979):

    n = n_a + n_b    delta = mu_b - mu_a    mu = mu_a + n_b / n delta    S = S_a + S_b + n_a n_b / n delta delta^T

A state holds the largest complete subtrees of its range of rows, and unmerged the rows of incomplete chunks. Both depend on
the range alone, so any batches, shards or processes lead to the same state.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

CHUNK = 1024


class Moments(NamedTuple):
    """Sample mean (D,) and unbiased covariance (D, D), float64."""

    mu: Float64[np.ndarray, " D"]
    sigma: Float64[np.ndarray, "D D"]


class _Rows(NamedTuple):
    """A part of one chunk, from row `first` on, as it was given."""

    first: int
    values: np.ndarray

    @property
    def count(self) -> int:
        return len(self.values)


class _Tree(NamedTuple):
    """Rows `first` ... `first + count - 1`: 2^k whole chunks, `first` being a multiple of `count`; or any merged rows."""

    first: int
    count: int
    mu: np.ndarray
    scatter: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingMoments:
    """The moments of the rows `first` ... `first + count - 1` of a stream; `StreamingMoments(a)` starts at row a.

    States are values: `update` and `merge` return new ones. D being the width and N the number of rows, a state holds at
    most 2 log2(N / 1024) matrices (D, D) and 2046 rows.
    """

    first: int = 0
    count: int = 0
    pieces: tuple[_Rows | _Tree, ...] = ()

    def update(self, rows: Float[np.ndarray, "n D"]) -> "StreamingMoments":
        """With the next n >= 0 rows of the stream, finite numbers."""
        begin = self.first + self.count
        borders = [begin, *range((begin // CHUNK + 1) * CHUNK, begin + len(rows), CHUNK), begin + len(rows)]
        # Copies, because the caller may change them, and a few rows would keep a large array in memory.
        parts = [_Rows(a, np.array(rows[a - begin : b - begin])) for a, b in zip(borders, borders[1:]) if a < b]
        return StreamingMoments(self.first, self.count + len(rows), _reduce([*self.pieces, *parts]))

    def merge(self, following: "StreamingMoments") -> "StreamingMoments":
        """With the state of the rows that follow; ValueError where they do not follow at once."""
        if following.first != self.first + self.count:
            raise ValueError(f"the state to merge starts at row {following.first}, not at {self.first + self.count}")
        pieces = _reduce([*self.pieces, *following.pieces])
        return StreamingMoments(self.first, self.count + following.count, pieces)

    def finalize(self) -> Moments:
        """Mean and unbiased covariance; ValueError where there are fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, and there are {self.count}")
        whole, *others = [_summarize(piece) if isinstance(piece, _Rows) else piece for piece in self.pieces]
        for tree in others:
            whole = _merge(whole, tree)
        return Moments(whole.mu.copy(), whole.scatter / (self.count - 1))


def _reduce(pieces: Iterable[_Rows | _Tree]) -> tuple[_Rows | _Tree, ...]:
    """Neighbours joined until no two of them make up a chunk or a subtree."""
    done = []
    for piece in pieces:
        done.append(piece)
        while True:
            if isinstance(done[-1], _Rows) and done[-1].count == CHUNK:
                done[-1] = _summarize(done[-1])
            joined = _join(*done[-2:]) if len(done) > 1 else None
            if joined is None:
                break
            done[-2:] = [joined]
    return tuple(done)


def _join(a: _Rows | _Tree, b: _Rows | _Tree) -> _Rows | _Tree | None:
    """Both in one piece if they are parts of one chunk or the two halves of a subtree, else None."""
    if isinstance(a, _Rows) and isinstance(b, _Rows) and a.first // CHUNK == b.first // CHUNK:
        return _Rows(a.first, np.concatenate([a.values, b.values]))
    if isinstance(a, _Tree) and isinstance(b, _Tree) and a.count == b.count and a.first % (2 * a.count) == 0:
        return _merge(a, b)
    return None


def _summarize(rows: _Rows) -> _Tree:
    values = rows.values.astype(np.float64, order="C")
    mu = values.mean(axis=0)
    values -= mu[None, :]
    return _Tree(rows.first, rows.count, mu, values.T @ values)


def _merge(a: _Tree, b: _Tree) -> _Tree:
    count, delta = a.count + b.count, b.mu - a.mu
    scatter = np.multiply.outer(delta, delta)
    scatter *= a.count * b.count / count
    scatter += a.scatter
    scatter += b.scatter
    return _Tree(a.first, count, a.mu + b.count / count * delta, scatter)
