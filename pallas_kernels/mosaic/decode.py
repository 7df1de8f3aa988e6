"""Assignments to operands of the matrix unit: one shift, one mask and one load from shared memory for each register.

Pallas has no gather, so the decoder is written in Mosaic's own MLIR (`plgpu.inline_mgpu`). It needs neither a store nor a
barrier: the loads leave the codewords in the registers that `wgmma` reads W from (see `fragments.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, vector

from pallas_kernels import fragments
from pallas_kernels.fragments import FragmentOrder
from pallas_kernels.mosaic.mlir import byte_address, constant, element


def make_decoder(
    order: FragmentOrder, dtype: jax.typing.DTypeLike, replicas: int, interpret: bool
) -> Callable[..., Any]:
    """`decoder(assignments_ref (lines, 32), codebook_ref) -> W tile (64, order.columns)` for one step of the main loop.

    In interpret mode, where MLIR cannot be inlined, `fragments.decode` gives the tile.
    """
    if interpret:

        def decoder(assignments: Any, codebook: Any) -> jax.Array:
            return fragments.decode(assignments[...], fragments.codebook_of(codebook[...], order, dtype), order)

        return decoder

    shape = (fragments.ROWS, order.columns)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=_layout(dtype)),
    )
    def decoder(_: Any, assignments: Any, codebook: Any) -> Any:
        return fragment(_decode_registers(order, replicas, assignments, codebook), shape, dtype)

    return decoder


def _decode_registers(order: FragmentOrder, replicas: int, assignments: Any, codebook: Any) -> list[Any]:
    """The 16 registers of this lane, rr after rr, as i32 values."""
    lane = arith.remui(arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x)), constant(128))
    sharing = int(math.log2(order.sharing))
    group = arith.shrui(lane, constant(sharing)) if sharing else lane
    words = _own_words(order, mgpu.memref_fold(assignments, 0, 2), group)

    # Byte address of a codeword: code << shift, and below that this lane's replica and its part of the codeword.
    word_bytes = 4 * order.codebook_words
    shift = int(math.log2(replicas * word_bytes))
    place = arith.shli(arith.andi(group, constant(replicas - 1)), constant(int(math.log2(word_bytes))))
    if sharing:
        part = arith.andi(lane, constant(order.sharing - 1))
        place = arith.ori(place, arith.shli(part, constant(2)))
    base = mgpu.utils.memref_ptr(mgpu.memref_fold(codebook, 0, 2))
    i32 = ir.IntegerType.get_signless(32)

    def load(code: int) -> Any:
        address = arith.ori(_code_at(order, words, code, shift), place)
        return llvm.load(i32, byte_address(base, address))

    loaded = [load(code) for code in range(order.codes)]
    if order.codes_per_register == 1:
        return loaded
    # Two 16-bit codewords to a register; each word holds its codeword twice.
    low, high = constant(0xFFFF), constant(-0x10000)
    return [arith.ori(arith.andi(a, low), arith.andi(b, high)) for a, b in zip(loaded[::2], loaded[1::2], strict=True)]


def _own_words(order: FragmentOrder, flat: Any, group: Any) -> list[Any]:
    """The words of this lane's group, from assignments folded to one axis."""
    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    if order.bits != 8:
        offsets = [arith.addi(group, constant(order.word_of(0, i))) for i in range(order.words)]
        return [memref.load(flat, [arith.index_cast(index, offset)]) for offset in offsets]
    words = []
    for i in range(0, order.words, 4):
        offset = arith.addi(arith.muli(group, constant(order.words)), constant(i))
        four = vector.load(ir.VectorType.get((4,), i32), flat, [arith.index_cast(index, offset)])
        words += [element(four, k) for k in range(4)]
    return words


def _code_at(order: FragmentOrder, words: list[Any], code: int, shift: int) -> Any:
    """Code number `code` of the lane's list, shifted left by `shift`."""

    def field(word: Any, start: int, width: int, to: int) -> Any:
        """Bits [start, start + width) of a word, moved to begin at bit `to`."""
        if start > to:
            word = arith.shrui(word, constant(start - to))
        elif start < to:
            word = arith.shli(word, constant(to - start))
        mask = (2**width - 1) << to
        return arith.andi(word, constant(mask - 2**32 if mask >= 2**31 else mask))

    if order.bits == 8:
        return field(words[code // 4], 8 * (code % 4), 8, shift)
    first, number = 3 * (code // 16), code % 16
    if number < 15:
        return field(words[first + number // 5], 6 * (number % 5), 6, shift)
    pieces = [field(words[first + i], 30, 2, shift + 2 * i) for i in range(3)]
    return arith.ori(arith.ori(pieces[0], pieces[1]), pieces[2])


def _layout(dtype: jax.typing.DTypeLike) -> plgpu.Layout:
    return plgpu.Layout.WGMMA if jnp.dtype(dtype).itemsize == 2 else plgpu.Layout.WGMMA_8BIT


def fragment(registers: list[Any], shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> Any:
    """16 registers (i32, rr after rr) as an array in the layout of `wgmma`'s first operand."""
    tiled = _layout(dtype).to_mgpu()
    axes = tiled.registers_shape(shape)
    element = {
        "bfloat16": ir.BF16Type.get,
        "int8": lambda: ir.IntegerType.get_signless(8),
        "float8_e4m3fn": ir.Float8E4M3FNType.get,
    }[jnp.dtype(dtype).name]()
    packed, one = tiled.registers_element_type(element), ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    out = np.empty(axes, dtype=object)
    for position in np.ndindex(axes):
        # Of the layout's axes only j (1) and rr (4) are longer than one.
        register = registers[position[4] * 8 + position[1]]
        out[position] = vector.bitcast(packed, vector.from_elements(one, [register]))
    signed = True if jnp.issubdtype(dtype, jnp.integer) else None
    return mgpu.FragmentedArray(_registers=out, _layout=tiled, _is_signed=signed)
