"""Attention on the qkv product as it lies: the kernel, interpreted and compiled, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx import emulate

from benchmarks.aot import compiler
from pallas_kernels import ops, selector
from pallas_kernels.mosaic.attention import attention

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
INT8, E4M3, BF16 = jnp.int8, jnp.float8_e4m3fn, jnp.bfloat16
LAYER, SCALES = np.array([1], np.int32), np.array([7.0, 0.02], np.float32)


def product(images, tokens, heads, size, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(1.5 * rng.normal(size=(images * tokens, 3 * heads * size)), BF16)


def exact(qkv, tokens, heads):
    """In float64."""
    x = np.asarray(qkv, np.float64).reshape(-1, tokens, 3, heads, qkv.shape[1] // (3 * heads))
    q, k, v = np.moveaxis(x, 2, 0)
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v).reshape(len(qkv), -1)


def check(out, wanted, dtype):
    """bfloat16: 4e-3 of the maximum. 8 bits: what rounding to them and that much add up to."""
    out, error = np.asarray(out, np.float64), 4e-3 * np.abs(wanted).max()
    if dtype == BF16:
        assert np.abs(out - wanted).max() <= error
        return
    scale = SCALES[LAYER[0]].astype(np.float64)
    limit = 127 if dtype == INT8 else 448
    rounding = scale / 2 if dtype == INT8 else np.maximum(np.abs(wanted) * 2**-4, scale * 2**-10)
    clipped = np.clip(wanted, -(limit + (dtype == INT8)) * scale, limit * scale)
    assert (np.abs(out * scale - clipped) <= error + rounding).all()


def kernel(dtype, tokens, heads, interpret=False):
    run = functools.partial(attention, tokens=tokens, num_heads=heads, interpret=interpret)
    if dtype == BF16:
        return run, ()
    return lambda qkv, layer, scale: run(qkv, layer=layer, out_scale=scale, dtype=dtype), (LAYER, SCALES)


# XL's heads of 72, every second one of which begins in the middle of a tile; one and two warpgroups; one and two steps over keys.
CASES = [(BF16, 2, 128, 2, 72), (INT8, 1, 64, 2, 72), (E4M3, 2, 64, 3, 64), (BF16, 1, 256, 1, 32)]
NAMES = ["bf16-72", "int8-72", "e4m3-64", "bf16-32-two-steps"]


@pytest.mark.parametrize("dtype, images, tokens, heads, size", CASES, ids=NAMES)
def test_the_kernel_interpreted_equals_float64(dtype, images, tokens, heads, size):
    qkv = product(images, tokens, heads, size)
    run, more = kernel(dtype, tokens, heads, interpret=True)
    check(jax.jit(run)(qkv, *more), exact(qkv, tokens, heads), dtype)


@pytest.mark.once
@needs_compiler
@pytest.mark.parametrize("dtype, images, tokens, heads, size", CASES, ids=NAMES)
def test_the_compiled_kernel_emulated_equals_float64(dtype, images, tokens, heads, size):
    qkv = product(images, tokens, heads, size, seed=1)
    run, more = kernel(dtype, tokens, heads)
    (out,) = emulate(run, [np.asarray(qkv), *more], [jax.ShapeDtypeStruct((len(qkv), heads * size), dtype)])
    check(out, exact(qkv, tokens, heads), dtype)


@pytest.mark.parametrize("dtype", [BF16, INT8, E4M3])
def test_the_xla_path_equals_float64(dtype):
    qkv = product(2, 16, 2, 24)
    scale = None if dtype == BF16 else jnp.asarray(SCALES)
    out, _ = ops.fused_attention(qkv, jnp.asarray(LAYER), tokens=16, num_heads=2, dtype=dtype, out_scale=scale)
    check(out, exact(qkv, 16, 2), dtype)


def test_images_do_not_see_each_other():
    qkv = product(2, 64, 2, 64)
    run = jax.jit(kernel(BF16, 64, 2, interpret=True)[0])
    other = qkv.at[64:].set(product(1, 64, 2, 64, seed=5))
    np.testing.assert_array_equal(np.asarray(run(qkv))[:64], np.asarray(run(other))[:64])


def test_shapes_that_the_kernel_does_not_take_are_refused_and_not_chosen():
    for tokens, heads, size in ((32, 2, 64), (64, 2, 60), (64, 3, 72)):
        qkv = jnp.zeros((tokens, 3 * heads * size), BF16)
        with pytest.raises(ValueError, match="wanted"):
            attention(qkv, tokens=tokens, num_heads=heads)
        assert selector.fused_attention(selector.H200, size, heads, tokens).implementation == "xla"
    assert selector.fused_attention(selector.H200, 72, 16, 256).implementation == "mosaic"
