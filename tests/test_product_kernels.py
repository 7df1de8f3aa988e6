"""Matrix products with packed weights against float64: the kernels interpreted, and the path through XLA."""

import functools

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from product_cases import BF16, E4M3, INT8, Case, make

from pallas_kernels import ops
from pallas_kernels.mosaic import matmul
from pallas_kernels.tiles import Tile

# Chosen so that together they hold every class of weights (dtype, d, bits of a code, groups of rows), every shape of a block
# (tokens, warpgroups, row tiles, splits; whole and cut off), and every part of the epilogue with each kind of operands.
CASES = {
    "bf16-d4-cut-off": Case(tokens=20, gelu=True, layer=0),
    "bf16-d2-6bits-groups": Case(rows=192, columns=64, length=2, codewords=64, groups=3, tile=Tile(32, 1, 1, 2)),
    "bf16-d8-gate": Case(image_tokens=32, length=8, codewords=100),
    "bf16-row-tiles": Case(tokens=16, rows=384, codewords=16, tile=Tile(16, 2, 3, 2), bias=False, layers=3, layer=2),
    "bf16-splits": Case(tokens=20, columns=192, gelu=True, scales=True, tile=Tile(32, 2, 1, 2, splits=3)),
    "int8-d4-to-int8": Case(tokens=20, dtype=INT8, scales=True, gelu=True, result=INT8),
    "int8-d2-6bits-groups-gate": Case(
        rows=384, columns=256, dtype=INT8, length=2, codewords=64, groups=3, tile=Tile(32, 1, 2, 2), image_tokens=32
    ),
    "int8-d8-splits-to-int8": Case(
        columns=256, dtype=INT8, length=8, tile=Tile(32, 2, 1, 2, splits=2), scales=True, result=INT8
    ),
    "e4m3-d4-warpgroups": Case(rows=192, dtype=E4M3, scales=True, gelu=True, tile=Tile(32, 3, 1, 2), result=E4M3),
    "e4m3-d8-gate-images": Case(dtype=E4M3, length=8, tile=Tile(16, 2, 1, 2), image_tokens=16, scales=True),
    "bytes-int8-gate": Case(
        weights="bytes", dtype=INT8, rows=256, scales=True, tile=Tile(32, 2, 2, 2), image_tokens=32
    ),
    "bytes-int8-to-int8": Case(tokens=20, weights="bytes", dtype=INT8, scales=True, gelu=True, result=INT8),
    "bytes-after-gelu": Case(tokens=20, weights="bytes", dtype=INT8, scales=True, gelu=True, after=True, layer=0),
    "bytes-after-gelu-to-int8": Case(tokens=20, weights="bytes", dtype=INT8, gelu=True, result=INT8, after=True),
    "bytes-e4m3-splits": Case(weights="bytes", dtype=E4M3, columns=256, tile=Tile(32, 1, 1, 2, splits=2), scales=True),
    "nibbles-cut-off": Case(tokens=40, weights="nibbles", dtype=INT8, columns=200, gelu=True),
    "nibbles-row-tiles-to-int8": Case(
        weights="nibbles", dtype=INT8, rows=256, tile=Tile(32, 2, 2, 2), gelu=True, result=INT8
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_interpreted_are_within_rounding_of_float64(name):
    product = make(CASES[name])
    run = functools.partial(matmul.product, tile=product.tile, interpret=True)
    product.check(jax.jit(run)(product.x, product.weights, product.epilogue, product.layer))


@settings(max_examples=3)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([(BF16, 2), (BF16, 8), (INT8, 4), (E4M3, 2)]),
)
def test_kernels_of_any_shape_are_within_rounding_of_float64(seed, tokens, blocks, steps, operands):
    dtype, length = operands
    columns = 72 * steps
    product = make(
        Case(tokens, 64 * blocks, columns, Tile(32, 1, 1, 2), dtype=dtype, length=length, scales=True, seed=seed)
    )
    run = functools.partial(matmul.product, tile=product.tile, interpret=True)
    product.check(jax.jit(run)(product.x, product.weights, product.epilogue, product.layer))


dense_linear = jax.jit(ops.dense_linear)


@pytest.mark.parametrize("name", CASES)
def test_products_through_xla_are_within_rounding_of_float64(name):
    product = make(CASES[name])
    product.check(dense_linear(product.x, product.weights, product.epilogue, product.layer))


@st.composite
def cases(draw):
    weights, dtype = draw(
        st.sampled_from([("vq", BF16), ("vq", INT8), ("vq", E4M3), ("bytes", INT8), ("bytes", E4M3), ("nibbles", INT8)])
    )
    layers = draw(st.integers(1, 3))
    images, image_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    gated = draw(st.booleans())
    return Case(
        tokens=images * image_tokens,
        rows=192 * draw(st.integers(1, 2)),
        columns=draw(st.sampled_from([8, 96, 128, 200, 384])),
        weights=weights,
        dtype=dtype,
        length=draw(st.sampled_from([2, 4, 8])),
        codewords=draw(st.sampled_from([1, 16, 64, 100, 256])),
        groups=draw(st.sampled_from([1, 3])),
        layers=layers,
        layer=draw(st.integers(0, layers - 1)),
        scales=draw(st.booleans()),
        bias=draw(st.booleans()),
        gelu=draw(st.booleans()),
        image_tokens=image_tokens if gated else 0,
        result=BF16 if gated or dtype == BF16 else draw(st.sampled_from([BF16, dtype])),
        seed=draw(st.integers(0, 2**32 - 1)),
        after=draw(st.booleans()),
    )


@settings(max_examples=15)
@given(cases())
def test_products_of_any_kind_through_xla_are_within_rounding_of_float64(case):
    product = make(case)
    product.check(dense_linear(product.x, product.weights, product.epilogue, product.layer))


def test_a_tile_that_does_not_divide_the_product_is_refused():
    product = make(Case(tokens=32, rows=128, columns=192, image_tokens=16))
    call = functools.partial(matmul.product, product.x, product.weights, product.epilogue, product.layer)
    for tile in (Tile(16, 3, 1, 2), Tile(16, 2, 1, 2, splits=2)):
        with pytest.raises(ValueError, match=r"X \(32, 192\), W \(128, 192\): .* does not divide them"):
            call(tile, interpret=True)
    with pytest.raises(ValueError, match="a block's tokens must lie in one image of 16"):
        call(Tile(32, 2, 1, 2), interpret=True)
