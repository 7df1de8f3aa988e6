"""Rotation and quantization of rows in one pass: the reference and the kernel against float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ptx import emulate
from row_cases import BF16, E4M3, INT8, check

from benchmarks.aot import compiler
from pallas_kernels import hadamard, ops, reference_norm
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.rotate_quantize import rotate_quantize
from pallas_kernels.operand import Operand

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
# Rows of proj and of fc2 of DiT-XL/2; a last program that overlaps its neighbour.
CASES = [(5, 1152, 64, INT8), (5, 1152, 0, INT8), (4, 4608, 576, INT8), (6, 128, 16, E4M3), (4, 4608, 256, BF16)]


def case(rows, width, rotation):
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, width)) * rng.uniform(0.1, 30, (rows, 1))).astype(ml_dtypes.bfloat16)
    if not rotation:
        return x, x.astype(np.float64)
    matrix = hadamard.regular(rotation) / np.sqrt(rotation)
    return x, (x.astype(np.float64).reshape(-1, rotation) @ matrix).reshape(x.shape)


@pytest.mark.parametrize("rows, width, rotation, dtype", CASES)
def test_the_operation_is_within_rounding_of_float64(rows, width, rotation, dtype):
    x, exact = case(rows, width, rotation)
    out = ops.rotate_quantize(jnp.asarray(x), Operand(rotation=rotation) if rotation else None, dtype)
    check(out[0] if dtype == BF16 else out, exact, dtype)
    assert (out[1] is None) == (dtype == BF16)


@pytest.mark.parametrize("dtype", [INT8, BF16])
def test_without_an_operand_rows_are_quantized_as_they_are(dtype):
    x = jnp.asarray(case(4, 128, 16)[0])
    got, wanted = ops.rotate_quantize(x, None, dtype), ops.quantize_tokens(x, dtype)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_kernel_interpreted_is_the_reference():
    x, _ = case(5, 1152, 144)
    how = dict(rotation=144, dtype=INT8)
    got = jax.jit(functools.partial(rotate_quantize, interpret=compat.interpret_params(), **how))(x)
    wanted = reference_norm.rotate_quantize(jnp.asarray(x), **how)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-6)
    assert np.abs(np.asarray(got[0], int) - np.asarray(wanted[0], int)).max() <= 1


@needs_compiler
@pytest.mark.parametrize("rows, width, rotation, dtype", CASES)
def test_the_compiled_kernel_emulated_is_within_rounding_of_float64(rows, width, rotation, dtype):
    x, exact = case(rows, width, rotation)
    results = [jax.ShapeDtypeStruct(x.shape, dtype)]
    if dtype != BF16:
        results.append(jax.ShapeDtypeStruct((rows,), jnp.float32))
    out = emulate(functools.partial(rotate_quantize, rotation=rotation, dtype=dtype), [x], results)
    check(out[0] if dtype == BF16 else out, exact, dtype)


@needs_compiler
@pytest.mark.parametrize("width, rotation", [(1152, 64), (1152, 576), (4608, 64), (4608, 576), (4608, 0)])
def test_compiled_for_dit_xl_it_is_one_launch_without_spills_and_barriers(width, rotation):
    kernel = functools.partial(rotate_quantize, rotation=rotation, dtype=INT8)
    compiled = compiler.compile(kernel, jax.ShapeDtypeStruct((4096, width), jnp.bfloat16))
    assert [thunk.kind for thunk in compiled.launches()] == ["kCustomCall"]
    (found,) = (kernel.assembly for kernel in compiled.mosaic_kernels)
    assert found.spill_bytes == 0 and found.opcodes()["BAR"] == 1


def test_what_a_warp_has_no_rotation_of_is_refused():
    for rows, width, rotation in ((3, 128, 64), (4, 128, 256), (4, 576, 576), (4, 1152, 36), (4, 96, 16)):
        with pytest.raises(ValueError, match=f"rotation {rotation}: wanted 4 rows, D % 64 == 0, and a rotation that"):
            rotate_quantize(jnp.zeros((rows, width), jnp.bfloat16), rotation=rotation, dtype=INT8)
    with pytest.raises(ValueError, match="dtype=int32: wanted int8, float8_e4m3fn"):
        rotate_quantize(jnp.zeros((4, 64), jnp.bfloat16), rotation=64, dtype=jnp.int32)
