"""Gradient of soft VQ weights with respect to codebook and ratios in plain jnp: the definition, and a form without scatters.

    W_hat_p = sum_n r[n, p] C[a[n, p]]      G = dL/dW_hat      p: a sub-vector
    dr[n, p] = <C[a[n, p]], G_p>            dC[k] = sum_{n, p: a[n, p] = k} r[n, p] G_p

Letters as in `reference.py`. The forward is `pallas_kernels.soft_decode`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_TILE = 16384
"""Sub-vectors of one product with a one-hot matrix, which then takes K * 64 KB: 16 MB for K = 256."""


def codebook_grad(
    gradient: Float[Array, "O I"],
    candidates: Int[Array, "n O S"],
    ratios: Float[Array, "n O S"],
    codebook: Float[Array, "G K d"],
) -> tuple[Float[Array, "G K d"], Float[Array, "n O S"]]:
    """dC by a segment sum and dr, both float32. For CPUs, where additions to one address do not wait for each other."""
    groups, codewords, length = codebook.shape
    vectors = gradient.astype(jnp.float32).reshape(-1, length)
    codes = _flat_codes(candidates, groups, codewords)
    weighted = ratios.reshape(len(codes), -1, 1) * vectors[None]
    sums = jax.ops.segment_sum(weighted.reshape(-1, length), codes.reshape(-1), groups * codewords)
    return sums.reshape(codebook.shape), _ratios_grad(vectors, codes, codebook).reshape(ratios.shape)


def codebook_grad_by_products(
    gradient: Float[Array, "O I"],
    candidates: Int[Array, "n O S"],
    ratios: Float[Array, "n O S"],
    codebook: Float[Array, "G K d"],
) -> tuple[Float[Array, "G K d"], Float[Array, "n O S"]]:
    """The same, dC as sum_tiles (r one_hot(a))^T G: K times the arithmetic and no scatter. On a GPU the
    atomic additions of hundreds of millions of sub-vectors to a few hundred addresses would wait for each other."""
    groups, codewords, length = codebook.shape
    n = len(candidates)
    vectors = gradient.astype(jnp.float32).reshape(-1, length)
    count = len(vectors) // groups
    tile = min(_TILE, count)
    missing = -count % tile

    def tiles(a: jax.Array) -> jax.Array:
        """(..., P, features) to (tiles of all groups, ..., tile, features); the last tile is filled up with zeros."""
        a = a.reshape(*a.shape[:-2], groups, count, a.shape[-1])
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)])
        a = a.reshape(*a.shape[:-3], -1, tile, a.shape[-1])
        return jnp.moveaxis(a, -3, 0)

    def product(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        vectors, codes, r = operands
        weights = sum(jnp.where(codes[i] == jnp.arange(codewords, dtype=jnp.int32)[None], r[i], 0.0) for i in range(n))
        return lax.dot_general(weights, vectors, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    per_number = lambda a: a.reshape(n, -1, 1)
    sums = lax.map(
        product, (tiles(vectors), tiles(per_number(candidates.astype(jnp.int32))), tiles(per_number(ratios)))
    )
    sums = sums.reshape(groups, -1, codewords, length).sum(1)
    return sums, _ratios_grad(vectors, _flat_codes(candidates, groups, codewords), codebook).reshape(ratios.shape)


def _flat_codes(candidates: Int[Array, "n O S"], groups: int, codewords: int) -> Int[Array, "n P"]:
    """Rows of the codebooks of all groups, one below the other."""
    n, rows, _ = candidates.shape
    first = (jnp.arange(rows, dtype=jnp.int32) // (rows // groups) * codewords)[None, :, None]
    return (candidates.astype(jnp.int32) + first).reshape(n, -1)


def _ratios_grad(
    vectors: Float[Array, "P d"], codes: Int[Array, "n P"], codebook: Float[Array, "G K d"]
) -> Float[Array, "n P"]:
    flat = codebook.reshape(-1, codebook.shape[-1])
    return jnp.einsum("npd,pd->np", jnp.take(flat, codes, axis=0, mode="clip"), vectors)
