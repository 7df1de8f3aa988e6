"""Int8 Linears as ComfyUI's files hold them, with and without ConvRot: the tensors of one Linear to a leaf, and back.

A quantized Linear X has three tensors where a dense one has `X.weight`:

    X.weight         I8 (O, I)     codes q of the rotated weight
    X.weight_scale   F32 (O, 1)    s of each row
    X.comfy_quant    U8            JSON such as {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}

    y = A(x R) (s q)^T,  q = round(W R / s),  s = max |W R| / 127 over a row;  A rounds a token to 8 bits, s = max |x R| / 127

R is H / sqrt(g) on each group of g consecutive inputs. H is a Kronecker power of one symmetric matrix of order 4, so R is its
own inverse. There is no R where `convrot` is false or left out. A is the identity where `full_precision_matrix_mult` is true.
(Ma et al. 2025, arXiv 2512.03673; stable-diffusion.cpp, docs/int8_convrot.md; ComfyUI, comfy/ops.py and comfy/quant_ops.py.)

The matrix of order 4 is J - 2 P', where P' exchanges 0 with 3 and 1 with 2. Ours (`integer.hadamard`) is J - 2 P, where P
exchanges 0 with 1 and 2 with 3. J - 2 P' = (J - 2 P) P P', and P P' sends column j to column j XOR 2. So W R of the format is
ours with its columns in another order within each group: the codes are moved and keep their values (`_order`).
"""

import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import hadamard
from vq4dit_jax.qarray.base import QuantizedArray
from vq4dit_jax.qarray.integer import IntArray
from vq4dit_jax.qarray.operand import OperandArray

FORMAT = "int8_tensorwise"
MARK, SCALE = "comfy_quant", "weight_scale"
GROUPS = (1024, 256, 64, 16, 4)
"""Groups of the rotation. Files are written with 256 at most, which is the format's own default."""


class Facts(NamedTuple):
    """What the JSON of a Linear says.

    Attributes:
      group: inputs of a group of the rotation; 0: none.
      rounds: whether activations are rounded to 8 bits.
    """

    group: int
    rounds: bool


def decode(codes: Int[np.ndarray, "O I"], scale: Float[np.ndarray, "O 1"], facts: Facts, name: str) -> OperandArray:
    """The leaf of one Linear from int8 codes and float32 scales; InputError, which names `name`, for scales that are none."""
    ours = codes[:, _order(codes.shape[1], facts.group)] if facts.group else codes
    said = {"shape": list(codes.shape), "bits": 8, "group": None, "grid": "symmetric"}
    weight = IntArray.restore({"qvalue": ours.view(np.uint8) ^ 0x80, "scale": scale}, said, name)
    return OperandArray(weight, None, None, None, facts.group, 8 if facts.rounds else None, "symmetric", codes.shape)


def encode(leaf: QuantizedArray, layer: str) -> dict[str, np.ndarray]:
    """The three tensors of the leaf (no stack axes) of a Linear called `layer`: `decode` gives the same codes, and scales of the
    same values. An `IntArray` alone does not round activations. InputError for a leaf that the format has no form for."""
    if isinstance(leaf, IntArray):
        leaf = OperandArray(leaf, None, None, None, 0, None, "symmetric", leaf.matrix)
    if lacking := _inexpressible(leaf):
        raise InputError(
            f"{layer}: the int8 format has no form for {lacking}; it has int8 by row, rotated without signs in groups of "
            f"{', '.join(map(str, GROUPS))}; save_safetensors keeps every leaf, and dequantize makes dense weights"
        )
    codes = (np.asarray(leaf.weight.qvalue) ^ 0x80).view(np.int8)
    said: dict[str, Any] = {"format": FORMAT}
    if leaf.bits is None:
        said["full_precision_matrix_mult"] = True
    if leaf.rotation:
        codes = codes[:, _order(leaf.matrix[1], leaf.rotation)]
        said |= {"convrot": True, "convrot_groupsize": leaf.rotation}
    return {
        f"{layer}.weight": np.ascontiguousarray(codes),
        f"{layer}.{SCALE}": np.asarray(leaf.weight.scale, np.float32),
        f"{layer}.{MARK}": np.frombuffer(json.dumps(said).encode(), np.uint8),
    }


def _inexpressible(leaf: QuantizedArray) -> str | None:
    """What of a leaf the format lacks; None: nothing."""
    if not isinstance(leaf, OperandArray) or not isinstance(leaf.weight, IntArray):
        return f"the {type(getattr(leaf, 'weight', leaf)).__name__}"
    weight = leaf.weight
    if (weight.bits, weight.grid) != (8, "symmetric") or weight.scale.shape[-1] != 1:
        return f"{weight.bits} bits on a {weight.grid} grid with {weight.scale.shape[-1]} scales a row"
    if given := [name for name in ("scale", "signs", "centre", "times") if getattr(leaf, name) is not None]:
        return f"the {given[0]} of an operand"
    if leaf.bits is not None and (leaf.bits, leaf.grid) != (8, "symmetric"):
        return f"activations in {leaf.bits} bits ({leaf.grid})"
    return None if leaf.rotation in (0, *GROUPS) else f"a rotation in groups of {leaf.rotation}"


def rotation(group: int) -> Int[np.ndarray, "g g"]:
    """Their H of order g = 4^n, of 1 and -1."""
    return hadamard.regular(group)[:, _order(group, group)]


def _order(columns: int, group: int) -> np.ndarray:
    """Column j of theirs is column order[j] of ours, and the reverse: 2 is added, without carry, to each digit to the base 4."""
    return np.arange(columns) ^ (2 * (group - 1) // 3)
