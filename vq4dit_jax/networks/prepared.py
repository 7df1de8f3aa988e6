"""The blocks of a DiT from packed weights: the mathematics of `dit.DiTBlock` in seven launches a block on Hopper.

    modulation of all blocks   one product for the whole network, before the first block
    norm1, shift, scale        [with a rotation, if qkv has one; 8-bit: and quantization by token]
    qkv                        with bias
    attention                  [8-bit: and quantization with a fixed scale, or by token, with proj's rotation, in a launch more]
    proj                       with bias, gate and the sum with x
    norm2, shift, scale        [as norm1, for fc1]
    fc1                        with bias and GELU [8-bit: and quantization as behind attention, for fc2]
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

CHUNKS = 6  # of the modulation of a block, each as wide as a token
SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(CHUNKS)


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
      * the operands of `qkv`, `proj`, `fc1` and `fc2` are rotations alone: `fold` has put their scales and centres into what
        comes before. Those of `qkv` and `fc1` are applied with the norm before them, the others where their rows are rounded.
      * `factors`: whether the scales that `modulation` gives the first and the second norm are whole factors, 1 included.
    """

    modulation: PreparedLinear
    qkv: PreparedLinear
    proj: PreparedLinear
    fc1: PreparedLinear
    fc2: PreparedLinear
    attention_scale: Any = None
    factors: tuple[bool, bool] = dataclasses.field(default=(False, False), metadata={"static": True})

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
    """One block on x (M, D); also what proj and fc2 read, before it is rotated and quantized by token."""
    rows, width = x.shape
    layer = i.reshape(1)
    stride = CHUNKS * width

    def norm(reader: PreparedLinear, shift: int, scale: int, which: int) -> Any:
        how = dict(dtype=blocks.operand_dtype, eps=eps[which], factors=blocks.factors[which], operand=reader.operand)
        where = dict(tokens=tokens, stride=stride, offsets=(shift * width, scale * width))
        return ops.norm(x, modulations, layer, **where, **how)

    def gated(operand: Any, prepared: PreparedLinear, scale: Any, gate: int) -> jax.Array:
        where = dict(tokens=tokens, gate_stride=stride, gate_offset=gate * width)
        return ops.linear(operand, prepared, layer, scale, modulation=modulations, residual=x, **where)

    def rounded(rows: jax.Array, reader: PreparedLinear) -> Any:
        return ops.rotate_quantize(rows, reader.operand, blocks.operand_dtype)

    operand, scale = norm(blocks.qkv, SHIFT1, SCALE1, 0)
    qkv = ops.linear(operand, blocks.qkv, layer, scale)
    attend = functools.partial(ops.fused_attention, qkv, layer, tokens=tokens, num_heads=num_heads)
    if blocks.attention_scale is None:
        attended, _ = attend(dtype=jnp.bfloat16)
        operand, scale = rounded(attended, blocks.proj)
    else:
        # The fixed scale is in proj's row_scale.
        attended, scale = attend(dtype=blocks.operand_dtype, out_scale=blocks.attention_scale)
        operand = attended
    x = gated(operand, blocks.proj, scale, GATE1)

    operand, scale = norm(blocks.fc1, SHIFT2, SCALE2, 1)
    hidden = ops.linear(operand, blocks.fc1, layer, scale, gelu=True)
    # 8-bit results of fc1 carry one scale for all tokens, which is in fc2's row_scale.
    if blocks.fc1.result_scale is not None:
        operand, scale = hidden, None
    else:
        operand, scale = rounded(hidden, blocks.fc2)
    return gated(operand, blocks.fc2, scale, GATE2), {"attn/proj": attended, "mlp/fc2": hidden}
