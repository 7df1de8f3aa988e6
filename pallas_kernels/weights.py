"""A Linear in the form of the kernels: stacks of L equal layers, packed, with the vectors of the epilogue; made once, at load.

Each kind of weights has a dense form, by which XLA multiplies where no kernel runs. In memory there is one
copy: an orbax or safetensors file holds the packed rows of `VQArray`, a prepared model the same codes in fragment order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import fragments, nibbles
from pallas_kernels.fragments import ROWS, FragmentOrder


def static(**kwargs: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **kwargs)


def pair_rows(rows: Any) -> Any:
    """(*stack, O, ...) -> the same with each 16 rows as `FragmentOrder.paired_rows` has them; axis 1 of a stack of L."""
    shape = rows.shape
    a = rows.reshape(shape[0], shape[1] // 16, 8, 2, *shape[2:])
    return a.swapaxes(2, 3).reshape(shape)


def unpair_rows(rows: Any) -> Any:
    shape = rows.shape
    a = rows.reshape(shape[0], shape[1] // 16, 2, 8, *shape[2:])
    return a.swapaxes(2, 3).reshape(shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQWeights:
    """W_hat = C[A] in fragment order, for operands in `dtype`.

    Invariants:
      * `assignments` (L, O/64, I/order.columns * order.lines, 32) int32, of `fragments.pack`.
      * `codebooks` (L, G, lines, words) int32, of `fragments.codebook_words`; row o of W reads codebook o // (O/G).
      * `dtype` is bfloat16 (order.itemsize 2), int8 or float8_e4m3fn (1); `columns` is I, which the assignments may
        exceed to fill the last step; X is filled up with zeros there.
    """

    assignments: Any
    codebooks: Any
    order: FragmentOrder = static()
    dtype: Any = static()
    columns: int = static()
    decodes = True

    @property
    def layers(self) -> int:
        return self.assignments.shape[0]

    @property
    def rows(self) -> int:
        return self.assignments.shape[1] * ROWS

    @property
    def steps(self) -> int:
        """Of the main loop."""
        return self.assignments.shape[2] // self.order.lines

    @property
    def groups(self) -> int:
        return self.codebooks.shape[1]

    @property
    def paired_rows(self) -> bool:
        return self.order.paired_rows

    @property
    def replicas(self) -> int:
        """Copies of each codeword in the kernel's table."""
        size = self.codebooks.shape[-1] * self.codebooks.shape[-2]
        return size // (2**self.order.bits * self.order.codebook_words)

    @property
    def stream_bytes(self) -> int:
        """Of a tile of 64 rows and a step of the main loop."""
        return 4 * fragments.LINE * self.order.lines

    @property
    def table_bytes(self) -> int:
        return 4 * self.codebooks.shape[-1] * self.codebooks.shape[-2]

    def dense(self, layer: jax.Array) -> jax.Array:
        """W (O, I) of one layer in `dtype`."""
        codes = fragments.unpack(self.assignments[layer], self.order).reshape(self.groups, -1)
        codebooks = fragments.codebook_of(self.codebooks[layer], self.order, self.dtype)
        take = lambda codebook, codes: jnp.take(codebook, codes, axis=0, mode="clip")
        return jax.vmap(take)(codebooks, codes).reshape(self.rows, -1)[:, : self.columns]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByteWeights:
    """8-bit W: `values` (L, O, >= I) int8 or float8_e4m3fn, filled up to steps of 128 columns.

    With `paired_rows` its rows are as the kernel stores 8-bit results.
    """

    values: Any
    columns: int = static()
    paired_rows: bool = static(default=False)
    stream_bytes = 64 * 128
    table_bytes = 0
    groups = 1
    decodes = False

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def layers(self) -> int:
        return self.values.shape[0]

    @property
    def rows(self) -> int:
        return self.values.shape[1]

    @property
    def steps(self) -> int:
        return self.values.shape[2] // 128

    def dense(self, layer: jax.Array) -> jax.Array:
        w = self.values[layer, :, : self.columns]
        return unpair_rows(w[None])[0] if self.paired_rows else w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NibbleWeights:
    """4-bit W with a scale for each row and 128 columns.

    Invariants: `values` (L, O/64, steps * nibbles.LINES, 32) int32, of `nibbles.pack`; `scales` (L, steps, O) float32, in
    the order of the packed rows; `columns` is I, at most 128 * steps.
    """

    values: Any
    scales: Any
    columns: int = static()
    paired_rows: bool = static(default=False)
    stream_bytes = 64 * 64 + 64 * 4
    table_bytes = 0
    groups = 1
    decodes = True
    dtype = jnp.int8

    @property
    def layers(self) -> int:
        return self.values.shape[0]

    @property
    def rows(self) -> int:
        return self.scales.shape[2]

    @property
    def steps(self) -> int:
        return self.scales.shape[1]

    def dense(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Integers (O, 128 * steps) int8 and their scales (steps, O) of one layer, rows in W's order."""
        values = nibbles.unpack(self.values[layer], self.paired_rows).reshape(self.rows, -1)
        scales = self.scales[layer]
        return values, unpair_rows(scales) if self.paired_rows else scales


Weights = VQWeights | ByteWeights | NibbleWeights


def vq_weights(
    codes: np.ndarray, codebooks: jax.Array, *, paired_rows: bool = False, table_bytes: int = 16384
) -> VQWeights:
    """From codes (L, O, S) and codebooks (L, G, K, d) of operands (bfloat16, int8 or float8_e4m3fn).

    A codebook is replicated to fill `table_bytes` of shared memory, 32 times at most.
    Raises ValueError where the shapes have no fragment order.
    """
    *_, num_codewords, length = codebooks.shape
    order = fragments.order_for(codebooks.dtype.itemsize, length, num_codewords, paired_rows)
    missing = -codes.shape[-1] % (order.columns // length)
    filled = np.pad(codes, ((0, 0), (0, 0), (0, missing)))
    return VQWeights(
        jnp.asarray(fragments.pack(filled, order)),
        fragments.codebook_words(codebooks, order, _replicas(order, table_bytes)),
        order,
        jnp.dtype(codebooks.dtype),
        codes.shape[-1] * length,
    )


def vq_shapes(
    layers: int,
    rows: int,
    columns: int,
    groups: int,
    num_codewords: int,
    length: int,
    dtype: Any,
    paired_rows: bool = False,
    table_bytes: int = 16384,
) -> VQWeights:
    """The shapes of `vq_weights`, without weights."""
    order = fragments.order_for(jnp.dtype(dtype).itemsize, length, num_codewords, paired_rows)
    codebook = jax.ShapeDtypeStruct((layers, groups, num_codewords, length), dtype)
    words = functools.partial(fragments.codebook_words, order=order, replicas=_replicas(order, table_bytes))
    lines = -(-columns // order.columns) * order.lines
    assignments = jax.ShapeDtypeStruct((layers, rows // ROWS, lines, fragments.LINE), jnp.int32)
    return VQWeights(assignments, jax.eval_shape(words, codebook), order, jnp.dtype(dtype), columns)


def _replicas(order: FragmentOrder, table_bytes: int) -> int:
    return max(1, min(32, table_bytes // (4 * 2**order.bits * order.codebook_words)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedLinear:
    """Weights, and the epilogue's vectors: `bias` (L, O), and `row_scale`, `after_scale`, `after_shift` (L, O) float32, or None.

    All in the order of the packed rows; `result_scale` (L,) float32 where the result is quantized for the next layer, else None.
    `operand`: an `operand.Operand` that the rows go through before they are rounded, or None.
    """

    weights: Any
    bias: Any = None
    row_scale: Any = None
    result_scale: Any = None
    operand: Any = None
    after_scale: Any = None
    after_shift: Any = None
