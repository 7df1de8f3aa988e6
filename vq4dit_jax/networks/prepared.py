"""The blocks of a DiT from packed weights: the mathematics of `dit.DiTBlock` in seven launches a block on Hopper.

    modulation of all blocks   one product for the whole network, before the first block
    norm1, shift, scale        [8-bit: and quantization by token]
    qkv                        with bias
    attention                  [8-bit: and quantization with a fixed scale]
    proj                       with bias, gate and the sum with x
    norm2, shift, scale        [8-bit: and quantization by token]
    fc1                        with bias and GELU [8-bit: and quantization with a fixed scale]
    fc2                        with bias, gate and the sum with x

No weight is cut out of its stack: a kernel takes the whole stack and the number of the layer, so the loop over blocks
moves nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import ops
from pallas_kernels.weights import PreparedLinear

_CHUNKS = 6
_SHIFT1, _SCALE1, _GATE1, _SHIFT2, _SCALE2, _GATE2 = range(_CHUNKS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedBlocks:
    """A run of L equal blocks. Made by `prepare_for_inference`; a leaf of the parameter tree at `blocks`.

    Invariants:
      * `qkv`, `proj`, `fc1`, `fc2` are `PreparedLinear` of L layers whose operands have one dtype: bfloat16, int8 or
        float8_e4m3fn. The residual stream between them is bfloat16.
      * `modulation` is a `PreparedLinear` of one layer with the rows of all L adaLN layers, one after the other.
      * where fc1 has a `result_scale`, its result goes to fc2 in 8 bits, and fc2's `row_scale` contains that scale;
        likewise `attention_scale` (L,) float32, or None, and proj's. Neither is there where fc2 or proj has an `operand`.
      * the operands of `qkv` and `fc1` are applied with the norm before them, those of the others where their rows are rounded.
    """

    modulation: PreparedLinear
    qkv: PreparedLinear
    proj: PreparedLinear
    fc1: PreparedLinear
    fc2: PreparedLinear
    attention_scale: Any = None

    @property
    def depth(self) -> int:
        return self.qkv.weights.layers

    @property
    def operand_dtype(self) -> Any:
        """Of the operands of the products."""
        return self.qkv.weights.dtype


def modulation(blocks: PreparedBlocks, activated: Float[Array, "B D"]) -> Float[Array, "B C"]:
    """Shifts, scales and gates of all blocks, C = L * 6 * D, from SiLU(c); depends on (t, y) alone."""
    layer = jnp.zeros(1, jnp.int32)
    read = ops.moved(activated.astype(jnp.bfloat16), blocks.modulation, layer)
    operand, scale = ops.quantize_tokens(read, blocks.modulation.weights.dtype)
    return ops.linear(operand, blocks.modulation, layer, scale)


def run(
    blocks: PreparedBlocks,
    x: Float[Array, "B T D"],
    modulations: Float[Array, "B C"],
    *,
    num_heads: int,
    eps: tuple[float, float],
) -> Float[Array, "B T D"]:
    """The run of blocks on tokens x, in bfloat16."""

    def step(i: jax.Array, tokens: jax.Array) -> jax.Array:
        return _block(blocks, i, tokens, modulations, x.shape[1], num_heads, eps)[0]

    return jax.lax.fori_loop(0, blocks.depth, step, _rows(x)).reshape(x.shape)


def run_observed(
    blocks: PreparedBlocks,
    x: Float[Array, "B T D"],
    modulations: Float[Array, "B C"],
    *,
    num_heads: int,
    eps: tuple[float, float],
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"], dict[str, Float[Array, " L"]]]:
    """The same, with the output of every block and the largest magnitudes of what proj and fc2 read."""

    def step(tokens: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
        tokens, seen = _block(blocks, i, tokens, modulations, x.shape[1], num_heads, eps)
        return tokens, (tokens.reshape(x.shape), jax.tree.map(lambda a: jnp.abs(a.astype(jnp.float32)).max(), seen))

    tokens, (outputs, ranges) = jax.lax.scan(step, _rows(x), jnp.arange(blocks.depth, dtype=jnp.int32))
    return tokens.reshape(x.shape), outputs, ranges


def _rows(x: Float[Array, "B T D"]) -> Float[Array, "M D"]:
    return x.astype(jnp.bfloat16).reshape(-1, x.shape[-1])


def _block(
    blocks: PreparedBlocks, i: jax.Array, x: jax.Array, modulations: jax.Array, tokens: int, num_heads: int, eps: tuple
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One block on x (M, D); also what proj and fc2 read, before it is quantized by token."""
    rows, width = x.shape
    layer = i.reshape(1)
    stride = _CHUNKS * width

    def norm(reader: PreparedLinear, shift: int, scale: int, eps: float) -> Any:
        how = dict(dtype=blocks.operand_dtype, stride=stride, offsets=(shift * width, scale * width), eps=eps)
        return ops.norm(x, modulations, layer, tokens=tokens, operand=reader.operand, **how)

    def gated(operand: Any, prepared: PreparedLinear, scale: Any, gate: int) -> jax.Array:
        where = dict(tokens=tokens, gate_stride=stride, gate_offset=gate * width)
        return ops.linear(operand, prepared, layer, scale, modulation=modulations, residual=x, **where)

    operand, scale = norm(blocks.qkv, _SHIFT1, _SCALE1, eps[0])
    qkv = ops.linear(operand, blocks.qkv, layer, scale)
    attend = functools.partial(ops.fused_attention, qkv, layer, tokens=tokens, num_heads=num_heads)
    if blocks.attention_scale is None:
        attended, _ = attend(dtype=jnp.bfloat16)
        attended = ops.moved(attended, blocks.proj, layer)
        operand, scale = ops.quantize_tokens(attended, blocks.operand_dtype)
    else:
        # The fixed scale is in proj's row_scale.
        attended, scale = attend(dtype=blocks.operand_dtype, out_scale=blocks.attention_scale)
        operand = attended
    x = gated(operand, blocks.proj, scale, _GATE1)

    operand, scale = norm(blocks.fc1, _SHIFT2, _SCALE2, eps[1])
    hidden = ops.linear(operand, blocks.fc1, layer, scale, gelu=True)
    # 8-bit results of fc1 carry one scale for all tokens, which is in fc2's row_scale.
    if blocks.fc1.result_scale is not None:
        operand, scale = hidden, None
    else:
        hidden = ops.moved(hidden, blocks.fc2, layer)
        operand, scale = ops.quantize_tokens(hidden, blocks.operand_dtype)
    return gated(operand, blocks.fc2, scale, _GATE2), {"attn/proj": attended, "mlp/fc2": hidden}
