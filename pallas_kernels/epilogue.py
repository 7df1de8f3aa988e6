"""The operations on a product before it is written: scales, bias, GELU, gate and residual, or quantization for the next layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num, Shaped

from pallas_kernels.weights import unpair_rows

ROW_VECTORS = ("row_scale", "bias", "after_scale", "after_shift")
"""Fields of `Epilogue` with a number for each row of W, in the order of the packed rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """y = gelu(acc * row_scale * token_scale + bias) * after_scale + after_shift, then cast(gate * y) + residual, or
    quantize(y / out_scale).

    Operands that are None are left out. Letters: L layers of a stack, M tokens, O output features, B images.
    Invariants:
      * `bias` (L, O) float; `row_scale`, `after_scale`, `after_shift` (L, O) float32; `token_scale` (M,) float32;
        `residual` (M, O).
      * `modulation` (>= B, C): the gate of image b and layer l is `modulation[b, l * gate_stride + gate_offset :][:O]`, and
        token m belongs to image m // tokens.
      * `out_scale` (L,) float32 goes with an 8-bit `dtype` alone, and excludes gate and residual: integers are rounded to
        even, all saturate at the type's ends.
    """

    bias: Any = None
    row_scale: Any = None
    token_scale: Any = None
    modulation: Any = None
    residual: Any = None
    out_scale: Any = None
    after_scale: Any = None
    after_shift: Any = None
    gelu: bool = dataclasses.field(default=False, metadata={"static": True})
    tokens: int = dataclasses.field(default=1, metadata={"static": True})
    gate_stride: int = dataclasses.field(default=0, metadata={"static": True})
    gate_offset: int = dataclasses.field(default=0, metadata={"static": True})
    dtype: Any = dataclasses.field(default=jnp.bfloat16, metadata={"static": True})

    def __post_init__(self) -> None:
        if (self.out_scale is not None) != (jnp.dtype(self.dtype).itemsize == 1):
            raise ValueError(f"out_scale goes with int8 or float8_e4m3fn results, and they with it; dtype={self.dtype}")
        if self.out_scale is not None and (self.modulation is not None or self.residual is not None):
            raise ValueError("an 8-bit result has neither gate nor residual")


def unpaired(epilogue: Epilogue) -> Epilogue:
    """The epilogue for sums in W's own row order, made from one whose vectors are in the order of `paired_rows`."""
    vectors = {name: getattr(epilogue, name) for name in ROW_VECTORS}
    return dataclasses.replace(epilogue, **{name: v if v is None else unpair_rows(v) for name, v in vectors.items()})


def saturate(x: Num[Array, "..."], dtype: jax.typing.DTypeLike) -> Shaped[Array, "..."]:
    """float32 to int8 (rounded to even) or float8_e4m3fn; values beyond the type's range become its ends."""
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.clip(jnp.round(x), info.min, info.max).astype(dtype)
    end = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -end, end).astype(dtype)


def apply(acc: Num[Array, "M O"], epilogue: Epilogue, layer: Int[Array, ""]) -> Shaped[Array, "M O"]:
    """The epilogue in plain jnp, float32 inside."""
    e = epilogue
    y = acc.astype(jnp.float32)
    if e.row_scale is not None:
        y = y * e.row_scale[layer][None, :]
    if e.token_scale is not None:
        y = y * e.token_scale[: y.shape[0], None]
    if e.bias is not None:
        y = y + e.bias[layer].astype(jnp.float32)[None, :]
    if e.gelu:
        y = jax.nn.gelu(y, approximate=True)
    if e.after_scale is not None:
        y = y * e.after_scale[layer][None, :]
    if e.after_shift is not None:
        y = y + e.after_shift[layer][None, :]
    if e.out_scale is not None:
        return saturate(y / e.out_scale[layer], e.dtype)
    if e.modulation is not None:
        start = layer * e.gate_stride + e.gate_offset
        gate = jax.lax.dynamic_slice_in_dim(e.modulation, start, y.shape[1], 1).astype(jnp.float32)
        images = jnp.arange(y.shape[0], dtype=jnp.int32) // e.tokens
        y = y * gate[images]
    if e.residual is None:
        return y.astype(e.dtype)
    # Rounded before the sum, as the kernels do (the sum is made in the layout that stores 16 bits).
    return (y.astype(e.dtype).astype(jnp.float32) + e.residual.astype(jnp.float32)).astype(e.dtype)
