"""Scales and centres of operands that were put into what comes before: the same rows, and nothing left to do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import inputs
from operand_cases import OPERANDS, with_operands

import vq4dit_jax as vq
from pallas_kernels import ops, reference_norm
from pallas_kernels.operand import Operand, move
from vq4dit_jax.networks import inference, prepared
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.fold import fold
from vq4dit_jax.networks.inference import prepare_for_inference
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import random_params

DEPTH, WIDTH, TOKENS, IMAGES = 2, 128, 16, 2
MODEL = DiT(input_size=8, patch_size=2, hidden_size=WIDTH, depth=DEPTH, num_heads=2, num_classes=5, in_channels=3)
X, T, Y = inputs(MODEL, IMAGES)
LAYER = jnp.ones(1, jnp.int32)
SPECS = {
    **OPERANDS,
    "W4A8, scaled": dataclasses.replace(OPERANDS["W4A8"], scaled=True),
    "W2, bfloat16": vq.OperandSpec(VQSpec(256, 4), None, rotation=16, signed=True, scaled=True, centred=True),
}


@functools.cache
def dense():
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), X, T, Y)["params"])
    return random_params(shapes, jax.random.key(1), 0.06)


@functools.cache
def both(name):
    """(blocks as they were, folded ones)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "fold", lambda blocks: blocks)
        plain = prepare_for_inference(with_operands(SPECS[name], dense()), activations(name))["blocks"]
    return plain, fold(plain)


def activations(name):
    return None if SPECS[name].bits is None else "int8"


def random(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), dtype)


def close(got, wanted):
    """Sums in float32 in another order."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def linear(prepared_linear, x, **finish):
    """In float32, so that nothing but the fold differs."""
    operand, scale = ops.quantize_tokens(x, prepared_linear.weights.dtype)
    layer = LAYER % prepared_linear.weights.layers
    return ops.linear(operand, prepared_linear, layer, scale, dtype=jnp.float32, **finish)


@pytest.mark.parametrize("name", SPECS)
def test_folded_blocks_give_each_linear_the_rows_of_its_operand(name):
    plain, folded = both(name)
    # adaLN and the norms: codes of 8 bits are equal, but for a rounding tie, and so are the scales.
    modulations = [linear(blocks.modulation, random(IMAGES, WIDTH)) for blocks in (plain, folded)]
    tokens = random(IMAGES * TOKENS, WIDTH, dtype=jnp.bfloat16)
    chunks = ((prepared.SHIFT1, prepared.SCALE1), (prepared.SHIFT2, prepared.SCALE2))
    for reader, offsets, factors in zip(("qkv", "fc1"), chunks, folded.factors, strict=True):
        where = dict(tokens=TOKENS, stride=prepared.CHUNKS * WIDTH, offsets=tuple(c * WIDTH for c in offsets))
        norm = functools.partial(reference_norm.ln_modulate_quantize, tokens, layer=LAYER, dtype=jnp.int8, **where)
        wanted, scales = norm(modulations[0], operand=getattr(plain, reader).operand)
        got, own = norm(modulations[1], operand=getattr(folded, reader).operand, factors=factors)
        close(own, scales)
        off = np.abs(np.asarray(got, int) - np.asarray(wanted, int))
        assert off.max() <= 1 and (off > 0).mean() < 2e-3
    gates = [
        np.asarray(m).reshape(IMAGES, DEPTH, 6, WIDTH)[:, :, [prepared.GATE1, prepared.GATE2]] for m in modulations
    ]
    np.testing.assert_array_equal(*gates)
    # qkv, attention and proj.
    x = random(IMAGES * TOKENS, WIDTH)
    qkv = [linear(blocks.qkv, x).reshape(IMAGES, TOKENS, 3, 2, WIDTH // 2) for blocks in (plain, folded)]
    attended = [ops.attention(*jnp.moveaxis(a, 2, 0)).reshape(-1, WIDTH) for a in qkv]
    close(*(move(a, b.proj.operand, LAYER) for a, b in zip(reversed(attended), (folded, plain), strict=True)))
    # fc1, GELU and fc2.
    hidden = [linear(blocks.fc1, x, gelu=True) for blocks in (plain, folded)]
    close(*(move(a, b.fc2.operand, LAYER) for a, b in zip(reversed(hidden), (folded, plain), strict=True)))


@pytest.mark.parametrize("name", SPECS)
def test_nothing_but_rotations_is_left(name):
    plain, folded = both(name)
    for reader in ("qkv", "proj", "fc1", "fc2"):
        rotation = SPECS[name].rotation
        assert getattr(plain, reader).operand.has_vectors
        assert getattr(folded, reader).operand == (Operand(rotation=rotation) if rotation else None)
    assert folded.factors == (SPECS[name].scaled,) * 2


def test_blocks_without_operands_are_left_alone():
    blocks = prepare_for_inference(dense(), "int8", weights="int8")["blocks"]
    assert all(a is b for a, b in zip(jax.tree.leaves(fold(blocks)), jax.tree.leaves(blocks), strict=True))
    assert blocks.factors == (False, False)


def test_without_a_rotation_fixed_scales_are_taken_and_the_rows_are_those_of_the_leaves():
    """fc1's rows are paired then, and so are the vectors behind its GELU."""
    params = with_operands(SPECS["W4A8, scaled"], dense())
    run = jax.jit(MODEL.apply, static_argnames="method")
    free = prepare_for_inference(params, "int8")
    fixed = prepare_for_inference(params, "int8", ranges=run({"params": free}, X, T, Y, method="ranges"))
    assert fixed["blocks"].attention_scale is not None and fixed["blocks"].fc1.weights.paired_rows
    wanted = np.asarray(run({"params": params}, X, T, Y))
    for ready in (free, fixed):
        assert np.linalg.norm(run({"params": ready}, X, T, Y) - wanted) < 2e-2 * np.linalg.norm(wanted)
