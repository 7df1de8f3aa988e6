"""Fragment order: assignments in the order of the registers of Hopper's matrix unit, so that a kernel decodes without shuffles.

`wgmma` takes a tile of 64 rows of W in registers. Lane (q, c) of warp w, with q = 0..7 and c = 0..3, holds in register
(rr, j) of rr = 0..1, j = 0..7 the row 16w + 8rr + q and four consecutive bytes of it (PTX ISA, "Register fragments
for wgmma.mma_async.m64nNk16 / .m64nNk32"). A step of the kernel's main loop takes 128 bytes of a row: 64 columns in
16-bit operands, 128 in 8-bit ones. So a lane needs 16 registers a step, and one 32-bit load from the codebook fills one.

    16-bit:  d = 2  a register is a codeword       8-bit:  d = 2  a register is two codewords
             d = 4  half of one                            d = 4  one
             d = 8  a quarter                              d = 8  half of one

Lanes that hold parts of the same codewords share one list of assignments. Everything here is done once, when a model
is prepared for inference; `unpack` is its inverse, for tests and for devices without these kernels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

ROWS = 64
"""Rows of W in a tile, the M of `wgmma`."""
LINE = 32
"""int32 words in a line of packed assignments; the copy engine moves blocks of (lines, LINE)."""
_STEP_BYTES = 128
_LANES = 128
_REGISTERS = 16


@dataclasses.dataclass(frozen=True)
class FragmentOrder:
    """How the assignments of one matrix lie in memory.

    Invariants:
      * `itemsize` is 2 (bfloat16 operands) or 1 (int8, float8_e4m3fn); `length` is d, one of 2, 4, 8.
      * `bits`, the bits of a code in memory, is 8, or 6 where all codes are below 64.
      * a word of 8-bit codes holds four, little-endian, and a group of lanes has its words side by side. Of 6-bit
        codes three words hold 16: word i the codes 5i to 5i+4, and bits 2i, 2i+1 of the last code on top.
      * with `paired_rows` register row 8rr + q of a warp holds row 2q + rr of W, so that 8-bit results of both
        rr, written as 16-bit pairs, come out in W's order.
    """

    itemsize: int
    length: int
    bits: int
    paired_rows: bool = False

    @property
    def columns(self) -> int:
        """Columns of W in a step of the main loop."""
        return _STEP_BYTES // self.itemsize

    @property
    def codes_per_register(self) -> int:
        return max(1, 4 // self.itemsize // self.length)

    @property
    def sharing(self) -> int:
        """Neighbouring lanes that hold parts of one codeword."""
        return max(1, self.length * self.itemsize // 4)

    @property
    def groups(self) -> int:
        """Groups of lanes with a list of assignments each."""
        return _LANES // self.sharing

    @property
    def codes(self) -> int:
        """Codes a group of lanes has for a tile and step."""
        return _REGISTERS * self.codes_per_register

    @property
    def words(self) -> int:
        """int32 words these codes take."""
        return self.codes * self.bits // 32

    @property
    def lines(self) -> int:
        """Lines of a tile and step."""
        return self.words * self.groups // LINE

    @property
    def codebook_words(self) -> int:
        """int32 words a codeword takes in the kernel's codebook (a 16-bit codeword stands twice in its word)."""
        return max(1, self.length * self.itemsize // 4)

    def word_of(self, group: int, word: int) -> int:
        """Index, in the words of a tile, of word number `word` of a group of lanes."""
        return group * self.words + word if self.bits == 8 else word * self.groups + group


def order_for(itemsize: int, length: int, num_codewords: int, paired_rows: bool = False) -> FragmentOrder:
    """The order of a codebook with K codewords of d. Raises ValueError where there is none."""
    if length not in (2, 4, 8) or not 1 <= num_codewords <= 256:
        raise ValueError(f"d={length}, K={num_codewords}: kernels want d of 2, 4 or 8 and K of 256 at most")
    return FragmentOrder(itemsize, length, 6 if num_codewords <= 64 else 8, paired_rows)


def _lane_axes(order: FragmentOrder) -> tuple[int, int, int]:
    """(j, groups of lanes in a quad, codes in a register): a step's code number, from slow to fast."""
    return 8, 4 // order.sharing, order.codes_per_register


def pack(codes: Int[np.ndarray, "*stack O S"], order: FragmentOrder) -> Int32[np.ndarray, "*stack tiles lines 32"]:
    """Codes of W (O, I), S = I/d, to O/64 tiles of (I/columns * order.lines, 32) words.

    Raises ValueError where O is no multiple of 64, or I of `order.columns`.
    """
    *stack, rows, length = codes.shape
    if rows % ROWS or length * order.length % order.columns:
        raise ValueError(f"W is ({rows}, {length * order.length}); wanted multiples of ({ROWS}, {order.columns})")
    tiles, steps = rows // ROWS, length * order.length // order.columns
    row_axes = (4, 8, 2) if order.paired_rows else (4, 2, 8)
    a = np.asarray(codes, np.uint8).reshape(-1, tiles, *row_axes, steps, *_lane_axes(order))
    # -> stack, tile, step, warp, q, group of the quad, rr, j, code of the register
    rr, q = (4, 3) if order.paired_rows else (3, 4)
    a = a.transpose(0, 1, 5, 2, q, 7, rr, 6, 8).reshape(-1, order.groups, order.codes)
    if order.bits == 8:
        words = np.ascontiguousarray(a).view("<i4")
    else:
        c = a.reshape(-1, order.groups, order.codes // 16, 16).astype(np.uint32)
        words = np.stack([_word6(c, i) for i in range(3)], axis=3).reshape(-1, order.groups, order.words)
        words = np.ascontiguousarray(words.swapaxes(1, 2)).view(np.int32)
    return words.reshape(*stack, tiles, steps * order.lines, LINE)


def _word6(codes: np.ndarray, i: int) -> np.ndarray:
    word = (codes[..., 15] >> np.uint32(2 * i) & np.uint32(3)) << np.uint32(30)
    for e in range(5):
        word = word | codes[..., 5 * i + e] << np.uint32(6 * e)
    return word


def unpack(words: Int32[Array, "*stack lines 32"], order: FragmentOrder) -> Int32[Array, "*stack 64 codes"]:
    """The codes of one tile of 64 rows (or a stack of them), as `pack` had them."""
    *stack, lines, _ = words.shape
    steps = lines // order.lines
    if order.bits == 8:
        w = words.reshape(-1, order.groups, order.words, 1)
        codes = w >> jnp.arange(0, 32, 8, dtype=jnp.int32).reshape(1, 1, 1, 4) & 0xFF
    else:
        w = words.reshape(-1, order.words, order.groups).swapaxes(1, 2).reshape(-1, order.groups, order.words // 3, 3)
        low = w[..., None] >> jnp.arange(0, 30, 6, dtype=jnp.int32).reshape(1, 1, 1, 1, 5) & 63
        top = jax.lax.shift_right_logical(w, jnp.int32(30)) << jnp.arange(0, 6, 2, dtype=jnp.int32).reshape(1, 1, 1, 3)
        codes = jnp.concatenate([low.reshape(*w.shape[:3], 15), top.sum(-1, dtype=jnp.int32)[..., None]], axis=-1)
    j, quad, e = _lane_axes(order)
    a = codes.reshape(-1, steps, 4, 8, quad, 2, j, e)
    row_axes = (2, 3, 5) if order.paired_rows else (2, 5, 3)
    return a.transpose(0, *row_axes, 1, 6, 4, 7).reshape(*stack, ROWS, -1)


def codebook_words(codebook: jax.Array, order: FragmentOrder, replicas: int) -> Int32[Array, "*stack lines words"]:
    """A codebook (*stack, K, d) of operands as int32 words [codeword][replica][word], K filled up to 2^bits.

    Lanes read different replicas, which makes bank conflicts in shared memory rarer.
    """
    *stack, num_codewords, length = codebook.shape
    fill = [(0, 0)] * len(stack) + [(0, 2**order.bits - num_codewords), (0, 0)]
    c = jnp.pad(codebook, fill)
    if length * order.itemsize == 2:
        c = jnp.concatenate([c, c], axis=-1)
    per_word = 4 // order.itemsize
    words = jax.lax.bitcast_convert_type(c.reshape(*c.shape[:-1], -1, per_word), jnp.int32)
    words = jnp.broadcast_to(words[..., None, :], (*words.shape[:-1], replicas, words.shape[-1]))
    size = 2**order.bits * replicas * order.codebook_words
    return words.reshape(*stack, -1, min(128, size))


def codebook_of(
    words: Int32[Array, "*stack lines words"], order: FragmentOrder, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """(*stack, 2^bits, d) operands again, from the first replica."""
    *stack, _, _ = words.shape
    first = words.reshape(*stack, 2**order.bits, -1, order.codebook_words)[..., 0, :]
    parts = jax.lax.bitcast_convert_type(first, dtype)
    return parts.reshape(*stack, 2**order.bits, -1)[..., : order.length]


def decode(words: Int32[Array, "lines 32"], codebook: jax.Array, order: FragmentOrder) -> jax.Array:
    """One tile (64, I) of W with rows in register order; the kernels' decoder must give the same."""
    natural = functools.partial(unpack, order=dataclasses.replace(order, paired_rows=False))
    return jnp.take(codebook, natural(words), axis=0, mode="clip").reshape(ROWS, -1)
