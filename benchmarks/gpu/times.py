"""Times of the kernels beside XLA's form of the same and the hardware's floor.

Each function is a generator: it compiles what needs no GPU, yields `timing.READY`, and then, alone on the GPU, measures and
yields records. XLA's own products are compiled after that, because XLA times candidates while it compiles them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import kernels, timing
from benchmarks.gpu.operands import (
    BF16,
    E4M3,
    INT8,
    KINDS,
    linears,
    plain_epilogue,
    random_matrix,
    random_tokens,
    tile_of,
)
from pallas_kernels import ops, reference_norm, reference_soft, soft_decode
from pallas_kernels.mosaic import codebook_grad as codebook_grad_kernel
from pallas_kernels.mosaic import ln_modulate_quantize as norm_kernel
from pallas_kernels.mosaic import soft_decode as soft_decode_kernel
from pallas_kernels.mosaic.attention import attention
from pallas_kernels.mosaic.matmul import product
from pallas_kernels.tiles import Tile

_KINDS = ("VQ2", "VQ3", "W2A8", "W2A8 e4m3", "W8A8", "W4A8")
_TOKENS = (16, 512, 2048, 4096, 2, 64, 16384)
"""Most important first: the run may end before the last."""


def _product(dry: bool, tile: Tile) -> Callable[..., Any]:
    """The kernel; in a dry run, whose times mean nothing, XLA's form."""
    return ops.dense_linear if dry else functools.partial(product, tile=tile)


def bf16_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product: cuBLAS, or XLA's own kernel where that is faster."""
    return jnp.matmul(x, w)


_SWEPT = {("fc1", 512), ("fc1", 4096), ("fc2", 16), ("fc2", 512), ("proj", 512), ("proj", 4096), ("qkv", 4096)}
"""Products that other tiles than the chosen one are tried for, with VQ2 and W2A8."""
_CANDIDATES = [
    Tile(tokens, warpgroups, row_tiles, stages, splits)
    for tokens, warpgroups, row_tiles, stages in (
        (16, 2, 3, 4), (64, 2, 1, 4), (64, 3, 1, 4), (128, 2, 1, 4), (128, 3, 1, 4), (256, 2, 1, 3)
    )
    for splits in (1, 3)
]  # fmt: skip


def linear(name: str, dry: bool) -> Iterator[Any]:
    """One Linear of XL/2 at every M: bfloat16 through XLA, and every kind of packed weights; no bias, no GELU."""
    rng = np.random.default_rng()
    rows, columns, groups = linears(128 if dry else 1152)[name]
    kinds = _KINDS
    # adaLN has a row of X for each image.
    counts = (32,) if dry else tuple(m for m in _TOKENS if m <= 64 or name != "adaLN")
    matrices = {
        kind: random_matrix(KINDS[kind], rng, rows, columns, groups=groups if KINDS[kind].codewords else 1, layers=1)
        for kind in kinds
    }
    most = {dtype: random_tokens(rng, dtype, max(counts), columns) for dtype in (BF16, INT8, E4M3)}
    layer = jnp.zeros(1, jnp.int32)

    def tile_for(kind: str, tokens: int) -> Tile:
        return tile_of(matrices[kind].weights, tokens, dry)

    def prepare(kind: str, tokens: int, tile: Tile | None = None) -> Callable[[], Any]:
        matrix = matrices[kind]
        operands = most[matrix.kind.dtype][:tokens], matrix.weights, plain_epilogue(matrix, tokens), layer
        return functools.partial(_compile(_product(dry, tile or tile_for(kind, tokens)), *operands), *operands)

    swept = [m for m in counts if dry or (name, m) in _SWEPT]
    wanted = [(kind, m, None) for m in counts for kind in kinds]
    wanted += [(kind, m, tile) for m in swept for kind in ("VQ2", "W2A8") for tile in _CANDIDATES]
    prepared = _in_threads({key: functools.partial(prepare, *key) for key in wanted})
    yield timing.READY
    dense = random_tokens(rng, BF16, columns, rows)
    for tokens in counts:
        x = most[BF16][:tokens]
        found = {kind: prepared[kind, tokens, None] for kind in kinds}
        calls = {"bf16": functools.partial(_compile(bf16_product, x, dense), x, dense)}
        calls |= {kind: call for kind, call in found.items() if callable(call)}
        floors = {}
        for kind in calls:
            small = kind != "bf16" and jnp.dtype(KINDS[kind].dtype).itemsize == 1
            weights = 2 * rows * columns if kind == "bf16" else matrices[kind].packed_bytes
            moved = tokens * columns * (1 if small else 2) + weights + 2 * tokens * rows
            floors[kind] = timing.floors(2 * tokens * rows * columns, moved, _device(), small)
        yield {
            **measured(name, {"M": tokens, "O": rows, "I": columns}, calls, floors, dry),
            "tiles": {kind: str(tile_for(kind, tokens)) for kind in calls if kind != "bf16"},
            "errors": {kind: str(call)[:500] for kind, call in found.items() if not callable(call)},
        }
    for tokens in swept:
        for kind in ("VQ2", "W2A8"):
            chosen = str(tile_for(kind, tokens))
            # A tile that does not divide the shape, or takes too much shared memory, is no candidate.
            made = {chosen: prepared[kind, tokens, None]} | {str(t): prepared[kind, tokens, t] for t in _CANDIDATES}
            samples, clock = timing.kernel_times(
                {k: call for k, call in made.items() if callable(call)}, 3 if dry else 10
            )
            ms = {tile: timing.summary(found)["median"] for tile, found in samples.items()}
            best = min(ms, key=ms.get)
            yield {
                "section": "tiles", "operation": name, "kind": kind, "M": tokens, "clock": clock, "chosen": chosen,
                "best": best, "chosen_over_best": ms.get(chosen, float("nan")) / ms[best], "ms": ms,
            }  # fmt: skip


def measured(
    operation: str, shape: dict[str, int], calls: timing.Calls, floors: Mapping[str, dict[str, float]], dry: bool
) -> dict[str, Any]:
    """A record: of each call the median and quartiles of its kernels, bursts by the host's clock, the floor, and how many
    times faster than the first call it is."""
    samples, clock = timing.kernel_times(calls, 3 if dry else 20)
    bursts = timing.wall_times(calls, jax.block_until_ready, bursts=3, burst_ms=10)
    ms = {name: timing.summary(found) for name, found in samples.items()}
    base = next(iter(ms.values()))["median"]
    for name, entry in ms.items():
        entry |= {"burst_median": timing.summary(bursts[name])["median"], "floor": floors[name]}
        entry["speedup"] = base / entry["median"]
    return {"section": "times", "operation": operation, "shape": shape, "clock": clock, "ms": ms}


def others(_: str, dry: bool) -> Iterator[Any]:
    """adaLN of all blocks; LayerNorm with modulation and quantization; attention; soft weights and their gradient."""
    rng = np.random.default_rng()
    yield timing.READY
    for measure in (_adaln, _norms, _attention, _soft):
        yield from measure(dry, rng)


def _adaln(dry: bool, rng: np.random.Generator) -> Iterator[Any]:
    for tokens in (2,) if dry else (2, 16):
        calls, floors = {}, {}
        for kind in ("VQ2", "VQ3"):
            matrix, x = kernels.stack_operands(dry, kind, tokens, rng)
            results = 2 * tokens * matrix.weights.rows
            if not calls:
                dense = random_tokens(rng, BF16, matrix.weights.columns, matrix.weights.rows)
                calls["bf16"] = functools.partial(_compile(bf16_product, x, dense), x, dense)
                floors["bf16"] = _memory_floor(dense, x, results)
            operands = x, matrix.weights, plain_epilogue(matrix, tokens), jnp.zeros(1, jnp.int32)
            run = _compile(_product(dry, tile_of(matrix.weights, tokens, dry)), *operands)
            calls[kind] = functools.partial(run, *operands)
            floors[kind] = _memory_floor(matrix.packed_bytes, x, results)
        shape = {"M": tokens, "O": matrix.weights.rows, "I": matrix.weights.columns}
        yield measured("adaLN of all blocks", shape, calls, floors, dry)


def _norms(dry: bool, rng: np.random.Generator) -> Iterator[Any]:
    for images, tokens, width in [(2, 16, 128)] if dry else [(2, 256, 1152), (16, 256, 1152), (16, 1024, 1152)]:
        operands = kernels.norm_operands(images, tokens, width, rng)
        calls, floors = {}, {}
        for dtype in (BF16, INT8, E4M3):
            how = dict(dtype=dtype, **kernels.norm_layout(tokens, width))
            for form, module in {"xla": reference_norm, "kernel": reference_norm if dry else norm_kernel}.items():
                run = _compile(functools.partial(module.ln_modulate_quantize, **how), *operands)
                name = f"{form} {jnp.dtype(dtype).name}"
                calls[name] = functools.partial(run, *operands)
                floors[name] = _memory_floor(operands[0], images * tokens * width * jnp.dtype(dtype).itemsize)
        yield measured("ln_modulate_quantize", {"images": images, "tokens": tokens, "D": width}, calls, floors, dry)


def _attention(dry: bool, rng: np.random.Generator) -> Iterator[Any]:
    """Beside the library that `ops.attention` takes (cuDNN's or XLA's), with the division of qkv into three."""
    for images, tokens, heads, size in (
        [(1, 64, 2, 16)] if dry else [(2, 256, 16, 72), (16, 256, 16, 72), (2, 1024, 16, 72), (16, 1024, 16, 72)]
    ):
        qkv = random_tokens(rng, BF16, images * tokens, 3 * heads * size)

        def library(qkv: jax.Array) -> jax.Array:
            q, k, v = jnp.moveaxis(qkv.reshape(images, tokens, 3, heads, size), 2, 0)
            return ops.attention(q, k, v).reshape(images * tokens, heads * size)

        kernel = functools.partial(attention, tokens=tokens, num_heads=heads)
        forms = {"library": library, "kernel": library if dry else kernel}
        calls = {form: functools.partial(_compile(run, qkv), qkv) for form, run in forms.items()}
        flops, moved = 4 * images * heads * tokens * tokens * size, qkv.nbytes * 4 // 3
        floor = timing.floors(flops, moved, _device(), False)
        shape = {"images": images, "tokens": tokens, "heads": heads, "H": size}
        yield measured("attention", shape, calls, dict.fromkeys(calls, floor), dry)


def _soft(dry: bool, rng: np.random.Generator) -> Iterator[Any]:
    rows, columns = (8, 256) if dry else (4608, 1152)
    operands = kernels.soft_operands(1, rows, columns, 256, 4, rng)
    gradient, candidates, ratios, codebook = (a[0] for a in operands)
    xla_decode = lambda codebook, candidates, ratios: soft_decode(codebook, candidates.astype(jnp.int32), ratios)
    forward = {"xla": xla_decode, "kernel": xla_decode if dry else soft_decode_kernel.soft_decode}
    scatter, by_products = reference_soft.codebook_grad, reference_soft.codebook_grad_by_products
    backward = {"xla, segment sum": scatter, "xla, products": by_products}
    backward["kernel"] = scatter if dry else codebook_grad_kernel.codebook_grad
    for name, forms, given, results in (
        ("soft_decode", forward, (codebook, candidates, ratios), gradient.nbytes),
        ("codebook_grad", backward, (gradient, candidates, ratios, codebook), ratios.nbytes),
    ):
        calls = {form: functools.partial(_compile(run, *given), *given) for form, run in forms.items()}
        floors = dict.fromkeys(calls, _memory_floor(*given, results))
        yield measured(name, {"O": rows, "I": columns, "K": 256, "d": 4, "n": 2}, calls, floors, dry)


def _memory_floor(*moved: Any) -> dict[str, float]:
    """Of arrays, and of numbers of bytes."""
    total = sum(part if isinstance(part, int) else part.nbytes for part in moved)
    return timing.floors(0.0, total, _device(), False)


def _device() -> str:
    return jax.devices()[0].device_kind


def _compile(function: Callable[..., Any], *operands: Any) -> Any:
    return jax.jit(function).lower(*operands).compile()


def _in_threads(tasks: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Results of all tasks, or their exceptions."""

    def attempt(task: Callable[[], Any]) -> Any:
        try:
            return task()
        except Exception as e:  # a kernel that does not compile is reported where its time would stand
            return e

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(tasks, pool.map(attempt, tasks.values())))
