"""`VQArray`: a weight matrix as a codebook and packed assignments."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels.reference_norm import largest_quantized
from pallas_kernels.weights import VQWeights, vq_weights
from vq4dit_jax.codebook import solver
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer.packing import pack_codes, packed_bytes
from vq4dit_jax.qarray.base import (
    Cost,
    Json,
    QuantizedArray,
    integer_fact,
    matrix_fact,
    register,
    static,
    take,
)  # fmt: skip

TABLE_BYTES = 16384
"""Of a kernel's table of codewords, where nothing else is asked for."""
"""Largest magnitude of an 8-bit operand."""


@register
class VQArray(QuantizedArray):
    """W_hat = C[A] for a Linear's weight W (O, I), cut along its inputs into sub-vectors of d (VQ4DiT, section 3.1).

    Invariants (`validate` checks them):
      * `codebook` is (*stack, G, K, d) floating; `assignments` is (*stack, O, bytes) uint8; `stack` is the same in
        both: empty for one matrix, (L,) for the stack of L blocks that `lax.scan` runs over.
      * G divides O. Row o reads codebook o // (O/G); q, k and v of a fused qkv are one leaf with G = 3.
      * d divides I; a row has S = I/d codes of ceil(log2 K) bits each, packed little-endian, rows padded with zero
        bits to whole units of lcm(bits, 8) bits: 8-bit codes are bytes, 6-bit codes lie four in three bytes.
      * every code is below K.
    """

    kind = "vq"
    codebook: Any
    assignments: Any
    matrix: tuple[int, int] = static()

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

    def with_codebook(self, codebook: Float[Array, "*stack G K d"]) -> "VQArray":
        """The same assignments with other codewords."""
        return dataclasses.replace(self, codebook=codebook)

    def codes(self) -> jax.Array:
        """Assignments as int32 (*stack, O, S)."""
        bits = pallas_kernels.code_bits(self.num_codewords)
        return pallas_kernels.unpack_codes(jnp.asarray(self.assignments), bits, self.matrix[1] // self.subvector_length)

    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        """The dense weight, in the codebook's dtype where none is given."""
        fn = pallas_kernels.decode
        for _ in self.stack:
            fn = jax.vmap(fn)
        return fn(self.codebook if dtype is None else self.codebook.astype(dtype), self.codes())

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """x @ W_hat^T of one matrix (no stack axes), from the packed form."""
        return pallas_kernels.vq_matmul(x, self.codebook, self.assignments)

    def arrays(self) -> dict[str, Any]:
        return {"codebook": self.codebook, "assignments": self.assignments}

    def facts(self) -> dict[str, Json]:
        return {
            "shape": list(self.matrix),
            "codewords": self.num_codewords,
            "subvector": self.subvector_length,
            "groups": self.num_groups,
            "code_bits": pallas_kernels.code_bits(self.num_codewords),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, Any], facts: Mapping[str, Json], name: str) -> "VQArray":
        codebook, assignments = take(arrays, ("codebook", "assignments"), name)
        leaf = cls(codebook, assignments, matrix_fact(facts, name))
        validate(leaf, name)
        for key, value in leaf.facts().items():
            if key != "shape" and integer_fact(facts, key, 1, 1 << 24, name) != value:
                raise InputError(
                    f"{name}: the manifest has {key}={facts[key]}, the arrays {value}; the file is damaged"
                )
        return leaf

    def cost(self) -> Cost:
        return Cost(
            math.prod(self.stack) * math.prod(self.matrix),
            math.prod(self.assignments.shape),
            math.prod(self.codebook.shape) * np.dtype(self.codebook.dtype).itemsize,
        )

    def tunable(self) -> dict[str, Any]:
        return {"codebook": jnp.asarray(self.codebook, jnp.float32)}

    def spec(self) -> Any:
        from vq4dit_jax.qarray.spec import VQSpec  # that file knows this class

        return VQSpec(self.num_codewords, self.subvector_length, self.num_groups, jnp.dtype(self.codebook.dtype).name)

    def scaled(self, factor: Any) -> "VQArray":
        wide = jnp.asarray(self.codebook, jnp.float32)
        return self.with_codebook((factor * wide).astype(self.codebook.dtype))

    def soften(self, weight: Float[np.ndarray, "*stack O I"] | None, num_candidates: int, start: str) -> QuantizedArray:
        """A `SoftVQArray` of at most K candidates."""
        from vq4dit_jax.qarray.soft import soften  # that file knows this class

        return soften(self, weight, min(num_candidates, self.num_codewords), start)

    def solve(
        self,
        kernel: Float[Array, "*stack I O"],
        second: Float[Array, "*stack I I"],
        block: Any = None,
        *,
        feedbacks: Any = solver.FEEDBACKS,
        rounds: Any = solver.ROUNDS,
        mean: Any = None,
    ) -> "VQArray":
        """Codebook and assignments that keep the layer's outputs (`codebook.solver`), starting from this codebook."""
        start = np.asarray(self.codebook, np.float32)
        codebook, codes = _solve(kernel, second, start, block, feedbacks, rounds)
        return from_codes(np.asarray(codebook).astype(self.codebook.dtype), np.asarray(codes))

    def prepare(
        self, operand_dtype: Any, *, as_one: bool = False, paired_rows: bool = False, table_bytes: int = TABLE_BYTES
    ) -> tuple[VQWeights, Float[np.ndarray, "L O"] | None]:
        """Codes in fragment order; 8-bit codebooks get a scale each."""
        dtype = jnp.dtype(operand_dtype)
        codes, codebooks, row_scale = np.asarray(self.codes()), np.asarray(self.codebook, np.float32), None
        if dtype.itemsize == 1:
            scale = np.maximum(np.abs(codebooks).max((-1, -2), keepdims=True), 1e-12) / largest_quantized(dtype)
            codebooks = codebooks / scale
            codebooks = np.rint(codebooks) if dtype == np.int8 else codebooks
            row_scale = np.repeat(scale[..., 0, 0], self.matrix[0] // self.num_groups, axis=1).astype(np.float32)
        if as_one:
            codes, codebooks = codes.reshape(1, -1, codes.shape[-1]), codebooks.reshape(1, -1, *codebooks.shape[2:])
        table = table_bytes or TABLE_BYTES
        packed = vq_weights(codes, jnp.asarray(codebooks, dtype), paired_rows=paired_rows, table_bytes=table)
        return packed, row_scale


@jax.jit
def _solve(kernel: Any, second: Any, codebook: Any, block: Any, feedbacks: Any, rounds: Any) -> Any:
    """(codebook, codes) of one matrix of a stack: one program for all its blocks."""
    cut = lambda a: a if block is None else a[block]
    weight, moments = cut(kernel).T.astype(jnp.float32), solver.condition(cut(second))
    return solver.solve(weight, moments, codebook, feedbacks=feedbacks, rounds=rounds)[:2]


def from_codes(codebook: jax.Array | np.ndarray, codes: jax.Array | np.ndarray) -> VQArray:
    """Packs codes (*stack, O, S) with codebook (*stack, G, K, d)."""
    num_codewords, length = codebook.shape[-2:]
    packed = pack_codes(np.asarray(codes), pallas_kernels.code_bits(num_codewords))
    return VQArray(*jax.device_put((codebook, packed)), (codes.shape[-2], codes.shape[-1] * length))


def validate(array: VQArray, name: str = "VQArray") -> None:
    """Checks the invariants on concrete arrays; raises InputError that names `name` and what does not hold."""
    codebook, packed, (rows, columns) = array.codebook, array.assignments, array.matrix
    floating = jnp.issubdtype(codebook.dtype, jnp.floating)
    if codebook.ndim < 3 or not floating or 0 in codebook.shape:
        raise InputError(f"{name}: codebook is {codebook.dtype}{codebook.shape}; wanted floating (*stack, G, K, d)")
    groups, num_codewords, length = codebook.shape[-3:]
    if num_codewords > 65536:
        raise InputError(f"{name}: the codebook has {num_codewords} codewords; wanted at most 65536")
    if columns % length or rows % groups:
        raise InputError(f"{name}: shape {array.matrix} is not a multiple of G={groups} rows and d={length} columns")
    bits = pallas_kernels.code_bits(num_codewords)
    wanted = (*array.stack, rows, packed_bytes(columns // length, bits))
    if packed.shape != wanted or packed.dtype != np.uint8:
        raise InputError(f"{name}: assignments are {packed.dtype}{packed.shape}; wanted uint8{wanted}")
    if not np.isfinite(np.asarray(codebook, np.float32)).all():
        raise InputError(f"{name}: the codebook holds NaN or infinity; the file is damaged, make it again")
    if num_codewords < 2**bits and int(np.asarray(array.codes()).max(initial=0)) >= num_codewords:
        raise InputError(f"{name}: an assignment points past the {num_codewords} codewords; the file is damaged")
