"""The quantized leaf and the parameter trees that hold it."""

import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import inputs, tiny

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.networks.dit import DIT_VARIANTS, DiT
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.rules import KEEP, abstract_quantized
from vq4dit_jax.qarray.soft import soften
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import dequantize, sizes
from vq4dit_jax.qarray.vq import VQArray, from_codes, validate


@st.composite
def vq_arrays(draw):
    """Any valid VQArray, as its codes and codebook in numpy and as the leaf."""
    stack = draw(st.sampled_from([(), (2,)]))
    groups, rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 8]))
    codewords, subvectors = draw(st.integers(1, 300)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codebook = rng.normal(size=(*stack, groups, codewords, length)).astype(np.float32)
    codes = rng.integers(0, codewords, (*stack, groups * rows, subvectors))
    return codebook, codes, from_codes(jnp.asarray(codebook), codes)


def _decode(codebook: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """W_hat = C[A], row by row."""
    rows_per_group = len(codes) // len(codebook)
    return np.stack([codebook[o // rows_per_group][row].reshape(-1) for o, row in enumerate(codes)])


@settings(max_examples=40)
@given(vq_arrays())
def test_decoding_looks_every_codeword_up(case):
    codebook, codes, leaf = case
    validate(leaf)
    wanted = np.stack([_decode(c, a) for c, a in zip(codebook, codes)]) if leaf.stack else _decode(codebook, codes)
    np.testing.assert_array_equal(np.asarray(leaf.decode()), wanted)


@settings(max_examples=20)
@given(vq_arrays())
def test_matmul_from_the_packed_form_is_decode_then_matmul(case):
    codebook, codes, leaf = case
    if leaf.stack:
        codebook, codes, leaf = codebook[0], codes[0], jax.tree.map(lambda a: a[0], leaf)
    x = np.random.default_rng(0).normal(size=(3, leaf.matrix[1])).astype(np.float32)
    wanted = x.astype(np.float64) @ _decode(codebook, codes).astype(np.float64).T
    np.testing.assert_allclose(np.asarray(leaf.matmul(jnp.asarray(x))), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(vq_arrays(), st.integers(0, 2**32 - 1))
def test_permuting_codewords_changes_nothing(case, seed):
    codebook, codes, leaf = case
    order = np.random.default_rng(seed).permutation(codebook.shape[-2])
    permuted = from_codes(jnp.asarray(codebook[..., order, :]), np.argsort(order)[codes])
    np.testing.assert_array_equal(np.asarray(permuted.decode()), np.asarray(leaf.decode()))


def test_validate_names_what_does_not_hold():
    leaf = from_codes(jnp.ones((1, 3, 2)), np.zeros((4, 6), int))
    for broken, message in (
        (dataclasses.replace(leaf, matrix=(4, 13)), "not a multiple"),
        (dataclasses.replace(leaf, assignments=leaf.assignments[:, :1]), "wanted uint8"),
        (dataclasses.replace(leaf, assignments=leaf.assignments.astype(np.int32)), "wanted uint8"),
        (dataclasses.replace(leaf, assignments=leaf.assignments + np.uint8(3)), "past the 3 codewords"),
        (leaf.with_codebook(leaf.codebook * np.nan), "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            validate(broken, "somewhere")


# Trees ----------------------------------------------------------------------------------------------------------


def test_quantize_picks_the_linears_of_the_blocks_and_keeps_the_rest():
    _, params = tiny()
    packed = quantize(params, 2, key=jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(packed, sep="/")
    quantized = {path for path, leaf in flat.items() if isinstance(leaf, VQArray)}
    names = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "adaLN_modulation/1")
    assert quantized == {f"blocks/{name}/kernel" for name in names}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        if path not in quantized:
            assert flat[path] is leaf


def test_the_packed_model_is_the_dense_model_of_its_decoded_weights():
    model, params = tiny()
    packed = quantize(params, 2, key=jax.random.key(0))
    apply = jax.jit(lambda p, *a: model.apply({"params": p}, *a))
    found, wanted = apply(packed, *inputs(model)), apply(dequantize(packed), *inputs(model))
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=2e-6 * float(jnp.abs(wanted).max()))


def test_blocks_of_different_bits_split_the_scan_and_change_nothing_else():
    """Mixed rules: a role in runs of different codebooks, another kept in one block. Same result as the dense tree."""
    model, params = tiny(depth=4)
    rules = (
        (r"blocks/[01]/mlp/fc1/kernel", VQSpec(16, 4)),
        (r"blocks/2/mlp/fc1/kernel", KEEP),
        (r"blocks/3/attn/proj/kernel", VQSpec(8, 2)),
        *dit_rules(2),
    )
    packed = quantize(params, key=jax.random.key(0), rules=rules)
    fc1, proj = packed["blocks"]["mlp"]["fc1"]["kernel"], packed["blocks"]["attn"]["proj"]["kernel"]
    assert [leaf.num_codewords for leaf in (fc1[0], fc1[2])] == [16, 128] and not isinstance(fc1[1], VQArray)
    assert [leaf.stack for leaf in proj] == [(3,), (1,)]
    dense = dequantize(packed)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(
        np.asarray(dense["blocks"]["mlp"]["fc1"]["kernel"][2]), np.asarray(params["blocks"]["mlp"]["fc1"]["kernel"][2])
    )
    apply = lambda p: model.apply({"params": p}, *inputs(model), return_blocks=True)
    for found, wanted in zip(jax.jit(apply)(packed), jax.jit(apply)(dense), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=2e-6 * float(jnp.abs(wanted).max()))


def test_a_path_without_a_rule_is_an_error_that_names_it():
    _, params = tiny()
    with pytest.raises(InputError, match="no rule matches parameter y_embedder"):
        quantize(params, key=jax.random.key(0), rules=dit_rules(2)[:-1] + ((r"(pos_embed|[xt]_.*|final.*)", KEEP),))


def test_weights_that_are_not_finite_are_refused_by_name():
    _, params = tiny()
    params = jax.tree.map(lambda a: a, params)
    params["blocks"]["attn"]["proj"]["kernel"] = params["blocks"]["attn"]["proj"]["kernel"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(InputError, match="blocks/attn/proj/kernel holds NaN"):
        quantize(params, key=jax.random.key(0))


def test_unknown_bits_are_refused():
    with pytest.raises(InputError, match="bits=5"):
        dit_rules(5)


@given(st.integers(1, 2048), st.integers(1, 64))
def test_small_layers_get_small_codebooks(rows, subvectors):
    codewords = VQSpec(256, 4).for_matrix(rows, 4 * subvectors).codewords
    assert codewords == min(256, 2 ** max(0, math.floor(math.log2(max(1, rows * subvectors / 4)))))


@pytest.mark.parametrize(
    ("bits", "assignment_mib", "codebook_mib"),
    [(1.5, 119.6015625, None), (2, 159.46875, 196 * 256 * 4 * 4 / 2**20), (3, 239.203125, None)],
)
def test_xl2_has_exactly_the_published_sizes(bits, assignment_mib, codebook_mib):
    """design.md section 2, from shapes alone."""
    model = DiT(**DIT_VARIANTS["DiT-XL/2"])
    x, label = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, label, label)["params"]
    blocks = flax.traverse_util.flatten_dict(shapes["blocks"], sep="/")
    weights = sum(math.prod(a.shape) for path, a in blocks.items() if path.endswith("kernel"))
    biases = sum(math.prod(a.shape) for path, a in blocks.items() if path.endswith("bias"))
    assert (weights, biases) == (668_860_416, 483_840)

    packed = abstract_quantized(shapes, dit_rules(bits))
    found, block_sizes = sizes(packed), sizes(packed["blocks"])
    assert found.parameters == 675_129_632
    assert found.quantized_parameters == weights
    assert found.assignment_bytes / 2**20 == pytest.approx(assignment_mib, abs=1e-9)
    assert block_sizes.other_bytes == 4 * biases
    if bits == 2:
        assert found.codebook_bytes / 2**20 == codebook_mib
        together = found.assignment_bytes + found.codebook_bytes + block_sizes.other_bytes
        assert together / 2**20 == pytest.approx(162.08, abs=0.005)
        assert 4 * (weights + biases) / 2**20 == pytest.approx(2553.35, abs=0.005)
    assert found.bits_per_quantized_weight == pytest.approx(bits, rel=0.01)


def test_abstract_quantization_has_the_shapes_of_the_real_one():
    _, params = tiny(depth=4)
    rules = ((r"blocks/2/mlp/fc1/kernel", VQSpec(8, 2)), *dit_rules(3))
    abstract = abstract_quantized(params, rules)
    real = quantize(params, key=jax.random.key(0), rules=rules)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    shape = lambda a: (a.shape, jnp.dtype(a.dtype))
    assert jax.tree.map(shape, abstract) == jax.tree.map(shape, real)


# Soft weights ---------------------------------------------------------------------------------------------------


def _soft(num_candidates: int, start: str):
    weight = np.random.default_rng(0).normal(size=(2, 12, 16)).astype(np.float32)
    params = {"kernel": jnp.asarray(weight.swapaxes(1, 2))}
    rules = ((r".*", VQSpec(8, 4, groups=3)),)
    hard = quantize({"blocks": params}, key=jax.random.key(0), rules=rules)["blocks"]["kernel"]
    return weight, hard, soften(hard, weight, num_candidates, start)


def test_candidates_are_the_nearest_codewords_in_order():
    weight, hard, soft = _soft(3, "uniform")
    codebook = np.asarray(hard.codebook, np.float64)
    for layer, row, s in np.ndindex(2, 12, 4):
        distance = np.square(codebook[layer, row // 4] - weight[layer, row, 4 * s : 4 * s + 4]).sum(1)
        found = distance[np.asarray(soft.candidates)[layer, :, row, s]]
        np.testing.assert_allclose(found, np.sort(distance)[:3], rtol=1e-5)


def test_ratio_starts_are_the_papers_and_the_released_codes():
    weight, hard, uniform = _soft(2, "uniform")
    np.testing.assert_allclose(np.asarray(uniform.ratios()), 0.5)
    _, _, soft = _soft(2, "distance")
    layer, row, s = 1, 7, 2
    vector = weight[layer, row, 4 * s : 4 * s + 4]
    codewords = np.asarray(hard.codebook)[layer, row // 4][np.asarray(soft.candidates)[layer, :, row, s]]
    inverse = 1 / (np.square(codewords - vector).sum(1) + 1e-5)
    np.testing.assert_allclose(np.asarray(soft.ratios())[layer, :, row, s], inverse / inverse.sum(), rtol=1e-4)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_soft_weights_are_the_ratio_weighted_codewords(num_candidates):
    _, hard, soft = _soft(num_candidates, "distance")
    layer = jax.tree.map(lambda a: a[1], soft)
    # One candidate is the packed code of the hard model; there is no array of candidates.
    candidates = hard.codes()[1][None] if num_candidates == 1 else layer.candidates
    codebook, candidates, ratios = map(np.asarray, (layer.codebook, candidates, layer.ratios()))
    wanted = sum(
        ratios[n][..., None] * _decode(codebook, candidates[n]).reshape(12, 4, 4) for n in range(num_candidates)
    )
    np.testing.assert_allclose(np.asarray(layer.decode()), wanted.reshape(12, 16), atol=1e-6)


@pytest.mark.parametrize("start", ["uniform", "distance"])
def test_hardening_at_the_start_gives_kmeans_back(start):
    """The nearest candidate wins, also among equal ratios; with n = 1 there is no other."""
    for num_candidates in (1, 2):
        _, hard, soft = _soft(num_candidates, start)
        np.testing.assert_array_equal(np.asarray(soft.harden().decode()), np.asarray(hard.decode()))


def test_one_candidate_is_the_hard_model():
    _, hard, soft = _soft(1, "uniform")
    np.testing.assert_array_equal(
        np.stack([np.asarray(jax.tree.map(lambda a: a[i], soft).decode()) for i in range(2)]), np.asarray(hard.decode())
    )


def test_frozen_subvectors_are_their_best_candidate_and_have_no_gradient():
    _, _, soft = _soft(2, "distance")
    layer = jax.tree.map(lambda a: a[0], soft)
    layer = dataclasses.replace(layer, frozen=layer.frozen.at[3].set(True))
    np.testing.assert_array_equal(np.asarray(layer.ratios())[:, 3], [[1.0] * 4, [0.0] * 4])
    gradient = jax.grad(lambda z: jnp.square(dataclasses.replace(layer, logits=z).decode()).sum())(layer.logits)
    assert not np.asarray(gradient)[:, 3].any() and np.asarray(gradient)[:, 2].all()
