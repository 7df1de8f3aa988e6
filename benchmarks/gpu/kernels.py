"""Every kernel against float64 on fresh random operands of DiT-XL/2's shapes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.operands import (
    BF16,
    E4M3,
    INT8,
    KINDS,
    LAYER,
    LIMIT,
    exact_product,
    linears,
    random_matrix,
    random_tokens,
    tile_of,
)
from pallas_kernels import epilogue
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.attention import attention
from pallas_kernels.mosaic.codebook_grad import codebook_grad
from pallas_kernels.mosaic.ln_modulate_quantize import ln_modulate_quantize
from pallas_kernels.mosaic.matmul import product
from pallas_kernels.mosaic.soft_decode import soft_decode
from pallas_kernels.weights import pair_rows

Parts = dict[str, tuple[Any, Any, float]]
"""Name of a result -> (the kernel's result, the right one, tolerance relative to the largest number)."""
Check = tuple[str, Callable[[], Parts]]

_ROUNDING = {BF16: 4e-3, INT8: 0.5 / 127 + 5e-4, E4M3: 16 / 448 + 5e-4}
"""Half a step at the largest number, and a little for float32 sums."""


def compare(got: Any, wanted: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Errors relative to the largest number, and of norms. NaN is never right."""
    got, wanted = np.asarray(got).astype(np.float64), np.asarray(wanted, np.float64)
    difference = got - wanted
    error = float(np.abs(difference).max() / np.abs(wanted).max())
    return {
        "max_error_relative": error,
        "norm_error_relative": float(np.linalg.norm(difference) / np.linalg.norm(wanted)),
        "tolerance": tolerance,
        "ok": error <= tolerance,
    }


def suite(name: str, dry: bool, skip: int) -> Iterator[dict[str, Any]]:
    """Records of all checks of a suite but the first `skip`: first the name alone, before it runs, then the result."""
    checks = {
        "bf16": lambda: products(dry, ("VQ2", "VQ3")) + stacks(dry, ("VQ2", "VQ3")),
        "8-bit": lambda: products(dry, ("W2A8", "W2A8 e4m3", "W8A8", "W4A8")) + stacks(dry, ("W8A8", "W4A8")),
        "other kinds": lambda: products(dry, ("W3A8", "W3A8 e4m3", "W8A8 e4m3")),
        "others": lambda: norms(dry) + attentions(dry) + soft(dry),
    }[name]()
    for name, check in checks[skip:]:
        yield {"begin": name}
        try:
            parts = check()
            record = {part: compare(*values) for part, values in parts.items()}
            yield {"section": "checks", "name": name, "ok": all(r["ok"] for r in record.values()), "results": record}
        except Exception as e:  # a kernel that does not compile or run is a result, and the next one may run
            yield {"section": "checks", "name": name, "ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}


def products(dry: bool, kinds: tuple[str, ...]) -> list[Check]:
    """Of each kind: bias; GELU; gate and residual; 8-bit results; few tokens, many, and a number that no tile divides."""
    image = 16 if dry else 256
    shapes = [("qkv", 512, "bias"), ("fc1", 2048, "gelu"), ("fc2", 64, "bias"), ("proj", 512, "gated")]
    shapes += [("fc2", 4096, "gated"), ("proj", 50, "bias"), ("fc1", 16, "gelu"), ("fc1", 512, "bytes")]
    shapes = [("proj", 16, "gated"), ("proj", 16, "bytes")] if dry else shapes
    return [
        (f"product {kind} {layer} M={tokens} {finish}",
         functools.partial(_product, dry, kind, layer, tokens, finish, image))
        for kind in kinds[: 1 if dry else None]
        for layer, tokens, finish in shapes
        if not (finish == "bytes" and KINDS[kind].dtype == BF16)
    ]  # fmt: skip


def _product(dry: bool, kind_name: str, name: str, tokens: int, finish: str, image: int) -> Parts:
    rng = np.random.default_rng()
    kind, (rows, columns, groups) = KINDS[kind_name], (64, 128, 1) if dry else linears(1152)[name]
    groups, small = groups if kind.codewords else 1, finish == "bytes"
    matrix = random_matrix(kind, rng, rows, columns, groups=groups, paired=small)
    x = random_tokens(rng, kind.dtype, tokens, columns)
    vectors = {"bias": rng.standard_normal((2, rows), np.float32)}
    if matrix.row_scale is not None:
        vectors["row_scale"] = matrix.row_scale
    fields = {} if kind.dtype == BF16 else {"token_scale": jnp.asarray(rng.uniform(0.5, 1.5, tokens), jnp.float32)}
    if finish == "gated":
        fields |= {
            "modulation": jnp.asarray(rng.standard_normal((tokens // image, 4 * rows)), jnp.bfloat16),
            "residual": jnp.asarray(rng.standard_normal((tokens, rows)), jnp.bfloat16),
            "tokens": image,
            "gate_stride": 2 * rows,
            "gate_offset": rows,
        }
    fields["gelu"] = finish in ("gelu", "bytes")
    acc = exact_product(x, matrix).astype(np.float32)
    plain = Epilogue(**fields, **{name: jnp.asarray(v) for name, v in vectors.items()}, dtype=jnp.float32)
    wanted = np.asarray(epilogue.apply(jnp.asarray(acc), plain, jnp.int32(LAYER)))
    scale = np.float32(1)
    if small:
        scale = np.float32(np.abs(wanted).max() / LIMIT[kind.dtype])
        fields |= {"out_scale": jnp.asarray([1, scale], jnp.float32), "dtype": kind.dtype}
    fields |= {name: jnp.asarray(pair_rows(v) if small else v) for name, v in vectors.items()}
    tile = tile_of(
        matrix.weights, tokens, dry, result_bytes=1 if small else 2, image_tokens=image if finish == "gated" else 0
    )
    y = jax.jit(functools.partial(product, tile=tile, interpret=dry))(
        x, matrix.weights, Epilogue(**fields), jnp.full(1, LAYER, jnp.int32)
    )
    result = np.asarray(y.astype(jnp.float32)) * scale
    rounding = _ROUNDING[kind.dtype if small else BF16]
    # Before the sum with the residual a kernel rounds once more, and the rounded term may be larger than the sum.
    return {str(tile): (result, wanted, 1.5 * rounding if finish == "gated" else rounding)}


def stacks(dry: bool, kinds: tuple[str, ...]) -> list[Check]:
    """adaLN of all blocks in one launch."""
    check = lambda kind, tokens: (f"adaLN stack {kind} M={tokens}", functools.partial(_stack, dry, kind, tokens))
    return [check("VQ2", 2)] * ("VQ2" in kinds) if dry else [check(kind, m) for kind in kinds for m in (2, 3, 8, 16)]


def _stack(dry: bool, kind_name: str, tokens: int) -> Parts:
    rng = np.random.default_rng()
    matrix, x = stack_operands(dry, kind_name, tokens, rng)
    scale = matrix.row_scale if matrix.row_scale is not None else np.ones((1, matrix.weights.rows), np.float32)
    bias = rng.standard_normal(scale.shape, np.float32)
    wide = np.asarray(x.astype(jnp.float32)).astype(np.float64)
    acc = np.concatenate([wide @ matrix.dense(0, g).T for g in range(matrix.weights.groups)], axis=1)
    given = None if matrix.row_scale is None else jnp.asarray(scale)
    tile = tile_of(matrix.weights, tokens, dry)
    y = jax.jit(functools.partial(product, tile=tile, interpret=dry))(
        x, matrix.weights, Epilogue(bias=jnp.asarray(bias), row_scale=given), jnp.zeros(1, jnp.int32)
    )
    return {str(tile): (y.astype(jnp.float32), acc * scale + bias, _ROUNDING[BF16])}


def stack_operands(dry: bool, kind_name: str, tokens: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """The adaLN layers of all blocks as one matrix, codebooks in the size that `prepare_for_inference` gives them."""
    kind, depth = KINDS[kind_name], 2 if dry else 28
    rows, columns, _ = (64, 128, 1) if dry else linears(1152)["adaLN"]
    groups = depth if kind.codewords else 1
    matrix = random_matrix(kind, rng, depth * rows, columns, groups=groups, layers=1, table_bytes=32768)
    return matrix, random_tokens(rng, kind.dtype, tokens, columns)


def norms(dry: bool) -> list[Check]:
    shapes = [(1, 4, 64)] if dry else [(2, 256, 1152), (16, 1024, 1152), (3, 10, 1152)]
    return [
        (f"ln_modulate_quantize {jnp.dtype(dtype).name} {images}x{tokens}x{width}",
         functools.partial(_norm, dry, dtype, images, tokens, width))
        for dtype in ((INT8,) if dry else (INT8, E4M3, BF16))
        for images, tokens, width in shapes
    ]  # fmt: skip


def norm_operands(images: int, tokens: int, width: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """x, the modulations of two layers, and which of the two."""
    x = rng.standard_normal((images * tokens, width), np.float32) * rng.uniform(0.1, 30, (images * tokens, 1)) + 1
    modulation = 0.5 * rng.standard_normal((images, 12 * width), np.float32)
    return jnp.asarray(x, BF16), jnp.asarray(modulation, BF16), jnp.full(1, LAYER, jnp.int32)


def norm_layout(tokens: int, width: int) -> dict[str, Any]:
    return dict(tokens=tokens, stride=6 * width, offsets=(3 * width, 4 * width))


def _norm(dry: bool, dtype: Any, images: int, tokens: int, width: int) -> Parts:
    x, modulation, layer = norm_operands(images, tokens, width, np.random.default_rng())
    how = norm_layout(tokens, width) | ({"interpret": compat.interpret_params()} if dry else {})
    out = jax.jit(functools.partial(ln_modulate_quantize, dtype=dtype, **how))(x, modulation, layer)
    wide, table = (np.asarray(a.astype(jnp.float32)).astype(np.float64) for a in (x, modulation))
    normed = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    shift, scale = (np.repeat(table[:, c : c + width], tokens, axis=0) for c in (9 * width, 10 * width))
    wanted = normed * (1 + scale) + shift
    if dtype == BF16:
        return {"values": (out.astype(jnp.float32), wanted, _ROUNDING[BF16])}
    values, token_scale = (np.asarray(a.astype(jnp.float32)) for a in out)
    return {
        "values": (values * token_scale[:, None], wanted, _ROUNDING[dtype]),
        "token_scale": (token_scale, np.abs(wanted).max(1) / LIMIT[dtype], 1e-5),
    }


def attentions(dry: bool) -> list[Check]:
    shapes = [(1, 64, 2, 16)] if dry else [(2, 256, 16, 72), (2, 1024, 16, 72), (3, 64, 6, 64)]
    return [
        (f"attention {jnp.dtype(dtype).name} {images}x{tokens}, {heads} heads of {size}",
         functools.partial(_attention, dry, dtype, images, tokens, heads, size))
        for dtype in ((BF16,) if dry else (BF16, INT8, E4M3))
        for images, tokens, heads, size in shapes
    ]  # fmt: skip


def _attention(dry: bool, dtype: Any, images: int, tokens: int, heads: int, size: int) -> Parts:
    qkv = random_tokens(np.random.default_rng(), BF16, images * tokens, 3 * heads * size)
    split = np.asarray(qkv.astype(jnp.float32)).astype(np.float64).reshape(images, tokens, 3, heads, size)
    q, k, v = split.transpose(2, 0, 3, 1, 4)
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(size)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(images * tokens, -1)
    scale, how = np.float32(1), {}
    if dtype != BF16:
        scale = np.float32(np.abs(wanted).max() / LIMIT[dtype])
        how = dict(dtype=dtype, layer=jnp.full(1, LAYER, jnp.int32), out_scale=jnp.asarray([1, scale], jnp.float32))
    out = jax.jit(functools.partial(attention, tokens=tokens, num_heads=heads, interpret=dry, **how))(qkv)
    # The weights of the values are rounded too, before the second product.
    return {"values": (np.asarray(out.astype(jnp.float32)) * scale, wanted, _ROUNDING[dtype] + 2e-3)}


def soft(dry: bool) -> list[Check]:
    layers, rows, columns = (1, 8, 256) if dry else (2, 4608, 1152)
    return [
        (f"{name} K={codewords} d={length}", functools.partial(check, dry, layers, rows, columns, codewords, length))
        for codewords, length in (((256, 4),) if dry else ((256, 4), (64, 2)))
        for name, check in (("soft_decode", _soft_decode), ("codebook_grad", _codebook_grad))
    ]


def soft_operands(
    layers: int, rows: int, columns: int, codewords: int, length: int, rng: np.random.Generator
) -> tuple[Any, Any, Any, Any]:
    """Gradient, two candidates of every sub-vector (equal here and there), ratios, codebooks."""
    candidates = rng.integers(0, codewords, (layers, 2, rows, columns // length), dtype=np.uint8)
    candidates[:, 0, :, ::5] = candidates[:, 1, :, ::5]
    first = rng.uniform(0.05, 0.95, candidates[:, 0].shape).astype(np.float32)
    return (
        jnp.asarray(rng.standard_normal((layers, rows, columns), np.float32)),
        jnp.asarray(candidates),
        jnp.asarray(np.stack([first, 1 - first], axis=1)),
        jnp.asarray(rng.standard_normal((layers, 1, codewords, length), np.float32)),
    )


def _soft_decode(dry: bool, layers: int, *shape: int) -> Parts:
    _, candidates, ratios, codebook = soft_operands(layers, *shape, np.random.default_rng())
    how = {"interpret": compat.interpret_params()} if dry else {}
    table, codes, r = (np.asarray(a) for a in (codebook, candidates, ratios))
    wanted = np.stack([(r[i, ..., None].astype(np.float64) * table[i, 0][codes[i]]).sum(0) for i in range(layers)])
    wanted = wanted.reshape(layers, *shape[:2])
    parts = {}
    for dtype, tolerance in ((jnp.float32, 1e-5), (BF16, _ROUNDING[BF16]))[: 1 if dry else None]:
        out = jax.jit(functools.partial(soft_decode, dtype=dtype, **how))(codebook, candidates, ratios)
        parts[jnp.dtype(dtype).name] = (out.astype(jnp.float32), wanted, tolerance)
    return parts


def _codebook_grad(dry: bool, layers: int, rows: int, columns: int, codewords: int, length: int) -> Parts:
    operands = soft_operands(layers, rows, columns, codewords, length, np.random.default_rng())
    how = {"interpret": compat.interpret_params()} if dry else {}
    by_codebook, by_ratios = jax.jit(functools.partial(codebook_grad, **how))(*operands)
    gradient, codes, r, table = (np.asarray(a) for a in operands)
    vectors = gradient.reshape(layers, 1, rows, -1, length).astype(np.float64)
    wanted = np.zeros((layers, 1, codewords, length))
    for i in range(layers):
        weighted = (r[i, ..., None] * vectors[i]).reshape(-1, length)
        for j in range(length):
            wanted[i, 0, :, j] = np.bincount(codes[i].reshape(-1), weighted[:, j], codewords)
    wanted_ratios = np.stack([(table[i, 0][codes[i]] * vectors[i]).sum(-1) for i in range(layers)])
    return {"codebook": (by_codebook, wanted, 1e-5), "ratios": (by_ratios, wanted_ratios, 1e-5)}
