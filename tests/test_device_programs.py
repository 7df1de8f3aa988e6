"""A sampler step of every form of a prepared network, compiled for six GPUs: XLA compiles what the selector chose."""

import collections

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import compiler, devices, steps
from benchmarks.aot.hlo import products
from benchmarks.aot.steps import FORMS
from benchmarks.aot.targets import TARGETS
from pallas_kernels import ops, selector
from vq4dit_jax.networks.dit import DiT

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable())),
]
# Wide enough that scales by group of 128 columns are more than one, and that the last group is filled up.
MODEL = DiT(input_size=16, hidden_size=192, depth=2, num_heads=3, num_classes=10, dtype=jnp.bfloat16)


def compile_forms(target, forms):
    fn, shapes = steps.steps(MODEL, 1, target.facts, forms)
    return compiler.compile(fn, *shapes, name=f"forms on {target.name}", target=target)


@pytest.mark.parametrize("name", TARGETS)
def test_a_sampler_step_of_every_form_compiles_and_multiplies_as_the_selector_says(name):
    target = TARGETS[name]
    try:
        compiled = compile_forms(target, FORMS)
    except jax.errors.JaxRuntimeError as all_together:
        for form in FORMS:
            try:
                compile_forms(target, [form])
            except jax.errors.JaxRuntimeError as error:
                pytest.fail(f"{form}: {str(error).splitlines()[0]}")
        raise all_together
    found = collections.Counter(products(compiled.hlo))
    told = [devices.told(MODEL, form, target.facts) for form in FORMS]
    pairs = lambda choice: [(choice.operands.name,) * 2] if choice.operands else []
    expected = collections.Counter()
    for form in told:
        for operation in ("qkv", "attention", "attention", "proj", "fc1", "fc2"):  # attention has two
            expected.update(pairs(form[operation]))
    assert expected <= found
    # What is left is adaLN, whose products XLA merges where forms have one input, the embedders and the last layer.
    outside = ("float32" if name == "t4" else "bfloat16",) * 2
    assert set(found - expected) == {outside}.union(*(pairs(form["adaLN of all blocks"]) for form in told))
    kernels = {choice.implementation for form in told for choice in form.values()} == {"mosaic"}
    assert kernels == bool(compiled.mosaic_kernels) == (name == "h200")


def test_bfloat16_attention_of_jax_itself_does_not_compile_for_a_t4_and_ours_does():
    """Where this begins to pass, the selector's rule for attention is not needed any more."""
    shape = jax.ShapeDtypeStruct((2, 64, 3, 64), jnp.bfloat16)
    plain = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="xla")
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="Unsupported algorithm .* ALG_DOT_BF16_BF16_F32")
    with jax.numpy_dtype_promotion("standard"), refused:
        compiler.compile(plain, shape, target=TARGETS["t4"])

    def ours(q):
        with selector.assume(TARGETS["t4"].facts):
            return ops.attention(q, q, q)

    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        compiled = compiler.compile(ours, jax.ShapeDtypeStruct(shape.shape, dtype), target=TARGETS["t4"])
        operands = "float16" if dtype == jnp.float16 else "float32"
        assert products(compiled.hlo) == [(operands, operands)] * 2
        assert compiled.outputs[0].dtype == dtype
    assert ".target sm_75" in compiled.kernels[0].ptx and compiled.kernels[0].assembly.registers > 0
