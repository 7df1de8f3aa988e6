"""Tiles of a product, and a static model of time that chooses among them."""

import dataclasses
import functools
import math

_MACS = {2: 2048, 1: 4096}
"""Multiply-adds a clock and multiprocessor, by bytes of an operand (H200, dense)."""
_SHARED_MEMORY = 227 * 1024
_DECODE_CLOCKS = 100
"""Instructions a warp issues to decode a tile of 64 rows by 128 bytes (ahead-of-time statistics, docs/kernels.md)."""
_BLOCK_CLOCKS = 2000
"""Start of a block: codebook and first stages; and its end: scales, stores."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block's part of Y: `tokens` rows of X and 64 * row_tiles * warpgroups rows of W.

    The copies of `stages` steps of X and W are in flight at once; the sum over columns has `splits` parts.
    """

    tokens: int = 128
    warpgroups: int = 2
    row_tiles: int = 1
    stages: int = 4
    splits: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.row_tiles * self.warpgroups


def shared_bytes(tile: Tile, stream_bytes: float, table_bytes: int, result_bytes: int) -> int:
    """Shared memory of a block; `stream_bytes` are those of a 64-row tile of packed W in a step."""
    stage = 128 * tile.tokens + stream_bytes * tile.row_tiles * tile.warpgroups
    return int(stage * tile.stages + table_bytes + tile.rows * tile.tokens * result_bytes) + 1024


@functools.lru_cache(maxsize=1024)
def choose(
    tokens: int,
    rows: int,
    columns: int,
    *,
    itemsize: int,
    group_rows: int,
    stream_bytes: float,
    table_bytes: int,
    result_bytes: int = 2,
    token_divisor: int = 0,
    may_split: bool = True,
    decodes: bool = True,
    multiprocessors: int = 132,
) -> Tile | None:
    """The tile with the shortest modelled time, or None where none fits.

    Args:
      tokens, rows, columns: M, O, I.
      itemsize: bytes of an operand.
      group_rows: O/G; a block may not read two codebooks.
      stream_bytes, table_bytes: of a packed tile and step, and of a codebook in shared memory.
      result_bytes: of an element of Y.
      token_divisor: where not 0, a block's tokens must divide it (an image's tokens, which share a gate).
      may_split: whether partial sums are allowed.
      decodes: whether W is made in registers, and does not lie in shared memory ready for the matrix unit.
    """
    steps = math.ceil(columns * itemsize / 128)
    best, best_clocks = None, math.inf
    for block_tokens in (16, 32, 64, 128, 256):
        if token_divisor % block_tokens and token_divisor:
            continue
        for warpgroups, row_tiles in ((2, 1), (3, 1), (1, 1), (2, 3), (2, 2)):
            if row_tiles > 1 and block_tokens * row_tiles > 96 or block_tokens == 256 and warpgroups == 3:
                continue
            for splits in (1, 2, 3, 4) if may_split else (1,):
                if steps % splits or splits > 1 and steps // splits < 4:
                    continue
                tile = Tile(block_tokens, warpgroups, row_tiles, 1, splits)
                if group_rows % tile.rows or splits > 1 and block_tokens < 32:
                    continue
                if not decodes and tile.rows > 256:  # more than the copy engine takes at once
                    continue
                size = 4 if splits > 1 else result_bytes
                fits = lambda n, tile=tile, size=size: (
                    shared_bytes(dataclasses.replace(tile, stages=n), stream_bytes, table_bytes, size) <= _SHARED_MEMORY
                )
                # Powers of two, so that a stage's index is a mask; many where stages are small and memory is the bound.
                small = shared_bytes(dataclasses.replace(tile, stages=1), stream_bytes, 0, 0) <= 12 * 1024
                stages = max(
                    (n for n in (3, 4, 8 if small else 4) if fits(n) and n <= max(3, steps // splits)), default=0
                )
                if not stages:
                    continue
                product = 64 * block_tokens * (128 // itemsize) / _MACS[itemsize]
                decode = _DECODE_CLOCKS if decodes else 0
                step = row_tiles * max(warpgroups * product, product + decode, decode * warpgroups)
                blocks = math.ceil(tokens / block_tokens) * (rows // tile.rows) * splits
                waves = math.ceil(blocks / multiprocessors)
                clocks = waves * (steps // splits * step + _BLOCK_CLOCKS) + (_BLOCK_CLOCKS if splits > 1 else 0)
                if clocks < best_clocks:
                    best, best_clocks = dataclasses.replace(tile, stages=stages), clocks
    return best
