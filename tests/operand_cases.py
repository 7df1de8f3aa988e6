"""Blocks of a DiT whose Linears centre, scale, rotate and round what they read; scales and centres drawn at random."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

import vq4dit_jax as vq
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import flatten, unflatten

OPERANDS = {
    "W8A8, rotated": vq.OperandSpec(
        vq.IntSpec(8, None, "symmetric"), 8, rotation=64, signed=True, scaled=True, centred=True
    ),
    "W4A8": vq.OperandSpec(vq.IntSpec(4, 128, "symmetric"), 8, rotation=0, centred=True),
    "W2A8": vq.OperandSpec(VQSpec(256, 4), 8, rotation=16, centred=True),
}
"""Of Linears that read tokens."""


def with_operands(spec: vq.OperandSpec, dense: Any) -> Any:
    """The dense tree with such leaves; adaLN has one centre, and no scale or signs."""
    rng = np.random.default_rng(0)
    alone = dataclasses.replace(spec, scaled=False, signed=False)
    flat = flatten(dense)
    for path in list(flat):
        if not re.search(r"blocks/.*(qkv|proj|fc1|fc2|1)/kernel", path):
            continue
        weight = np.asarray(flat[path]).swapaxes(1, 2)
        depth, _, columns = weight.shape
        adaln = "adaLN" in path
        scale = rng.uniform(0.5, 2, (depth, columns)).astype(np.float32)
        centre = rng.standard_normal((1 if adaln else depth, columns)).astype(np.float32) / 4
        centre = np.broadcast_to(centre, scale.shape)
        flat[path] = (alone if adaln else spec).balanced(weight, scale, centre, jax.random.key(1), 3)
    return unflatten(flat)
