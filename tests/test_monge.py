"""The Monge distance: optimal transport solved otherwise, closed forms, and what leaves it as it is."""

import math
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
from evaluation_cases import correlated, rng

from vq4dit_jax.evaluation import monge, monge_distance


def transport(a: np.ndarray, b: np.ndarray) -> float:
    """W2^2 on a line by the assignment problem: each point repeated until both sets have equally many."""
    count = math.lcm(len(a), len(b))
    a, b = np.repeat(a, count // len(a)), np.repeat(b, count // len(b))
    cost = np.square(a[:, None] - b[None, :])
    return cost[scipy.optimize.linear_sum_assignment(cost)].mean()


@pytest.mark.parametrize("counts, width", [((7, 7), 3), ((4, 6), 5), ((1, 5), 2), ((12, 8), 1), ((9, 4), 300)])
def test_it_is_the_mean_over_directions_of_optimal_transport(counts, width):
    a, b = correlated(1, counts[0], width), correlated(2, counts[1], width)
    (units,) = monge._unit_vectors(40, width, 3)
    expected = 3 * width * np.mean([transport(a @ u, b @ u) for u in units])
    assert monge_distance(a, b, directions=40, seed=3) == pytest.approx(expected, rel=1e-10)


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 9))
@hypothesis.settings(deadline=None)
def test_it_is_a_squared_distance(n, m, width, seed):
    """>= 0, symmetric, 0 of equal sets; a scale s becomes s^2; the order of the rows and their copies do not matter."""
    generator = rng(seed)
    a, b = generator.normal(size=(n, width)), generator.normal(size=(m, width))
    found = monge_distance(a, b, directions=17)
    assert found >= 0 == monge_distance(a, a, directions=17)
    assert monge_distance(b, a, directions=17) == pytest.approx(found, rel=1e-12)
    assert monge_distance(3 * a, 3 * b, directions=17) == pytest.approx(9 * found, rel=1e-10)
    shuffled = generator.permutation(a), generator.permutation(b)
    assert monge_distance(*shuffled, directions=17) == pytest.approx(found, rel=1e-10)
    assert monge_distance(np.repeat(a, 3, axis=0), b, directions=17) == pytest.approx(found, rel=1e-9)


@hypothesis.given(st.integers(1, 200), st.integers(1, 200))
def test_pieces_cover_the_line_and_each_point_has_its_share(n, m):
    lengths, first, second = monge._pieces(n, m)
    assert (lengths > 0).all() and len(lengths) <= n + m - 1
    np.testing.assert_allclose(np.bincount(first, lengths), np.full(n, 1 / n), rtol=1e-12)
    np.testing.assert_allclose(np.bincount(second, lengths), np.full(m, 1 / m), rtol=1e-12)


def test_directions_are_of_length_1_and_point_everywhere():
    units = np.concatenate(monge._unit_vectors(3000, 5, 0))
    assert units.shape == (3000, 5)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1.0)
    np.testing.assert_allclose(units.T @ units / 3000, np.eye(5) / 5, atol=0.02)
    other = np.concatenate(monge._unit_vectors(3000, 5, 1))
    assert (units != other).all()


def test_of_a_moved_set_it_is_three_times_the_squared_shift():
    """Each direction has the squared shift along it, |v|^2 / D on average over the sphere."""
    x, shift = correlated(0, 300, 16), rng(1).normal(size=(1, 16))
    found = monge_distance(x + shift, x, directions=5000)
    assert found == pytest.approx(3 * np.square(shift).sum(), rel=0.05)


def test_of_gaussians_it_is_three_times_the_frechet_distance():
    """N(v, s^2 I) and N(0, t^2 I): |v|^2 / D + (s - t)^2 along each direction; D times that is the Frechet distance."""
    width, shift = 8, 1.0
    a, b = rng(1).normal(size=(8000, width)), 1.5 * rng(2).normal(size=(6000, width))
    a[:, 0] += shift
    frechet = shift**2 + width * 0.5**2
    assert monge_distance(a, b) == pytest.approx(3 * frechet, rel=0.05)


def test_it_sees_what_moments_do_not():
    """Signs and a normal distribution, both of mean 0 and variance 1 in each of two features."""
    a, b, same = (
        rng(1).choice([-1.0, 1.0], size=(5000, 2)),
        rng(2).normal(size=(5000, 2)),
        rng(3).normal(size=(5000, 2)),
    )
    assert monge_distance(a, b, directions=100) > 30 * monge_distance(same, b, directions=100)


def test_blocks_change_nothing(monkeypatch):
    a, b = correlated(1, 50, 7).astype(np.float32), correlated(2, 33, 7).astype(np.float16)
    expected = monge_distance(a, b, directions=30)
    monkeypatch.setattr(monge, "_DIRECTIONS_AT_ONCE", 7)
    monkeypatch.setattr(monge, "_ROWS_AT_ONCE", 8)
    assert monge_distance(a, b, directions=30) == pytest.approx(expected, rel=1e-12)


def test_memory_is_that_of_a_block_of_directions():
    a, b = rng(1).random((15_000, 64), np.float32), rng(2).random((10_000, 64), np.float32)
    tracemalloc.start()
    try:
        monge_distance(a, b, directions=256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 128 * 25_000 * 4  # all 256 at once take 6.8
