"""Machine code of the product kernels at DiT-XL/2's shapes, compiled for an H200: no spills, the right opcode, short loops."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import cases, compiler, sass
from pallas_kernels import tiles
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import ByteWeights

pytestmark = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))

WIDTH, HIDDEN, M = 1152, 4608, 512
TILE = Tile(128, 2, 1, 4)
BYTES = ByteWeights(jax.ShapeDtypeStruct((28, HIDDEN, WIDTH), jnp.int8), WIDTH)


@dataclasses.dataclass(frozen=True)
class Expected:
    """`loop`: instructions of the design study's prototype in its main loop; `loads` from shared memory in it."""

    case: cases.Case
    tile: Tile
    mma: str
    loop: int
    loads: int
    row_tiles: int = 1


vq = cases.vq
# One load for each of 16 registers, and four words of codes at once (of 6-bit codes one at a time).
PRODUCTS = {
    "w2": lambda: Expected(cases.linear(vq(HIDDEN, WIDTH, 2, jnp.bfloat16), M, TILE, gelu=True), TILE, "HGMMA", 88, 17),
    "w3": lambda: Expected(cases.linear(vq(HIDDEN, WIDTH, 3, jnp.bfloat16), M, TILE, gelu=True), TILE, "HGMMA", 95, 19),
    "w2a8": lambda: Expected(cases.linear(vq(HIDDEN, WIDTH, 2, jnp.int8), M, TILE), TILE, "IGMMA", 104, 17),
    "w2a8-e4m3": lambda: Expected(cases.linear(vq(HIDDEN, WIDTH, 2, jnp.float8_e4m3fn), M, TILE), TILE, "QGMMA", 104, 17),
    "w8a8": lambda: Expected(cases.linear(BYTES, M, TILE), TILE, "IGMMA", 48, 0),
    "adaln": lambda: Expected(
        cases.linear(vq(6 * WIDTH, WIDTH, 2, jnp.bfloat16), 16, Tile(16, 2, 3, 6)),
        Tile(16, 2, 3, 6), "HGMMA", 98, 17, row_tiles=3,
    ),
}  # fmt: skip
UNIFORM_MOVES = 4
"""By so many instructions a loop differs between versions of jax: UMOV, before the matrix unit's descriptors."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_main_loops_are_as_short_as_the_prototypes_and_nothing_spills(name):
    expected = PRODUCTS[name]()
    case = expected.case
    compiled = compiler.compile(case.fn, *case.shapes, name=name)
    assert len(compiled.launches()) == 1
    (kernel,) = compiled.mosaic_kernels
    code = kernel.assembly
    assert code.spill_bytes == code.stack_bytes == 0
    # A block of three warpgroups shares 65,536 registers.
    assert code.registers == 168
    assert code.mma() == expected.mma
    loop = code.main_loop()
    counts = collections.Counter(map(sass.opcode, loop))
    assert counts[expected.mma] == 4 * expected.row_tiles  # 128 bytes of a row are four steps of the matrix unit
    assert counts["LDS"] == expected.loads * expected.row_tiles
    assert not counts["STS"] and not counts["BAR"] and not counts["LDL"] and not counts["STL"]
    assert len(loop) <= expected.loop * expected.row_tiles + UNIFORM_MOVES
    weights = case.shapes[1]
    modelled = tiles.shared_bytes(expected.tile, weights.stream_bytes, weights.table_bytes, 2)
    assert kernel.dynamic_shared_bytes <= modelled <= 227 * 1024


def test_tokens_that_are_no_multiple_of_eight_cost_a_copy():
    """The copy engine sees X in tiles of eight rows, so ten are filled up to 16 by XLA."""
    ten, two = (cases.linear(vq(WIDTH, WIDTH, 2, jnp.bfloat16), m, Tile(16, 2, 1, 4)) for m in (10, 2))
    launches = lambda case: [thunk.kind for thunk in compiler.compile(case.fn, *case.shapes).launches()]
    assert launches(ten).count("kCustomCall") == 1 and len(launches(ten)) <= 3
    assert launches(two) == ["kCustomCall"]
