"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as ADM's evaluator computes them.

A set's manifold is the union of balls around its feature vectors, each with the distance to the point's k-th nearest
neighbour in the set as radius. Precision is the share of generated images in the manifold of the real ones, recall the
share of real images in the manifold of the generated ones. Figures from sets of different sizes do not compare.
ADM's evaluator rounds the features and the distances to float16; here they are float64.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64

NEIGHBOURS = 3
# Vectors of each side of a block of distances: 128 MiB of them.
_BLOCK = 4096
# Squared distances are computed as a^2 - 2ab + b^2; relative to a^2, rounding errors are far below this and distances far above.
_ROUNDING = 1e-12


def precision_and_recall(
    real: Float[np.ndarray, "M D"], generated: Float[np.ndarray, "N D"], neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """(precision, recall) of two sets of more than `neighbours` feature vectors each. A ball includes its surface.

    Beside the features in their own dtype, memory is that of some blocks of 4096 vectors and their distances.
    2 D (M^2 + N^2 + 2 M N) operations.
    """
    centre = real.mean(axis=0, dtype=np.float64, keepdims=True)  # small numbers round less
    precision = _inside(generated, real, _squared_radii(real, centre, neighbours), centre).mean()
    recall = _inside(real, generated, _squared_radii(generated, centre, neighbours), centre).mean()
    return float(precision), float(recall)


def _squared_radii(
    points: Float[np.ndarray, "N D"], centre: Float64[np.ndarray, "1 D"], neighbours: int
) -> Float64[np.ndarray, " N"]:
    """Squared distance of each point to its k-th nearest neighbour, itself not counted."""
    radii = []
    for rows in _blocks(points, centre):
        # A point's distance to itself is among them, the smallest, at index 0.
        nearest = np.full((len(rows), neighbours + 1), np.inf)
        for others in _blocks(points, centre):
            nearest = np.concatenate([nearest, _squared_distances(rows, others)], axis=1)
            nearest = np.partition(nearest, neighbours)[:, : neighbours + 1]
        radii.append(nearest[:, neighbours])
    return np.concatenate(radii)


def _inside(
    points: Float[np.ndarray, "P D"],
    centres: Float[np.ndarray, "N D"],
    squared_radii: Float64[np.ndarray, " N"],
    centre: Float64[np.ndarray, "1 D"],
) -> Bool[np.ndarray, " P"]:
    """Whether each point lies in at least one of the balls."""
    slack = _ROUNDING * max(np.square(part).sum(axis=1).max() for part in _blocks(centres, centre))
    found = []
    for rows in _blocks(points, centre):
        inside, start = np.zeros(len(rows), bool), 0
        for others in _blocks(centres, centre):
            reach = squared_radii[start : start + len(others)] + slack
            inside |= (_squared_distances(rows, others) <= reach[None, :]).any(axis=1)
            start += len(others)
        found.append(inside)
    return np.concatenate(found)


def _blocks(
    points: Float[np.ndarray, "N D"], centre: Float64[np.ndarray, "1 D"]
) -> Iterator[Float64[np.ndarray, "rows D"]]:
    for start in range(0, len(points), _BLOCK):
        yield points[start : start + _BLOCK].astype(np.float64) - centre


def _squared_distances(a: Float64[np.ndarray, "N D"], b: Float64[np.ndarray, "M D"]) -> Float64[np.ndarray, "N M"]:
    distances = a @ b.T
    distances *= -2.0
    distances += np.square(a).sum(axis=1)[:, None]
    distances += np.square(b).sum(axis=1)[None, :]
    return np.maximum(distances, 0.0, out=distances)
