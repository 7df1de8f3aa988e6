"""Gradient of soft VQ weights with respect to codebook and ratios, for Hopper.

    W_hat_p = sum_n r[n, p] C[a[n, p]]      G = dL/dW_hat      p: a sub-vector
    dr[n, p] = <C[a[n, p]], G_p>            dC[k] = sum_{n, p: a[n, p] = k} r[n, p] G_p

The sum for dC scatters hundreds of millions of sub-vectors over at most 256 codewords. As atomic additions nearly all
of them collide; as a product with one-hot matrices it costs K multiplications for each useful one, and two instructions
for each element of a matrix that is almost all zeros. Here every lane of every warp adds into a column of shared memory
that is its own at that moment, so that nothing collides, nothing is atomic, and the result is the same in every run:

  * A warp has sums of shape (K, 32) in float32: word (k, l) lies in bank l, whatever the code k. The 32 words are 32/d
    copies of the d components.
  * A lane holds a whole sub-vector. In step s of d, lane l adds component (l mod d) xor s into word (k, l xor s). The d
    lanes that share a copy have different components in each step; over the d steps each adds all of its own.
  * The n codes of a sub-vector are added in one go: n loads, then n stores. Where two of them are equal the later takes
    over the earlier's sum.

Each program sums a part of a group of rows and writes its (K, 32) sums. XLA adds the parts and the copies.
All sums are float32: for K = 256, d = 4, n = 2 a sub-vector takes 8 steps of a load, an FMA and a store, and the
time of these steps is hidden behind the reads of G, candidates and ratios.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import compat, subvectors
from pallas_kernels.mosaic.direct_store import direct_store
from pallas_kernels.mosaic.mlir import byte_address, constant, element
from pallas_kernels.mosaic.subvectors import STREAMING_MULTIPROCESSORS, TILE

_WARPS = 4
_LANES = 32
_SHARED_BYTES = 200 * 1024  # of a multiprocessor, for sums; everything else of a program is in the rest of the 227 KB
_TILES_OF_A_PROGRAM = 64
"""Enough work (32,768 sub-vectors) that clearing and writing the sums is a few per cent of it."""


def codebook_grad(
    gradient: Float[Array, "*stack O I"],
    candidates: Int[Array, "*stack n O S"],
    ratios: Float[Array, "*stack n O S"],
    codebook: Float[Array, "*stack G K d"],
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "*stack G K d"], Float[Array, "*stack n O S"]]:
    """dC and dr of L = f(W_hat), both float32, from dL/dW_hat in float32 or bfloat16, as defined by
    `pallas_kernels.reference_soft.codebook_grad`.

    One launch for all layers of the stack (do not `vmap` it), and two small ones of XLA for the sum over parts. Candidates
    may be uint8 or int32; K <= 256, d in {2, 4, 8}, n <= 4. A group whose sub-vectors are no multiple of 512 is padded, which
    costs a copy. `interpret`: parameters of Pallas' GPU interpreter.
    """
    subvectors.check(codebook.shape, candidates.shape)
    *stack, groups, codewords, length = codebook.shape
    n, rows, row_length = candidates.shape[-3:]
    layers, count = math.prod(stack), rows // groups * row_length
    of_group = lambda a: subvectors.pad_axis(a.reshape(layers, n, groups, count), 3, TILE)
    operands = (
        subvectors.pad_axis(gradient.reshape(layers, groups, count, length), 2, TILE),
        of_group(candidates),
        of_group(ratios),
        subvectors.pad_axis(codebook.astype(jnp.float32).reshape(layers, groups, codewords, length), 2, 64),
    )
    parts, dr = _launch(*operands, interpret=interpret)
    copies = parts.reshape(layers, groups, -1, parts.shape[-2], _LANES // length, length)
    return (
        copies[:, :, :, :codewords].sum((2, 4)).reshape(codebook.shape),
        dr[..., :count].reshape(ratios.shape),
    )


def _launch(
    gradient: Float[Array, "L G P d"],
    candidates: Int[Array, "L n G P"],
    ratios: Float[Array, "L n G P"],
    codebook: Float[Array, "L G K d"],
    *,
    interpret: Any,
) -> tuple[Float[Array, "L G parts K 32"], Float[Array, "L n G P"]]:
    layers, groups, count, length = gradient.shape
    n, codewords, interpreted = candidates.shape[1], codebook.shape[2], interpret is not None
    tiles = count // TILE
    steps = _tiles_of_a_program(tiles, layers * groups, codewords)
    parts = pl.cdiv(tiles, steps)
    of_vectors = subvectors.layout(length)
    of_numbers = of_vectors.reduce(1)
    gather = subvectors.make_gather(length, interpreted)
    accumulate = _make_accumulate(length, n, codewords, interpreted)

    def kernel(gradient_ref, candidates_ref, ratios_ref, codebook_ref, parts_ref, dr_ref, sums, table):
        layer, group, part = (lax.axis_index(name) for name in ("layer", "group", "part"))
        whole = plgpu.Layout.WG_STRIDED((codewords * length,), vec_size=1)
        table[...] = compat.load(codebook_ref.at[layer, group], whole, interpreted)
        sums[...] = jnp.zeros((_WARPS, codewords, _LANES), jnp.float32)
        plgpu.commit_smem()

        def load(tile):
            here = pl.ds(jnp.minimum(tile, tiles - 1) * TILE, TILE)
            per_candidate = lambda ref: [
                compat.load(ref.at[layer, i, group, here], of_numbers, interpreted) for i in range(n)
            ]
            vectors = compat.load(gradient_ref.at[layer, group, here], of_vectors, interpreted)
            return vectors, per_candidate(candidates_ref), per_candidate(ratios_ref)

        def step(tile, loaded):
            # The loads of the next tile are in flight while this one is summed.
            following = load(tile + 1)
            vectors, codes, r = loaded
            vectors, codes = vectors.astype(jnp.float32), [code.astype(jnp.int32) for code in codes]
            here = pl.ds(tile * TILE, TILE)
            for i in range(n):
                dr = jnp.sum(gather(table, codes[i]) * vectors, axis=1)
                direct_store(dr_ref.at[layer, i, group, here], dr, of_numbers, interpreted)
            accumulate(sums, vectors, codes, r)
            return following

        first = part * steps
        lax.fori_loop(first, jnp.minimum(first + steps, tiles), step, load(first))
        plgpu.commit_smem()
        parts_ref[layer, group, part] = sum((sums[warp] for warp in range(1, _WARPS)), sums[0])

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((layers, groups, parts, codewords, _LANES), jnp.float32),
            jax.ShapeDtypeStruct(ratios.shape, jnp.float32),
        ),
        grid=(layers, groups, parts),
        grid_names=("layer", "group", "part"),
        scratch_types=[
            plgpu.SMEM((_WARPS, codewords, _LANES), jnp.float32),
            plgpu.SMEM((codewords * length,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(gradient, candidates, ratios, codebook.reshape(layers, groups, -1))


def _tiles_of_a_program(tiles: int, matrices: int, codewords: int) -> int:
    """Whole waves of programs over the device, of about _TILES_OF_A_PROGRAM tiles each where there are so many."""
    together = STREAMING_MULTIPROCESSORS * max(1, _SHARED_BYTES // (4 * _WARPS * _LANES * codewords))
    waves = max(1, round(tiles * matrices / (together * _TILES_OF_A_PROGRAM)))
    return max(1, min(tiles, math.ceil(tiles * matrices / (together * waves))))


def _make_accumulate(length: int, n: int, codewords: int, interpret: bool) -> Any:
    """`accumulate(sums (4, K, 32), vectors (TILE, d), n times codes, n times ratios)`: sums[code] += r * vector."""
    if interpret:
        return _accumulate_interpreted
    of_vectors = subvectors.layout(length)
    of_numbers = [of_vectors.reduce(1)] * n

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), of_vectors, of_numbers, of_numbers))
    def accumulate(_: Any, sums: Any, vectors: Any, codes: Any, ratios: Any) -> None:
        base = mgpu.utils.memref_ptr(sums)
        thread = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
        lane, warp = arith.andi(thread, constant(_LANES - 1)), arith.shrui(thread, constant(5))
        own_column = arith.addi(arith.muli(warp, constant(4 * _LANES * codewords)), arith.shli(lane, constant(2)))
        lane_bits = [
            arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, constant(1 << bit)), constant(0))
            for bit in range(int(math.log2(length)))
        ]
        for i, vector in enumerate(vectors.registers.flat):
            of_candidates = lambda arrays: [element(array.registers.flat[i], 0) for array in arrays]
            components = _by_step([element(vector, j) for j in range(length)], lane_bits)
            _add(base, own_column, components, of_candidates(codes), of_candidates(ratios))

    return accumulate


def _by_step(components: list[Any], lane_bits: list[Any]) -> list[Any]:
    """Number s of the result is component (lane xor s): exchanges pairs, then pairs of pairs, where the lane's bit says so."""
    for bit, is_set in enumerate(lane_bits):
        components = [arith.select(is_set, components[s ^ (1 << bit)], components[s]) for s in range(len(components))]
    return components


def _add(base: Any, own_column: Any, components: list[Any], codes: list[Any], ratios: list[Any]) -> None:
    """Adds this lane's sub-vector, times its ratios, to the sums of its codes."""
    contract = arith.FastMathFlags.contract
    rows = [arith.addi(arith.shli(code, constant(7)), own_column) for code in codes]
    same = {
        (earlier, later): arith.cmpi(arith.CmpIPredicate.eq, codes[earlier], codes[later])
        for later in range(len(codes))
        for earlier in range(later)
    }
    for step, component in enumerate(components):
        words = [byte_address(base, arith.xori(row, constant(4 * step))) for row in rows]
        values = [llvm.load(ir.F32Type.get(), word) for word in words]
        for later, ratio in enumerate(ratios):
            for earlier in range(later):
                values[later] = arith.select(same[earlier, later], values[earlier], values[later])
            product = arith.mulf(ratio, component, fastmath=contract)
            values[later] = arith.addf(values[later], product, fastmath=contract)
        for value, word in zip(values, words, strict=True):
            llvm.store(value, word)
        # In the next step another lane of this warp adds to the same word.
        mgpu.utils.warp_barrier()


def _accumulate_interpreted(sums: Any, vectors: jax.Array, codes: list[jax.Array], ratios: list[jax.Array]) -> None:
    """The same sums, all of them in the first copy of the first warp."""
    length = vectors.shape[1]
    for code, ratio in zip(codes, ratios, strict=True):
        one_hot = jax.nn.one_hot(code, sums.shape[1], axis=0, dtype=jnp.float32)
        sums[0, :, :length] += one_hot @ (ratio[:, None] * vectors)
