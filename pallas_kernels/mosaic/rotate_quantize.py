"""Rotation of rows and quantization by row in one pass, for Hopper: what stands between attention and proj, or GELU and fc2.

XLA takes three launches to quantize by row, and a fourth for a rotation.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from pallas_kernels import hadamard
from pallas_kernels.mosaic.rows import ROWS, Rows, results


def rotate_quantize(
    x: Float[Array, "M D"], *, rotation: int = 0, dtype: Any, interpret: Any = None
) -> tuple[Num[Array, "M D"], Float[Array, " M"]] | Float[Array, "M D"]:
    """`pallas_kernels.reference_norm.rotate_quantize` in one launch: a warp a row, no shared memory.

    M is at least 4, D a multiple of 64 (up to 4608 no register spills). Rows beyond a multiple of 4 overlap in the last program:
    both warps write the same numbers. `interpret`: parameters of Pallas' GPU interpreter. Raises ValueError for other shapes, and
    where `hadamard.fits_warp` says no.
    """
    count, width = x.shape
    if count < ROWS or width % 64 or rotation and not hadamard.fits_warp(rotation, width):
        raise ValueError(
            f"x {x.shape}, rotation {rotation}: wanted {ROWS} rows, D % 64 == 0, and a rotation that a warp has"
        )
    rows = Rows(width, rotation, interpret is not None)

    def rotate_quantize_kernel(x_ref: Any, out_ref: Any, *scale_refs: Any) -> None:
        here = pl.ds(jnp.minimum(lax.axis_index("group") * ROWS, count - ROWS), ROWS)
        rows.write(rows.rotated(rows.load(x_ref.at[here])), here, dtype, out_ref, *scale_refs)

    return plgpu.kernel(
        rotate_quantize_kernel,
        out_type=results(count, width, dtype),
        grid=(pl.cdiv(count, ROWS),),
        grid_names=("group",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x)
