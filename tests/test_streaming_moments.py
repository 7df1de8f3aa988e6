"""Streaming moments: numpy's values, and the same bits however the stream is cut."""

import concurrent.futures
import multiprocessing
import os
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from evaluation_cases import correlated

from vq4dit_jax.evaluation import Moments, StreamingMoments, moments, streaming


def features(count: int, width: int = 5) -> np.ndarray:
    return (3 * correlated(0, count, width) + 7).astype(np.float32)


def same_bits(a: Moments, b: Moments) -> bool:
    return all(x.dtype == y.dtype == np.float64 and x.tobytes() == y.tobytes() for x, y in zip(a, b))


@pytest.mark.parametrize("count, width", [(2, 1), (30, 4), (1023, 3), (1024, 3), (1025, 3), (10_000, 40)])
def test_they_are_numpys(count, width):
    x = features(count, width)
    mu, sigma = moments(x)
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-13)
    expected = np.cov(x.astype(np.float64), rowvar=False).reshape(width, width)
    np.testing.assert_allclose(sigma, expected, rtol=1e-12, atol=1e-13 * np.abs(expected).max())
    assert (sigma == sigma.T).all()


def test_a_large_offset_costs_no_digits():
    x = features(5000).astype(np.float64)
    np.testing.assert_allclose(moments(x + 2.0**30).sigma, moments(x).sigma, rtol=1e-6)


@hypothesis.given(data=st.data(), count=st.integers(2, 400), first=st.integers(0, 100))
def test_any_cuts_and_any_order_of_merges_give_the_same_bits(data, count, first):
    x = features(400)[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK", 16)  # many chunks, many levels
        whole = StreamingMoments(first).update(x)
        cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=12)))
        states = []
        for begin, end in zip([0, *cuts], [*cuts, count]):
            state, middle = StreamingMoments(first + begin), data.draw(st.integers(begin, end))
            states.append(state.update(x[begin:middle]).update(x[middle:end]))
        while len(states) > 1:
            i = data.draw(st.integers(0, len(states) - 2))
            states[i : i + 2] = [states[i].merge(states[i + 1])]
        assert (states[0].first, states[0].count) == (first, count)
        assert same_bits(states[0].finalize(), whole.finalize())
        expected = np.cov(x.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(whole.finalize().sigma, expected, rtol=1e-9, atol=1e-12)


@hypothesis.given(cuts=st.lists(st.integers(0, 5000), max_size=6).map(sorted))
@hypothesis.settings(max_examples=30)
def test_any_batches_of_chunks_as_they_are(cuts):
    x, state = features(5000, 33), StreamingMoments()
    for begin, end in zip([0, *cuts], [*cuts, 5000]):
        state = state.update(x[begin:end])
    assert same_bits(state.finalize(), moments(x))
    assert same_bits(state.finalize(), moments(np.asfortranarray(x)))


def _state_of_a_part(first: int, end: int) -> StreamingMoments:
    state = StreamingMoments(first)
    for begin in range(first, end, 170):
        state = state.update(features(5000, 64)[begin : min(begin + 170, end)])
    return state


def test_two_processes_give_the_same_bits_as_one(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # a worker's BLAS has another number of threads, too
    here = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.path.dirname(here)]))
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawned) as processes:
        a, b = processes.map(_state_of_a_part, (0, 2345), (2345, 5000))
    assert same_bits(a.merge(b).finalize(), moments(features(5000, 64)))


def test_states_are_values():
    x = features(3000)
    state = StreamingMoments().update(x[:1500])
    before = state.finalize()
    state.update(x[1500:])
    state.merge(StreamingMoments(1500).update(x[1500:]))
    x[:] = 0  # what was given is no longer needed either
    assert same_bits(state.finalize(), before)


def test_what_does_not_follow_is_refused():
    with pytest.raises(ValueError, match="starts at row 4, not at 3"):
        StreamingMoments().update(features(3)).merge(StreamingMoments(4).update(features(3)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        StreamingMoments().update(features(1)).finalize()
    with pytest.raises(ValueError, match="at least 2 rows"):
        StreamingMoments().finalize()


def test_memory_does_not_grow_with_the_stream():
    batch, state = features(500, 64), StreamingMoments()
    tracemalloc.start()
    for _ in range(400):  # 200,000 rows: 51 MB in float32
        state = state.update(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert state.count == 200_000 and peak < 4e6
