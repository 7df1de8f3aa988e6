"""Y = epilogue(X W^T) with 8-bit X and W of 8 or 4 bits (W8A8, W4A8 of ViDiT-Q, arXiv 2406.02540)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector

from pallas_kernels import nibbles
from pallas_kernels.fragments import LINE, ROWS
from pallas_kernels.mosaic import compat, store
from pallas_kernels.mosaic.decode import fragment
from pallas_kernels.mosaic.mlir import constant, element
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import ByteWeights, NibbleWeights

_CONTRACT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class ByteSource:
    """`ByteWeights`: both operands from shared memory; scales are the epilogue's."""

    weights: ByteWeights
    promotes = False

    def operands(self) -> Sequence[jax.Array]:
        return (self.weights.values.reshape(-1, self.weights.values.shape[2]),)

    def streams(self, tile: Tile) -> Sequence[plgpu.BlockSpec]:
        swizzle = store.transforms(self.weights.values.dtype)
        return (plgpu.BlockSpec((tile.rows, 128), lambda k: (0, k), transforms=swizzle, memory_space=plgpu.SMEM),)

    def at_rows(self, refs: Sequence[Any], layer: Any, block: Any, first_step: Any, tile: Tile) -> Sequence[Any]:
        columns = pl.ds(first_step * 128, self.weights.steps * 128 // tile.splits)
        return (refs[0].at[pl.ds(layer * self.weights.rows + block * tile.rows, tile.rows), columns],)

    def table(self) -> None:
        return None

    def multiply(self, acc: Any, x: Any, streamed: Sequence[Any], row_tile: Any, table: Any, interpret: bool) -> Any:
        w = streamed[0].at[pl.ds(row_tile * ROWS, ROWS)]
        if interpret:
            return acc + lax.dot_general(w[...], x[...], _CONTRACT, preferred_element_type=acc.dtype)
        plgpu.wgmma(acc, w, compat.transpose(x))
        return acc


@dataclasses.dataclass(frozen=True)
class NibbleSource:
    """`NibbleWeights`, decoded into registers. Sums of 128 columns are exact integers, and join the float32 sum with
    their group's scale.
    """

    weights: NibbleWeights
    promotes = True

    def operands(self) -> Sequence[jax.Array]:
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        return flat(self.weights.values), flat(self.weights.scales)

    def streams(self, tile: Tile) -> Sequence[plgpu.BlockSpec]:
        tiles = tile.warpgroups * tile.row_tiles
        return (
            plgpu.BlockSpec((tiles, nibbles.LINES, LINE), lambda k: (0, k, 0), memory_space=plgpu.SMEM),
            plgpu.BlockSpec((1, tile.rows), lambda k: (k, 0), memory_space=plgpu.SMEM),
        )

    def at_rows(self, refs: Sequence[Any], layer: Any, block: Any, first_step: Any, tile: Tile) -> Sequence[Any]:
        tiles, steps = tile.warpgroups * tile.row_tiles, self.weights.steps
        here = steps // tile.splits
        lines = pl.ds(first_step * nibbles.LINES, here * nibbles.LINES)
        values = refs[0].at[pl.ds(layer * self.weights.values.shape[1] + block * tiles, tiles), lines]
        return values, refs[1].at[pl.ds(layer * steps + first_step, here), pl.ds(block * tile.rows, tile.rows)]

    def table(self) -> None:
        return None

    def multiply(self, acc: Any, x: Any, streamed: Sequence[Any], row_tile: Any, table: Any, interpret: bool) -> Any:
        at_rows = pl.ds(row_tile * ROWS, ROWS)
        scale = compat.load(streamed[1].at[0, at_rows], plgpu.Layout.WGMMA.reduce(1), interpret)
        scale = lax.broadcast_in_dim(scale * (1 / nibbles.FACTOR), acc.shape, (0,))
        if interpret:
            w = nibbles.unpack(streamed[0].at[row_tile][...]) * jnp.int8(nibbles.FACTOR)
            part = lax.dot_general(w, x[...], _CONTRACT, preferred_element_type=jnp.int32)
            return acc + part.astype(jnp.float32) * scale
        w = _decode(streamed[0].at[row_tile])

        def multiply(part: Any) -> jax.Array:
            plgpu.wgmma(part, w, compat.transpose(x))
            plgpu.wgmma_wait(0)
            return part[...]

        part = pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.int32))
        return acc + part.astype(jnp.float32) * scale


@plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct((ROWS, nibbles.COLUMNS), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
)
def _decode(_: Any, words: Any) -> Any:
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    lane = arith.remui(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), constant(128))
    flat, mask, registers = mgpu.memref_fold(words, 0, 2), constant(-0x0F0F0F10), []
    for i in (0, 4):
        offset = arith.index_cast(index, arith.addi(arith.shli(lane, constant(3)), constant(i)))
        four = vector.load(ir.VectorType.get((4,), i32), flat, [offset])
        for k in range(4):
            word = element(four, k)
            registers += [arith.andi(arith.shli(word, constant(4)), mask), arith.andi(word, mask)]
    return fragment(registers, (ROWS, nibbles.COLUMNS), jnp.int8)
