"""Y = epilogue(X decode(C, A)^T): weights are decoded into the registers of the matrix unit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fragments import LINE
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.decode import make_decoder
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import VQWeights


@dataclasses.dataclass(frozen=True)
class VQSource:
    """How a block reads `VQWeights`: assignments as a stream, its codebook as a table."""

    weights: VQWeights
    promotes = False

    def operands(self) -> Sequence[jax.Array]:
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        return flat(self.weights.assignments), flat(self.weights.codebooks)

    def streams(self, tile: Tile) -> Sequence[plgpu.BlockSpec]:
        shape = (tile.warpgroups * tile.row_tiles, self.weights.order.lines, LINE)
        return (plgpu.BlockSpec(shape, lambda k: (0, k, 0), memory_space=plgpu.SMEM),)

    def at_rows(self, refs: Sequence[Any], layer: Any, block: Any, first_step: Any, tile: Tile) -> Sequence[Any]:
        tiles = tile.warpgroups * tile.row_tiles
        first = layer * self.weights.assignments.shape[1] + block * tiles
        steps = self.weights.steps // tile.splits
        lines = pl.ds(first_step * self.weights.order.lines, steps * self.weights.order.lines)
        return (refs[0].at[pl.ds(first, tiles), lines],)

    def table(self) -> Any:
        return plgpu.SMEM(self.weights.codebooks.shape[-2:], jnp.int32)

    def table_slice(self, refs: Sequence[Any], layer: Any, block: Any, tile: Tile) -> Any:
        groups = self.weights.groups
        return refs[1].at[layer * groups + block // (self.weights.rows // groups // tile.rows)]

    def multiply(self, acc: Any, x: Any, streamed: Sequence[Any], row_tile: Any, table: Any, interpret: bool) -> Any:
        decoder = make_decoder(self.weights.order, self.weights.dtype, self.weights.replicas, interpret)
        w = decoder(streamed[0].at[row_tile], table)
        if interpret:
            contract = (((1,), (1,)), ((), ()))
            return acc + lax.dot_general(w, x[...], contract, preferred_element_type=acc.dtype)
        plgpu.wgmma(acc, w, compat.transpose(x))
        return acc
