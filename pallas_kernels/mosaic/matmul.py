"""The kernel that all matrix products share: tiles of Y^T = W X^T in a warp-specialized pipeline.

One warpgroup requests the copies of the next stages of X and of the packed weights; the others multiply. W is the
first operand of `wgmma` (64 rows a warpgroup), which may lie in registers, so that decoded weights never touch memory;
X (tokens, columns) is the second, from shared memory, in its own layout. docs/kernels.md has a drawing.
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
from pallas_kernels.epilogue import ROW_VECTORS, Epilogue
from pallas_kernels.fragments import ROWS
from pallas_kernels.mosaic import compat, store
from pallas_kernels.mosaic.int_matmul import ByteSource, NibbleSource
from pallas_kernels.mosaic.vq_matmul import VQSource
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import ByteWeights, NibbleWeights, VQWeights, Weights, unpair_rows

_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(0)
_MEMORY_REGISTERS = 40
"""Registers of a thread in the warpgroup that only requests copies; the others share the rest."""


class Source(Protocol):
    """How a block reads the packed W of one layer of a stack."""

    weights: Weights
    promotes: bool
    """Whether `multiply` takes and returns float32 sums as arrays, in place of the matrix unit's accumulators."""

    def operands(self) -> Sequence[jax.Array]:
        """Arrays in global memory, all layers."""

    def streams(self, tile: Tile) -> Sequence[plgpu.BlockSpec]:
        """Block shapes of the streamed operands (they come first) for a step of the main loop, from this block's first row on."""

    def at_rows(self, refs: Sequence[Any], layer: Any, block: Any, first_step: Any, tile: Tile) -> Sequence[Any]:
        """The streamed operands from this block's first row on."""

    def table(self) -> Any | None:
        """Shared memory for the table that a block reads in every step, or None."""

    def table_slice(self, refs: Sequence[Any], layer: Any, block: Any, tile: Tile) -> Any:
        """The part of the operands that is copied there."""

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

    O must be a multiple of tile.rows. M is any number: the copy engine fills the last block with zeros and stores only its
    valid part. I is any number that the weights were packed for; X is copied where its rows are no multiple of 128 bytes.
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


@dataclasses.dataclass(frozen=True)
class _Block:
    """A consumer warpgroup of one block inside the kernel: its part of Y, and its operands.

    `refs` are the operands, `out` and the scratch by name. `u` counts the warpgroup's own tiles of 64 rows.
    """

    refs: dict[str, Any]
    source: Source
    e: Epilogue
    tile: Tile
    interpret: bool
    layer: Any
    number: Any
    first_token: Any
    part: Any
    warpgroup: Any

    @property
    def tokens(self) -> Any:
        return pl.ds(self.first_token, self.tile.tokens)

    def row_tile(self, u: int) -> Any:
        return self.warpgroup * self.tile.row_tiles + u

    def first_row(self, u: int) -> Any:
        return self.number * self.tile.rows + self.row_tile(u) * ROWS

    def result(self, u: int) -> Any:
        return self.refs["result"].at[self.row_tile(u)]

    def fetch(self) -> None:
        """Starts the copies of the codebook and of the residual; the residual goes where the result will be."""
        if "table" in self.refs:

            @pl.when(self.warpgroup == 0)
            def _() -> None:
                weights = [ref for name, ref in self.refs.items() if name.startswith("weights")]
                table = self.source.table_slice(weights, self.layer, self.number, self.tile)
                plgpu.copy_gmem_to_smem(table, self.refs["table"], self.refs["table_ready"])

        if self.e.residual is not None:
            for u in range(self.tile.row_tiles):
                residual = self.refs["residual"].at[self.tokens, pl.ds(self.first_row(u), ROWS)]
                plgpu.copy_gmem_to_smem(residual, self.result(u), self.refs["residual_ready"].at[self.warpgroup])

    def row_vectors(self, u: int) -> dict[str, jax.Array]:
        """Row scales, bias, what follows GELU, and gates (64,) float32."""
        first, e = self.first_row(u), self.e
        start = self.layer * self.source.weights.rows + first
        slices = {name: self.refs[name].at[pl.ds(start, ROWS)] for name in ROW_VECTORS if name in self.refs}
        if e.modulation is not None:
            start = self.layer * e.gate_stride + e.gate_offset + first
            slices["gate"] = self.refs["modulation"].at[self.first_token // e.tokens, pl.ds(start, ROWS)]
        return {name: compat.load(s, _BY_ROW, self.interpret).astype(jnp.float32) for name, s in slices.items()}

    def finish(self, acc: jax.Array, u: int, vectors: dict[str, jax.Array]) -> None:
        """The epilogue of a tile of Y^T (64, tokens), into shared memory."""
        e, shape = self.e, acc.shape
        by_row = lambda v: lax.broadcast_in_dim(v, shape, (0,))
        y = acc.astype(jnp.float32)
        if e.row_scale is not None:
            y = y * by_row(vectors["row_scale"])
        if e.token_scale is not None:
            scale = compat.load(self.refs["token_scale"].at[self.tokens], _BY_TOKEN, self.interpret)
            y = y * lax.broadcast_in_dim(scale, shape, (1,))
        if e.bias is not None:
            y = y + by_row(vectors["bias"])
        if e.gelu:
            y = jax.nn.gelu(y, approximate=True)
        if e.after_scale is not None:
            y = y * by_row(vectors["after_scale"])
        if e.after_shift is not None:
            y = y + by_row(vectors["after_shift"])
        if e.modulation is not None:
            y = y * by_row(vectors["gate"])
        if e.out_scale is not None:
            store.store_bytes(y * (1 / self.refs["out_scale"][self.layer]), self.result(u), e.dtype, self.interpret)
        elif self.tile.splits > 1:
            self.result(u)[...] = y
        else:
            store.store_transposed(y.astype(e.dtype), self.result(u), self.interpret, e.residual is not None)

    def write(self) -> None:
        """Copies the results of `finish` from shared memory to global memory."""
        plgpu.commit_smem()
        for u in range(self.tile.row_tiles):
            rows = pl.ds(self.first_row(u), ROWS)
            out = self.refs["out"]
            target = out.at[self.part, rows, self.tokens] if self.tile.splits > 1 else out.at[self.tokens, rows]
            plgpu.copy_smem_to_gmem(self.result(u), target)
        plgpu.wait_smem_to_gmem(0)

    def compute(self, run_pipeline: Any) -> None:
        """The whole work of a consumer; `run_pipeline` runs the main loop, from accumulators to accumulators."""
        own = range(self.tile.row_tiles)
        self.fetch()
        # These copies start before the main loop, so that they are complete after it.
        vectors = [self.row_vectors(u) for u in own]
        if "table" in self.refs:
            plgpu.barrier_wait(self.refs["table_ready"])

        def end(accs: Sequence[jax.Array]) -> None:
            if self.e.residual is not None:
                plgpu.barrier_wait(self.refs["residual_ready"].at[self.warpgroup])
            for u in own:
                self.finish(accs[u], u, vectors[u])
            self.write()

        shape = (ROWS, self.tile.tokens)
        acc_type = jnp.int32 if self.source.weights.dtype == jnp.int8 else jnp.float32
        if self.interpret or self.source.promotes:
            zeros = jnp.zeros(shape, jnp.float32 if self.source.promotes else acc_type)
            zeros = zeros if self.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            end(run_pipeline((zeros,) * self.tile.row_tiles))
            return

        @functools.partial(pl.run_scoped, accs=tuple(plgpu.ACC(shape, acc_type) for _ in own))
        def _(accs: Any) -> None:
            run_pipeline(accs)
            end([acc[...] for acc in accs])

    def step(self, _: Any, x: Any, *streamed_and_accs: Any) -> Any:
        """The main loop's body: one stage of X and of the packed weights."""
        *streamed, accs = streamed_and_accs
        table, multiply = self.refs.get("table"), self.source.multiply
        accs = tuple(multiply(acc, x, streamed, self.row_tile(u), table, self.interpret) for u, acc in enumerate(accs))
        if not self.interpret and not self.source.promotes:
            # No product may be outstanding: the operands lie in registers, which the next step overwrites.
            plgpu.wgmma_wait(0)
        return accs


def _operands(x: Any, source: Source, e: Epilogue, layer: Any, padded_tokens: int) -> dict[str, jax.Array]:
    """The kernel's operands by name, those of the weights first."""
    out = {f"weights{i}": a for i, a in enumerate(source.operands())} | {"x": x, "layer": layer}
    out |= {name: getattr(e, name).reshape(-1) for name in ROW_VECTORS if getattr(e, name) is not None}
    if e.token_scale is not None:
        # Vectors are read without the copy engine, so their ends are not checked: they are padded.
        missing = max(0, padded_tokens - e.token_scale.shape[0])
        out["token_scale"] = jnp.pad(e.token_scale, (0, missing)) if missing else e.token_scale
    others = ("modulation", "residual", "out_scale")
    return out | {name: getattr(e, name) for name in others if getattr(e, name) is not None}


def _scratch(source: Source, e: Epilogue, tile: Tile) -> dict[str, Any]:
    """Shared memory and barriers of a block, by name."""
    # Partial sums are written untransposed, rows of W first; results are transposed on the way.
    shape = (ROWS, tile.tokens) if tile.splits > 1 else (tile.tokens, ROWS)
    swizzle = () if jnp.dtype(e.dtype).itemsize == 1 else store.transforms(e.dtype)
    out = {"result": plgpu.SMEM((tile.warpgroups * tile.row_tiles, *shape), e.dtype, transforms=swizzle)}
    if source.table() is not None:
        out |= {"table": source.table(), "table_ready": plgpu.Barrier(num_arrivals=1)}
    if e.residual is not None:
        out["residual_ready"] = plgpu.Barrier(num_arrivals=tile.row_tiles, num_barriers=tile.warpgroups)
    return out


def _launch(x: Any, source: Source, e: Epilogue, layer: Any, tile: Tile, interpret: bool) -> jax.Array:
    """Y (M, O), or with tile.splits > 1 partial sums of Y^T (splits, O, M filled up to whole blocks) in float32."""
    tokens, columns = x.shape
    rows, step = source.weights.rows, 128 // x.dtype.itemsize
    steps, blocks = columns // (step * tile.splits), -(-tokens // tile.tokens)
    if e.modulation is not None and e.tokens % tile.tokens:
        raise ValueError(f"{tile}: a block's tokens must lie in one image of {e.tokens}")
    operands, scratch = _operands(x, source, e, layer, blocks * tile.tokens), _scratch(source, e, tile)
    x_stage = plgpu.BlockSpec(
        (tile.tokens, step), lambda k: (0, k), transforms=store.transforms(x.dtype), memory_space=plgpu.SMEM
    )
    weight_stages = source.streams(tile)

    def product_kernel(*refs: Any) -> None:
        by_name = dict(zip([*operands, "out", *scratch], refs, strict=True))
        number, token_block, part = (lax.axis_index(name) for name in ("rows", "tokens", "parts"))
        where, warpgroup = by_name["layer"][0], lax.axis_index("warpgroup")
        first_token = token_block * tile.tokens
        block = _Block(by_name, source, e, tile, interpret, where, number, first_token, part, warpgroup)
        pipeline = plgpu.emit_pipeline_warp_specialized(
            block.step,
            grid=(steps,),
            memory_registers=_MEMORY_REGISTERS,
            in_specs=[x_stage, *weight_stages],
            wg_axis="warpgroup",
            num_compute_wgs=tile.warpgroups,
            max_concurrent_steps=min(tile.stages, steps),
            compute_context=block.compute,
        )
        streamed = [by_name[f"weights{i}"] for i in range(len(weight_stages))]
        own_x = by_name["x"].at[block.tokens, pl.ds(part * steps * step, steps * step)]
        pipeline(own_x, *source.at_rows(streamed, where, number, part * steps, tile))

    shape = (tile.splits, rows, blocks * tile.tokens) if tile.splits > 1 else (tokens, rows)
    return plgpu.kernel(
        product_kernel,
        out_type=jax.ShapeDtypeStruct(shape, e.dtype),
        grid=(rows // tile.rows, blocks, tile.splits),
        grid_names=("rows", "tokens", "parts"),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        **({"interpret": compat.interpret_params()} if interpret else {}),
    )(*operands.values())
