"""The definition of every kernel in plain jnp. CPU, TPU and older GPUs run it, and tests compare the kernels with it.

Letters: K codewords, d sub-vector length, O output and I input features, S = I/d sub-vectors in a row,
G groups of O/G consecutive rows that share one codebook.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def code_bits(num_codewords: int) -> int:
    """Bits of one packed assignment, ceil(log2 K), at least 1. K up to 65536."""
    if not 1 <= num_codewords <= 65536:
        raise ValueError(f"num_codewords={num_codewords}: wanted 1 to 65536")
    return max(1, math.ceil(math.log2(num_codewords)))


def unpack_codes(packed: UInt8[Array, "*rows bytes"], bits: int, length: int) -> Int[Array, "*rows {length}"]:
    """Reads `length` codes of `bits` bits from each row, little-endian: code j lies in bits [j*bits, (j+1)*bits).

    `lcm(bits, 8)` bits hold a whole number of codes, so each code of such a unit is a fixed shift and mask of at
    most three bytes: no gather, and a unit at a time for a kernel.
    """
    unit_bits = math.lcm(bits, 8)
    codes_per_unit, bytes_per_unit = unit_bits // bits, unit_bits // 8
    if bits == 8:
        return packed[..., :length].astype(jnp.int32)
    units = packed.reshape(*packed.shape[:-1], -1, bytes_per_unit).astype(jnp.int32)
    columns = []
    for j in range(codes_per_unit):
        first, shift = divmod(j * bits, 8)
        last = (j * bits + bits - 1) // 8
        word = units[..., first]
        for k in range(first + 1, last + 1):
            word = word | (units[..., k] << (8 * (k - first)))
        columns.append((word >> shift) & ((1 << bits) - 1))
    return jnp.stack(columns, axis=-1).reshape(*packed.shape[:-1], -1)[..., :length]


def decode(codebook: Float[Array, "G K d"], codes: Int[Array, "O S"]) -> Float[Array, "O I"]:
    """W_hat = C[A]: row o reads codebook o // (O/G). VQ4DiT, section 3.1."""
    groups, num_codewords, length = codebook.shape
    rows, _ = codes.shape
    row_offset = (jnp.arange(rows, dtype=jnp.int32) // (rows // groups) * num_codewords)[:, None]
    flat = codebook.reshape(groups * num_codewords, length)
    return jnp.take(flat, codes + row_offset, axis=0, mode="clip").reshape(rows, -1)


def vq_matmul(
    x: Float[Array, "*batch I"], codebook: Float[Array, "G K d"], packed: UInt8[Array, "O bytes"]
) -> Float[Array, "*batch O"]:
    """Y = X @ decode(C, A)^T in the dtype of `x`."""
    _, num_codewords, length = codebook.shape
    codes = unpack_codes(packed, code_bits(num_codewords), x.shape[-1] // length)
    weight = decode(codebook.astype(x.dtype), codes)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def soft_decode(
    codebook: Float[Array, "G K d"], candidates: Int[Array, "n O S"], ratios: Float[Array, "n O S"]
) -> Float[Array, "O I"]:
    """W_hat = sum_n r_n C[a_n]. VQ4DiT, eq 7."""
    n, rows, _ = candidates.shape
    vectors = jax.vmap(lambda codes: decode(codebook, codes))(candidates).reshape(n, -1, codebook.shape[-1])
    # A contraction, not a sum of products: on CPU four times faster, forward and backward.
    return jnp.einsum("np,npd->pd", ratios.reshape(n, -1), vectors).reshape(rows, -1)
