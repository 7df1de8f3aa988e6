"""Lloyd's iteration on CPU: the nearest codewords by faiss, the means by numpy.

faiss's own `Kmeans` is not used: an empty cluster there is split in a way that can raise the error, it subsamples,
refuses P < K, and sums clusters and error in float32, too coarse to stop by.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

# Threads that solve problems. One of 1.4 million sub-vectors takes 200 MB while it is solved.
_MOST_AT_ONCE = 16


def each(solve: Callable[[int, Any], Any], problems: Iterable[Any]) -> list[Any]:
    """[solve(i, problem i), ...], as many at once as faiss has threads; threads without a problem share one.

    Threads with a problem each never wait for each other; threads that share a problem wait after every iteration. On a machine
    with other work that waiting took two thirds of the time.
    """
    import faiss

    threads = faiss.omp_get_max_threads()
    problems = list(problems)
    workers = max(1, min(len(problems), threads, _MOST_AT_ONCE))
    pool = concurrent.futures.ThreadPoolExecutor(
        workers, initializer=faiss.omp_set_num_threads, initargs=(max(1, threads // workers),)
    )
    with _fused_kernel(faiss), pool:
        return list(pool.map(solve, range(len(problems)), problems))


def lloyd(
    points: Float[np.ndarray, "P d"], codebook: Float[np.ndarray, "K d"], max_iterations: int, tolerance: float
) -> tuple[Float[np.ndarray, "K d"], Int[np.ndarray, " P"], int]:
    """Iterates from `codebook`; returns the codebook, the assignments to it and the iterations run."""
    import faiss

    columns = np.ascontiguousarray(points.T, np.float64)
    power = np.square(columns).sum()

    def assign(codebook: Float[np.ndarray, "K d"]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Ids (P,), size (K,) and sum (K, d) of each cluster, and the mean squared error that follows from these."""
        ids = faiss.knn(points, codebook, 1)[1][:, 0]
        counts = np.bincount(ids, minlength=len(codebook))
        sums = np.stack([np.bincount(ids, column, len(codebook)) for column in columns], 1)
        wide = codebook.astype(np.float64)
        error = (power - 2 * np.vdot(wide, sums) + np.vdot(counts, np.square(wide).sum(1))) / len(points)
        return ids, counts, sums, max(error, 0.0)

    ids, counts, sums, error = assign(codebook)
    for iteration in range(1, max_iterations + 1):
        used = counts > 0
        means = np.where(used[:, None], sums / np.maximum(counts, 1)[:, None], codebook).astype(np.float32)
        if not used.all():
            squared = np.square(points - codebook[ids]).sum(1)
            for empty in np.flatnonzero(~used):
                farthest = squared.argmax()
                if squared[farthest] == 0:
                    break
                means[empty] = points[farthest]
                squared = np.minimum(squared, np.square(points - points[farthest]).sum(1))
        *found, new_error = assign(means)
        fall, previous = error - new_error, error
        if fall > 0:
            codebook, error, (ids, counts, sums) = means, new_error, found
        if not fall > tolerance * previous:
            break
    return codebook, ids, iteration


def nearest(points: Float[np.ndarray, "P d"], codebook: Float[np.ndarray, "K d"], n: int) -> Int[np.ndarray, "P n"]:
    """Ids of the n nearest codewords, nearest first."""
    import faiss

    with _fused_kernel(faiss):
        return faiss.knn(points, codebook, n)[1]


@contextlib.contextmanager
def _fused_kernel(faiss) -> Iterator[None]:
    """faiss uses its vectorised kernel for P*d above a threshold alone; below it, too, that kernel is ten times faster."""
    threshold = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 0
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold
