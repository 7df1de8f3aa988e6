"""Random operands, none of them zero, of the products of a DiT, and their products in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import nibbles, selector
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import ByteWeights, NibbleWeights, Weights, pair_rows, vq_weights

BF16, INT8, E4M3 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
LIMIT = {INT8: 127.0, E4M3: 448.0}
LAYER = 1
"""Index of the layer of a stack that is used: not the first."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Weights with operands in `dtype`: from codebooks with K = `codewords` of d = `length`, else of `bits` each."""

    dtype: Any
    codewords: int = 0
    length: int = 0
    bits: int = 8


KINDS = {
    "VQ2": Kind(BF16, 256, 4),
    "VQ3": Kind(BF16, 64, 2),
    "W2A8": Kind(INT8, 256, 4),
    "W2A8 e4m3": Kind(E4M3, 256, 4),
    "W8A8": Kind(INT8),
    "W4A8": Kind(INT8, bits=4),
    "W3A8": Kind(INT8, 64, 2),
    "W3A8 e4m3": Kind(E4M3, 64, 2),
    "W8A8 e4m3": Kind(E4M3),
}


def linears(width: int) -> dict[str, tuple[int, int, int]]:
    """(O, I, G) of the Linears of a block of a DiT with D = `width`."""
    return {
        "qkv": (3 * width, width, 3),
        "proj": (width, width, 1),
        "fc1": (4 * width, width, 1),
        "fc2": (width, 4 * width, 1),
        "adaLN": (6 * width, width, 1),
    }


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A stack of packed W with scales (L, O) in W's order (None: none), and `dense(layer, group)`, rows in float64."""

    kind: Kind
    weights: Weights
    row_scale: np.ndarray | None
    dense: Callable[[int, int], np.ndarray]

    @property
    def packed_bytes(self) -> int:
        """Of one layer, as read from memory."""
        parts = [v for v in vars(self.weights).values() if hasattr(v, "nbytes")]
        return sum(part.nbytes for part in parts) // self.weights.layers


def random_matrix(
    kind: Kind,
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    groups: int = 1,
    layers: int = 2,
    paired: bool = False,
    table_bytes: int = 16384,
) -> Matrix:
    """Whose products with `random_tokens` have a standard deviation of about 1. `paired`: for 8-bit results."""
    spread = columns**-0.5 / (73 * 73 if kind.dtype == INT8 else 1)  # 73: of integers from -127 to 127
    row_scale = rng.uniform(0.5, 1.5, (layers, rows)).astype(np.float32) * np.float32(spread)
    if kind.codewords:
        codes = rng.integers(0, kind.codewords, (layers, rows, columns // kind.length), dtype=np.uint8)
        shape = (layers, groups, kind.codewords, kind.length)
        codebooks = _random(rng, kind.dtype, shape, spread if kind.dtype == BF16 else 1.0)
        wide, by_group = _wide(codebooks), codes.reshape(layers, groups, rows // groups, -1)
        dense = lambda layer, group: wide[layer, group][by_group[layer, group]].reshape(-1, columns)
        weights = vq_weights(codes, codebooks, paired_rows=paired, table_bytes=table_bytes)
        return Matrix(kind, weights, None if kind.dtype == BF16 else row_scale, dense)
    if kind.bits == 8:
        values = _random(rng, kind.dtype, (layers, rows, columns))
        dense = lambda layer, group: _wide(values[layer])
        return Matrix(kind, ByteWeights(pair_rows(values) if paired else values, columns, paired), row_scale, dense)
    values = rng.integers(-8, 8, (layers, rows, columns), dtype=np.int8)
    scale = rng.uniform(0.5, 1.5, (layers, rows, columns // nibbles.COLUMNS)).astype(np.float32)
    scale *= np.float32(spread * 73 / 4.6)  # 4.6: of integers from -8 to 7
    dense = lambda layer, group: values[layer] * np.repeat(scale[layer], nibbles.COLUMNS, axis=1).astype(np.float64)
    scales = np.ascontiguousarray((pair_rows(scale) if paired else scale).swapaxes(1, 2))
    packed = jnp.asarray(nibbles.pack(values, paired))
    return Matrix(kind, NibbleWeights(packed, jnp.asarray(scales), columns, paired), None, dense)


def random_tokens(rng: np.random.Generator, dtype: Any, tokens: int, columns: int) -> Any:
    return _random(rng, dtype, (tokens, columns))


def _random(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...], spread: float = 1.0) -> Any:
    if dtype == INT8:
        return jnp.asarray(rng.integers(-127, 128, shape, dtype=np.int8))
    return jnp.asarray(spread * rng.standard_normal(shape, np.float32), dtype)


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32)).astype(np.float64)


def exact_product(x: Any, matrix: Matrix) -> np.ndarray:
    """x W^T of layer `LAYER` in float64, no scales."""
    wide = _wide(x)
    return np.concatenate([wide @ matrix.dense(LAYER, g).T for g in range(matrix.weights.groups)], axis=1)


def plain_epilogue(matrix: Matrix, tokens: int) -> Epilogue:
    """An epilogue with the scales of 8-bit operands alone."""
    if matrix.kind.dtype == BF16:
        return Epilogue()
    row_scale = None if matrix.row_scale is None else jnp.asarray(matrix.row_scale)
    return Epilogue(row_scale=row_scale, token_scale=jnp.ones(tokens, jnp.float32))


def tile_of(weights: Weights, tokens: int, dry: bool, **how: Any) -> Tile:
    """The selector's choice here (in a dry run: on an H200); RuntimeError with its reason where it takes no kernel."""
    choice = selector.product(selector.H200 if dry else selector.facts(), weights, tokens, **how)
    if choice.tile is None:
        raise RuntimeError(f"no kernel: {choice.reason}")
    return choice.tile
