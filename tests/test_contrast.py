"""One factor for all blocks: found again where it was taken away, and nothing else touched."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax.methods import contrast
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.passes import begin
from vq4dit_jax.qarray.tree import dequantize, matrices

FIT = contrast.FitContrast(images=4, num_steps=4, cfg_scale=1.5)


@pytest.fixture(scope="module")
def given():
    """A student in float32 codebooks, and the context of a teacher that is the same in dense weights."""
    model, params = tiny()
    student = quantize(params, 2, key=jax.random.key(0))
    return begin(model, dequantize(student, jnp.float32), jax.random.key(1)), student


def fitted(run, params):
    return FIT(run, params, jax.random.key(2))[0]


def body(student):
    return tuple(dict.fromkeys(path for path, _, _ in matrices(student) if "adaLN" not in path))


def test_where_nothing_is_lost_nothing_changes(given):
    run, student = given
    for a, b in zip(*map(jax.tree.leaves, (fitted(run, student), student)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("taken", [0.996, 1.003])
def test_the_factor_that_was_taken_is_given_back_and_all_else_stays(given, taken):
    run, student = given
    found = fitted(run, contrast.scaled(student, body(student), taken))
    old, new = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (student, found))
    for path in old:
        if path in body(student):
            np.testing.assert_array_equal(old[path].assignments, new[path].assignments)
            np.testing.assert_allclose(new[path].codebook, old[path].codebook, rtol=1e-4)
        else:
            jax.tree.map(np.testing.assert_array_equal, old[path], new[path])


def test_the_factor_is_bounded(given):
    run, student = given
    found = fitted(run, contrast.scaled(student, body(student), 0.9))
    path = body(student)[0]
    factor = np.asarray(flax.traverse_util.flatten_dict(found, sep="/")[path].codebook) / np.asarray(
        flax.traverse_util.flatten_dict(student, sep="/")[path].codebook
    )
    np.testing.assert_allclose(factor, 0.9 * 1.01, rtol=1e-5)


def test_the_slope_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    found, wanted = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
    expected = np.linalg.lstsq(wanted.reshape(-1, 1), found.reshape(-1), rcond=None)[0][0]
    np.testing.assert_allclose(contrast.slope(jnp.asarray(found), jnp.asarray(wanted)), expected, rtol=1e-5)
    assert contrast.slope(jnp.asarray(found), jnp.zeros((3, 4, 4, 1))) == 1
