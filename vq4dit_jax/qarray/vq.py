"""`VQArray`: a weight matrix as a codebook and packed assignments, a leaf of the parameter tree."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels
from vq4dit_jax.codebook.packing import pack_codes, packed_bytes
from vq4dit_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQArray:
    """W_hat = C[A] for a Linear's weight W (O, I), cut along its inputs into sub-vectors of d (VQ4DiT, section 3.1).

    Invariants (`validate` checks them):
      * `codebook` is (*stack, G, K, d) floating; `assignments` is (*stack, O, bytes) uint8; `stack` is the same in
        both: empty for one matrix, (L,) for the stack of L blocks that `lax.scan` runs over.
      * G divides O. Row o reads codebook o // (O/G); q, k and v of a fused qkv are one leaf with G = 3.
      * d divides I; a row has S = I/d codes of ceil(log2 K) bits each, packed little-endian, rows padded with zero
        bits to whole units of lcm(bits, 8) bits: 8-bit codes are bytes, 6-bit codes lie four in three bytes.
      * every code is below K.
      * `shape` = (O, I) is static, so slicing the stack axis keeps it.
    """

    # Not typed further: tree transformations put shapes, shardings or numpy arrays in the arrays' place.
    codebook: Any
    assignments: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def num_groups(self) -> int:
        return self.codebook.shape[-3]

    @property
    def num_codewords(self) -> int:
        return self.codebook.shape[-2]

    @property
    def subvector_length(self) -> int:
        return self.codebook.shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.codebook.shape[:-3])

    @property
    def num_weights(self) -> int:
        """Weights that the leaf stands for, all layers of the stack."""
        return math.prod(self.stack) * math.prod(self.shape)

    def with_codebook(self, codebook: Float[Array, "*stack G K d"]) -> "VQArray":
        """The same assignments with other codewords."""
        return dataclasses.replace(self, codebook=codebook)

    def codes(self) -> jax.Array:
        """Assignments as int32 (*stack, O, S)."""
        bits = pallas_kernels.code_bits(self.num_codewords)
        return pallas_kernels.unpack_codes(jnp.asarray(self.assignments), bits, self.shape[1] // self.subvector_length)

    def decode(self) -> Float[Array, "*stack O I"]:
        """The dense weight, in the codebook's dtype."""
        fn = lambda codebook, codes: pallas_kernels.decode(codebook, codes)
        for _ in self.stack:
            fn = jax.vmap(fn)
        return fn(self.codebook, self.codes())

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """x @ W_hat^T of one matrix (no stack axes), from the packed form."""
        return pallas_kernels.vq_matmul(x, self.codebook, self.assignments)


def from_codes(codebook: jax.Array, codes: jax.Array | np.ndarray) -> VQArray:
    """Packs codes (*stack, O, S) with codebook (*stack, G, K, d)."""
    num_codewords, length = codebook.shape[-2:]
    packed = pack_codes(np.asarray(codes), pallas_kernels.code_bits(num_codewords))
    return VQArray(jnp.asarray(codebook), jnp.asarray(packed), (codes.shape[-2], codes.shape[-1] * length))


def validate(array: VQArray, name: str = "VQArray") -> None:
    """Checks the invariants on concrete arrays; raises InputError that names `name` and what does not hold."""
    codebook, packed, (rows, columns) = array.codebook, array.assignments, array.shape
    if (
        codebook.ndim < 3
        or not np.issubdtype(np.asarray(codebook[..., :0]).dtype, np.floating)
        and (str(codebook.dtype) != "bfloat16")
    ):
        raise InputError(f"{name}: codebook is {codebook.dtype}{codebook.shape}; wanted floating (*stack, G, K, d)")
    groups, num_codewords, length = codebook.shape[-3:]
    if columns % length or rows % groups:
        raise InputError(f"{name}: shape {array.shape} is not a multiple of G={groups} rows and d={length} columns")
    bits = pallas_kernels.code_bits(num_codewords)
    wanted = (*array.stack, rows, packed_bytes(columns // length, bits))
    if packed.shape != wanted or packed.dtype != np.uint8:
        raise InputError(f"{name}: assignments are {packed.dtype}{packed.shape}; wanted uint8{wanted}")
    if not np.isfinite(np.asarray(codebook, np.float32)).all():
        raise InputError(f"{name}: the codebook holds NaN or infinity; the file is damaged, make it again")
    if num_codewords < 2**bits and int(np.asarray(array.codes()).max(initial=0)) >= num_codewords:
        raise InputError(f"{name}: an assignment points past the {num_codewords} codewords; the file is damaged")
