"""Soft reconstruction in one pass, for Hopper: W_hat_p = sum_n r[n, p] C[a[n, p]] for each sub-vector p.

The codebook lies in shared memory; a lane reads the candidates and ratios of its sub-vector, loads their codewords and
writes the sum. No array of shape (n, O, I) is made. The time of the pass is that of its reads and writes.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import compat, subvectors
from pallas_kernels.mosaic.direct_store import direct_store
from pallas_kernels.mosaic.subvectors import TILE

_TILES_OF_A_PROGRAM = 8
"""A program reads the codebook (4 KB for K = 256, d = 4) once; its tiles read and write at least 36 KB."""


def soft_decode(
    codebook: Float[Array, "*stack G K d"],
    candidates: Int[Array, "*stack n O S"],
    ratios: Float[Array, "*stack n O S"],
    *,
    dtype: Any = jnp.float32,
    interpret: Any = None,
) -> Float[Array, "*stack O I"]:
    """`pallas_kernels.soft_decode`, summed in float32 and written as `dtype` (float32 or bfloat16).

    One launch for all layers of the stack (do not `vmap` it). Candidates may be uint8 or int32; K <= 256, d in {2, 4, 8},
    n <= 4. A group whose sub-vectors are no multiple of 512 is padded, which costs a copy. `interpret`: parameters of
    Pallas' GPU interpreter.
    """
    subvectors.check(codebook.shape, candidates.shape)
    *stack, groups, codewords, length = codebook.shape
    n, rows, row_length = candidates.shape[-3:]
    layers, count = math.prod(stack), rows // groups * row_length
    of_group = lambda a: subvectors.pad_axis(a.reshape(layers, n, groups, count), 3, TILE)
    table = codebook.astype(jnp.float32).reshape(layers, groups, codewords, length)
    vectors = _launch(
        subvectors.pad_axis(table, 2, 64), of_group(candidates), of_group(ratios), dtype=dtype, interpret=interpret
    )
    return vectors[:, :, :count].reshape(*stack, rows, row_length * length)


def _launch(
    codebook: Float[Array, "L G K d"],
    candidates: Int[Array, "L n G P"],
    ratios: Float[Array, "L n G P"],
    *,
    dtype: Any,
    interpret: Any,
) -> Float[Array, "L G P d"]:
    layers, groups, codewords, length = codebook.shape
    n, count = candidates.shape[1], candidates.shape[3]
    interpreted = interpret is not None
    tiles = count // TILE
    of_vectors = subvectors.layout(length)
    of_numbers = of_vectors.reduce(1)
    gather = subvectors.make_gather(length, interpreted)

    def kernel(codebook_ref, candidates_ref, ratios_ref, out_ref, table):
        layer, group, part = (lax.axis_index(name) for name in ("layer", "group", "part"))
        whole = plgpu.Layout.WG_STRIDED((codewords * length,), vec_size=1)
        table[...] = compat.load(codebook_ref.at[layer, group], whole, interpreted)
        plgpu.commit_smem()

        def step(tile, carry):
            here = pl.ds(tile * TILE, TILE)
            per_candidate = lambda ref: [
                compat.load(ref.at[layer, i, group, here], of_numbers, interpreted) for i in range(n)
            ]
            codes, r = per_candidate(candidates_ref), per_candidate(ratios_ref)
            terms = [
                subvectors.spread(r[i], length, interpreted) * gather(table, codes[i].astype(jnp.int32))
                for i in range(n)
            ]
            vectors = sum(terms[1:], terms[0]).astype(dtype)
            direct_store(out_ref.at[layer, group, here], vectors, of_vectors, interpreted)
            return carry

        first = part * _TILES_OF_A_PROGRAM
        lax.fori_loop(first, jnp.minimum(first + _TILES_OF_A_PROGRAM, tiles), step, None)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((layers, groups, count, length), dtype),
        grid=(layers, groups, pl.cdiv(tiles, _TILES_OF_A_PROGRAM)),
        grid_names=("layer", "group", "part"),
        scratch_types=[plgpu.SMEM((codewords * length,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(codebook.reshape(layers, groups, -1), candidates, ratios)
