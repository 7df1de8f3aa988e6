"""What runs where, and why: the selector's choices for a DiT, as a table."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import selector
from pallas_kernels.selector import Choice
from pallas_kernels.weights import PreparedLinear, vq_shapes
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.inference import ACTIVATIONS
from vq4dit_jax.networks.prepared import PreparedBlocks
from vq4dit_jax.qarray.base import Transient, is_quantized
from vq4dit_jax.qarray.parts import parts_of
from vq4dit_jax.qarray.rules import BITS

_ROWS = ("adaLN of all blocks", "norm, modulate", "qkv", "attention", "proj", "fc1", "fc2")
"""Of blocks without operands."""


def explain_kernels(
    model: DiT, batch: int, params: Any = None, *, bits: float | int = 2, activations: str | None = None
) -> str:
    """Prints and returns a line for each operation of a block: implementation and reason, on this process's device.

    Args:
      model: a `DiT`.
      batch: rows of x, two for each image with guidance.
      params: whose form decides: prepared, packed or dense. Left out: prepared ones of `bits` and `activations`.
      bits, activations: as in `quantize` and `prepare_for_inference`.
    """
    facts = selector.facts()
    blocks = _blocks(model, bits, activations) if params is None else params["blocks"]
    runs = blocks if isinstance(blocks, tuple) else (blocks,)
    lines = [f"{facts}; {batch} rows of {model.grid**2} tokens"]
    for i, run in enumerate(runs):
        if len(runs) > 1:
            lines.append(f"blocks of run {i}")
        found = choices(model, batch, run, facts) if isinstance(run, PreparedBlocks) else _plain(model, run, facts)
        lines += [f"  {name:20} {choice.implementation:7} {choice.reason}" for name, choice in found.items()]
    text = "\n".join(lines)
    print(text)
    return text


def _blocks(model: DiT, bits: float | int, activations: str | None) -> PreparedBlocks:
    """Shapes of prepared blocks: enough to choose by."""
    (codewords, length), width, dtype = BITS[bits], model.hidden_size, jnp.dtype(ACTIVATIONS[activations])
    hidden = int(model.mlp_ratio * width)

    def linear(rows: int, columns: int, groups: int = 1, dtype: Any = dtype, paired: bool = False) -> PreparedLinear:
        result = None if not paired else jax.ShapeDtypeStruct((model.depth,), jnp.float32)
        return PreparedLinear(
            vq_shapes(1, rows, columns, groups, codewords, length, dtype, paired), result_scale=result
        )

    depth, bf16 = model.depth, jnp.dtype(jnp.bfloat16)
    return PreparedBlocks(
        modulation=linear(depth * 6 * width, width, depth, bf16),
        qkv=linear(3 * width, width, 3),
        proj=linear(width, width),
        fc1=linear(hidden, width, paired=activations is not None),
        fc2=linear(width, hidden),
        attention_scale=None if activations is None else jax.ShapeDtypeStruct((depth,), jnp.float32),
    )


def choices(model: DiT, batch: int, run: PreparedBlocks, facts: selector.Facts) -> dict[str, Choice]:
    """What runs each operation of prepared blocks, or of their shapes, on a device."""
    tokens, width = model.grid**2, model.hidden_size
    rows = batch * tokens

    def product(linear: Any, rows: int = rows, gate: bool = False) -> Choice:
        size = 2 if linear.result_scale is None else 1
        return selector.product(facts, linear.weights, rows, result_bytes=size, image_tokens=tokens if gate else 0)

    bf16 = jnp.dtype(jnp.bfloat16)
    norms = [selector.norm(facts, width, tokens, bf16, linear.operand) for linear in (run.qkv, run.fc1)]
    alike = norms[0] == norms[1]

    def by_token(name: str, linear: PreparedLinear, fixed: Any) -> dict[str, Choice]:
        """Of the launch behind attention or GELU, where there is one."""
        if fixed is not None or (linear.operand is None and jnp.dtype(run.operand_dtype).itemsize == 2):
            return {}
        choice = selector.rows(facts, (rows, linear.weights.columns), bf16, linear.operand)
        return {f"{'rotate' if linear.operand else 'quantize'} for {name}": choice}

    return {
        "adaLN of all blocks": product(run.modulation, batch),
        "norm, modulate" if alike else "norm for qkv": norms[0],
        "qkv": product(run.qkv),
        "attention": selector.fused_attention(facts, width // model.num_heads, model.num_heads, tokens),
        **by_token("proj", run.proj, run.attention_scale),
        "proj": product(run.proj, gate=True),
        **({} if alike else {"norm for fc1": norms[1]}),
        "fc1": product(run.fc1),
        **by_token("fc2", run.fc2, run.fc1.result_scale),
        "fc2": product(run.fc2, gate=True),
    }


def _plain(model: DiT, run: Any, facts: selector.Facts) -> dict[str, Choice]:
    kernel = run["attn"]["qkv"]["kernel"]
    reason = "dense weights"
    first = parts_of(kernel)[0][1]
    if isinstance(first, Transient):
        reason = "soft weights, in calibration"
    elif is_quantized(first):
        reason = "packed rows, decoded a block at a time; prepare_for_inference(params) makes what the kernels read"
    attention = selector.attention(facts, model.hidden_size // model.num_heads, jnp.dtype(model.dtype))
    return {name: attention if name == "attention" else Choice("xla", reason) for name in _ROWS}
