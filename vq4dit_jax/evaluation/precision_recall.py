"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as ADM's evaluator computes them.

A set's manifold is the union of balls around its feature vectors, each with the distance to the point's k-th nearest
neighbour in the set as radius. Precision is the share of generated images in the manifold of the real ones, recall the
share of real images in the manifold of the generated ones. Figures from sets of different sizes do not compare.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64

NEIGHBOURS = 3
# Distances of one block: 2^24 float64 values, 128 MiB.
_BLOCK_ELEMENTS = 1 << 24
# Squared distances come from a^2 - 2ab + b^2; relative to a^2, rounding is far below this, and features far above.
_ROUNDING = 1e-12


def precision_and_recall(
    real: Float[np.ndarray, "M D"], generated: Float[np.ndarray, "N D"], neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """(precision, recall) of two sets of more than `neighbours` feature vectors each. A ball has its surface."""
    centre = np.asarray(real, np.float64).mean(axis=0, keepdims=True)  # small numbers round less
    real, generated = real.astype(np.float64) - centre, generated.astype(np.float64) - centre
    precision = _inside(generated, real, _squared_radii(real, neighbours)).mean()
    recall = _inside(real, generated, _squared_radii(generated, neighbours)).mean()
    return float(precision), float(recall)


def _squared_radii(points: Float64[np.ndarray, "N D"], neighbours: int) -> Float64[np.ndarray, " N"]:
    """Squared distance of each point to its k-th nearest neighbour, itself not counted."""
    # Each row holds the point's distance to itself, the smallest, at index 0.
    return np.concatenate(
        [np.partition(rows, neighbours)[:, neighbours] for rows in _squared_distances(points, points)]
    )


def _inside(
    points: Float64[np.ndarray, "P D"], centres: Float64[np.ndarray, "N D"], squared_radii: Float64[np.ndarray, " N"]
) -> Bool[np.ndarray, " P"]:
    """Which of the points lie in at least one of the balls."""
    slack = _ROUNDING * np.square(centres).sum(axis=1).max()
    reach = (squared_radii + slack)[None, :]
    return np.concatenate([(rows <= reach).any(axis=1) for rows in _squared_distances(points, centres)])


def _squared_distances(
    a: Float64[np.ndarray, "N D"], b: Float64[np.ndarray, "M D"]
) -> Iterator[Float64[np.ndarray, "rows M"]]:
    """The N x M matrix of squared distances, some rows at a time so that memory stays bounded."""
    squares = np.square(b).sum(axis=1)[None, :]
    rows = max(1, _BLOCK_ELEMENTS // len(b))
    for start in range(0, len(a), rows):
        part = a[start : start + rows]
        yield np.maximum(np.square(part).sum(axis=1)[:, None] - 2.0 * part @ b.T + squares, 0.0)
