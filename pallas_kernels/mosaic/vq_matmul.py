"""Y = epilogue(X decode(C, A)^T): weights are decoded into the registers of the matrix unit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.fragments import LINE, ROWS, FragmentOrder
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.decode import make_decoder
from pallas_kernels.tiles import Tile


@dataclasses.dataclass(frozen=True)
class VQWeights:
    """Assignments in fragment order and codebooks of G groups of rows, for L layers.

    Invariants: `assignments` (L, O/64, I/order.columns * order.lines, 32) int32; `codebooks` (L, G, lines, words) int32 of
    `fragments.codebook_words`; blocks of rows do not straddle groups.
    """

    assignments: Int32[Array, "L tiles lines 32"]
    codebooks: Int32[Array, "L G lines words"]
    order: FragmentOrder
    dtype: Any
    columns: int
    promotes = False

    @property
    def rows(self) -> int:
        return self.assignments.shape[1] * ROWS

    @property
    def replicas(self) -> int:
        size = self.codebooks.shape[-1] * self.codebooks.shape[-2]
        return size // (2**self.order.bits * self.order.codebook_words)

    def operands(self) -> Sequence[jax.Array]:
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        return flat(self.assignments), flat(self.codebooks)

    def streams(self, tile: Tile) -> Sequence[plgpu.BlockSpec]:
        shape = (tile.warpgroups * tile.row_tiles, self.order.lines, LINE)
        return (plgpu.BlockSpec(shape, lambda k: (0, k, 0), memory_space=plgpu.SMEM),)

    def at_rows(self, refs: Sequence[Any], layer: Any, block: Any, first_step: Any, tile: Tile) -> Sequence[Any]:
        tiles = tile.warpgroups * tile.row_tiles
        first = layer * self.assignments.shape[1] + block * tiles
        steps = self.columns // self.order.columns // tile.splits
        lines = pl.ds(first_step * self.order.lines, steps * self.order.lines)
        return (refs[0].at[pl.ds(first, tiles), lines],)

    def table(self) -> Any:
        return plgpu.SMEM(self.codebooks.shape[-2:], jnp.int32)

    def table_slice(self, refs: Sequence[Any], layer: Any, block: Any, tile: Tile) -> Any:
        groups = self.codebooks.shape[1]
        return refs[1].at[layer * groups + block // (self.rows // groups // tile.rows)]

    def multiply(self, acc: Any, x: Any, streamed: Sequence[Any], row_tile: Any, table: Any, interpret: bool) -> Any:
        decoder = make_decoder(self.order, self.dtype, self.replicas, interpret)
        w = decoder(streamed[0].at[row_tile], table)
        if interpret:
            contract = (((1,), (1,)), ((), ()))
            return acc + lax.dot_general(w, x[...], contract, preferred_element_type=acc.dtype)
        plgpu.wgmma(acc, w, compat.transpose(x))
        return acc
