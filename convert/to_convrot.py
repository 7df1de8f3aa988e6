"""Writes a DiT as an int8 file with ConvRot (`convert.convrot`), under facebookresearch/DiT's names."""

import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from convert.convrot import Facts, decode, encode, rotation
from convert.facebook import FACEBOOK, metadata
from convert.layout import LINEAR, Rule
from vq4dit_jax.errors import InputError
from vq4dit_jax.files import atomic_path
from vq4dit_jax.networks.dit import DiT, parameter_shapes
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.operand import OperandArray
from vq4dit_jax.qarray.parts import parts_of, stack_length
from vq4dit_jax.qarray.tree import dense_shapes, flatten, quantized_paths

_GROUPS = (256, 64, 16, 4)
"""Groups of the rotation that are chosen from, the largest first."""
_LEAST_SCALE = 1e-30
"""Of a row of zeros, as comfy-kitchen has it."""


def save_convrot(file: str | os.PathLike, model: DiT, params: Any, *, group: int | None = None) -> None:
    """Writes one safetensors file with int8 Linears in the form of ComfyUI's files; `load_pretrained` reads it.

    Args:
      file: is written beside and renamed.
      model: its sizes that shapes do not tell go into the metadata of the file.
      params: dense, and then all Linears of the blocks are rotated and rounded to the nearest of int8, a scale for each row,
        without data. Or with quantized leaves, which are written as they are, and so are the dense ones beside them: what
        `load_pretrained` read comes back with the same codes and scales. An `IntArray` of 8 bits, which rounds no activations,
        is marked so.
      group: inputs of a group of the rotation, of dense params: 4, 16, 64 or 256, or 0 for none. None: the largest that divides
        the inputs of each Linear, and none where no group does.

    Raises:
      InputError: a network that is no DiT of facebookresearch's form, a group that does not divide, numbers that are not finite,
        or a leaf that the format has no form for: codebooks, other bits, a centre, scale or signs of the operand.

    Source: arXiv 2512.03673 and stable-diffusion.cpp's docs/int8_convrot.md.
    """
    from safetensors.numpy import save_file

    flat, rounding = _checked(model, params), not quantized_paths(params)
    if group is not None and not rounding:
        raise InputError(
            f"group={group} is for dense params; these hold quantized leaves, which are written as they are"
        )
    tensors: dict[str, np.ndarray] = {}
    for rule in FACEBOOK.rules:
        for name, leaf in zip(rule.names(model.depth), _blocks(flat[rule.path], rule), strict=True):
            layer = name.removesuffix(".weight")
            if is_quantized(leaf):
                if rule.kind is not LINEAR:
                    raise InputError(f"{rule.path} is quantized; the format has Linears alone; give this leaf dense")
                tensors |= encode(leaf, layer)
                continue
            dense = rule.kind.back(leaf)
            if not np.isfinite(dense).all():
                raise InputError(f"{rule.path} holds NaN or infinity ({name}); the parameters are damaged")
            if rounding and rule.stacked and rule.kind is LINEAR:
                tensors |= encode(rounded(np.asarray(dense, np.float64), group, layer), layer)
            else:
                tensors[name] = np.ascontiguousarray(dense)
    with atomic_path(file) as partial:
        save_file(tensors, partial, metadata=metadata(model))
        partial.chmod(0o644)  # save_file lets only the owner read


def rounded(weight: Float[np.ndarray, "O I"], group: int | None, layer: str) -> OperandArray:
    """A dense weight, rotated and rounded to the nearest as the format says; `layer` is its name in errors."""
    rows, columns = weight.shape
    if group is None:
        group = next((size for size in _GROUPS if columns % size == 0), 0)
    if group not in (0, *_GROUPS) or (group and columns % group):
        raise InputError(
            f"{layer}: group={group} for {columns} inputs; wanted one of {', '.join(map(str, _GROUPS))} that divides "
            "them, 0 for no rotation, or None"
        )
    if group:
        turned = weight.reshape(rows, -1, group) @ (rotation(group) / math.sqrt(group))
        weight = turned.reshape(rows, columns)
    scale = np.maximum(np.abs(weight).max(1, keepdims=True) / 127, _LEAST_SCALE).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return decode(codes, scale, Facts(group, True), f"{layer}.weight")


def _checked(model: DiT, params: Any) -> dict[str, Any]:
    """The leaves by their paths; InputError where they are not those of the model, or its form is not facebookresearch's."""
    if not isinstance(model, DiT):
        raise InputError(f"model is a {type(model).__name__}; int8 files are written of a vq4dit_jax.DiT alone")
    theirs, ours = ((m.freq_shift, m.norm2_eps) for m in (DiT, model))
    if ours != theirs:
        raise InputError(
            f"the model has freq_shift, norm2_eps = {ours}, those of diffusers' module; a file in {FACEBOOK.name}'s names has "
            f"{theirs} and would compute something else"
        )
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(parameter_shapes(model)).items()}
    found = dense_shapes(params)
    if wrong := sorted(path for path in {*wanted, *found} if wanted.get(path) != found.get(path)):
        path = wrong[0]
        raise InputError(
            f"parameter {path} has shape {found.get(path)}; the model wants {wanted.get(path)}; give the model that params are of"
        )
    return flatten(params)


def _blocks(leaf: Any, rule: Rule) -> Iterator[Any]:
    """The leaf of every block, or the leaf itself where it is no stack; arrays are numpy's."""
    for _, part in parts_of(leaf):
        host = jax.tree.map(np.asarray, part)
        if rule.stacked:
            yield from (jax.tree.map(lambda a: a[i], host) for i in range(stack_length(host)))
        else:
            yield host
