"""LayerNorm, modulation and per-token quantization in one pass over the tokens, for Hopper.

A warp owns a token: its D numbers lie in the registers of 32 lanes, the three reductions (mean, variance, largest
magnitude) are five shuffles each, and no shared memory is used. The pass moves 2D bytes in and D bytes out for each
token; the modulation of an image (4D bytes) stays in the L1 cache while its tokens pass. Rows of an image whose token
count is no multiple of four overlap in its last group: both warps write the same numbers, and nothing is masked.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.direct_store import direct_store
from pallas_kernels.reference_norm import SMALLEST_TOKEN_SCALE, largest_quantized

_ROWS = 4  # tokens of a program: one for each warp of a warpgroup


def _row_per_warp(width: int) -> Any:
    """Layout of (_ROWS, width): row w in warp w, neighbouring vectors of 2, 4 or 8 numbers in neighbouring lanes."""
    vector = next(v for v in (8, 4, 2) if width % (32 * v) == 0)
    tiling = plgpu.Tiling(((_ROWS, 32 * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


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
    interpret: Any = None,
) -> tuple[Num[Array, "M D"], Float[Array, " M"]] | Float[Array, "M D"]:
    """`pallas_kernels.reference_norm.ln_modulate_quantize` in one launch.

    D is a multiple of 64 (up to 3072 no register spills), `tokens` at least 4, stride and offsets multiples of 8 (vector
    loads). `interpret`: parameters of Pallas' GPU interpreter.
    """
    rows, width = x.shape
    if width % 64 or tokens < _ROWS or rows % tokens:
        raise ValueError(
            f"x {x.shape} with tokens={tokens}: wanted D a multiple of 64, at least {_ROWS} tokens and whole images"
        )
    quantized = jnp.dtype(dtype) != jnp.bfloat16
    limit = largest_quantized(dtype) if quantized else None
    layout, interpreted = _row_per_warp(width), interpret is not None

    def load(ref, layout):
        return compat.load(ref, layout, interpreted).astype(jnp.float32)

    def spread(a, dimension):
        spread = lax.broadcast_in_dim(a, (_ROWS, width), (dimension,))
        return spread if interpreted else plgpu.layout_cast(spread, layout)

    def kernel(x_ref, modulation_ref, layer_ref, out_ref, *scale_refs):
        image, group = lax.axis_index("image"), lax.axis_index("group")
        here = pl.ds(image * tokens + jnp.minimum(group * _ROWS, tokens - _ROWS), _ROWS)
        # All loads stand before the first reduction, so that they are in flight together.
        wide = load(x_ref.at[here], layout)
        first = layer_ref[0] * stride
        own = [modulation_ref.at[image, pl.ds(first + offset, width)] for offset in offsets]
        shift, scale = (load(ref, layout.reduce(0)) for ref in own)

        centred = wide - spread(jnp.sum(wide, axis=1) * (1 / width), 0)
        inverse = spread(lax.rsqrt(jnp.sum(centred * centred, axis=1) * (1 / width) + eps), 0)
        v = centred * (inverse * spread(scale, 1) + inverse) + spread(shift, 1)
        if quantized:
            token_scale = jnp.maximum(jnp.max(jnp.abs(v), axis=1) * (1 / limit), SMALLEST_TOKEN_SCALE)
            direct_store(scale_refs[0].at[here], token_scale, layout.reduce(1), interpreted)
            v = v * spread(1.0 / token_scale, 0)
        if jnp.dtype(dtype) == jnp.int8:
            # 1.5 * 2^23 + v: the sum rounds to even and leaves the integer in its low bits. One FMA for the product, the
            # rounding and the conversion, which as instructions of their own run at a quarter of its rate and less.
            v = lax.bitcast_convert_type(v + 12582912.0, jnp.int32)
        direct_store(out_ref.at[here], v.astype(dtype), layout, interpreted)

    out = jax.ShapeDtypeStruct((rows, width), dtype)
    return plgpu.kernel(
        kernel,
        out_type=(out, jax.ShapeDtypeStruct((rows,), jnp.float32)) if quantized else out,
        grid=(rows // tokens, pl.cdiv(tokens, _ROWS)),
        grid_names=("image", "group"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, modulation, layer)
