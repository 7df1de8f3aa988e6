"""LayerNorm, modulation and per-token quantization in one pass, in plain jnp: the definition, and the CPU path."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.epilogue import saturate
from pallas_kernels.operand import Operand, move, rotate

SMALLEST_TOKEN_SCALE = 1e-8
"""Keeps the scale of a token of zeros away from 0."""


def largest_quantized(dtype: Any) -> float:
    """The value that the largest entry of a token is quantized to. ValueError for a dtype that is not an 8-bit one of ours."""
    limits = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
    if jnp.dtype(dtype) not in limits:
        raise ValueError(f"dtype={jnp.dtype(dtype).name}: wanted int8, float8_e4m3fn or, for no quantization, bfloat16")
    return limits[jnp.dtype(dtype)]


def quantize_tokens(x: Float[Array, "M D"], dtype: Any) -> tuple[Num[Array, "M D"], Float[Array, " M"]]:
    """Each token symmetrically to 8 bits: (values in `dtype`, scales float32), scale = max |x| / limit, not below 1e-8."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(-1) / largest_quantized(dtype), SMALLEST_TOKEN_SCALE)
    return saturate(wide * (1 / scale)[:, None], dtype), scale


def rotate_quantize(
    x: Float[Array, "M D"], *, rotation: int = 0, dtype: Any
) -> tuple[Num[Array, "M D"], Float[Array, " M"]] | Float[Array, "M D"]:
    """Rows after a rotation (`operand.rotate`; 0: as they are), quantized by token; with dtype bfloat16 rounded to it."""
    z = rotate(x, rotation) if rotation else x
    return z.astype(jnp.bfloat16) if jnp.dtype(dtype) == jnp.bfloat16 else quantize_tokens(z, dtype)


def ln_modulate_quantize(
    x: Float[Array, "M D"],
    modulation: Float[Array, "B C"],
    layer: Int[Array, " 1"],
    *,
    tokens: int,
    dtype: Any,
    stride: int,
    offsets: tuple[int, int],
    eps: float = 1e-6,
    factors: bool = False,
    operand: Operand | None = None,
) -> tuple[Num[Array, "M D"], Float[Array, " M"]] | Float[Array, "M D"]:
    """LayerNorm without weights, times (1 + scale), plus shift, and each token quantized symmetrically to 8 bits.

        v = (x - mean x) / sqrt(mean (x - mean x)^2 + eps) * (1 + scale) + shift
        s = max(max |v| / limit, 1e-8)    q = round_half_even(v / s)

    or with `factors` times scale in place of (1 + scale),
    with limit 127 for int8 and 448, the largest number, for float8_e4m3fn. All of it is computed in float32.

    x (M, D) holds `tokens` consecutive rows of each image. `modulation` holds the shifts and scales of all layers of
    a network, an image a row (more rows than images may be there); those of layer l begin in columns
    l * stride + offsets (shift, scale). `layer` is an operand, so that it may differ in every step of a `lax.scan`.
    Returns q (M, D) in `dtype` and s (M,) float32. With dtype bfloat16 only v (M, D), rounded to it. What is quantized or rounded
    is v after the `operand` of the layer.
    """
    rows, width = x.shape
    images = rows // tokens
    per_image = lambda column: jax.lax.dynamic_slice(
        modulation, (jnp.zeros((), layer.dtype), layer[0] * stride + column), (images, width)
    ).astype(jnp.float32)[:, None, :]
    wide = x.astype(jnp.float32).reshape(images, tokens, width)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    factor = per_image(offsets[1]) if factors else 1.0 + per_image(offsets[1])
    v = (normed * factor + per_image(offsets[0])).reshape(rows, width)
    v = move(v, operand, layer)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return v.astype(jnp.bfloat16)
    return quantize_tokens(v, dtype)
