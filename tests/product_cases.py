"""Products that several tests run: random operands of every class, and epilogue(X W^T) in float64 numpy, written out again."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import nibbles
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import Tile
from pallas_kernels.weights import ByteWeights, NibbleWeights, Weights, pair_rows, vq_weights

BF16, INT8, E4M3 = ml_dtypes.bfloat16, np.int8, ml_dtypes.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Case:
    """What differs between products. Letters as everywhere; `weights` is "vq", "bytes" or "nibbles".

    `image_tokens` is not 0 where there is a gate, with a residual and images of so many tokens; `table_bytes` is what the
    replicated codebook may fill; with an 8-bit `result` rows are paired; with `after` a scale and a shift follow GELU.
    """

    tokens: int = 32
    rows: int = 128
    columns: int = 128
    tile: Tile = Tile(32, 2, 1, 2)
    weights: str = "vq"
    dtype: Any = BF16
    length: int = 4
    codewords: int = 256
    groups: int = 1
    table_bytes: int = 4096
    layers: int = 2
    layer: int = 1
    scales: bool = False
    bias: bool = True
    gelu: bool = False
    image_tokens: int = 0
    result: Any = BF16
    seed: int = 0
    after: bool = False


@dataclasses.dataclass(frozen=True)
class Product:
    """The operands of `mosaic.matmul.product`, and what it has to give before the last rounding: `exact`, float64 (M, O).

    `rounded` is the sum of the magnitudes that are rounded to the type of the results, which a gated product is before the
    residual joins it; `largest` the largest magnitude on the way.
    """

    x: Any
    weights: Weights
    epilogue: Epilogue
    layer: Any
    tile: Tile
    exact: Any
    rounded: Any
    largest: float

    def check(self, y: Any, arithmetic: float = 1e-5) -> None:
        """bfloat16: within half a unit in the last place, and `arithmetic` of the largest magnitude for sums in float32.

        8 bits: hardly ever another number than the nearest, and then the next one.
        """
        y = np.asarray(y)
        assert y.shape == self.exact.shape
        if y.dtype == BF16:
            assert (np.abs(wide(y) - self.exact) <= 2**-8 * self.rounded + arithmetic * self.largest).all()
            return
        if y.dtype == INT8:
            steps = np.abs(y.astype(int) - np.rint(self.exact).astype(int))
        else:
            steps = np.abs(_place(y) - _place(self.exact.astype(E4M3)))
        assert steps.max() <= 1 and (steps > 0).mean() <= 0.01


def _place(a: Any) -> Any:
    """Among the numbers of float8_e4m3fn in ascending order, which is that of their bytes but for the sign."""
    magnitude = (a.view(np.int8) & 127).astype(int)
    return np.where(a.view(np.int8) < 0, -magnitude, magnitude)


def make(case: Case) -> Product:
    rng = np.random.default_rng(case.seed)
    eight_bits, paired = np.dtype(case.dtype).itemsize == 1, np.dtype(case.result).itemsize == 1
    x = operands(rng, case.dtype, case.tokens, case.columns)
    w, weights = _weights(rng, case, paired)
    vectors: dict[str, Any] = {}
    y = wide(x) @ w.T
    if case.scales or eight_bits:
        vectors["token_scale"] = (rng.uniform(0.5, 1.5, case.tokens) / np.abs(y).max()).astype(np.float32)
        y = y * wide(vectors["token_scale"])[:, None]
    if case.scales:
        row_scale = rng.uniform(0.5, 4, (case.layers, case.rows)).astype(np.float32)
        y = y * wide(row_scale)[case.layer]
        vectors["row_scale"] = pair_rows(row_scale) if paired else row_scale
    if case.bias:
        bias = rng.standard_normal((case.layers, case.rows)).astype(np.float32)
        y = y + wide(bias)[case.layer]
        vectors["bias"] = pair_rows(bias) if paired else bias
    gated, largest = np.zeros_like(y), np.abs(y).max()
    if case.gelu:
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    if case.after:
        own = {
            name: rng.uniform(0.25, 1, (case.layers, case.rows)).astype(np.float32)
            for name in ("after_scale", "after_shift")
        }
        y = y * wide(own["after_scale"])[case.layer] + wide(own["after_shift"])[case.layer]
        vectors |= {name: pair_rows(v) if paired else v for name, v in own.items()}
        largest = max(largest, np.abs(y).max())
    if case.image_tokens:
        images = case.tokens // case.image_tokens
        # Two chunks a layer, of which the second is the gate; a row more than images.
        modulation = rng.standard_normal((images + 1, 2 * case.layers * case.rows)).astype(BF16)
        first = 2 * case.layer * case.rows + case.rows
        gates = wide(modulation)[:images, first : first + case.rows]
        residual = rng.standard_normal((case.tokens, case.rows)).astype(BF16)
        gated = y * np.repeat(gates, case.image_tokens, axis=0)
        y, largest = gated + wide(residual), max(largest, np.abs(gated).max())
        vectors |= {"modulation": modulation, "residual": residual}
        vectors |= {"gate_stride": 2 * case.rows, "gate_offset": case.rows, "tokens": case.image_tokens}
    if paired:
        # So that some results saturate.
        least, end = {INT8: (-128, 127), E4M3: (-448, 448)}[case.result]
        out_scale = (0.7 * np.abs(y).max() / end * rng.uniform(1, 1.1, case.layers)).astype(np.float32)
        y = np.clip(y / wide(out_scale)[case.layer], least, end)
        vectors["out_scale"] = out_scale
    vectors = {name: jnp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in vectors.items()}
    finish = Epilogue(**vectors, gelu=case.gelu, dtype=jnp.dtype(case.result))
    layer = jnp.asarray([case.layer], jnp.int32)
    return Product(jnp.asarray(x), weights, finish, layer, case.tile, y, np.abs(y) + np.abs(gated), largest)


def operands(rng: np.random.Generator, dtype: Any, *shape: int) -> Any:
    """Random numbers that a dtype of operands holds exactly."""
    if dtype == INT8:
        return rng.integers(-127, 128, shape).astype(INT8)
    return rng.standard_normal(shape).astype(dtype)


def wide(a: Any) -> Any:
    return np.asarray(a).astype(np.float64)


def _weights(rng: np.random.Generator, case: Case, paired: bool) -> tuple[Any, Weights]:
    """W (O, I) of the layer in float64, and the packed stack."""
    shape = (case.layers, case.rows, case.columns)
    filled = ((0, 0), (0, 0), (0, -case.columns % 128))
    if case.weights == "bytes":
        w = operands(rng, case.dtype, *shape)
        values = np.pad(pair_rows(w) if paired else w, filled)
        return wide(w[case.layer]), ByteWeights(jnp.asarray(values), case.columns, paired)
    if case.weights == "nibbles":
        w = rng.integers(-8, 8, shape).astype(INT8)
        scales = rng.uniform(0.5, 2, (case.layers, -(-case.columns // 128), case.rows)).astype(np.float32)
        by_row = pair_rows(scales.swapaxes(1, 2)).swapaxes(1, 2) if paired else scales
        values = nibbles.pack(np.pad(w, filled), paired)
        packed = NibbleWeights(jnp.asarray(values), jnp.asarray(by_row), case.columns, paired)
        by_column = np.repeat(wide(scales)[case.layer].T, 128, axis=1)[:, : case.columns]
        return wide(w[case.layer]) * by_column, packed
    codes = rng.integers(0, case.codewords, (*shape[:2], case.columns // case.length)).astype(np.uint8)
    codebooks = operands(rng, case.dtype, case.layers, case.groups, case.codewords, case.length)
    own = np.repeat(wide(codebooks)[case.layer], case.rows // case.groups, axis=0)
    w = own[np.arange(case.rows)[:, None], codes[case.layer]].reshape(case.rows, case.columns)
    packed = vq_weights(codes, jnp.asarray(codebooks), paired_rows=paired, table_bytes=case.table_bytes)
    return w, packed
