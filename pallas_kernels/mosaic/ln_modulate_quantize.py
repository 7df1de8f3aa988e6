"""LayerNorm, modulation, rotation and per-token quantization in one pass over the tokens, for Hopper.

A warp owns a token (`rows.Rows`): the three reductions (mean, variance, largest magnitude) are five shuffles each, a
rotation is some for each number (`rotate`), and no shared memory is used. The pass moves 2D bytes in and D bytes out for
each token; the modulation of an image (4D bytes) stays in the L1 cache while its tokens pass. Rows of an image whose token
count is no multiple of four overlap in its last group: both warps write the same numbers, and nothing is masked.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import hadamard
from pallas_kernels.mosaic.rows import ROWS, Rows, results


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
    rotation: int = 0,
    interpret: Any = None,
) -> tuple[Num[Array, "M D"], Float[Array, " M"]] | Float[Array, "M D"]:
    """`pallas_kernels.reference_norm.ln_modulate_quantize` in one launch; its operand may have a `rotation` alone.

    D is a multiple of 64 (up to 3072 no register spills), `tokens` at least 4, stride and offsets multiples of 8 (vector
    loads). `interpret`: parameters of Pallas' GPU interpreter. Raises ValueError for other shapes and rotations.
    """
    count, width = x.shape
    if width % 64 or tokens < ROWS or count % tokens:
        raise ValueError(
            f"x {x.shape} with tokens={tokens}: wanted D a multiple of 64, at least {ROWS} tokens and whole images"
        )
    if rotation and not hadamard.fits_warp(rotation, width):
        raise ValueError(f"x {x.shape}: a warp has no rotation in groups of {rotation} of such rows")
    rows = Rows(width, rotation, interpret is not None)

    def ln_modulate_quantize_kernel(
        x_ref: Any, modulation_ref: Any, layer_ref: Any, out_ref: Any, *scale_refs: Any
    ) -> None:
        image, group = lax.axis_index("image"), lax.axis_index("group")
        here = pl.ds(image * tokens + jnp.minimum(group * ROWS, tokens - ROWS), ROWS)
        # All loads stand before the first reduction, so that they are in flight together.
        wide = rows.load(x_ref.at[here])
        first = layer_ref[0] * stride
        own = [modulation_ref.at[image, pl.ds(first + offset, width)] for offset in offsets]
        shift, scale = map(rows.load_vector, own)

        centred = wide - rows.spread(jnp.sum(wide, axis=1) * (1 / width), 0)
        inverse = rows.spread(lax.rsqrt(jnp.sum(centred * centred, axis=1) * (1 / width) + eps), 0)
        factor = inverse * rows.spread(scale, 1)
        v = centred * (factor if factors else factor + inverse) + rows.spread(shift, 1)
        rows.write(rows.rotated(v), here, dtype, out_ref, *scale_refs)

    return plgpu.kernel(
        ln_modulate_quantize_kernel,
        out_type=results(count, width, dtype),
        grid=(count // tokens, pl.cdiv(tokens, ROWS)),
        grid_names=("image", "group"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, modulation, layer)
