"""A DiT that runs from packed weights against the same network from its parameters, and what preparing refuses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models import inputs
from operand_cases import OPERANDS, with_operands

import vq4dit_jax as vq
from benchmarks.aot import steps
from pallas_kernels import ops, selector
from pallas_kernels.weights import PreparedLinear
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT, DiTBlock, variant
from vq4dit_jax.networks.inference import activation_ranges, prepare_for_inference
from vq4dit_jax.networks.prepared import PreparedBlocks
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import random_params
from vq4dit_jax.qarray.vq import VQArray, from_codes

DEPTH, WIDTH, TOKENS, BATCH = 2, 128, 16, 4
MODEL = DiT(input_size=8, patch_size=2, hidden_size=WIDTH, depth=DEPTH, num_heads=2, num_classes=5, in_channels=3)
X, T, Y = inputs(MODEL, BATCH)


@functools.cache
def dense():
    """Weights with which rounding errors neither vanish nor grow from block to block."""
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), X, T, Y)["params"])
    return random_params(shapes, jax.random.key(1), 0.06)


@functools.cache
def packed(bits=2):
    return vq.quantize(dense(), bits, key=jax.random.key(2), max_iterations=3)


@functools.cache
def prepared(activations=None, weights=None, fixed=False, bits=2):
    """With `fixed`, scales of a model without fixed ones on the very inputs that the tests use."""
    ranges = ranges_of(weights and "int8", 2 if weights else bits) if fixed else None
    return prepare_for_inference(dense() if weights else packed(bits), activations, weights=weights, ranges=ranges)


@functools.cache
def ranges_of(weights, bits):
    return program(method="ranges")({"params": prepared(weights, weights, bits=bits)}, X, T, Y)


@functools.cache
def program(**options):
    return jax.jit(functools.partial(MODEL.apply, **options))


def run(params, **options):
    return program(**options)({"params": params}, X, T, Y)


@pytest.mark.parametrize("name", OPERANDS)
def test_scaled_centred_and_rotated_operands_are_those_of_the_leaves(name):
    """The prepared blocks round the same operands as the leaves, in 16-bit tokens, and multiply integers."""
    params = with_operands(OPERANDS[name], dense())
    ready = prepare_for_inference(params, "int8")
    assert difference(run(ready), run(params)) < 2e-2
    text = jax.jit(MODEL.apply).lower({"params": ready}, X, T, Y).as_text()
    products = re.findall(r"dot_general.*: \((tensor<[^>]*>), (tensor<[^>]*>)\)", text)
    integers = [pair for pair in products if all(kind.endswith("xi8>") for kind in pair)]
    # adaLN, and qkv, proj, fc1 and fc2 in the loop's body; of 4-bit weights those with one group (I = 128, all but fc2), because
    # scales of several groups go into the weights first.
    assert len(integers) == {"W8A8, rotated": 5, "W4A8": 4, "W2A8": 5}[name]


def test_operands_that_have_no_prepared_form_are_refused():
    six = vq.OperandSpec(vq.IntSpec(8, None, "symmetric"), 6)
    params = vq.quantize(dense(), key=jax.random.key(0), rules=dit_rules(lambda role: six))
    with pytest.raises(
        InputError, match=r"adaLN_modulation/1/kernel.*activations are in 6 bits \(symmetric\).*asked for int8"
    ):
        prepare_for_inference(params, "int8")
    own = with_operands(OPERANDS["W8A8, rotated"], dense())
    kernel = own["blocks"]["adaLN_modulation"]["1"]["kernel"]
    other = dataclasses.replace(kernel, centre=kernel.centre.at[1, 0].add(1.0))
    own["blocks"]["adaLN_modulation"]["1"]["kernel"] = other
    with pytest.raises(InputError, match="adaLN_modulation/1/kernel has another shift of its operand in each block"):
        prepare_for_inference(own, "int8")


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def difference(got, wanted):
    """Relative, in the 2-norm."""
    got, wanted = (np.asarray(a, np.float64) for a in (got, wanted))
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "activations, bits, fixed, tolerance",
    [
        (None, 2, False, 1e-2),
        (None, 3, False, 1e-2),
        ("int8", 3, False, 2e-2),
        ("int8", 2, True, 2e-2),
        ("e4m3", 2, True, 4e-2),
    ],
)
def test_a_prepared_model_is_the_packed_one_up_to_its_roundings(activations, bits, fixed, tolerance):
    assert difference(run(prepared(activations, fixed=fixed, bits=bits)), run(packed(bits))) < tolerance


@pytest.mark.parametrize(
    "weights, fixed, tolerance",
    [("int8", False, 2e-2), ("int8", True, 2e-2), ("int4", True, 0.2)],
)
def test_integer_weights_are_the_dense_model_up_to_their_roundings(weights, fixed, tolerance):
    assert difference(run(prepared("int8", weights, fixed)), run(dense())) < tolerance


@pytest.mark.parametrize(
    "activations, weights, fixed",
    [(None, None, False), ("int8", None, True), ("e4m3", None, True), ("e4m3", None, False), ("int8", "int4", True)],
)
def test_the_wider_products_of_a_t4_change_nothing_but_roundings(activations, weights, fixed):
    """bfloat16 multiplied as float32, and e4m3 as float16, whose products are those of the values themselves."""
    params = prepared(activations, weights, fixed)

    def on_a_t4(params):
        with selector.assume(selector.Facts("gpu", "Tesla T4", (7, 5), 40, True)):
            return MODEL.apply({"params": params}, X, T, Y)

    text = jax.jit(on_a_t4).lower(params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and not any("f8E4M3FN" in line for line in products)
    # Outside the blocks the operands are the model's own.
    assert not any("bf16" in line for line in products if "batching_dims" in line)
    # A last bit of attention decides how a value near the middle of two 8-bit ones is rounded.
    assert difference(jax.jit(on_a_t4)(params), run(params)) < (1e-2 if activations is None else 2e-2)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_products_are_those_of_values_rounded_in_float64(weights):
    """W8A8 and W4A8 as the papers define them: symmetric, a scale for a row (and 128 inputs), a scale for a token."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 128)).astype(ml_dtypes.bfloat16)
    leaf = dense()["blocks"]["mlp"]["fc1"]
    scale = lambda a, limit: np.abs(a).max(-1, keepdims=True) / limit
    fake = lambda a, s, most: np.clip(np.rint(a / s), -most - 1, most) * s
    w, most = np.asarray(leaf["kernel"], np.float64)[1].T, 127 if weights == "int8" else 7
    tokens = x.astype(np.float64)
    wanted = fake(tokens, scale(tokens, 127), 127) @ fake(w, scale(w, most + 0.5).astype(np.float16), most).T
    wanted += np.asarray(leaf["bias"], np.float64)[1]
    wanted = gelu(wanted)
    operand, scale = ops.quantize_tokens(jnp.asarray(x), jnp.int8)
    fc1 = prepared("int8", weights)["blocks"].fc1
    got = ops.linear(operand, fc1, jnp.ones(1, jnp.int32), scale, gelu=True)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-8, atol=1e-4 * np.abs(wanted).max())


def test_blocks_of_different_bits_are_runs_of_prepared_blocks():
    rules = ((r"blocks/0/mlp/fc1/kernel", VQSpec(64, 2)), *dit_rules(2))
    mixed = vq.quantize(dense(), key=jax.random.key(3), rules=rules, max_iterations=2)
    tree = prepare_for_inference(mixed)
    assert [type(blocks) for blocks in tree["blocks"]] == [PreparedBlocks, PreparedBlocks]
    assert [blocks.fc1.weights.order.bits for blocks in tree["blocks"]] == [6, 8]
    wanted, got = (run(params, return_blocks=True) for params in (mixed, tree))
    assert difference(got[0], wanted[0]) < 1e-2
    assert got[1].shape == wanted[1].shape == (DEPTH, BATCH, TOKENS, WIDTH)
    assert difference(got[1], wanted[1]) < 1e-2
    modulations = program(method="modulations")({"params": tree}, T, Y)
    assert [m.shape for m in modulations] == [(BATCH, 6 * WIDTH)] * 2
    # Each run has its own part of the ranges: the second block's are a thousand times too large.
    ranges = {name: np.asarray(v) * [1, 1000] for name, v in run(tree, method="ranges").items()}
    coarse = prepare_for_inference(mixed, "int8", ranges=ranges)
    _, outputs = run(coarse, return_blocks=True)
    assert difference(outputs[0], wanted[1][0]) < 2e-2 < difference(outputs[1], wanted[1][1])


@pytest.mark.parametrize("activations, weights", [(None, None), ("int8", "int8")])
def test_modulations_that_are_given_change_no_bit(activations, weights):
    tree = prepared(activations, weights)
    modulations = program(method="modulations")({"params": tree}, T, Y)
    assert [m.shape for m in modulations] == [(BATCH, DEPTH * 6 * WIDTH)]
    given = lambda modulations: program()({"params": tree}, X, T, Y, modulations=modulations)
    np.testing.assert_array_equal(given(modulations), run(tree))
    # They are read: others give another result.
    assert difference(given(tuple(m + 1 for m in modulations)), run(tree)) > 1e-2


def test_block_outputs_are_those_of_the_packed_model_and_the_image_is_the_same():
    image, outputs = run(prepared(), return_blocks=True)
    _, wanted = run(packed(), return_blocks=True)
    assert outputs.shape == (DEPTH, BATCH, TOKENS, WIDTH)
    for got, exact in zip(outputs, wanted, strict=True):
        assert difference(got, exact) < 1e-2
    assert difference(image, run(prepared())) < 1e-3


def test_ranges_are_the_largest_magnitudes_that_proj_and_fc2_read():
    """Of the first block, from its plain parameters and in float64."""
    plain = vq.dequantize(packed())
    tokens = MODEL.apply({"params": plain}, X, method="_tokens")
    c = MODEL.apply({"params": plain}, T, Y, method="conditioning")
    block = DiTBlock(num_heads=2, mlp_ratio=4.0, norm2_eps=MODEL.norm2_eps)
    first = jax.tree.map(lambda a: a[0], plain["blocks"])
    _, seen = block.apply({"params": first}, tokens, c, capture_intermediates=True)
    result = lambda part, layer: np.asarray(seen["intermediates"][part][layer]["__call__"][0], np.float64)
    q, k, v = np.moveaxis(result("attn", "qkv").reshape(BATCH, TOKENS, 3, 2, WIDTH // 2), 2, 0)
    weights = np.exp(np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(WIDTH // 2))
    attended = np.einsum("bnqk,bknh->bqnh", weights / weights.sum(-1, keepdims=True), v)
    ranges = ranges_of(None, 2)
    assert {name: found.shape for name, found in ranges.items()} == {"attn/proj": (DEPTH,), "mlp/fc2": (DEPTH,)}
    np.testing.assert_allclose(ranges["attn/proj"][0], np.abs(attended).max(), rtol=2e-2)
    np.testing.assert_allclose(ranges["mlp/fc2"][0], np.abs(gelu(result("mlp", "fc1"))).max(), rtol=2e-2)


def test_activation_ranges_of_a_sampled_trajectory_serve_for_other_inputs():
    ranges = activation_ranges(MODEL, packed(), key=jax.random.key(0), images=2, num_steps=2)
    for name, here in ranges_of(None, 2).items():
        assert ranges[name].shape == (DEPTH,)
        assert (ranges[name] > here / 3).all() and (ranges[name] < here * 3).all()
    assert difference(run(prepare_for_inference(packed(), "int8", ranges=ranges)), run(packed())) < 4e-2


def test_memory_holds_one_copy_of_the_assignments():
    tree = prepared(bits=3)
    leaves = jax.tree.leaves(packed(3), is_leaf=lambda node: isinstance(node, VQArray))
    codes = [leaf for leaf in leaves if isinstance(leaf, VQArray)]
    assert len(codes) == 5
    linears = jax.tree.leaves(tree["blocks"], is_leaf=lambda node: isinstance(node, PreparedLinear))
    assert sum(p.weights.assignments.nbytes for p in linears) == sum(leaf.assignments.nbytes for leaf in codes)
    assert not [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, VQArray) or leaf.dtype == jnp.uint8]
    outside = {name: leaf for name, leaf in tree.items() if name != "blocks"}
    assert {leaf.dtype for leaf in jax.tree.leaves(outside)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("activations", [None, "int8"])
def test_weights_of_dit_xl_in_2_bits_take_less_than_190_mb(activations):
    model = variant("DiT-XL/2", dtype=jnp.bfloat16)
    shapes = steps.prepared_shapes(model, steps.Form(activations, ranges=activations is not None))
    assert shapes["blocks"].depth == 28
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    # 159.469 MiB of assignments are the least.
    assert 159.469 * 2**20 < size < 190e6


def with_proj(codebook, codes):
    """The packed tree with another kernel of attn/proj."""
    tree = packed()
    blocks = tree["blocks"]
    proj = {
        **blocks["attn"]["proj"],
        "kernel": from_codes(jnp.zeros((DEPTH, 1, *codebook)), np.zeros((DEPTH, *codes), int)),
    }
    return {**tree, "blocks": {**blocks, "attn": {**blocks["attn"], "proj": proj}}}


WRONG = {"attn/proj": np.ones(3), "mlp/fc2": np.ones(3)}
REFUSED = [
    (packed, dict(activations="int4"), r"activations='int4': wanted None, 'int8' or 'e4m3'"),
    (dense, dict(activations="int8", weights="int2"), r"weights='int2': wanted None .*, 'int8' or 'int4'"),
    (dense, dict(weights="int8"), r"weights='int8' go with activations='int8', not None"),
    (dense, dict(activations="e4m3", weights="int4"), r"weights='int4' go with activations='int8', not 'e4m3'"),
    (packed, dict(ranges=WRONG), r"ranges are of 8-bit activations; give activations='int8' or 'e4m3', or leave"),
    (packed, dict(activations="int8", ranges=WRONG), r"ranges: wanted attn/proj and mlp/fc2 .* each of the 2 blocks"),
    (packed, dict(activations="int8", ranges={"mlp/fc2": np.ones(2)}), r"ranges: wanted attn/proj and mlp/fc2"),
    (lambda: {"w": np.zeros(3)}, {}, r"params hold no blocks of a DiT \(attn, mlp, adaLN_modulation\)"),
    (prepared, {}, r"prepared ones cannot be prepared again"),
    (dense, {}, r"blocks/adaLN_modulation/1/kernel is a \w+; wanted packed weights: quantize first"),
    (packed, dict(activations="int8", weights="int8"), r"kernel is a VQArray; weights='int8' are made of dense ones"),
    (
        lambda: with_proj((256, 4), (96, 32)),
        {},
        r"blocks/attn/proj/kernel has no form for the kernels: W is \(96, 128\)",
    ),
    (lambda: with_proj((4, 16), (128, 8)), {}, r"blocks/attn/proj/kernel has no form for the kernels: d=16, K=4"),
    (lambda: with_proj((512, 4), (128, 32)), {}, r"blocks/attn/proj/kernel has no form for the kernels: d=4, K=512"),
]


@pytest.mark.parametrize("make, options, message", REFUSED)
def test_what_has_no_prepared_form_is_refused_in_a_line(make, options, message):
    with pytest.raises(InputError, match=message) as error:
        prepare_for_inference(make(), **options)
    assert "\n" not in str(error.value)
