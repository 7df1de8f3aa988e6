"""The cases of `python -m benchmarks.aot`: every kernel at DiT-XL/2's shapes, and whole sampler steps.

Limits of main loops are those of the prototypes in the design study (docs/kernels.md), in instructions of one warp and
step; limits of launches are a block's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot import steps
from benchmarks.aot.steps import Form, stacked
from pallas_kernels import selector, weights
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.mosaic.attention import attention
from pallas_kernels.mosaic.codebook_grad import codebook_grad
from pallas_kernels.mosaic.ln_modulate_quantize import ln_modulate_quantize
from pallas_kernels.mosaic.matmul import product
from pallas_kernels.mosaic.rotate_quantize import rotate_quantize
from pallas_kernels.mosaic.soft_decode import soft_decode
from pallas_kernels.tiles import Tile
from vq4dit_jax.networks.dit import variant
from vq4dit_jax.qarray.rules import BITS

LAYERS, WIDTH, HEADS, IMAGE_TOKENS = 28, 1152, 16, 256
_S = jax.ShapeDtypeStruct
_LAYER = _S((1,), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program and its limits: `mma` is the opcode of its longest main loop; None: no limit."""

    fn: Callable[..., Any]
    shapes: tuple[Any, ...]
    mma: str | None = "HGMMA"
    max_loop: int | None = None
    max_launches: int | None = None


def vq(rows: int, columns: int, bits: int | float, dtype: Any, paired: bool = False) -> Any:
    codewords, length = BITS[bits]
    codes = np.zeros((1, rows, columns // length), np.uint8)
    codebooks = jnp.zeros((1, 1, codewords, length), dtype)
    return stacked(weights.vq_weights(codes, codebooks, paired_rows=paired), 0, LAYERS)


def linear(w: Any, tokens: int, tile: Tile, *, gelu: bool = False, gate: bool = False, result: Any = None) -> Case:
    """One Linear with its epilogue, as a block has it."""
    small = jnp.dtype(w.dtype).itemsize == 1
    rows = w.rows
    vectors = dict(bias=_S((LAYERS, rows), jnp.float32))
    if small:
        vectors |= dict(row_scale=_S((LAYERS, rows), jnp.float32), token_scale=_S((tokens,), jnp.float32))
    if isinstance(w, weights.NibbleWeights):
        del vectors["row_scale"]
    if gate:
        columns = LAYERS * 6 * rows
        vectors |= dict(modulation=_S((16, columns), jnp.bfloat16), residual=_S((tokens, rows), jnp.bfloat16))
    if result is not None:
        vectors |= dict(out_scale=_S((LAYERS,), jnp.float32))
    how = dict(gelu=gelu, tokens=IMAGE_TOKENS, gate_stride=6 * rows, dtype=result or jnp.bfloat16)

    def fn(x: Any, w: Any, vectors: Any, layer: Any) -> jax.Array:
        return product(x, w, Epilogue(**vectors, **how), layer, tile)

    mma = {jnp.dtype(jnp.bfloat16): "HGMMA", jnp.dtype(jnp.int8): "IGMMA"}.get(jnp.dtype(w.dtype), "QGMMA")
    return Case(fn, (_S((tokens, w.columns), w.dtype), w, vectors, _LAYER), mma)


def _limited(case: Case, loop: int) -> Case:
    return dataclasses.replace(case, max_loop=loop)


def _products() -> dict[str, Case]:
    tile, hidden = Tile(128, 2, 1, 4), 4 * WIDTH
    int8, e4m3 = jnp.int8, jnp.float8_e4m3fn
    byte = weights.ByteWeights(_S((LAYERS, hidden, WIDTH), int8), WIDTH)
    steps = WIDTH // 128
    nibble = weights.NibbleWeights(
        _S((LAYERS, hidden // 64, steps * 32, 32), jnp.int32), _S((LAYERS, steps, hidden), jnp.float32), WIDTH
    )
    adaln = stacked(
        weights.vq_weights(
            np.zeros((1, 6 * WIDTH, WIDTH // 4), np.uint8), jnp.zeros((1, 1, 256, 4), jnp.bfloat16), table_bytes=32768
        ),
        1,
        LAYERS,
    )
    all_adaln = linear(adaln, 16, Tile(16, 2, 3, 8))
    all_adaln.shapes[2]["bias"] = _S((1, LAYERS * 6 * WIDTH), jnp.float32)
    return {
        "vq2 bf16 fc1": _limited(linear(vq(hidden, WIDTH, 2, jnp.bfloat16), 512, tile, gelu=True), 96),
        "vq2 bf16 fc1 256 tokens": linear(vq(hidden, WIDTH, 2, jnp.bfloat16), 4096, Tile(256, 2, 1, 4), gelu=True),
        "vq2 bf16 proj gate residual": linear(vq(WIDTH, WIDTH, 2, jnp.bfloat16), 4096, tile, gate=True),
        "vq2 bf16 fc2 split 3": linear(vq(WIDTH, hidden, 2, jnp.bfloat16), 512, Tile(128, 2, 1, 4, 3), gate=True),
        "vq3 bf16 fc1 6-bit codes": _limited(linear(vq(hidden, WIDTH, 3, jnp.bfloat16), 512, tile, gelu=True), 100),
        "vq1 bf16 fc1 d=8": linear(vq(hidden, WIDTH, 1, jnp.bfloat16), 512, tile, gelu=True),
        "w2a8 int8 qkv": _limited(linear(vq(3 * WIDTH, WIDTH, 2, int8), 4096, tile), 108),
        "w2a8 int8 fc1 to int8": linear(vq(hidden, WIDTH, 2, int8, True), 4096, tile, gelu=True, result=int8),
        "w2a8 int8 proj gate residual": linear(vq(WIDTH, WIDTH, 2, int8), 4096, tile, gate=True),
        "w2a8 e4m3 qkv": _limited(linear(vq(3 * WIDTH, WIDTH, 2, e4m3), 4096, tile), 108),
        "w2a8 e4m3 fc1 to e4m3": linear(vq(hidden, WIDTH, 2, e4m3, True), 4096, tile, gelu=True, result=e4m3),
        "w3a8 int8 fc1": linear(vq(hidden, WIDTH, 3, int8), 4096, tile, gelu=True),
        "w8a8 int8 fc1": _limited(linear(byte, 4096, tile, gelu=True), 52),
        "w4a8 int8 fc1": linear(nibble, 4096, tile, gelu=True),
        "adaLN of 28 layers": _limited(all_adaln, 300),
    }


def _others() -> dict[str, Case]:
    tokens, columns = 16 * IMAGE_TOKENS, LAYERS * 6 * WIDTH
    x, modulation = _S((tokens, WIDTH), jnp.bfloat16), _S((16, columns), jnp.bfloat16)
    hidden = _S((tokens, 4 * WIDTH), jnp.bfloat16)
    norm = functools.partial(
        ln_modulate_quantize, tokens=IMAGE_TOKENS, stride=6 * WIDTH, offsets=(0, WIDTH), dtype=jnp.int8
    )
    attend = functools.partial(attention, tokens=IMAGE_TOKENS, num_heads=HEADS)
    to_int8 = lambda qkv, layer, scale: attend(qkv, layer=layer, out_scale=scale, dtype=jnp.int8)
    qkv, codewords, length = _S((tokens, 3 * WIDTH), jnp.bfloat16), *BITS[2]
    shape = (2, 4 * WIDTH, WIDTH // length)
    candidates, ratios = _S(shape, jnp.uint8), _S(shape, jnp.float32)
    codebook, gradient = _S((1, codewords, length), jnp.float32), _S((4 * WIDTH, WIDTH), jnp.float32)
    return {
        "ln modulate int8": Case(norm, (x, modulation, _LAYER), None),
        "ln modulate e4m3": Case(functools.partial(norm, dtype=jnp.float8_e4m3fn), (x, modulation, _LAYER), None),
        "ln modulate int8 rotation 64": Case(functools.partial(norm, rotation=64), (x, modulation, _LAYER), None),
        "ln modulate int8 rotation 576": Case(functools.partial(norm, rotation=576), (x, modulation, _LAYER), None),
        "rotate 576 proj int8": Case(functools.partial(rotate_quantize, rotation=576, dtype=jnp.int8), (x,), None),
        "rotate 576 fc2 int8": Case(functools.partial(rotate_quantize, rotation=576, dtype=jnp.int8), (hidden,), None),
        "ln modulate bf16": Case(functools.partial(norm, dtype=jnp.bfloat16), (x, modulation, _LAYER), None),
        "attention bf16": Case(attend, (qkv,)),
        "attention to int8": Case(to_int8, (qkv, _LAYER, _S((LAYERS,), jnp.float32))),
        "codebook gradient fc1": Case(codebook_grad, (gradient, candidates, ratios, codebook), None),
        "soft weights fc1": Case(soft_decode, (codebook, candidates, ratios), None),
    }


def _step(size: int, batch: int, form: Form) -> Case:
    """A sampler step of XL/2 with guidance: 2 * batch rows."""
    model = variant("DiT-XL/2", input_size=size, dtype=jnp.bfloat16)
    fn, shapes = steps.step(model, batch, selector.H200)
    return Case(fn, (steps.prepared_shapes(model, form), *shapes), max_launches=11 if form.activations else 10)


@functools.cache
def cases() -> dict[str, Case]:
    """By name. This takes seconds, because a layer of each network is prepared."""
    w2, w2a8, w8a8 = Form(), Form("int8", ranges=True), Form("int8", "int8", ranges=True)
    whole = {
        "step 256 px batch 8 vq2": _step(32, 8, w2),
        "step 256 px batch 8 w2a8": _step(32, 8, w2a8),
        "step 256 px batch 8 w8a8": _step(32, 8, w8a8),
        "step 256 px batch 8 w8a8 balanced, rotated": _step(32, 8, Form("int8", "int8", rotation=576)),
        "step 256 px batch 8 w4a8 balanced, rotated": _step(32, 8, Form("int8", "int4", rotation=576)),
        "step 256 px batch 8 w4a8 balanced": _step(32, 8, Form("int8", "int4", ranges=True, rotation=0)),
        "step 256 px batch 1 vq2": _step(32, 1, w2),
        "step 256 px batch 1 w2a8": _step(32, 1, w2a8),
        "step 512 px batch 1 w2a8": _step(64, 1, w2a8),
    }
    return {**_products(), **_others(), **whole}
