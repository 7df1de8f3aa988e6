"""The operations of a prepared network, each run by the implementation that the selector chooses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8, Int32, Num, Shaped

from pallas_kernels import epilogue as epilogue_lib
from pallas_kernels import nibbles, reference_norm, selector
from pallas_kernels import operand as operand_lib
from pallas_kernels.epilogue import Epilogue, saturate
from pallas_kernels.operand import Operand
from pallas_kernels.weights import NibbleWeights, PreparedLinear

_CONTRACT = (((1,), (1,)), ((), ()))


def linear(
    x: Shaped[Array, "M I"],
    prepared: PreparedLinear,
    layer: Int32[Array, " 1"],
    token_scale: Float32[Array, " M"] | None = None,
    **finish: Any,
) -> Shaped[Array, "M O"]:
    """epilogue(x W^T) of one layer of a prepared stack; `finish` are fields of `Epilogue`.

    `x` is in the weights' dtype. Where the layer has a `result_scale`, the result is quantized with it.
    """
    weights = prepared.weights
    if x.dtype != weights.dtype:
        raise ValueError(f"x is {x.dtype}; these weights take {jnp.dtype(weights.dtype)}")
    finish.setdefault("dtype", weights.dtype if prepared.result_scale is not None else jnp.bfloat16)
    e = Epilogue(
        bias=prepared.bias,
        row_scale=prepared.row_scale,
        token_scale=token_scale,
        out_scale=prepared.result_scale,
        after_scale=prepared.after_scale,
        after_shift=prepared.after_shift,
        **finish,
    )
    choice = selector.product(
        selector.facts(),
        weights,
        x.shape[0],
        result_bytes=jnp.dtype(e.dtype).itemsize,
        image_tokens=0 if e.modulation is None else e.tokens,
    )
    if choice.implementation == "xla":
        return dense_linear(x, weights, e, layer, choice.operands)
    from pallas_kernels.mosaic.matmul import product

    return product(x, weights, e, layer, choice.tile)


def dense_linear(
    x: Any, weights: Any, e: Epilogue, layer: Int32[Array, " 1"], operands: Any = None
) -> Shaped[Array, "M O"]:
    """The same through XLA: this layer's weights are decoded, and multiplied in the dtype `operands`; None: in their own."""
    i = layer[0]
    if weights.paired_rows:
        e = epilogue_lib.unpaired(e)
    if isinstance(weights, NibbleWeights):
        acc = _grouped_sums(x, weights, i)
    else:
        x, w = (a if operands is None else a.astype(operands) for a in (x, weights.dense(i)))
        wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        acc = jax.lax.dot_general(x, w, _CONTRACT, preferred_element_type=wide)
    return epilogue_lib.apply(acc, e, i)


def _grouped_sums(x: Int8[Array, "M I"], weights: NibbleWeights, i: Int[Array, ""]) -> Float32[Array, "M O"]:
    """x W^T with a scale for each row and 128 columns of W: one float32 product with W times its scales.

    The kernel sums each group's integers exactly and then scales in float32. Here the scales come first, so that there is one
    product and no array of M x O for each group; both are within float32's rounding of the real sum.

    CPU time of a whole forward, in multiples of this form's. Two Zen 3 cores that were shared with other work (so 10 % either
    way), jax 0.10.2, 12,800 tokens of the built-in model; the first row by way of W8A8's time, from another run:
      int8 einsum over all groups at once                              3.5
      float32 products of the integers, one for each group             1.7
      int8 products, one for each group                                1.7
      a loop over groups of int8 products                              1.5
      products by group, int8 or float32, for 512 tokens at a time     1.3
      this form with W^T                                               1.0
      the loop over groups for fc2 (I = 4 O), this form elsewhere      1.0
    At I = 192 XLA:CPU multiplies int8 about as fast as float32, so exact sums by group only add the arrays of sums.
    """
    values, scales = weights.dense(i)
    by_group = values.reshape(weights.rows, weights.steps, nibbles.COLUMNS).astype(jnp.float32)
    w = (by_group * scales.T[:, :, None]).reshape(weights.rows, -1)[:, : x.shape[1]]
    # GPUs and TPUs round the operands of float32 products unless they are told not to.
    how = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(x.astype(jnp.float32), w, _CONTRACT, **how)


def norm(
    x: Float[Array, "M D"],
    modulation: Float[Array, "B C"],
    layer: Int32[Array, " 1"],
    *,
    tokens: int,
    dtype: Any,
    stride: int,
    offsets: tuple[int, int],
    eps: float,
    factors: bool = False,
    operand: Operand | None = None,
) -> tuple[Num[Array, "M D"], Float32[Array, " M"] | None]:
    """LayerNorm, modulation by (shift, scale) at `offsets`, the `operand` of the Linear that reads it, and for 8-bit dtypes
    quantization: (values, token scales). `factors`: the scales are whole factors, 1 included."""
    choice = selector.norm(selector.facts(), x.shape[1], tokens, x.dtype, operand)
    if choice.implementation == "xla":
        run = functools.partial(reference_norm.ln_modulate_quantize, operand=operand)
    else:
        from pallas_kernels.mosaic.ln_modulate_quantize import ln_modulate_quantize

        run = functools.partial(ln_modulate_quantize, rotation=0 if operand is None else operand.rotation)
    where = dict(tokens=tokens, stride=stride, offsets=offsets)
    out = run(x, modulation, layer, dtype=dtype, eps=eps, factors=factors, **where)
    return out if isinstance(out, tuple) else (out, None)


def rotate_quantize(
    x: Float[Array, "M D"], operand: Operand | None, dtype: Any
) -> tuple[Num[Array, "M D"], Float32[Array, " M"] | None]:
    """The rows x as a Linear with this operand, a rotation or None, takes them: (values in `dtype`, token scales or None)."""
    if operand is None and jnp.dtype(dtype).itemsize == 2:
        return x.astype(dtype), None
    if selector.rows(selector.facts(), x.shape, x.dtype, operand).implementation == "xla":
        run = reference_norm.rotate_quantize
    else:
        from pallas_kernels.mosaic.rotate_quantize import rotate_quantize as run
    out = run(x, rotation=0 if operand is None else operand.rotation, dtype=dtype)
    return out if isinstance(out, tuple) else (out, None)


def moved(x: Float[Array, "M I"], prepared: PreparedLinear, layer: Int32[Array, " 1"]) -> Float[Array, "M I"]:
    """What a Linear rounds of the rows that it reads."""
    return operand_lib.move(x, prepared.operand, layer)


def quantize_tokens(x: Float[Array, "M D"], dtype: Any) -> tuple[Num[Array, "M D"], Float32[Array, " M"] | None]:
    """Each token symmetrically to 8 bits, as `norm` does; unchanged where `dtype` is bfloat16."""
    if jnp.dtype(dtype).itemsize == 2:
        return x.astype(dtype), None
    return reference_norm.quantize_tokens(x, dtype)


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T N H"], v: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v by a library: cuDNN's or XLA's."""
    choice = selector.attention(selector.facts(), q.shape[-1], q.dtype)
    operands = (a if choice.operands is None else a.astype(choice.operands) for a in (q, k, v))
    # Its XLA form mixes bfloat16 and float32 where strict promotion wants casts.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(*operands, implementation=choice.implementation).astype(q.dtype)


def fused_attention(
    qkv: Float[Array, "M C"],
    layer: Int32[Array, " 1"],
    *,
    tokens: int,
    num_heads: int,
    dtype: Any,
    out_scale: Float32[Array, " L"] | None = None,
) -> tuple[Num[Array, "M D"], Float32[Array, " M"] | None]:
    """Attention of each image's `tokens` rows from (q, k, v) side by side: (values in `dtype`, token scales or None).

    8-bit values have the fixed scale `out_scale` of the layer, or without one a scale for each token.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    small = jnp.dtype(dtype).itemsize == 1
    choice = selector.fused_attention(selector.facts(), width // num_heads, num_heads, tokens)
    if choice.implementation == "mosaic":
        from pallas_kernels.mosaic.attention import attention as kernel

        if small and out_scale is not None:
            how = dict(layer=layer, out_scale=out_scale, dtype=dtype)
            return kernel(qkv, tokens=tokens, num_heads=num_heads, **how), None
        return quantize_tokens(kernel(qkv, tokens=tokens, num_heads=num_heads), dtype)
    q, k, v = jnp.moveaxis(qkv.reshape(-1, tokens, 3, num_heads, width // num_heads), 2, 0)
    out = attention(q, k, v).reshape(rows, width)
    if small and out_scale is not None:
        return saturate(out.astype(jnp.float32) / out_scale[layer[0]], dtype), None
    return quantize_tokens(out, dtype)
