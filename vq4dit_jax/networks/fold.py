"""Scales and centres of operands, put into what comes before: then they cost nothing while a network runs.

    qkv, fc1   read LayerNorm times a factor plus a shift, which are rows of adaLN's product
    proj       reads softmax . v, which is linear in v, and whose weights sum to 1: the rows of v in qkv's product
    fc2        reads GELU: a scale and a shift behind it, in the epilogue of fc1's product

adaLN's own operand stays, because nothing of ours comes before it; so do all rotations.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.operand import Operand
from pallas_kernels.weights import NibbleWeights, PreparedLinear, pair_rows
from vq4dit_jax.networks.prepared import CHUNKS, SCALE1, SCALE2, SHIFT1, SHIFT2, PreparedBlocks


def fold(blocks: PreparedBlocks) -> PreparedBlocks:
    """The same blocks, not folded yet, where no operand of qkv, proj, fc1 or fc2 has vectors any more.

    Scales of adaLN become the factors (1 + scale) t where there is a t. `scale'` = (1 + scale) t - 1 would do without telling
    the norm, but it is near -1 where t is small, and bfloat16 leaves it an error of 2^-9: 4 % of a factor of 0.05. The
    factor itself has one of 2^-9 of itself. The small W8A8 model of the tests, with t of 0.5 to 2, differs from its float32
    leaves by 1.10 % unfolded, 1.09 % with factors, 1.12 % with scale', and 1.09 % with float32 modulations: factors lose nothing.
    """
    modulation, factors = _into_modulation(blocks)
    qkv, fc1 = _without_vectors(blocks.qkv), _without_vectors(blocks.fc1)
    # Of (q, k, v) the last third.
    of_v = lambda a, other: None if a is None else np.pad(a, ((0, 0), (2 * a.shape[1], 0)), constant_values=other)
    scale, shift = _vectors(blocks.proj)
    qkv = _changed(qkv, of_v(scale, 1), of_v(shift, 0))
    scale, shift = (a if a is None or not fc1.weights.paired_rows else pair_rows(a) for a in _vectors(blocks.fc2))
    as_array = lambda a: None if a is None else jnp.asarray(a, jnp.float32)
    return dataclasses.replace(
        blocks,
        modulation=modulation,
        qkv=qkv,
        proj=_without_vectors(blocks.proj),
        fc1=dataclasses.replace(fc1, after_scale=as_array(scale), after_shift=as_array(shift)),
        fc2=_without_vectors(blocks.fc2),
        factors=factors,
    )


def _into_modulation(blocks: PreparedBlocks) -> tuple[PreparedLinear, tuple[bool, bool]]:
    """adaLN with the vectors of qkv and fc1, and for each norm whether its scales became factors."""
    readers = ((blocks.qkv, SHIFT1, SCALE1), (blocks.fc1, SHIFT2, SCALE2))
    shape = (blocks.depth, CHUNKS, blocks.qkv.weights.columns)
    factor, offset, factors = np.ones(shape, np.float32), np.zeros(shape, np.float32), []
    for reader, shift_chunk, scale_chunk in readers:
        scale, shift = _vectors(reader)
        factors.append(scale is not None)
        if scale is not None:
            factor[:, shift_chunk] = factor[:, scale_chunk] = offset[:, scale_chunk] = scale
        if shift is not None:
            offset[:, shift_chunk] = shift
    flat = lambda a, neutral: None if (a == neutral).all() else a.reshape(1, -1)
    return _changed(blocks.modulation, flat(factor, 1), flat(offset, 0)), (factors[0], factors[1])


def _changed(
    linear: PreparedLinear, factor: Float[np.ndarray, "L O"] | None, offset: Float[np.ndarray, "L O"] | None
) -> PreparedLinear:
    """The Linear whose results are those of `linear` times a factor plus an offset; its rows are in W's own order."""
    weights, row_scale, bias = linear.weights, linear.row_scale, linear.bias
    if factor is not None:
        bias = bias * factor
        if isinstance(weights, NibbleWeights):
            weights = dataclasses.replace(weights, scales=weights.scales * factor[:, None, :])
        else:
            row_scale = jnp.asarray(factor) if row_scale is None else row_scale * factor
    if offset is not None:
        bias = bias + offset
    return dataclasses.replace(linear, weights=weights, row_scale=row_scale, bias=bias)


def _vectors(linear: PreparedLinear) -> tuple[Float[np.ndarray, "L I"] | None, Float[np.ndarray, "L I"] | None]:
    """(scale, shift) of a Linear's operand."""
    operand = linear.operand or Operand()
    return tuple(None if a is None else np.asarray(a, np.float32) for a in (operand.scale, operand.shift))


def _without_vectors(linear: PreparedLinear) -> PreparedLinear:
    return linear if linear.operand is None else dataclasses.replace(linear, operand=linear.operand.without_vectors())
