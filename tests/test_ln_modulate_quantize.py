"""LayerNorm, modulation and per-token quantization in one pass: the reference and the kernel against float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import emulate
from row_cases import BF16, E4M3, INT8, check

from benchmarks.aot import compiler
from pallas_kernels import reference_norm
from pallas_kernels.hadamard import regular
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic import ln_modulate_quantize as mosaic
from pallas_kernels.operand import Operand
from vq4dit_jax.networks import layers

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))


def case(seed, images, tokens, width, layers=2, padding=1):
    """x, modulation of all layers with more rows than images, the last layer's number, and where its MLP's vectors stand."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(images * tokens, width)) * rng.uniform(0.1, 30) + rng.normal()).astype(ml_dtypes.bfloat16)
    modulation = (0.5 * rng.normal(size=(images + padding, layers * 6 * width))).astype(ml_dtypes.bfloat16)
    where = dict(stride=6 * width, offsets=(3 * width, 4 * width))
    return x, modulation, np.array([layers - 1], np.int32), where


def exact(x, modulation, layer, tokens, stride, offsets, eps=1e-6, rotation=0, factors=False):
    """v in float64."""
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + eps)
    image = np.arange(len(x)) // tokens
    firsts = (layer[0] * stride + offset for offset in offsets)
    shift, scale = (modulation[image, first : first + x.shape[1]].astype(np.float64) for first in firsts)
    v = normed * (scale if factors else 1 + scale) + shift
    return v if not rotation else (v.reshape(-1, rotation) @ (regular(rotation) / np.sqrt(rotation))).reshape(v.shape)


def run(function, arrays, **options):
    return jax.jit(functools.partial(function, **options))(*arrays)


@settings(max_examples=12)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([8, 64, 384]),
    st.sampled_from([INT8, E4M3, BF16]),
)
def test_the_reference_is_within_rounding_of_float64(seed, images, tokens, width, dtype):
    *arrays, where = case(seed, images, tokens, width)
    check(
        run(reference_norm.ln_modulate_quantize, arrays, tokens=tokens, dtype=dtype, **where),
        exact(*arrays, tokens, **where),
        dtype,
    )


def test_without_quantization_it_is_what_a_block_computes():
    x, modulation, layer, where = case(1, 3, 16, 64)
    ours = run(reference_norm.ln_modulate_quantize, (x, modulation, layer), tokens=16, dtype=BF16, **where)
    own = modulation[:3].reshape(3, 2, 6, 64)[:, layer[0]].astype(np.float32)
    shift, scale = jnp.asarray(own[:, 3]), jnp.asarray(own[:, 4])
    blocks = layers.modulate(layers.layer_norm(jnp.asarray(x, jnp.float32).reshape(3, 16, 64), 1e-6), shift, scale)
    np.testing.assert_array_equal(ours, blocks.reshape(48, 64).astype(BF16))


@pytest.mark.parametrize("power", [-12, 5])
def test_layer_norm_forgets_the_scale_of_its_input(power):
    x, modulation, layer, where = case(2, 2, 8, 128)
    quantize = functools.partial(reference_norm.ln_modulate_quantize, tokens=8, dtype=INT8, eps=0.0, **where)
    q, token_scale = quantize(x, modulation, layer)
    q_scaled, token_scale_scaled = quantize(np.ldexp(x, power).astype(x.dtype), modulation, layer)
    np.testing.assert_array_equal(q, q_scaled)
    np.testing.assert_array_equal(token_scale, token_scale_scaled)


def test_a_token_of_equal_numbers_gives_the_shift_and_a_token_of_zeros_gives_zeros():
    x = np.full((4, 64), 3, ml_dtypes.bfloat16)
    modulation = np.zeros((1, 6 * 64), ml_dtypes.bfloat16)
    quantize = functools.partial(
        reference_norm.ln_modulate_quantize, tokens=4, dtype=INT8, stride=6 * 64, offsets=(0, 64)
    )
    layer = np.zeros(1, np.int32)
    q, token_scale = quantize(x, modulation, layer)
    assert not np.asarray(q).any() and (np.asarray(token_scale) == np.float32(1e-8)).all()
    modulation[:, :64] = 0.5
    q, token_scale = quantize(x, modulation, layer)
    np.testing.assert_allclose(np.asarray(q) * np.asarray(token_scale)[:, None], 0.5, rtol=1e-6)


# A group of four rows that is full, that overlaps its neighbour, and three lengths of vector (D = 64, 128, 256).
@pytest.mark.parametrize(
    "dtype, images, tokens, width",
    [(INT8, 2, 16, 128), (E4M3, 3, 7, 64), (BF16, 1, 9, 384), (INT8, 2, 4, 256)],
    ids=["int8", "e4m3-overlap", "bf16-overlap", "int8-wide"],
)
def test_the_kernel_interpreted_is_within_rounding_of_float64(dtype, images, tokens, width):
    *arrays, where = case(3, images, tokens, width)
    interpret = compat.interpret_params()
    out = run(mosaic.ln_modulate_quantize, arrays, tokens=tokens, dtype=dtype, interpret=interpret, **where)
    check(out, exact(*arrays, tokens, **where), dtype)


# Orders 4^k with vectors of 2, 4 and 8 numbers, and 36 * 4^k.
ROTATIONS = [(64, 16, INT8), (384, 64, E4M3), (256, 256, BF16), (1152, 64, INT8), (1152, 144, BF16), (1152, 576, INT8)]


@pytest.mark.parametrize("width, rotation, dtype", ROTATIONS[::2])
def test_the_kernel_with_a_rotation_interpreted_is_within_rounding_of_float64(width, rotation, dtype):
    *arrays, where = case(7, 1, 4, width)
    how = dict(tokens=4, **where, rotation=rotation, factors=True)
    out = run(mosaic.ln_modulate_quantize, arrays, dtype=dtype, interpret=compat.interpret_params(), **how)
    check(out, exact(*arrays, **how), dtype)


def test_the_reference_rotates_as_float64_does():
    *arrays, where = case(8, 2, 3, 1152)
    out = run(reference_norm.ln_modulate_quantize, arrays, tokens=3, dtype=INT8, operand=Operand(rotation=576), **where)
    check(out, exact(*arrays, 3, rotation=576, **where), INT8)


def test_the_layer_is_read_when_the_kernel_runs():
    x, modulation, layer, where = case(4, 1, 4, 64)
    interpret = compat.interpret_params()
    quantize = jax.jit(
        functools.partial(mosaic.ln_modulate_quantize, tokens=4, dtype=INT8, interpret=interpret, **where)
    )
    for here in (layer, layer - 1):
        check(quantize(x, modulation, here), exact(x, modulation, here, 4, **where), INT8)
    assert quantize._cache_size() == 1


def test_shapes_and_dtypes_that_the_kernel_does_not_take_are_refused():
    x, modulation, layer, where = case(5, 2, 4, 64)
    with pytest.raises(ValueError, match="dtype=int32: wanted int8, float8_e4m3fn"):
        reference_norm.ln_modulate_quantize(x, modulation, layer, tokens=4, dtype=jnp.int32, **where)
    for tokens, width in ((3, 64), (2, 64), (4, 48)):
        with pytest.raises(ValueError, match="wanted D a multiple of 64, at least 4 tokens and whole images"):
            mosaic.ln_modulate_quantize(x[:, :width], modulation, layer, tokens=tokens, dtype=INT8, **where)
    for rotation in (8, 36, 256, 576):
        with pytest.raises(ValueError, match=f"a warp has no rotation in groups of {rotation} of such rows"):
            mosaic.ln_modulate_quantize(x, modulation, layer, tokens=4, dtype=INT8, rotation=rotation, **where)


# Vectors of 2, 4 and 8 numbers; D = 1152 is DiT-XL's.
@needs_compiler
@pytest.mark.parametrize(
    "dtype, images, tokens, width", [(INT8, 2, 10, 256), (E4M3, 2, 8, 64), (BF16, 1, 5, 1152), (INT8, 1, 4, 1152)]
)
def test_the_compiled_kernel_emulated_is_within_rounding_of_float64(dtype, images, tokens, width):
    *arrays, where = case(6, images, tokens, width)
    results = [jax.ShapeDtypeStruct((images * tokens, width), dtype)]
    if dtype != BF16:
        results.append(jax.ShapeDtypeStruct((images * tokens,), jnp.float32))
    kernel = functools.partial(mosaic.ln_modulate_quantize, tokens=tokens, dtype=dtype, **where)
    out = emulate(kernel, arrays, results)
    check(out[0] if dtype == BF16 else out, exact(*arrays, tokens, **where), dtype)


@needs_compiler
@pytest.mark.parametrize("width, rotation, dtype", ROTATIONS)
def test_the_compiled_kernel_with_a_rotation_emulated_is_within_rounding_of_float64(width, rotation, dtype):
    *arrays, where = case(9, 1, 5, width)
    results = [jax.ShapeDtypeStruct((5, width), dtype)]
    if dtype != BF16:
        results.append(jax.ShapeDtypeStruct((5,), jnp.float32))
    how = dict(tokens=5, **where, rotation=rotation, factors=True)
    out = emulate(functools.partial(mosaic.ln_modulate_quantize, dtype=dtype, **how), arrays, results)
    check(out[0] if dtype == BF16 else out, exact(*arrays, **how), dtype)


# Five shuffles each of two sums and a maximum. In a rotation a number takes two for each stage of order 4 in other lanes, half of
# one where the stage begins in its register; the 36 of order 36 take 24.
@needs_compiler
@pytest.mark.parametrize("rotation, shuffles", [(64, 36 * 4), (576, 24 + 36 * 2.5)])
def test_a_rotation_of_dit_xl_is_shuffles_without_spills_and_barriers(rotation, shuffles):
    shapes = ((4096, 1152), jnp.bfloat16), ((16, 28 * 6 * 1152), jnp.bfloat16), ((1,), jnp.int32)
    where = dict(tokens=256, stride=6 * 1152, offsets=(0, 1152))
    kernel = functools.partial(mosaic.ln_modulate_quantize, dtype=INT8, rotation=rotation, **where)
    compiled = compiler.compile(kernel, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert len(compiled.launches()) == 1
    (found,) = (kernel.assembly for kernel in compiled.mosaic_kernels)
    assert found.spill_bytes == 0 and found.registers <= 128  # four programs on a multiprocessor
    counts = found.opcodes()
    assert counts["BAR"] == 1 and counts["SHFL"] == shuffles + 3 * 5


@needs_compiler
@pytest.mark.parametrize("dtype", [INT8, E4M3, BF16])
def test_compiled_for_dit_xl_it_is_one_launch_without_spills_and_barriers(dtype):
    shapes = ((4096, 1152), jnp.bfloat16), ((16, 28 * 6 * 1152), jnp.bfloat16), ((1,), jnp.int32)
    kernel = functools.partial(mosaic.ln_modulate_quantize, tokens=256, dtype=dtype, stride=6 * 1152, offsets=(0, 1152))
    compiled = compiler.compile(kernel, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert len(compiled.launches()) == 1
    (found,) = (kernel.assembly for kernel in compiled.mosaic_kernels)
    assert found.spill_bytes == 0 and found.registers <= 96  # five programs on a multiprocessor
    assert found.opcodes()["BAR"] == 1  # Mosaic's own, before the first instruction of ours
    assert len(found.instructions) <= 600
