"""4-bit integers in fragment order (see `fragments.py`): two registers of 8-bit operands in one word.

Byte b of word i holds byte b of register 2i in its low half and of register 2i + 1 in its high half. A shift and a mask,
or a mask alone, give a register whose bytes are 16 times the integers; the scales contain the factor 1/16.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, Int32

from pallas_kernels.fragments import LINE, ROWS

COLUMNS = 128
"""Columns of W in a step of the main loop, and of a group that shares a scale."""
LINES = 32
"""Lines of a tile of 64 rows and a step."""
FACTOR = 16
"""Decoded operands are too large by this factor; scales divide it out."""


def pack(
    values: Int[np.ndarray, "*stack O I"], paired_rows: bool = False
) -> Int32[np.ndarray, "*stack tiles lines 32"]:
    """Integers from -8 to 7, O a multiple of 64 and I of 128, to (O/64, I/128 * LINES, 32) words."""
    *stack, rows, columns = values.shape
    if rows % ROWS or columns % COLUMNS:
        raise ValueError(f"W is ({rows}, {columns}); wanted multiples of ({ROWS}, {COLUMNS})")
    row_axes = (4, 8, 2) if paired_rows else (4, 2, 8)
    a = (np.asarray(values, np.int8).view(np.uint8) & 15).reshape(
        -1, rows // ROWS, *row_axes, columns // COLUMNS, 8, 4, 4
    )
    rr, q = (4, 3) if paired_rows else (3, 4)
    # -> stack, tile, step, warp, q, c, rr, j, byte
    a = a.transpose(0, 1, 5, 2, q, 7, rr, 6, 8).reshape(-1, 128, 8, 2, 4)
    words = np.ascontiguousarray(a[:, :, :, 0] | a[:, :, :, 1] << 4).view("<i4")
    return words.reshape(*stack, rows // ROWS, columns // COLUMNS * LINES, LINE)


def unpack(words: Int32[Array, "*stack lines 32"], paired_rows: bool = False) -> Int8[Array, "*stack 64 I"]:
    """Inverse of `pack` for one tile (or a stack of them)."""
    *stack, lines, _ = words.shape
    w = words.reshape(-1, lines // LINES, 4, 8, 4, 2, 4)  # ..., warp, q, c, rr, word
    half = lambda word: jax.lax.bitcast_convert_type(word, jnp.int8) >> 4
    registers = jnp.stack([half(w << 4), half(w)], axis=-2)  # ..., rr, word, register of two, byte
    a = registers.reshape(*w.shape[:6], 8, 4)
    row_axes = (2, 3, 5) if paired_rows else (2, 5, 3)
    return a.transpose(0, *row_axes, 1, 6, 4, 7).reshape(*stack, ROWS, -1)
