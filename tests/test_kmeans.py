"""K-means: what Lloyd's iteration guarantees, exact cases, and agreement with scikit-learn and with float64."""

import functools
import sys

import faiss
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from sklearn.cluster import KMeans as SklearnKMeans

from vq4dit_jax.codebook import kmeans_faiss, kmeans_jax
from vq4dit_jax.codebook.first_smallest import first_smallest
from vq4dit_jax.codebook.kmeans import kmeans, nearest_codewords
from vq4dit_jax.errors import InputError

# `vq4dit_jax.vq.kmeans` as an attribute is the function.
kmeans_module = sys.modules["vq4dit_jax.codebook.kmeans"]

BACKENDS = ["faiss", "jax"]
SOLVERS = [kmeans_faiss, kmeans_jax]
KEY = jax.random.key(7)
# Few shapes, because each is compiled: (P, K, d), with P < K, P = K, d = 1 and odd sizes among them.
SHAPES = [(300, 16, 4), (37, 8, 2), (64, 64, 3), (5, 9, 2), (203, 7, 1)]


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_distances(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """(P, K) in float64."""
    return np.square(points[:, None].astype(np.float64) - codebook[None].astype(np.float64)).sum(-1)


@st.composite
def problems(draw) -> tuple[np.ndarray, int]:
    """Sub-vectors (P, d) and K: Gaussian, heavy-tailed, on few integers (ties, duplicates), or constant."""
    size, num_codewords, length = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["gaussian", "cauchy", "integers", "constant"]))
    points = {
        "gaussian": lambda: rng.standard_normal((size, length)),
        "cauchy": lambda: rng.standard_cauchy((size, length)),
        "integers": lambda: rng.integers(-1, 2, (size, length)),
        "constant": lambda: np.full((size, length), rng.standard_normal()),
    }[kind]()
    return points.astype(np.float32), num_codewords


@pytest.mark.parametrize("axis", [0, 1])
@given(values=hnp.arrays(np.float32, (5, 7), elements=st.sampled_from([-np.inf, -1, 0, 0.5, np.inf])))
def test_the_first_of_the_smallest_is_argmin(axis, values):
    found = first_smallest(jnp.asarray(values), axis=axis)
    np.testing.assert_array_equal(np.asarray(found), values.argmin(axis))


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=30)
def test_result_is_the_nearest_codewords_and_their_error(backend, problem):
    points, num_codewords = problem
    result = kmeans(points[None], num_codewords, KEY, backend=backend)
    codebook, ids = result.codebook[0], result.assignments[0]
    assert (codebook.shape, codebook.dtype) == ((num_codewords, points.shape[1]), np.float32)
    assert (ids.shape, ids.dtype, result.iterations.dtype) == ((len(points),), np.int32, np.int32)
    assert np.isfinite(codebook).all()

    distances = squared_distances(points, codebook)
    chosen = distances[np.arange(len(points)), ids]
    # A float32 |c|^2 - 2 x.c is off by a few units in the last place of its largest term.
    rounding = 8 * np.finfo(np.float32).eps * np.square(points).sum(1).max(initial=0)
    assert (chosen <= distances.min(1) + rounding).all()
    np.testing.assert_allclose(result.error[0], chosen.mean(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=15)
def test_error_never_rises_from_one_iteration_to_the_next(backend, problem):
    points, num_codewords = problem
    solve = functools.partial(kmeans, points[None], num_codewords, KEY, tolerance=0.0, backend=backend)
    errors = np.array([solve(max_iterations=i).error[0] for i in range(1, 7)])
    # Each error is rounded to float32.
    assert (np.diff(errors) <= 1e-6 * errors[:-1]).all(), errors


@pytest.mark.parametrize("solver", SOLVERS)
def test_lloyd_from_given_seeds_agrees_with_scikit_learn(solver):
    points = gaussian(3000, 4)
    seeds = points[:20]
    codebook, ids, iterations = solver.lloyd(points, seeds, 300, 0.0)
    theirs = SklearnKMeans(20, init=seeds, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(points)
    assert 10 < iterations < 300
    np.testing.assert_allclose(codebook, theirs.cluster_centers_, atol=1e-4)
    assert (ids == theirs.labels_).mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_good_as_scikit_learn(backend):
    points = gaussian(16384, 4)
    ours = kmeans(np.stack([points] * 4), 64, KEY, backend=backend).error.mean()
    fits = [SklearnKMeans(64, n_init=1, max_iter=100, tol=0, random_state=i).fit(points) for i in range(4)]
    assert ours < 1.01 * np.mean([fit.inertia_ for fit in fits]) / len(points)


def test_backends_reach_the_same_error():
    points = gaussian(3, 10_000, 4)
    by_faiss, by_jax = (kmeans(points, 64, KEY, backend=backend).error for backend in BACKENDS)
    np.testing.assert_allclose(by_faiss, by_jax, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_codewords_as_distinct_points_is_exact(backend):
    points = gaussian(100, 3)
    # The same points as often as you like: there are still 100 to find.
    for repeats in (1, 5):
        subvectors = np.repeat(points, repeats, axis=0)
        result = kmeans(subvectors[None], 100, KEY, backend=backend)
        assert result.error[0] == 0
        np.testing.assert_array_equal(result.codebook[0][result.assignments[0]], subvectors)
        np.testing.assert_array_equal(np.unique(result.codebook[0], axis=0), np.unique(points, axis=0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("points", [gaussian(5, 2), np.full((50, 2), 0.3), np.zeros((50, 2))])
def test_fewer_distinct_points_than_codewords(backend, points):
    points = points.astype(np.float32)
    result = kmeans(points[None], 16, KEY, backend=backend)
    assert result.error[0] == 0
    np.testing.assert_array_equal(result.codebook[0][result.assignments[0]], points)
    # The codewords to spare repeat points that are there.
    np.testing.assert_array_equal(np.unique(result.codebook[0], axis=0), np.unique(points, axis=0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_clusters_are_reseeded(solver, monkeypatch):
    """Three far groups; two of the seeds are no point's nearest, so plain Lloyd would keep one codeword for all.

    In tiles of 12, which leaves 6 rows of padding: at zero they would be farther from the seeds than any point.
    """
    monkeypatch.setitem(kmeans_jax._TILE_ELEMENTS, "cpu", 12 * 3)
    groups = np.repeat(np.float32([[50, 50], [60, 50], [50, 60]]), 50, axis=0)
    points = groups + 0.1 * gaussian(150, 2)
    seeds = np.float32([[53, 53], [300, 300], [400, 400]])
    codebook, ids, _ = solver.lloyd(points, seeds, 100, 0.0)
    means = points.reshape(3, 50, 2).mean(1)
    np.testing.assert_allclose(codebook[np.lexsort(codebook.T)], means[np.lexsort(means.T)], atol=1e-4)
    assert [len(np.unique(part)) for part in ids.reshape(3, 50)] == [1, 1, 1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_lloyd_does_not_depend_on_the_order_of_the_points(solver):
    points = gaussian(3000, 4)
    order = np.random.default_rng(1).permutation(len(points))
    seeds = points[:16]
    codebook, ids, _ = solver.lloyd(points, seeds, 200, 0.0)
    permuted_codebook, permuted_ids, _ = solver.lloyd(points[order], seeds, 200, 0.0)
    np.testing.assert_allclose(permuted_codebook, codebook, atol=1e-4)
    assert (permuted_ids == ids[order]).mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_subvectors_have_the_same_error(backend):
    # Eight groups so far apart that D^2 sampling finds each: one optimum, whatever is drawn.
    corners = 100 * np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), -1).reshape(8, 3)
    points = (np.repeat(corners, 100, axis=0) + gaussian(800, 3)).astype(np.float32)
    permuted = np.random.default_rng(1).permutation(points)
    errors = [kmeans(x[None], 8, KEY, backend=backend).error[0] for x in (points, permuted)]
    assert errors[0] < 4
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_key_same_bits_whatever_else_is_in_the_batch(backend):
    points = gaussian(4, 2000, 4)
    solve = functools.partial(kmeans, num_codewords=32, key=KEY, backend=backend)
    batch = solve(points)
    others = solve(np.concatenate([gaussian(2, 2000, 4, seed=1), points[2:3]]))
    for field, again, alone, other in zip(batch, solve(points), solve(points[:1]), others, strict=True):
        np.testing.assert_array_equal(again, field)
        np.testing.assert_array_equal(alone[0], field[0])
        np.testing.assert_array_equal(other[2], field[2])
    different = kmeans(points, 32, jax.random.key(8), backend=backend)
    assert (different.codebook != batch.codebook).any()


# Two problems: one after the other, side by side, and side by side with two threads each. faiss has a kernel of its
# own up to d = 16 and a matrix product beyond.
@pytest.mark.parametrize("length", [4, 24])
def test_faiss_threads_do_not_change_a_bit(length):
    points = gaussian(2, 20_000, length)
    threads = faiss.omp_get_max_threads()
    results = []
    try:
        for count in (1, 2, 5):
            faiss.omp_set_num_threads(count)
            results.append(kmeans(points, 100, KEY, max_iterations=10, backend="faiss"))
    finally:
        faiss.omp_set_num_threads(threads)
    for one, two, five in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, five)


def test_faiss_keeps_its_settings():
    before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    kmeans(gaussian(3, 50, 2), 4, KEY, backend="faiss")
    assert (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-100, 50])
def test_scales_with_the_subvectors_to_the_bit(backend, exponent):
    points = gaussian(1, 500, 4)
    factor = np.float32(2.0**exponent)
    plain = kmeans(points, 16, KEY, backend=backend)
    scaled = kmeans(points * factor, 16, KEY, backend=backend)
    np.testing.assert_array_equal(scaled.codebook, plain.codebook * factor)
    np.testing.assert_array_equal(scaled.assignments, plain.assignments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_the_origin(backend):
    """|c|^2 - 2 x.c loses every digit here; integers this large are exact in float32, their squares are not."""
    grid = np.random.default_rng(0).integers(-20, 21, (500, 2)).astype(np.float32)
    shift = np.float32([1e6, -3e5])
    near = kmeans(grid[None], 16, KEY, backend=backend)
    far = kmeans((grid + shift)[None], 16, KEY, backend=backend)
    np.testing.assert_allclose(far.error, near.error, rtol=0.02)
    distances = squared_distances(grid + shift, far.codebook[0])
    chosen = distances[np.arange(500), far.assignments[0]]
    # The codebook itself is rounded to 1/16 there.
    assert (chosen <= distances.min(1) + 2 * 0.1 * np.sqrt(distances.min(1)) + 0.01).all()
    _, squared = nearest_codewords(grid + shift, far.codebook[0], 3, backend)
    np.testing.assert_allclose(squared, np.sort(distances, 1)[:, :3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_change_nothing_but_rounding(backend, monkeypatch):
    """200 sub-vectors in tiles of 12 and in parts of 10, neither of which divides them."""
    points = gaussian(200, 3)
    codebook = gaussian(20, 3, seed=1)
    whole = kmeans(points[None], 20, KEY, backend=backend)
    ids, squared = nearest_codewords(points, codebook, 2, backend)
    monkeypatch.setitem(kmeans_jax._TILE_ELEMENTS, "cpu", 12 * 20)
    monkeypatch.setattr(kmeans_module, "_REFINED_AT_ONCE", 60)
    np.testing.assert_allclose(kmeans(points[None], 20, KEY, backend=backend).error, whole.error, rtol=1e-4)
    tiled_ids, tiled_squared = nearest_codewords(points, codebook, 2, backend)
    np.testing.assert_array_equal(tiled_ids, ids)
    np.testing.assert_array_equal(tiled_squared, squared)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([1, 2, 9]), shape=st.sampled_from([(50, 9, 2), (301, 40, 4)]))
@example(seed=0, n=9, shape=(301, 9, 1))
def test_nearest_codewords_with_ties_to_the_lower_index(backend, seed, n, shape):
    """Small integers: float32 is exact, ties abound, codewords repeat. A stable sort in integers is the answer."""
    size, num_codewords, length = shape
    rng = np.random.default_rng(seed)
    points, codebook = rng.integers(-3, 4, (size, length)), rng.integers(-2, 3, (num_codewords, length))
    ids, squared = nearest_codewords(points.astype(np.float32), codebook.astype(np.float32), n, backend)
    exact = np.square(points[:, None] - codebook[None]).sum(-1)
    wanted = np.argsort(exact, axis=1, kind="stable")[:, :n]
    assert (ids.dtype, squared.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(squared, np.take_along_axis(exact, wanted, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_codewords_of_many_codewords(backend):
    points, codebook = gaussian(500, 8), gaussian(5000, 8, seed=1)
    ids, squared = nearest_codewords(points, codebook, 3, backend)
    distances = squared_distances(points, codebook)
    np.testing.assert_allclose(squared, np.sort(distances, 1)[:, :3], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(distances, ids, 1), squared, rtol=1e-5)
    assert (np.diff(squared, axis=1) >= 0).all()


def test_assignments_are_the_first_candidates():
    points = gaussian(5000, 4)
    result = kmeans(points[None], 64, KEY)
    ids, squared = nearest_codewords(points, result.codebook[0], 2)
    assert (ids[:, 0] == result.assignments[0]).mean() > 0.999
    np.testing.assert_allclose(squared[:, 0].mean(), result.error[0], rtol=1e-5)


def test_seeds_are_drawn_in_proportion_to_their_weight():
    """Inversion of evenly spaced uniforms draws each index as often as its share says, to within two."""
    rng = np.random.default_rng(0)
    weights = (rng.exponential(size=300) * (rng.random(300) < 0.5)).astype(np.float32)
    draws = 30_000
    uniform = ((np.arange(draws) + 0.5) / draws).astype(np.float32)
    drawn = jax.vmap(kmeans_module._draw_in_proportion, (None, 0))(jnp.asarray(weights), jnp.asarray(uniform))
    counts = np.bincount(np.asarray(drawn), minlength=300)
    np.testing.assert_allclose(counts, draws * weights / weights.sum(), atol=2)
    assert not counts[weights == 0].any()


def test_rounding_never_draws_a_weight_of_zero():
    weights = jnp.array([0.0, 2.0, 0.0, 3.0])
    rose_at_a_zero, beyond_the_end = jnp.array([False, False, True, True]), jnp.zeros(4, bool)
    assert kmeans_module._first(rose_at_a_zero, weights) == 3
    assert kmeans_module._first(beyond_the_end, weights) == 3


def test_seeds_follow_squared_distance():
    """Of 0, 1, 3: the first is uniform, the second is each other one in proportion to its squared distance."""
    draw = jax.vmap(lambda key: kmeans_module._draw_seeds((jnp.array([0.0, 1.0, 3.0]),), key, 2))
    draws = 6000
    pairs = np.asarray(draw(jax.random.split(KEY, draws)))
    seen = np.zeros((3, 3))
    np.add.at(seen, tuple(pairs.T), 1 / draws)
    wanted = np.array([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]]) / 3
    # Four standard deviations of a frequency of at most 0.3.
    np.testing.assert_allclose(seen, wanted, atol=4 * np.sqrt(0.3 * 0.7 / draws))


def test_seeding_on_a_subsample_finds_every_group(monkeypatch):
    """A thousandth of the sub-vectors lies far out; D^2 sampling takes a seed there, uniform sampling would not."""
    monkeypatch.setattr(kmeans_module, "_SEEDING_SAMPLES", 2000)
    points = gaussian(100_000, 2)
    points[::1000] += 1000
    for key in jax.random.split(KEY, 5):
        assert (kmeans_module.seeds(points, 4, key) > 500).any()


def test_without_faiss(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    points = gaussian(1, 50, 2)
    by_jax, by_default = (kmeans(points, 4, KEY, backend=backend) for backend in ("jax", "auto"))
    np.testing.assert_array_equal(by_default.codebook, by_jax.codebook)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        kmeans(points, 4, KEY, backend="faiss")


NAN = gaussian(2, 10, 4)
NAN[1, 3, 2] = np.nan
GOOD = gaussian(1, 10, 4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(subvectors=NAN), r"subvectors\[1, 3, 2\] is nan"),
        (dict(subvectors=np.where(np.isnan(NAN), -np.inf, NAN)), r"subvectors\[1, 3, 2\] is -inf"),
        (dict(subvectors=np.where(np.isnan(NAN), np.float32(1e20), NAN)), r"subvectors\[1, 3, 2\] is .*1e\+18"),
        (dict(subvectors=GOOD[0]), r"\(10, 4\): wanted \(N, P, d\)"),
        (dict(subvectors=GOOD[:, :0]), r"\(1, 0, 4\): wanted \(N, P, d\)"),
        (dict(num_codewords=0), "num_codewords=0"),
        (dict(num_codewords=65537), "num_codewords=65537"),
        (dict(max_iterations=0), "max_iterations=0"),
        (dict(tolerance=-1.0), "tolerance=-1"),
        (dict(tolerance=float("nan")), "tolerance=nan"),
        (dict(backend="cuda"), "backend='cuda'.*'faiss'"),
    ],
)
def test_bad_input_to_kmeans(arguments, words):
    with pytest.raises(InputError, match=words):
        kmeans(**(dict(subvectors=GOOD, num_codewords=4, key=KEY) | arguments))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(subvectors=NAN[1]), r"subvectors\[3, 2\] is nan"),
        (dict(codebook=NAN[1]), r"codebook\[3, 2\] is nan"),
        (dict(codebook=GOOD[0, :, :3]), "length 4, codewords 3"),
        (dict(n=0), "n=0: wanted 1 to 10"),
        (dict(n=11), "n=11: wanted 1 to 10"),
    ],
)
def test_bad_input_to_nearest_codewords(arguments, words):
    with pytest.raises(InputError, match=words):
        nearest_codewords(**(dict(subvectors=GOOD[0], codebook=GOOD[0], n=2) | arguments))
