"""What runs on which GPU: the selector's choices for each form of a prepared network."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from benchmarks.aot import devices, steps
from benchmarks.aot.hlo import products
from benchmarks.aot.steps import FORMS
from benchmarks.aot.targets import TARGETS
from pallas_kernels import ops, selector
from pallas_kernels.operand import Operand
from pallas_kernels.weights import ByteWeights, PreparedLinear
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.explain import explain_kernels

# Wide enough that scales by group of 128 columns are more than one, and that the last group is filled up.
MODEL = DiT(input_size=16, hidden_size=192, depth=2, num_heads=3, num_classes=10, dtype=jnp.bfloat16)


def test_targets_are_what_their_names_say():
    assert TARGETS["h200"].facts == selector.H200
    capabilities = {name: target.facts.capability for name, target in TARGETS.items()}
    assert capabilities == {
        "t4": (7, 5), "a100": (8, 0), "l4": (8, 9), "h200": (9, 0), "b200": (10, 0), "rtx5090": (12, 0)
    }  # fmt: skip
    assert TARGETS["t4"].facts == selector.Facts("gpu", "Tesla T4", (7, 5), 40, False)


def test_the_documented_table_is_the_selectors():
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert devices.table(MODEL) in page, "make it anew: python -m benchmarks.aot.devices"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ranges_choose_nothing(form):
    for target in TARGETS.values():
        found = devices.told(MODEL, form, target.facts)
        bare = devices.told(MODEL, steps.Form(form.activations, form.weights), target.facts)
        # Without them rows are quantized by a launch of its own.
        own = {"quantize for proj", "quantize for fc2"}
        assert set(bare) - set(found) == (own if form.ranges else set()) and set(found) <= set(bare)
        for name, choice in found.items():
            assert (choice.implementation, choice.operands) == (bare[name].implementation, bare[name].operands)


def test_products_are_read_from_xlas_text():
    text = """
  %a = bf16[2,4]{1,0} parameter(0)
  b.1 = s8[2,4]{1,0} parameter(1)
  ROOT %dot.3 = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %c = (s32[2,2]{1,0}, s8[4194304]{0}) custom-call(%b.1, s8[2,4]{1,0} %b.1), custom_call_target="__cublas$lt$matmul"
  %d = (f32[2,2]{1,0}, f16[0]{0:S(1)}) custom-call(%a, %a), custom_call_target="__cudnn$convForward"
  %e = f32[2,2]{1,0} dot(%d#0, %d#1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
"""
    assert products(text) == [("bfloat16", "bfloat16"), ("int8", "int8"), ("float32", "float16")]


def test_operands_in_the_wider_dtype_have_the_products_of_the_values_themselves():
    rng = np.random.default_rng(0)
    draw = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape) * 20).astype(dtype)
    exact = lambda *arrays: [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]
    t4 = TARGETS["t4"].facts
    x, w = draw((8, 128), jnp.float8_e4m3fn), draw((1, 64, 128), jnp.float8_e4m3fn)
    with selector.assume(t4):
        y = ops.linear(x, PreparedLinear(ByteWeights(w, 128)), jnp.zeros(1, jnp.int32), dtype=jnp.float32)
    a, b = exact(x, w[0])
    np.testing.assert_allclose(y, a @ b.T, rtol=1e-6, atol=1e-6 * np.abs(a @ b.T).max())
    # Attention beyond what float16 holds: values larger than 65504.
    q, k, v = (draw((2, 16, 3, 64), jnp.bfloat16) * jnp.asarray(scale, jnp.bfloat16) for scale in (0.05, 0.05, 1e6))
    with selector.assume(t4):
        found = ops.attention(q, k, v)
    a, b, c = exact(q, k, v)
    weights = np.exp(np.einsum("btnh,bsnh->bnts", a, b) / 8)
    wanted = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), c)
    assert found.dtype == jnp.bfloat16
    # A bfloat16 has 8 bits, so half of its last place is up to 2**-8 of the value.
    np.testing.assert_allclose(*exact(found), wanted, rtol=2**-7.9, atol=1e-5 * np.abs(wanted).max())


def test_rotations_are_explained_where_they_run(capsys):
    """By the norms, and behind attention and GELU; of a norm that is not as the other one a line of its own."""
    blocks = steps.shapes_of(MODEL, steps.Form("int8", "int8", rotation=64))["blocks"]
    other = dataclasses.replace(blocks, fc1=dataclasses.replace(blocks.fc1, operand=Operand(rotation=192)))
    with selector.assume(selector.H200):
        texts = [explain_kernels(MODEL, 2, {"blocks": each}) for each in (blocks, other)]
    capsys.readouterr()
    alike, apart = (
        {line[2:22].strip(): line[23:].split(maxsplit=1) for line in text.splitlines()[1:]} for text in texts
    )
    rotated = ["mosaic", "NVIDIA H200: one pass, a token a warp, rotated in groups of 64"]
    assert (
        alike["norm, modulate"]
        == alike["rotate for proj"]
        == alike["rotate for fc2"]
        == apart["norm for qkv"]
        == rotated
    )
    implementation, reason = apart["norm for fc1"]
    assert implementation == "xla" and reason.startswith("rotation in groups of 192, D=192: the kernels have groups of")
    assert list(alike)[2:] == ["qkv", "attention", "rotate for proj", "proj", "fc1", "rotate for fc2", "fc2"]


def test_a_fall_back_is_explained(capsys):
    """A T4: in which dtype XLA gets the operands, and why in no other."""
    with selector.assume(TARGETS["t4"].facts):
        text = explain_kernels(MODEL, 2, activations="e4m3")
        plain = explain_kernels(MODEL, 2, steps.shapes_of(MODEL, steps.Form("int8", "int4")))
        dense = explain_kernels(MODEL, 2, {"blocks": {"attn": {"qkv": {"kernel": np.zeros((2, 192, 576))}}}})
    assert capsys.readouterr().out == "\n".join([text, plain, dense, ""])
    row = lambda text, name: next(line for line in text.splitlines() if line.startswith(f"  {name}"))
    why = "float8_e4m3fn has products from compute capability 8.9 on"
    assert text.startswith("Tesla T4, compute capability 7.5; 2 rows of 64 tokens")
    assert row(text, "fc1").endswith(f"9.0 (Hopper); XLA gets operands in float16: {why}")
    why = "XLA gets operands in float32: bfloat16 has products from compute capability 8.0 on"
    for name in ("attention", "adaLN of all blocks"):
        assert row(text, name).endswith(why)
    assert row(dense, "attention").endswith(why)
    assert row(plain, "fc1").endswith("XLA gets operands in float32")
