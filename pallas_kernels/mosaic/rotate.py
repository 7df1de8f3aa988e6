"""Regular Hadamard rotations of rows that lie in the registers of a warp (`rows.Rows`), without a matrix.

The matrices (`pallas_kernels.hadamard`) are Kronecker products, so each factor is a stage of its own. With a factor of order 4
four numbers whose columns differ in two bits become

    y_i = (x_0 + x_1 + x_2 + x_3) / 2 - x_(i ^ 1)

A bit of a column's number is one of the place in a register's vector or one of the lane's number: the other number is
this thread's own, or comes by a shuffle. A stage within the vector costs no shuffle, one that begins in it half a
shuffle for each number, any other two. A factor of order 36 works on a square of 6 by 6 numbers with the sums R, C and S of each
row, column and symbol (row + column mod 6):

    y = (sum of all) / 6 - (R + C + S) / 3 + x

All is float32, and no number is rounded to less.
"""

import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector
from jaxtyping import Array, Float32

from pallas_kernels.mosaic.mlir import constant, element


def rotate(v: Float32[Array, "R D"], rotation: int, layout: Any, interpret: bool) -> Float32[Array, "R D"]:
    """Each `rotation` consecutive columns times the regular Hadamard matrix over its root; `layout` is that of `Rows`."""
    if interpret:
        groups = v.reshape(v.shape[0], -1, rotation)
        return jnp.matmul(groups, _matrix(rotation), precision=lax.Precision.HIGHEST).reshape(v.shape)
    of_36 = rotation % 36 == 0
    inner = rotation // 36 if of_36 else rotation

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(v.shape, jnp.float32, layout=layout))
    def emit(_: Any, values: Any) -> Any:
        registers = list(values.registers.flat)
        if of_36:
            registers = [y for i in range(0, len(registers), 18) for y in _of_36(registers[i : i + 18], inner)]
        for bit in range(0, int(math.log2(inner)), 2):
            registers = [_of_4(x, bit) for x in registers]
        out = np.empty(values.registers.shape, dtype=object)
        for place, register in zip(np.ndindex(out.shape), registers, strict=True):
            out[place] = register
        return mgpu.FragmentedArray(_registers=out, _layout=values.layout, _is_signed=None)

    return emit(v)


def _of_4(x: Any, bit: int) -> Any:
    """The stage whose four columns differ in bits `bit` and `bit + 1`."""
    partner = _partner(x, bit)
    two = arith.addf(x, partner)
    four = arith.addf(two, _partner(two, bit + 1))
    return arith.subf(_times(four, 0.5), partner)


def _partner(x: Any, bit: int) -> Any:
    """What stands where a column's number has the other bit: in the vector, whose bits are the lowest, or in another lane."""
    size = ir.VectorType(x.type).shape[0]
    if 2**bit < size:
        return vector.from_elements(x.type, [element(x, i ^ 2**bit) for i in range(size)])
    return mgpu.utils.shfl_bfly(x, 2**bit // size)


def _of_36(x: list[Any], inner: int) -> list[Any]:
    """The stage of order 36 of one group: this lane's 18 registers, of which number 3 r + j has row r and column 2 j + odd.

    `odd` is a bit of the lane's number, so that two lanes have a square. Symbols are counted from `odd` on: then each register
    has the same one in both lanes, and this lane's symbol s is the other's s + 1, or s - 1 where this one is odd.
    """
    distance = inner // 2
    thread = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
    odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, constant(distance)), constant(0))
    at = lambda r, j: x[3 * (r % 6) + j]
    other = lambda a: mgpu.utils.shfl_bfly(a, distance)
    rows = [_sum([at(r, j) for j in range(3)]) for r in range(6)]
    rows = [arith.addf(a, other(a)) for a in rows]
    columns = [_sum([at(r, j) for r in range(6)]) for j in range(3)]
    own = [_sum([at(s - 2 * j, j) for j in range(3)]) for s in range(6)]
    sent = [arith.select(odd, own[(s - 1) % 6], own[(s + 1) % 6]) for s in range(6)]
    symbols = [arith.addf(a, other(b)) for a, b in zip(own, sent, strict=True)]
    everything = _times(_sum(rows), 1 / 6)
    out = []
    for r in range(6):
        for j in range(3):
            three = _sum([rows[r], columns[j], symbols[(r + 2 * j) % 6]])
            out.append(arith.addf(arith.subf(everything, _times(three, 1 / 3)), at(r, j)))
    return out


def _sum(terms: list[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = arith.addf(total, term)
    return total


def _times(x: Any, factor: float) -> Any:
    return arith.mulf(x, mgpu.utils.c(factor, x.type))


def _matrix(rotation: int) -> Float32[Array, "G G"]:
    """The matrix over its root from its definition; the interpreter takes no constant arrays."""
    row, column = (lax.broadcasted_iota(jnp.int32, (rotation, rotation), axis) for axis in (0, 1))
    inner = rotation // 36 if rotation % 36 == 0 else rotation
    negative = jnp.zeros((rotation, rotation), bool)
    while inner > 1:
        negative ^= row % 4 == (column % 4) ^ 1
        row, column, inner = row // 4, column // 4, inner // 4
    if rotation % 36 == 0:
        same = [of(row) == of(column) for of in (lambda a: a // 6, lambda a: a % 6, lambda a: (a // 6 + a % 6) % 6)]
        negative ^= (same[0] | same[1] | same[2]) & (row != column)
    return jnp.where(negative, -1.0, 1.0).astype(jnp.float32) / math.sqrt(rotation)
