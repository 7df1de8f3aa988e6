"""Packing is a bijection, in the order that docs/checkpoints.md describes."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import pallas_kernels
from vq4dit_jax.integer.packing import pack_codes, packed_bytes


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 16))
    shape = draw(npst.array_shapes(min_dims=1, max_dims=3, max_side=21))
    return draw(npst.arrays(np.int32, shape, elements=st.integers(0, 2**bits - 1))), bits


@settings(max_examples=30)  # each compiles programs of its own
@given(codes_and_bits())
def test_unpacking_is_the_inverse_of_packing(case):
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape[-1] == packed_bytes(codes.shape[-1], bits)
    found = pallas_kernels.unpack_codes(jnp.asarray(packed), bits, codes.shape[-1])
    np.testing.assert_array_equal(np.asarray(found), codes)


@given(codes_and_bits())
def test_the_layout_is_numpys_little_endian_bits(case):
    """What a reader without this library does: unpackbits, cut into codes, weigh by powers of two."""
    codes, bits = case
    flat = np.unpackbits(pack_codes(codes, bits), axis=-1, bitorder="little")
    flat = flat[..., : codes.shape[-1] * bits].reshape(*codes.shape, bits)
    np.testing.assert_array_equal(flat @ (1 << np.arange(bits)), codes)


@given(st.integers(1, 16), st.integers(1, 500))
def test_a_row_wastes_less_than_one_unit(bits, length):
    used, unit = packed_bytes(length, bits) * 8, math.lcm(bits, 8)
    assert 0 <= used - length * bits < unit


@pytest.mark.parametrize("length", [4, 288, 576])
def test_six_bit_codes_lie_four_in_three_bytes(length):
    assert packed_bytes(length, 6) == length * 3 // 4


@pytest.mark.parametrize(("codes", "bits"), [([4], 2), ([-1], 8), ([65536], 16)])
def test_a_code_that_does_not_fit_is_refused(codes, bits):
    with pytest.raises(ValueError, match="do not fit"):
        pack_codes(np.asarray([codes]), bits)


@pytest.mark.parametrize(("codewords", "bits"), [(1, 1), (2, 1), (3, 2), (64, 6), (65, 7), (256, 8), (65536, 16)])
def test_bits_of_a_code(codewords, bits):
    assert pallas_kernels.code_bits(codewords) == bits
