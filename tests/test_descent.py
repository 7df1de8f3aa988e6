"""Coordinate descent on integer codes and scales: what it may not do, and where it has to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vq4dit_jax as vq
from vq4dit_jax.integer import gptq, grids
from vq4dit_jax.integer.descent import descend

FORMS = [(4, None, "symmetric"), (3, 8, "asymmetric"), (2, 12, "centred"), (4, 10, "symmetric")]


def _layer(seed: int, rows: int = 6, columns: int = 24) -> tuple[jnp.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, columns)) @ rng.standard_normal((columns, columns))
    return jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32), (x.T @ x / 200).astype(np.float32)


def _errors(weight, moments, codes, grid, group) -> np.ndarray:
    """(e H e^T) of every row, in float64."""
    left = np.asarray(weight, np.float64) - np.asarray(grids.decode(codes, grid, group), np.float64)
    return np.einsum("oi,ij,oj->o", left, moments.astype(np.float64), left)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rounds", [1, 4])
def test_no_row_gets_worse_and_together_they_get_better(form, rounds):
    weight, moments = _layer(0)
    for start in (grids.fit_grid(weight, *form, (1.0,)), None):
        codes, grid = gptq.quantize_weight(weight, moments, *form) if start is None else (None, start)
        codes = grids.codes(weight, grid, form[0], form[1]) if codes is None else codes
        found = descend(weight, jnp.asarray(moments), codes, grid, form[0], form[1], rounds)
        before, after = (_errors(weight, moments, *pair, form[1]) for pair in ((codes, grid), found))
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < before.sum()
        np.testing.assert_array_equal(found[1].zero, grid.zero)
        assert (np.asarray(found[0]) < 2 ** form[0]).all()


def test_at_the_end_no_single_code_can_be_moved():
    weight, moments = _layer(1)
    bits, group, kind = FORMS[0]
    codes, grid = gptq.quantize_weight(weight, moments, bits, group, kind)
    codes, grid = descend(weight, jnp.asarray(moments), codes, grid, bits, group, 40)
    least, codes = _errors(weight, moments, codes, grid, group), np.asarray(codes)
    for j in range(codes.shape[1]):
        for step in (-1, 1):
            moved = codes.astype(np.int32)
            moved[:, j] = np.clip(moved[:, j] + step, 0, 2**bits - 1)
            assert (_errors(weight, moments, jnp.asarray(moved), grid, group) >= least * (1 - 1e-4)).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_inputs_that_are_not_correlated_are_rounded_to_nearest(seed):
    """With a diagonal H each weight is alone: its best code is the nearest level of the grid that came out."""
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    moments = np.diag(rng.uniform(0.5, 2, 16)).astype(np.float32)
    grid = grids.fit_grid(weight, 3, None, "asymmetric", (1.0,))
    start = grids.codes(weight, grid, 3)
    codes, found = descend(weight, jnp.asarray(moments), start, grid, 3, None, 30)
    away = np.abs(np.asarray(weight - grids.decode(codes, found)))
    nearest = np.abs(np.asarray(weight - grids.round_to_nearest(weight, found, 3)))
    np.testing.assert_allclose(away, nearest, atol=1e-5)


def test_an_input_that_is_always_0_keeps_its_codes_and_a_row_of_zeros_its_scale():
    weight, moments = _layer(2)
    weight = weight.at[3].set(0.0)
    moments[:, 5] = moments[5] = 0
    grid = grids.fit_grid(weight, 4, None, "symmetric", (1.0,))
    start = grids.codes(weight, grid, 4)
    codes, found = descend(weight, jnp.asarray(moments), start, grid, 4, None, 5)
    np.testing.assert_array_equal(np.asarray(codes)[:, 5], np.asarray(start)[:, 5])
    assert np.asarray(found.scale)[3, 0] == 0 and np.isfinite(np.asarray(found.scale)).all()


def test_a_leaf_is_solved_with_as_many_rounds_as_are_asked_for():
    weight, moments = _layer(3)
    leaf = vq.IntSpec(4, 8).quantize(np.asarray(weight), jax.random.key(0))
    error = lambda leaf: np.einsum("oi,ij,oj->", left := np.asarray(weight - leaf.decode()), moments, left)
    found = [error(leaf.solve(weight.T, moments, feedbacks=1, rounds=rounds)) for rounds in (0, 3)]
    assert found[1] < found[0] < error(leaf)
