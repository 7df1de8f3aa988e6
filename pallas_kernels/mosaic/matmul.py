"""The frame that all matrix products share: tiles of Y^T = W X^T through a warp-specialized pipeline.

One warpgroup asks the copy engine for the next stages of X and of the packed weights; the others multiply. W is the
first operand of `wgmma` (64 rows a warpgroup), which may lie in registers, so that decoded weights never touch memory;
X (tokens, columns) is the second, from shared memory, as it lies. docs/kernels.md has a drawing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels import epilogue as epilogue_lib
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.fragments import ROWS
from pallas_kernels.mosaic import compat, store
from pallas_kernels.mosaic.int_matmul import ByteSource, NibbleSource
from pallas_kernels.mosaic.vq_matmul import VQSource
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import ByteWeights, NibbleWeights, VQWeights, Weights, unpair_rows

_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(0)
_MEMORY_REGISTERS = 40
"""Left to the warpgroup that only asks for copies; the others share what it gives up."""


class Source(Protocol):
    """How a block reads the packed W of one layer of a stack."""

    weights: Weights
    promotes: bool
    """Whether `multiply` takes and gives float32 sums as arrays, and not the matrix unit's own accumulators."""

    def operands(self) -> Sequence[jax.Array]:
        """Arrays in global memory, all layers."""

    def streams(self, tile: Tile) -> Sequence[plgpu.BlockSpec]:
        """What a step of the main loop takes of each streamed operand (they come first), from this block's first row on."""

    def at_rows(self, refs: Sequence[Any], layer: Any, block: Any, first_step: Any, tile: Tile) -> Sequence[Any]:
        """The streamed operands from this block's first row on."""

    def table(self) -> Any | None:
        """Shared memory for what a block reads all the time, or None."""

    def table_slice(self, refs: Sequence[Any], layer: Any, block: Any, tile: Tile) -> Any:
        """What of the operands is copied there."""

    def multiply(self, acc: Any, x: Any, streamed: Sequence[Any], row_tile: Any, table: Any, interpret: bool) -> Any:
        """acc (64, tokens) += W tile @ x^T; returns the accumulator. Nothing waits for the matrix unit yet."""


def _source(weights: Weights) -> Source:
    return {VQWeights: VQSource, ByteWeights: ByteSource, NibbleWeights: NibbleSource}[type(weights)](weights)


def product(
    x: Shaped[Array, "M I"],
    weights: Weights,
    epilogue: Epilogue,
    layer: Int[Array, " 1"],
    tile: Tile,
    *,
    interpret: bool = False,
) -> Shaped[Array, "M O"]:
    """Y = epilogue(X W^T) of one layer of the stack. With tile.splits > 1 the epilogue is XLA's, after the sum of parts.

    O must be a multiple of tile.rows. Any M: the copy engine fills the last block with zeros and cuts it off. Any I that the
    weights were packed for, at the price of a copy of X where it is no multiple of 128 bytes.
    """
    tokens, columns = x.shape
    if columns != weights.columns or weights.steps % tile.splits or weights.rows % tile.rows:
        raise ValueError(f"X {x.shape}, W ({weights.rows}, {weights.columns}): {tile} does not divide them")
    missing = weights.steps * (128 // x.dtype.itemsize) - columns
    x = jnp.pad(x, ((0, 0), (0, missing))) if missing else x
    # The copy engine sees an array as tiles of eight rows, or as one that is smaller.
    whole = tile.tokens if interpret and not compat.INTERPRETER_CLIPS else min(tokens, 8)
    if tokens % whole:
        padding = ((0, -tokens % whole), (0, 0))
        x = jnp.pad(x, padding)
        if epilogue.residual is not None:
            epilogue = dataclasses.replace(epilogue, residual=jnp.pad(epilogue.residual, padding))
    if tile.splits > 1:
        acc = _launch(x, _source(weights), Epilogue(dtype=jnp.float32), layer, tile, interpret).sum(0)
        if weights.paired_rows:
            acc, epilogue = unpair_rows(acc[None])[0], epilogue_lib.unpaired(epilogue)
        return epilogue_lib.apply(acc[:, :tokens].T, epilogue, layer[0])
    return _launch(x, _source(weights), epilogue, layer, tile, interpret)[:tokens]


def _launch(x: Any, source: Source, e: Epilogue, layer: Any, tile: Tile, interpret: bool) -> jax.Array:
    tokens, columns = x.shape
    rows, step = source.weights.rows, 128 // x.dtype.itemsize
    steps = columns // (step * tile.splits)
    blocks = -(-tokens // tile.tokens)
    parts = tile.splits > 1
    if e.modulation is not None and e.tokens % tile.tokens:
        raise ValueError(f"{tile}: a block's tokens must lie in one image of {e.tokens}")
    acc_type = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    operands = {f"weights{i}": a for i, a in enumerate(source.operands())}
    streams = list(operands)[: len(source.streams(tile))]
    operands |= {"x": x, "layer": layer}
    if e.bias is not None:
        operands["bias"] = e.bias.reshape(-1)
    if e.row_scale is not None:
        operands["row_scale"] = e.row_scale.reshape(-1)
    if e.token_scale is not None:
        # Vectors are read without the copy engine, which alone knows where they end.
        padding = blocks * tile.tokens - e.token_scale.shape[0]
        operands["token_scale"] = jnp.pad(e.token_scale, (0, max(0, padding)))
    for name in ("modulation", "residual", "out_scale"):
        if getattr(e, name) is not None:
            operands[name] = getattr(e, name)

    tiles = tile.warpgroups * tile.row_tiles
    # Partial sums are written as they lie, rows of W first; a result is turned around on its way.
    tile_shape = (ROWS, tile.tokens) if parts else (tile.tokens, ROWS)
    small = jnp.dtype(e.dtype).itemsize == 1
    swizzle = () if small else store.transforms(e.dtype)
    scratch = {"result": plgpu.SMEM((tiles, *tile_shape), e.dtype, transforms=swizzle)}
    if source.table() is not None:
        scratch |= {"table": source.table(), "table_ready": plgpu.Barrier(num_arrivals=1)}
    if e.residual is not None:
        scratch["residual_ready"] = plgpu.Barrier(num_arrivals=tile.row_tiles, num_barriers=tile.warpgroups)

    def kernel(*refs: Any) -> None:
        ref = dict(zip([*operands, "out", *scratch], refs, strict=True))
        block, token_block = lax.axis_index("rows"), lax.axis_index("tokens")
        part, warpgroup = lax.axis_index("parts"), lax.axis_index("warpgroup")
        where = ref["layer"][0]
        first_token = token_block * tile.tokens
        own = [block * tile.rows + (warpgroup * tile.row_tiles + u) * ROWS for u in range(tile.row_tiles)]
        result = [ref["result"].at[warpgroup * tile.row_tiles + u] for u in range(tile.row_tiles)]

        def vector(name: str, u: int) -> jax.Array:
            return compat.load(ref[name].at[pl.ds(where * rows + own[u], ROWS)], _BY_ROW, interpret).astype(jnp.float32)

        def gate(u: int) -> jax.Array:
            start = where * e.gate_stride + e.gate_offset + own[u]
            at = ref["modulation"].at[first_token // e.tokens, pl.ds(start, ROWS)]
            return compat.load(at, _BY_ROW, interpret).astype(jnp.float32)

        by_row = lambda v: lax.broadcast_in_dim(v, (ROWS, tile.tokens), (0,))

        def finish(acc: jax.Array, u: int, before: dict[str, list[jax.Array]]) -> None:
            y = acc.astype(jnp.float32)
            if e.row_scale is not None:
                y = y * by_row(before["row_scale"][u])
            if e.token_scale is not None:
                scale = compat.load(ref["token_scale"].at[pl.ds(first_token, tile.tokens)], _BY_TOKEN, interpret)
                y = y * lax.broadcast_in_dim(scale, (ROWS, tile.tokens), (1,))
            if e.bias is not None:
                y = y + by_row(before["bias"][u])
            if e.gelu:
                y = jax.nn.gelu(y, approximate=True)
            if e.modulation is not None:
                y = y * by_row(before["gate"][u])
            if e.out_scale is not None:
                store.store_bytes(y * (1 / ref["out_scale"][where]), result[u], e.dtype, interpret)
            elif parts:
                result[u][...] = y
            else:
                store.store_transposed(y.astype(e.dtype), result[u], interpret, e.residual is not None)

        def target(u: int) -> Any:
            at_rows, at_tokens = pl.ds(own[u], ROWS), pl.ds(first_token, tile.tokens)
            return ref["out"].at[part, at_rows, at_tokens] if parts else ref["out"].at[at_tokens, at_rows]

        def compute(run_pipeline: Any) -> None:
            if "table" in scratch:

                @pl.when(warpgroup == 0)
                def _() -> None:
                    names = [ref[name] for name in operands if name.startswith("weights")]
                    own_table = source.table_slice(names, where, block, tile)
                    plgpu.copy_gmem_to_smem(own_table, ref["table"], ref["table_ready"])

            if e.residual is not None:
                for u in range(tile.row_tiles):
                    before_sum = ref["residual"].at[pl.ds(first_token, tile.tokens), pl.ds(own[u], ROWS)]
                    plgpu.copy_gmem_to_smem(before_sum, result[u], ref["residual_ready"].at[warpgroup])
            # Asked for before the main loop, so that nobody waits for them after it.
            before = {
                name: [vector(name, u) for u in range(tile.row_tiles)] for name in ("row_scale", "bias") if name in ref
            }
            if e.modulation is not None:
                before["gate"] = [gate(u) for u in range(tile.row_tiles)]
            if "table" in scratch:
                plgpu.barrier_wait(ref["table_ready"])

            def end(accs: Sequence[jax.Array]) -> None:
                if e.residual is not None:
                    plgpu.barrier_wait(ref["residual_ready"].at[warpgroup])
                for u, acc in enumerate(accs):
                    finish(acc, u, before)
                plgpu.commit_smem()
                for u in range(tile.row_tiles):
                    plgpu.copy_smem_to_gmem(result[u], target(u))
                plgpu.wait_smem_to_gmem(0)

            shape = (ROWS, tile.tokens)
            if interpret or source.promotes:
                zeros = jnp.zeros(shape, jnp.float32 if source.promotes else acc_type)
                zeros = zeros if interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                end(run_pipeline((zeros,) * tile.row_tiles))
                return

            @functools.partial(pl.run_scoped, accs=tuple(plgpu.ACC(shape, acc_type) for _ in range(tile.row_tiles)))
            def _(accs: Any) -> None:
                run_pipeline(accs)
                end([acc[...] for acc in accs])

        def body(_: Any, x_tile: Any, *streamed_and_accs: Any) -> Any:
            *streamed, accs = streamed_and_accs
            accs = tuple(
                source.multiply(acc, x_tile, streamed, warpgroup * tile.row_tiles + u, ref.get("table"), interpret)
                for u, acc in enumerate(accs)
            )
            if not interpret and not source.promotes:
                # Zero, not one behind: the operands lie in registers, which the next step writes.
                plgpu.wgmma_wait(0)
            return accs

        pipeline = plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            memory_registers=_MEMORY_REGISTERS,
            in_specs=[
                plgpu.BlockSpec(
                    (tile.tokens, step), lambda k: (0, k), transforms=store.transforms(x.dtype), memory_space=plgpu.SMEM
                ),
                *source.streams(tile),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=tile.warpgroups,
            max_concurrent_steps=min(tile.stages, steps),
            compute_context=compute,
        )
        x_rows = ref["x"].at[pl.ds(first_token, tile.tokens), pl.ds(part * steps * step, steps * step)]
        pipeline(x_rows, *source.at_rows([ref[name] for name in streams], where, block, part * steps, tile))

    out_shape = (tile.splits, rows, blocks * tile.tokens) if parts else (tokens, rows)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, e.dtype),
        grid=(rows // tile.rows, blocks, tile.splits),
        grid_names=("rows", "tokens", "parts"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        **({"interpret": compat.interpret_params()} if interpret else {}),
    )(*operands.values())
