"""Sub-vectors in registers, one in each lane, and their codewords from a codebook in shared memory.

A weight (O, I), read row after row, is a list of sub-vectors of d numbers, and so is its gradient. Candidates and ratios are
lists with an entry for each sub-vector. Kernels take the lists in tiles. A warp loads 32 neighbouring sub-vectors with one
instruction of up to 16 bytes a lane. All values of one sub-vector are in one lane.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.mlir import byte_address, constant, element

TILE = 512
"""Sub-vectors that a warpgroup holds at a time: four in each lane."""

STREAMING_MULTIPROCESSORS = 132
"""Of an H100 (SXM) or H200."""


def layout(length: int) -> Any:
    """Layout of (TILE, d), a sub-vector in each lane; `layout(d).reduce(1)` is that of (TILE,), a number for each."""
    tiling = plgpu.Tiling(((128, length), (32, length)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


def check(codebook_shape: tuple[int, ...], candidates_shape: tuple[int, ...]) -> None:
    """ValueError for shapes that the kernels do not take."""
    groups, codewords, length = codebook_shape[-3:]
    n, rows, _ = candidates_shape[-3:]
    if codewords > 256 or length not in (2, 4, 8) or not 1 <= n <= 4 or rows % groups:
        raise ValueError(
            f"codebook {codebook_shape} with candidates {candidates_shape}: wanted at most 256 codewords of 2, 4 or 8 "
            "numbers, 1 to 4 candidates, and the same number of rows in every group"
        )
    if codebook_shape[:-3] != candidates_shape[:-3]:
        raise ValueError(
            f"codebook {codebook_shape} and candidates {candidates_shape} are of different stacks of layers"
        )


def pad_axis(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """The array padded with zeros along `axis` to a multiple; unchanged where none is missing (as in all layers of a DiT)."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


def spread(per_subvector: jax.Array, length: int, interpret: bool) -> jax.Array:
    """(TILE,) to (TILE, d): each sub-vector's number for all of its weights."""
    wide = lax.broadcast_in_dim(per_subvector, (TILE, length), (0,))
    return wide if interpret else plgpu.layout_cast(wide, layout(length))


def make_gather(length: int, interpret: bool) -> Any:
    """`gather(codebook (K * d,) float32 in shared memory, codes (TILE,) int32) -> (TILE, d)`, one load for each lane."""
    if interpret:
        return lambda codebook, codes: jnp.take(codebook[...].reshape(-1, length), codes, axis=0, mode="clip")
    rows = layout(length)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), rows.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct((TILE, length), jnp.float32, layout=rows),
    )
    def gather(_: Any, codebook: Any, codes: Any) -> Any:
        base, codeword = mgpu.utils.memref_ptr(codebook), ir.VectorType.get((length,), ir.F32Type.get())
        tiled = rows.to_mgpu()
        out = np.empty(tiled.registers_shape((TILE, length)), dtype=object)
        for i, code in enumerate(codes.registers.flat):
            address = byte_address(base, arith.shli(element(code, 0), constant(int(math.log2(4 * length)))))
            out.flat[i] = llvm.load(codeword, address, alignment=min(4 * length, 16))
        return mgpu.FragmentedArray(_registers=out, _layout=tiled, _is_signed=None)

    return gather
