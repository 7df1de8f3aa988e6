"""Counts that must be exact: of ratios, of bits with their padding, of what a leaf without a choice holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vq4dit_jax as vq
from vq4dit_jax.methods import allocate, tune
from vq4dit_jax.qarray.tree import matrices


def test_a_bin_counts_past_what_float32_can():
    """fc1 of XL/2 has 37 million sub-vectors; 2^24 + 1 is the first number that float32 does not have."""
    count = (1 << 24) + 3
    found = np.asarray(tune.histogram_of(jnp.full(count, 0.51)))
    assert found.dtype == np.int32 and found[10] == count and found.sum() == count


def test_bins_are_those_of_numpy():
    ratios = np.random.default_rng(0).uniform(size=1000).astype(np.float32)
    ratios[:2] = 0.0, 1.0
    wanted = np.histogram(ratios.astype(np.float64), bins=20, range=(0, 1))[0]
    np.testing.assert_array_equal(np.asarray(tune.histogram_of(jnp.asarray(ratios))), wanted)


@settings(max_examples=20)  # each shape is a program of its own
@given(
    rows=st.integers(1, 6).map(lambda n: 4 * n),
    codes=st.integers(1, 9),
    spec=st.sampled_from([(64, 4), (64, 2), (256, 4), (16, 2), (8, 1)]),
)
def test_bits_of_a_spec_are_the_bytes_of_its_leaf(rows, codes, spec):
    """6-bit codes lie four in three bytes and a row is filled up: five of them take six bytes, not 30 bits."""
    spec = vq.VQSpec(*spec, dtype="float16")
    columns = codes * spec.subvector
    leaf = spec.quantize(np.ones((rows, columns), np.float32), jax.random.key(0), iterations=1)
    arrays = [np.asarray(a) for a in leaf.arrays().values()]
    assert spec.stored_bits(rows, columns) == 8 * sum(a.nbytes for a in arrays)


def test_an_allocation_keeps_its_budget_with_the_padding():
    """Rows of 20 inputs: 6-bit codes of d = 4 are five to a row, 30 bits that take 48."""
    spec = vq.VQSpec(64, 4, dtype="float16")
    layers = [allocate.Layer(f"blocks/{i}/k", 256, 20, spec, 1.0 + i) for i in range(3)]
    least = min(s.stored_bits(256, 20) for s in layers[0].menu())
    chosen = allocate.spread(layers, 4 * least)
    assert sum(chosen[layer.path].stored_bits(256, 20) for layer in layers) <= 4 * least
    with pytest.raises(vq.errors.InputError, match=r"multiply the budget by at least 1\.5"):
        allocate.spread(layers, 2 * least)


def test_a_leaf_without_a_choice_holds_its_codes_and_nothing_beside():
    weight = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    hard = vq.VQSpec(64, 4).quantize(weight, jax.random.key(0), iterations=2)
    soft = hard.soften(None, 1, "distance")
    bytes_of = lambda leaf: sum(a.nbytes for a in jax.tree.leaves(leaf))
    assert bytes_of(soft) == bytes_of(hard) and list(soft.tunable()) == ["codebook"]
    assert all(
        found[0] == wanted[0] for found, wanted in zip(matrices({"k": soft}), matrices({"k": hard}), strict=True)
    )
    np.testing.assert_array_equal(np.asarray(soft.decode()), np.asarray(hard.decode()))
    np.testing.assert_array_equal(np.asarray(soft.harden().assignments), np.asarray(hard.assignments))
