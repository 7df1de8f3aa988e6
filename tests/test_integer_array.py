"""Integer leaves: packing loses nothing, values are those of the grids, bytes are those that are counted, qwix agrees."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vq4dit_jax as vq
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import grids
from vq4dit_jax.integer.gptq import inverse_factor, quantize_weight, round_columns
from vq4dit_jax.qarray.integer import IntArray, from_codes


@st.composite
def cases(draw):
    """Codes, scales and zero points of any leaf, and the leaf."""
    bits, grid = draw(st.integers(2, 8)), draw(st.sampled_from(grids.KINDS))
    stack, rows, columns = draw(st.sampled_from([(), (2,), (2, 1)])), draw(st.integers(1, 5)), draw(st.integers(1, 19))
    group = draw(st.one_of(st.none(), st.integers(1, 25)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = grids.num_groups(columns, None if group is None or group >= columns else group)
    codes = rng.integers(0, 2**bits, (*stack, rows, columns))
    scale = rng.uniform(1e-3, 2, (*stack, rows, groups)).astype(np.float16)
    zeros = rng.integers(0, 2**bits, scale.shape)
    return codes, scale, zeros, from_codes(codes, jnp.asarray(scale), zeros, bits, group, grid)


def _weight(leaf: IntArray, codes, scale, zeros) -> np.ndarray:
    """s (q - z), one weight at a time."""
    out = np.empty(codes.shape, np.float32)
    for index in np.ndindex(*codes.shape):
        cell = (*index[:-1], index[-1] // (leaf.group or codes.shape[-1]))
        zero = {"asymmetric": zeros[cell], "symmetric": 2 ** (leaf.bits - 1), "centred": (2**leaf.bits - 1) / 2}[
            leaf.grid
        ]
        out[index] = np.float32(scale[cell]) * np.float32(codes[index] - zero)
    return out


@settings(max_examples=25)
@given(cases())
def test_packing_loses_nothing_and_values_are_the_grids(case):
    codes, scale, zeros, leaf = case
    np.testing.assert_array_equal(np.asarray(leaf.codes()), codes)
    if leaf.grid == "asymmetric":
        np.testing.assert_array_equal(np.asarray(leaf.zeros()), zeros)
    np.testing.assert_array_equal(np.asarray(leaf.decode()), _weight(leaf, codes, scale, zeros))
    again = IntArray.restore(leaf.arrays(), leaf.facts(), "here")
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    cost, layers = leaf.cost(), math.prod(leaf.stack)
    stored = grids.stored_bytes(leaf.matrix, leaf.bits, leaf.group, leaf.grid)
    assert cost == (codes.size, layers * stored[0], layers * stored[1])
    abstract = vq.IntSpec(leaf.bits, leaf.group, leaf.grid).abstract(leaf.stack, *leaf.matrix)
    shape = lambda a: (a.shape, jnp.dtype(a.dtype).name)
    assert jax.tree.structure(abstract) == jax.tree.structure(leaf)
    assert list(map(shape, jax.tree.leaves(abstract))) == list(map(shape, jax.tree.leaves(leaf)))


@settings(max_examples=10)
@given(cases())
def test_matmul_is_of_the_decoded_weight(case):
    _, _, _, leaf = case
    for _ in leaf.stack:
        leaf = leaf.block(0)
    x = np.random.default_rng(0).normal(size=(3, leaf.matrix[1])).astype(np.float32)
    wanted = x.astype(np.float64) @ np.asarray(leaf.decode(), np.float64).T
    np.testing.assert_allclose(
        np.asarray(leaf.matmul(jnp.asarray(x))), wanted, rtol=1e-5, atol=1e-4 * (1 + np.abs(wanted).max())
    )


GRIDS = [(2, None, "centred"), (3, 16, "asymmetric"), (4, 24, "symmetric"), (8, None, "asymmetric")]


@pytest.mark.parametrize(("bits", "group", "kind"), GRIDS)
def test_round_to_nearest_has_the_values_of_the_formula_bit_for_bit(bits, group, kind):
    """s (clip(round(w / s + z)) - z) in float32, which is what the dense baselines of 0.1.0 held."""
    weight = np.random.default_rng(0).normal(size=(2, 12, 40)).astype(np.float32) + np.float32(0.1)
    weight[0, 3] = 0
    leaf = vq.IntSpec(bits, group, kind).quantize(weight, jax.random.key(0))
    for layer in range(2):
        grid = grids.fit_grid(jnp.asarray(weight[layer]), bits, group, kind, (1.0,))
        scale, zero = (np.repeat(np.asarray(a), group or 40, axis=1)[:, :40] for a in grid)
        ratio = np.where(scale > 0, weight[layer] / np.where(scale > 0, scale, 1), np.float32(0))
        wanted = scale * (np.clip(np.round(ratio + zero), 0, 2**bits - 1) - zero)
        np.testing.assert_array_equal(np.asarray(leaf.decode())[layer], wanted)


@pytest.mark.parametrize(("bits", "group", "kind"), GRIDS)
def test_gptqs_codes_stand_for_the_values_of_its_recursion_bit_for_bit(bits, group, kind):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(12, 40)), jnp.float32)
    x = rng.standard_normal((160, 40)) @ rng.standard_normal((40, 40))
    moments = x.T @ x / 160
    grid = grids.expand(grids.fit_grid(weight, bits, group, kind, (1.0,)), 40, group)
    wanted, _ = round_columns(weight, jnp.asarray(inverse_factor(moments), jnp.float32), grid, bits)
    codes, own = quantize_weight(weight, moments, bits, group, kind, (1.0,), act_order=False)
    leaf = from_codes(codes, own.scale.astype(jnp.float16), own.zero, bits, group, kind)
    np.testing.assert_array_equal(np.asarray(leaf.decode()), np.asarray(wanted))


def test_restoring_checks_every_invariant():
    leaf = from_codes(np.ones((3, 10), int), jnp.ones((3, 3), jnp.float16), np.zeros((3, 3)), 4, 4, "asymmetric")
    arrays, facts = leaf.arrays(), leaf.facts()
    for change, message in (
        ({"qvalue": arrays["qvalue"][:, :-1]}, r"qvalue is uint8\(3, 4\); wanted uint8\(3, 5\)"),
        ({"qvalue": arrays["qvalue"].astype(jnp.int32)}, "wanted uint8"),
        ({"zero_point": arrays["zero_point"][:-1]}, "zero_point is uint8"),
        ({"scale": arrays["scale"][:, :2]}, "wanted floating"),
        ({"scale": arrays["scale"].astype(jnp.int32)}, "wanted floating"),
        ({"scale": -arrays["scale"]}, "a scale is negative"),
        ({"scale": arrays["scale"] * jnp.float16(jnp.inf)}, "a scale is negative, NaN or infinity"),
        ({"extra": arrays["scale"]}, "the file holds 'extra' beside"),
    ):
        with pytest.raises(InputError, match=message):
            IntArray.restore({**arrays, **change}, facts, "here")
    for change, message in (
        ({"bits": 9}, "bits=9"),
        ({"bits": "4"}, "bits='4'"),
        ({"group": 0}, "group=0"),
        ({"grid": "odd"}, "grid='odd'"),
        ({"grid": "centred"}, "the file holds 'zero_point' beside"),
        ({"shape": [3]}, r"shape=\[3\]"),
    ):
        with pytest.raises(InputError, match=message):
            IntArray.restore(arrays, {**facts, **change}, "here")


@pytest.mark.parametrize(
    ("spec", "dtype"), [((8, None), "ByteWeights"), ((6, None), "ByteWeights"), ((4, 128), "NibbleWeights")]
)
@pytest.mark.parametrize("as_one", [False, True])
def test_the_kernels_form_is_the_same_weight(spec, dtype, as_one):
    weight = np.random.default_rng(0).normal(size=(2, 64, 200)).astype(np.float32)
    leaf = vq.IntSpec(*spec, "symmetric").quantize(weight, jax.random.key(0))
    packed, row_scale = leaf.prepare(jnp.int8, as_one=as_one)
    assert type(packed).__name__ == dtype
    layers = 1 if as_one else 2
    wanted = np.asarray(leaf.decode()).reshape(layers, -1, 200)
    for layer in range(layers):
        if row_scale is None:  # a scale for each 128 inputs
            values, scales = packed.dense(jnp.asarray(layer))
            found = np.asarray(values, np.float32) * np.repeat(np.asarray(scales).T, 128, axis=1)
        else:
            values = packed.dense(jnp.asarray(layer))
            found = np.asarray(values, np.float32) * row_scale.reshape(layers, -1, 1)[layer]
        np.testing.assert_allclose(found[:, :200], wanted[layer], rtol=1e-6, atol=1e-6)


def test_forms_that_the_kernels_do_not_have_are_refused():
    weight = np.random.default_rng(0).normal(size=(1, 64, 256)).astype(np.float32)
    for spec, dtype in (
        ((4, None, "asymmetric"), jnp.int8),
        ((4, 64, "symmetric"), jnp.int8),
        ((8, None, "symmetric"), jnp.bfloat16),
    ):
        with pytest.raises(InputError, match="the kernels have no form for int"):
            vq.IntSpec(*spec).quantize(weight, jax.random.key(0)).prepare(dtype)


def test_scaling_is_of_the_weight():
    weight = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    leaf = vq.IntSpec(4, 16).quantize(weight, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(leaf.scaled(0.5).decode()), 0.5 * np.asarray(leaf.decode()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 20])
@pytest.mark.parametrize("grid", grids.KINDS)
def test_qwix_reads_the_same_weight_and_gives_the_leaf_back(bits, group, grid):
    pytest.importorskip("qwix", reason="qwix, an optional oracle, is not installed")
    from qwix._src.core import qarray

    weight = np.random.default_rng(0).normal(size=(2, 6, 40)).astype(np.float32)
    leaf = vq.IntSpec(bits, group, grid).quantize(weight, jax.random.key(0))
    if grid == "centred" and bits == 8:
        with pytest.raises(InputError, match="has no form in qwix"):
            leaf.to_qwix()
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = leaf.to_qwix()
        qarray.validate_qarray(theirs)
        wide = dataclasses.replace(theirs, scale=theirs.scale.astype(jnp.float32))
        np.testing.assert_array_equal(np.asarray(qarray.dequantize(wide)), np.asarray(leaf.decode()))
        again = IntArray.from_qwix(theirs)
    np.testing.assert_array_equal(np.asarray(again.decode()), np.asarray(leaf.decode()))
    if grid != "centred":
        assert jax.tree.structure(again) == jax.tree.structure(leaf)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again, leaf)


def test_a_qarray_of_another_type_is_refused():
    class Their:
        qvalue, scale, zero_point, qtype = jnp.ones((4, 6)), jnp.ones((1, 6)), None, "nf4"

    with pytest.raises(InputError, match="is nf4 of"):
        IntArray.from_qwix(Their())
