"""What an H200 would run: the compiled PTX of the product kernels, executed by the emulator, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from product_cases import E4M3, INT8, Case, make, wide
from ptx import emulate

from benchmarks.aot import compiler
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.mosaic import matmul
from pallas_kernels.tiles import Tile

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable())),
]

# Each kind of decoder (dtype, d, bits of a code, replicas), each way to store a result, and what only the hardware does: codes in
# fragment order, swizzled copies that are cut off, the matrix store that turns a tile around.
CASES = {
    "bf16-d4-cut-off": Case(tokens=40, gelu=True, table_bytes=16384),
    "bf16-d2-6bits": Case(tokens=16, length=2, codewords=64, groups=2, tile=Tile(16, 1, 1, 2)),
    "bf16-d8-gate": Case(length=8, tile=Tile(16, 2, 1, 2), image_tokens=16),
    "bf16-row-tiles": Case(tokens=3, rows=192, codewords=16, tile=Tile(16, 1, 3, 2)),
    "int8-d4-to-int8": Case(tokens=24, dtype=INT8, columns=256, scales=True, gelu=True, result=INT8),
    "int8-d2-6bits-gate": Case(
        dtype=INT8, length=2, codewords=64, scales=True, image_tokens=32, tile=Tile(32, 1, 2, 2)
    ),
    "e4m3-d8-to-e4m3": Case(tokens=16, dtype=E4M3, length=8, tile=Tile(16, 2, 1, 2), scales=True, result=E4M3),
    "e4m3-d2": Case(tokens=16, rows=64, dtype=E4M3, length=2, tile=Tile(16, 1, 1, 2), scales=True),
    "bytes-int8-to-int8": Case(tokens=24, weights="bytes", dtype=INT8, scales=True, gelu=True, result=INT8),
    "bytes-after-gelu-to-int8": Case(tokens=16, weights="bytes", dtype=INT8, gelu=True, result=INT8, after=True),
    "bytes-e4m3": Case(tokens=16, weights="bytes", dtype=E4M3, scales=True, tile=Tile(16, 1, 2, 2)),
    "nibbles": Case(tokens=24, weights="nibbles", dtype=INT8, columns=256),
    "nibbles-to-int8": Case(tokens=16, weights="nibbles", dtype=INT8, tile=Tile(16, 2, 1, 2), result=INT8),
}
TANH = 2**-11
"""Relative error of `tanh.approx` (PTX ISA)."""


def run(launch, product, epilogue, shape, dtype):
    """`launch(x, weights, epilogue, layer)` through the emulator."""
    leaves, treedef = jax.tree.flatten((product.x, product.weights, epilogue, product.layer))
    call = lambda *leaves: launch(*treedef.unflatten(leaves))
    (y,) = emulate(call, [np.asarray(leaf) for leaf in leaves], [jax.ShapeDtypeStruct(shape, dtype)])
    return y


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_emulated_are_within_rounding_of_float64(name):
    case = CASES[name]
    product = make(case)
    launch = lambda x, weights, epilogue, layer: matmul.product(x, weights, epilogue, layer, product.tile)
    epilogue = product.epilogue
    if (
        epilogue.token_scale is not None
    ):  # Filled up to whole blocks here, since XLA would do it with a kernel of its own.
        filled = jnp.pad(epilogue.token_scale, (0, -case.tokens % product.tile.tokens))
        epilogue = dataclasses.replace(epilogue, token_scale=filled)
    y = run(launch, product, epilogue, product.exact.shape, case.result)
    product.check(y, arithmetic=TANH if case.gelu else 1e-5)


def test_partial_sums_emulated_are_those_of_float64():
    """The kernel's part of a product with splits; the sum and the epilogue after it are XLA's."""
    product = make(Case(tokens=40, columns=192, bias=False, tile=Tile(32, 1, 1, 2, splits=3)))
    launch = lambda x, weights, epilogue, layer: matmul._launch(
        x, matmul._source(weights), epilogue, layer, product.tile, False
    )
    parts = run(launch, product, Epilogue(dtype=jnp.float32), (3, 128, 64), np.float32)
    np.testing.assert_allclose(parts[:, :, :40].sum(0).T, product.exact, rtol=0, atol=1e-5 * product.largest)
    assert not wide(parts[:, :, 40:]).any()
