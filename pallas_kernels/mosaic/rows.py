"""Rows of D numbers in registers, a warp a row: their layout, rotation, quantization and stores.

The D numbers of a row lie in the registers of 32 lanes. Sums and the largest magnitude of a row are five shuffles each, and no
shared memory is used.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.hadamard import ROW_OF_36
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.direct_store import direct_store
from pallas_kernels.mosaic.rotate import rotate
from pallas_kernels.reference_norm import SMALLEST_TOKEN_SCALE, largest_quantized

ROWS = 4
"""Of a program: one for each warp of a warpgroup."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """`ROWS` rows of `width` numbers, which may be rotated in groups of `rotation`; see `hadamard.fits_warp`."""

    width: int
    rotation: int = 0
    interpreted: bool = False

    @property
    def layout(self) -> Any:
        """Of (ROWS, width): row w in warp w.

        Neighbouring vectors of 2, 4 or 8 numbers lie in neighbouring lanes. For rotations of order 36 * n the 36 blocks of n
        numbers of a group lie in the 18 registers of lanes that n / 2 apart, even ones in one and odd ones in the other.
        """
        if self.rotation and self.rotation % 36 == 0:
            inner = self.rotation // 36
            tiling = plgpu.Tiling(((ROWS, ROW_OF_36), (self.rotation,), (2 * inner,), (inner,), (2,)))
            return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=(-5, -3, -2), vector_dim=-1)
        vector = next(v for v in (8, 4, 2) if self.width % (32 * v) == 0)
        tiling = plgpu.Tiling(((ROWS, 32 * vector), (vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def load(self, ref: Any) -> Float32[Array, "R D"]:
        return compat.load(ref, self.layout, self.interpreted).astype(jnp.float32)

    def load_vector(self, ref: Any) -> Float32[Array, " D"]:
        """What all rows have in common."""
        return compat.load(ref, self.layout.reduce(0), self.interpreted).astype(jnp.float32)

    def spread(self, a: Float32[Array, " N"], dimension: int) -> Float32[Array, "R D"]:
        """A number for each row (dimension 0) or each column (1)."""
        spread = lax.broadcast_in_dim(a, (ROWS, self.width), (dimension,))
        return spread if self.interpreted else plgpu.layout_cast(spread, self.layout)

    def rotated(self, v: Float32[Array, "R D"]) -> Float32[Array, "R D"]:
        return rotate(v, self.rotation, self.layout, self.interpreted) if self.rotation else v

    def write(self, v: Float[Array, "R D"], here: Any, dtype: Any, out_ref: Any, scale_ref: Any = None) -> None:
        """Rows in bfloat16, or with `scale_ref` in 8 bits with a scale each, to the rows `here` of the results."""
        if scale_ref is not None:
            largest = jnp.max(jnp.abs(v), axis=1)
            scale = jnp.maximum(largest * (1 / largest_quantized(dtype)), SMALLEST_TOKEN_SCALE)
            direct_store(scale_ref.at[here], scale, self.layout.reduce(1), self.interpreted)
            v = v * self.spread(1.0 / scale, 0)
        if jnp.dtype(dtype) == jnp.int8:
            # 1.5 * 2^23 + v: the sum rounds to even and leaves the integer in its low bits. One FMA for the product, the
            # rounding and the conversion, which as instructions of their own run at a quarter of its rate and less.
            v = lax.bitcast_convert_type(v + 12582912.0, jnp.int32)
        direct_store(out_ref.at[here], v.astype(dtype), self.layout, self.interpreted)


def results(rows: int, width: int, dtype: Any) -> Any:
    """Shapes of what `Rows.write` fills: rows in bfloat16, or rows in 8 bits and their scales. ValueError for other dtypes."""
    out = jax.ShapeDtypeStruct((rows, width), dtype)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return out
    largest_quantized(dtype)
    return out, jax.ShapeDtypeStruct((rows,), jnp.float32)
