"""softmax(Q K^T / sqrt(H)) V directly from the product that computes Q, K and V, for Hopper; FlashAttention (arXiv 2205.14135).

A block takes 64 queries a warpgroup of one head of one image, and streams that image's keys and values. The running
maximum, the sum and the result stay in registers.

Heads of 8 more than a multiple of 16, as DiT-XL's 72, begin in the middle of a swizzled tile at every second head, where the
copy engine cannot start. Their tiles begin there or 8 columns before, and are 8 wider than the head. The columns of a
neighbouring head are multiplied by zeros in Q, and are not stored in the result.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.epilogue import saturate
from pallas_kernels.mosaic import compat

_QUERIES = 64
_BY_QUERY = plgpu.Layout.WGMMA.reduce(1)


def attention(
    qkv: Float[Array, "M C"],
    *,
    tokens: int,
    num_heads: int,
    layer: Int32[Array, " 1"] | None = None,
    out_scale: Float32[Array, " L"] | None = None,
    dtype: Any = jnp.bfloat16,
    interpret: bool = False,
) -> Shaped[Array, "M D"]:
    """Attention of each image's `tokens` consecutive rows; C = 3 * D, columns in the order (q, k, v; heads; H).

    With `out_scale` the result is quantized to `dtype` with the scale of `layer`. `tokens` is a multiple of 64, H of 8.
    """
    rows, columns = qkv.shape
    width = columns // 3
    head = width // num_heads
    if tokens % _QUERIES or head % 8 or rows % tokens or (out_scale is None) != (jnp.dtype(dtype).itemsize == 2):
        raise ValueError(f"qkv {qkv.shape}, tokens={tokens}, heads of {head}: wanted multiples of {_QUERIES} and 8")
    odd = head % 16 == 8
    padded = head + 8 if odd else head
    lanes = 16 if odd else next(n for n in (64, 32, 16) if head % n == 0)
    if columns % lanes:
        raise ValueError(f"{num_heads} heads of {head}: wanted an even number of heads")
    swizzle = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes))
    keys = 128 if tokens % 128 == 0 else 64
    warpgroups = 2 if tokens % (2 * _QUERIES) == 0 else 1
    # exp2 of scaled logits is exp of logits.
    scale = math.log2(math.e) / math.sqrt(head)
    operands = {"qkv": qkv} if out_scale is None else {"qkv": qkv, "layer": layer, "out_scale": out_scale}

    def attention_kernel(*refs: Any) -> None:
        ref = dict(zip([*operands, "out", "queries", "ready"], refs, strict=True))
        image, block, number = lax.axis_index("image"), lax.axis_index("block"), lax.axis_index("head")
        warpgroup = lax.axis_index("warpgroup")
        first_key = image * tokens
        first_query = first_key + (block * warpgroups + warpgroup) * _QUERIES
        column = number * head
        extra = lax.rem(column, lanes) if odd else 0
        spread = lambda v, n: lax.broadcast_in_dim(v, (_QUERIES, n), (0,))

        def compute(run_pipeline: Any) -> None:
            own = ref["queries"].at[warpgroup]
            here = ref["qkv"].at[pl.ds(first_query, _QUERIES), pl.ds(column - extra, padded)]
            plgpu.copy_gmem_to_smem(here, own, ref["ready"].at[warpgroup])
            start = lambda value, shape, layout: _place(jnp.full(shape, value, jnp.float32), layout, interpret)
            sums = start(0.0, (_QUERIES, padded), plgpu.Layout.WGMMA)
            largest, total = (start(v, (_QUERIES,), _BY_QUERY) for v in (-jnp.inf, 0.0))
            plgpu.barrier_wait(ref["ready"].at[warpgroup])
            q = compat.load(own, plgpu.Layout.WGMMA, interpret)
            if odd:
                place = _columns((_QUERIES, padded), interpret) - extra
                real = (place >= 0) & (place < head)
                q = jnp.where(real, q.astype(jnp.float32), 0.0).astype(q.dtype)
            sums, _, total, _ = run_pipeline((sums, largest, total, q))
            finish(sums / spread(total, padded))

        def body(_: Any, k_tile: Any, v_tile: Any, carry: Any) -> Any:
            sums, largest, total, q = carry
            logits = _product(q, k_tile, True, interpret) * scale
            before, largest = largest, jnp.maximum(largest, logits.max(axis=1))
            weights = jnp.exp2(logits - spread(largest, keys))
            fade = jnp.exp2(before - largest)
            total = total * fade + weights.sum(axis=1)
            sums = _product(weights.astype(q.dtype), v_tile, False, interpret, sums * spread(fade, padded))
            return sums, largest, total, q

        def finish(y: jax.Array) -> None:
            target = ref["out"].at[pl.ds(first_query, _QUERIES), pl.ds(column, head)]
            if out_scale is not None:
                y = y * (1 / ref["out_scale"][ref["layer"][0]])
            for first in (0, 8) if odd else (0,):
                pl.when(extra == first)(lambda first=first: _store(target, y, dtype, first, head, interpret))

        block_of = lambda: plgpu.BlockSpec(
            (keys, padded), lambda i: (i, 0), transforms=swizzle, memory_space=plgpu.SMEM
        )
        pipeline = plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(tokens // keys,),
            memory_registers=40,
            in_specs=[block_of(), block_of()],
            wg_axis="warpgroup",
            num_compute_wgs=warpgroups,
            max_concurrent_steps=min(2, tokens // keys),
            compute_context=compute,
        )
        rows_of_image = pl.ds(first_key, tokens)
        k, v = (ref["qkv"].at[rows_of_image, pl.ds(part * width + column - extra, padded)] for part in (1, 2))
        pipeline(k, v)

    return plgpu.kernel(
        attention_kernel,
        out_type=jax.ShapeDtypeStruct((rows, width), dtype),
        grid=(num_heads, tokens // (_QUERIES * warpgroups), rows // tokens),
        grid_names=("head", "block", "image"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((warpgroups, _QUERIES, padded), qkv.dtype, transforms=swizzle),
            plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        **({"interpret": compat.interpret_params()} if interpret else {}),
    )(*operands.values())


def _place(value: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    return value if interpret else plgpu.layout_cast(value, layout)


def _columns(shape: tuple[int, int], interpret: bool) -> jax.Array:
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def _product(a: jax.Array, b: Any, transposed: bool, interpret: bool, before: jax.Array | None = None) -> jax.Array:
    """before + a @ b (or b^T) with a in registers and b in shared memory, float32."""
    if interpret:
        y = lax.dot_general(
            a, b[...], (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return y if before is None else before + y
    if transposed:
        b = compat.transpose(b)
    if before is not None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(before))

    def multiply(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _store(target: Any, y: jax.Array, dtype: Any, first: int, head: int, interpret: bool) -> None:
    """Columns [first, first + head) of y, from registers to global memory."""
    if interpret:
        target[...] = (y if jnp.dtype(dtype).itemsize == 2 else saturate(y, dtype))[:, first : first + head].astype(
            dtype
        )
        return
    if jnp.dtype(dtype) == jnp.int8:
        # 1.5 * 2^23 + y: the sum rounds to even and leaves the integer in its low bits.
        y = lax.bitcast_convert_type(jnp.clip(y, -128.0, 127.0) + 12582912.0, jnp.int32)
    elif jnp.dtype(dtype).itemsize == 1:
        end = float(jnp.finfo(dtype).max)
        y = jnp.clip(y, -end, end)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def emit(_: Any, out: Any, values: Any) -> None:
        values[:, first : first + head].store_untiled(out, optimized=False)

    emit(target, y.astype(dtype))
