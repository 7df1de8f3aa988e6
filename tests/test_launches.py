"""Launches of a block of DiT-XL/2 in 8 bits, compiled for an H200: what operands with scales, centres and rotations add."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import compiler, steps
from benchmarks.aot.steps import Form
from pallas_kernels import selector
from vq4dit_jax.networks import prepared
from vq4dit_jax.networks.dit import variant

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable())),
]
MODEL, IMAGES = variant("DiT-XL/2", dtype=jnp.bfloat16), 16
NORM, PRODUCT, ATTENTION, ROTATION = "ln_modulate_quantize", "product", "attention", "rotate_quantize"
# By token there is a launch behind attention and one behind GELU, with the rotation or without; with fixed scales there is none.
# Scales and centres have no launch anywhere, and the rotation of what attention makes none where values are rotated. The last
# one is the loop's counter.
BY_TOKEN = [NORM, PRODUCT, ATTENTION, ROTATION, PRODUCT, NORM, PRODUCT, ROTATION, PRODUCT, "loop_add_fusion"]
OF_HIDDEN_ALONE = [name for i, name in enumerate(BY_TOKEN) if i != BY_TOKEN.index(ROTATION)]
FORMS = {
    Form("int8", "int8"): BY_TOKEN,
    Form("int8", "int8", rotation=576): BY_TOKEN,
    Form("int8", "int4", rotation=64): BY_TOKEN,
    Form("int8", "int8", ranges=True, rotation=576): OF_HIDDEN_ALONE,
    Form("int8", "int4", ranges=True, rotation=64): OF_HIDDEN_ALONE,
    Form("int8", "int8", ranges=True, rotation=0): [name for name in BY_TOKEN if name != ROTATION],
    Form("int8", "int4", ranges=True, rotation=0): [name for name in BY_TOKEN if name != ROTATION],
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_operands_add_no_launch_to_a_block(form):
    blocks = steps.shapes_of(MODEL, form)["blocks"]
    width, tokens = MODEL.hidden_size, MODEL.grid**2
    x = jax.ShapeDtypeStruct((IMAGES, tokens, width), jnp.bfloat16)
    modulations = jax.ShapeDtypeStruct((IMAGES, MODEL.depth * prepared.CHUNKS * width), jnp.bfloat16)
    run = functools.partial(prepared.run, num_heads=MODEL.num_heads, eps=(1e-6, 1e-6))
    with selector.assume(selector.H200):
        compiled = compiler.compile(run, blocks, x, modulations, name=str(form))
    names = [launch.name.split("_kernel")[0] for launch in compiled.launches_per_iteration()]
    assert names == FORMS[form]
