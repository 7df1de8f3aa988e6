"""Soft reconstruction and its gradient: references against float64, torch and autodiff; kernels, interpreted, against float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import emulate

from benchmarks.aot import compiler
from pallas_kernels import reference_soft, soft_decode
from pallas_kernels.mosaic import codebook_grad as codebook_grad_kernel
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic import soft_decode as soft_decode_kernel
from pallas_kernels.soft_weights import soft_weights

needs_compiler = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))


def case(seed, rows=8, subvectors=64, length=4, codewords=256, n=2, groups=1, stack=(), codes_dtype=np.int32):
    """(gradient, candidates, ratios, codebook) with a candidate that is another's equal here and there."""
    rng = np.random.default_rng(seed)
    candidates = rng.integers(0, codewords, (*stack, n, rows, subvectors)).astype(codes_dtype)
    candidates[..., 0, :, ::5] = candidates[..., -1, :, ::5]
    ratios = rng.dirichlet(np.ones(n), (*stack, rows, subvectors)).astype(np.float32)
    return (
        rng.normal(size=(*stack, rows, subvectors * length)).astype(np.float32),
        candidates,
        np.ascontiguousarray(np.moveaxis(ratios, -1, len(stack))),
        rng.normal(size=(*stack, groups, codewords, length)).astype(np.float32),
    )


def exact(gradient, candidates, ratios, codebook):
    """W_hat, dC and dr of one matrix in float64, additions one after the other."""
    groups, codewords, length = codebook.shape
    n, rows, subvectors = candidates.shape
    group = np.arange(rows) // (rows // groups)
    codes = candidates.astype(np.int64) + (group * codewords)[None, :, None]
    vectors = gradient.astype(np.float64).reshape(rows, subvectors, length)
    gathered = codebook.astype(np.float64).reshape(-1, length)[codes]
    weights = (ratios[..., None].astype(np.float64) * gathered).sum(0).reshape(rows, -1)
    by_codebook = np.zeros((groups * codewords, length))
    np.add.at(by_codebook, codes, ratios[..., None].astype(np.float64) * vectors[None])
    return weights, by_codebook.reshape(codebook.shape), (gathered * vectors).sum(-1)


def over_stack(function, *operands):
    """`function` of each matrix of a stack."""
    stack = operands[-1].shape[:-3]
    results = [function(*(operand[i] for operand in operands)) for i in np.ndindex(stack)]
    return [np.stack(parts).reshape(*stack, *parts[0].shape) for parts in zip(*results, strict=True)]


def close(got, wanted, tolerance):
    """Errors relative to the largest number."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


cases = st.builds(
    case,
    st.integers(0, 2**32 - 1),
    rows=st.sampled_from([6, 12]),
    subvectors=st.sampled_from([1, 7, 32]),
    length=st.sampled_from([2, 4, 8]),
    codewords=st.sampled_from([1, 5, 64, 256]),
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    codes_dtype=st.sampled_from([np.int32, np.uint8]),
)


@settings(max_examples=15)
@given(cases)
def test_both_forms_of_the_gradient_are_that_of_float64(operands):
    _, by_codebook, by_ratios = exact(*operands)
    for form in (reference_soft.codebook_grad, reference_soft.codebook_grad_by_products):
        got = jax.jit(form)(*operands)
        close(got[0], by_codebook, 1e-6)
        close(got[1], by_ratios, 1e-6)


def test_the_gradient_by_products_of_tiles_that_do_not_divide_a_group(monkeypatch):
    monkeypatch.setattr(reference_soft, "_TILE", 100)
    operands = case(1, rows=6, subvectors=96, groups=3)
    _, by_codebook, by_ratios = exact(*operands)
    got = reference_soft.codebook_grad_by_products(*operands)
    close(got[0], by_codebook, 1e-6)
    close(got[1], by_ratios, 1e-6)


def test_forward_and_gradient_are_those_of_torch():
    torch = pytest.importorskip("torch")
    gradient, candidates, ratios, codebook = case(2, n=3)
    table, weights = (torch.tensor(a, requires_grad=True) for a in (codebook[0], ratios.reshape(3, -1).T.copy()))
    codes = torch.tensor(candidates.reshape(3, -1).T.astype(np.int64).copy())
    out = torch.nn.functional.embedding_bag(codes, table, per_sample_weights=weights, mode="sum")
    out.backward(torch.tensor(gradient.reshape(-1, 4)))

    ours, pull_back = jax.vjp(lambda c, r: soft_weights(c, candidates, r), codebook, ratios)
    by_codebook, by_ratios = pull_back(jnp.asarray(gradient))
    close(ours.reshape(-1, 4), out.detach().numpy(), 1e-6)
    close(by_codebook[0], table.grad.numpy(), 1e-6)
    close(by_ratios.reshape(3, -1).T, weights.grad.numpy(), 1e-6)


@settings(max_examples=8)
@given(cases)
def test_on_a_cpu_values_and_gradients_are_those_of_autodiff(operands):
    gradient, candidates, ratios, codebook = operands

    @jax.jit
    def both(codebook, ratios):
        ours = lambda c, r: soft_weights(c, candidates, r)
        plain = lambda c, r: soft_decode(c, candidates.astype(np.int32), r)
        results = []
        for function in (ours, plain):
            value, pull_back = jax.vjp(function, codebook, ratios)
            results.append((value, *pull_back(jnp.asarray(gradient))))
        return results

    # Not to the bit: which sums XLA fuses with their products (FMA) it decides for each program and processor.
    for ours, plain in zip(*both(codebook, ratios), strict=True):
        close(ours, plain, 1e-6)


def test_a_stack_is_a_matrix_after_the_other_and_integers_get_no_gradient():
    operands = case(3, stack=(2, 3), rows=4, subvectors=8, groups=2)
    gradient, candidates, ratios, codebook = operands
    weights, by_codebook, by_ratios = over_stack(exact, *operands)
    ours, pull_back = jax.vjp(lambda c, a, r: soft_weights(c, a, r), codebook, candidates, ratios)
    got_codebook, nothing, got_ratios = pull_back(jnp.asarray(gradient))
    assert nothing.dtype == jax.dtypes.float0
    close(ours, weights, 1e-6)
    close(got_codebook, by_codebook, 1e-6)
    close(got_ratios, by_ratios, 1e-6)


def test_permuted_codewords_permute_the_gradient_and_its_sum_is_that_of_weighted_sub_vectors():
    gradient, candidates, ratios, codebook = case(4, codewords=64, n=3)
    by_codebook, _ = reference_soft.codebook_grad(gradient, candidates, ratios, codebook)
    to = np.random.default_rng(5).permutation(64)
    permuted = np.empty_like(codebook)
    permuted[:, to] = codebook
    again, _ = reference_soft.codebook_grad(gradient, to[candidates].astype(np.int32), ratios, permuted)
    np.testing.assert_array_equal(again[:, to], by_codebook)
    weighted = ratios.sum(0).astype(np.float64)[..., None] * gradient.reshape(8, 64, 4)
    close(np.asarray(by_codebook, np.float64).sum((0, 1)), weighted.sum((0, 1)), 1e-5)


# Each length of sub-vector; several tiles in a program and in several; padded tiles and codewords; groups; stacks; dtypes.
INTERPRETED = {
    "w2": (dict(rows=8, subvectors=160), np.float32, 1),
    "w3-stack": (
        dict(length=2, codewords=64, n=3, groups=3, rows=3, subvectors=512, stack=(2,)),
        ml_dtypes.bfloat16,
        132,
    ),
    "odd": (dict(length=8, codewords=40, n=1, rows=5, subvectors=33, codes_dtype=np.uint8), np.float32, 132),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_gradient_kernel_interpreted_is_that_of_float64(name, monkeypatch):
    options, dtype, processors = INTERPRETED[name]
    monkeypatch.setattr(codebook_grad_kernel, "STREAMING_MULTIPROCESSORS", processors)
    gradient, *others = case(6, **options)
    gradient = gradient.astype(dtype)
    run = functools.partial(codebook_grad_kernel.codebook_grad, interpret=compat.interpret_params())
    _, by_codebook, by_ratios = over_stack(exact, gradient, *others)
    got = jax.jit(run)(gradient, *others)
    close(got[0], by_codebook, 1e-6)
    close(got[1], by_ratios, 1e-6)


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_decode_kernel_interpreted_is_that_of_float64(name):
    options, dtype, _ = INTERPRETED[name]
    gradient, candidates, ratios, codebook = operands = case(7, **options)
    run = functools.partial(soft_decode_kernel.soft_decode, dtype=dtype, interpret=compat.interpret_params())
    got = jax.jit(run)(codebook, candidates, ratios)
    assert got.dtype == dtype
    close(np.asarray(got, np.float64), over_stack(exact, *operands)[0], 1e-6 if dtype == np.float32 else 2**-8)


def test_calibration_differentiates_the_kernels_as_it_does_the_references():
    _, candidates, ratios, codebook = case(8, stack=(2,), rows=4, subvectors=128)
    loss = lambda options: jax.jit(
        jax.value_and_grad(
            lambda c, z: (soft_weights(c, candidates, jax.nn.softmax(z, 1), **options) ** 3).sum(), (0, 1)
        )
    )
    kernels = loss(dict(implementation="mosaic", interpret=compat.interpret_params()))(codebook, ratios)
    references = loss(dict(implementation="xla"))(codebook, ratios)
    for ours, wanted in zip(jax.tree.leaves(kernels), jax.tree.leaves(references), strict=True):
        close(ours, wanted, 1e-5)


def test_what_the_kernels_do_not_take_is_refused():
    gradient, candidates, ratios, codebook = case(9, codewords=257)
    with pytest.raises(ValueError, match="wanted at most 256 codewords of 2, 4 or 8 numbers"):
        codebook_grad_kernel.codebook_grad(gradient, candidates, ratios, codebook)
    with pytest.raises(ValueError, match="different stacks of layers"):
        soft_decode_kernel.soft_decode(codebook[None, :, :256], candidates, ratios)
    with pytest.raises(ValueError, match="implementation='cuda': wanted one of xla, mosaic"):
        soft_weights(codebook, candidates, ratios, implementation="cuda")


# Equal candidates of one sub-vector, n = 1 to 4, each length, stacks and groups. Only here is what differs from interpret mode.
EMULATED = {
    "w2": (dict(rows=8, subvectors=192, codes_dtype=np.uint8), np.float32),
    "w3-stack": (dict(length=2, codewords=64, n=3, groups=2, rows=4, subvectors=512, stack=(2,)), ml_dtypes.bfloat16),
    "d8": (dict(length=8, n=4, rows=1, subvectors=512), np.float32),
    "hard": (dict(codewords=64, n=1, rows=2, subvectors=256), np.float32),
}


@needs_compiler
@pytest.mark.parametrize("name", EMULATED)
def test_the_compiled_kernels_emulated_are_those_of_float64(name, monkeypatch):
    monkeypatch.setattr(codebook_grad_kernel, "STREAMING_MULTIPROCESSORS", 1)
    options, dtype = EMULATED[name]
    operands = case(10, **{"stack": (1,), **options})
    gradient, candidates, ratios, codebook = operands = (operands[0].astype(dtype), *operands[1:])
    weights, by_codebook, by_ratios = over_stack(exact, *operands)

    launch = functools.partial(codebook_grad_kernel._launch, interpret=None)
    layers, groups, codewords, length = codebook.shape
    count = weights[0].size // groups // length
    by_group = lambda a: a.reshape(layers, -1, groups, count)
    inputs = gradient.reshape(layers, groups, count, length), by_group(candidates), by_group(ratios), codebook
    parts, dr = emulate(launch, inputs, jax.eval_shape(launch, *inputs))
    parts = parts.astype(np.float64).reshape(layers, groups, -1, codewords, 32 // length, length)
    close(parts.sum((2, 4)), by_codebook, 1e-6)
    close(dr.reshape(ratios.shape), by_ratios, 1e-6)

    decode = functools.partial(soft_decode_kernel.soft_decode, dtype=dtype)
    (got,) = emulate(decode, [codebook, candidates, ratios], [jax.ShapeDtypeStruct(weights.shape, dtype)])
    close(got.astype(np.float64), weights, 1e-6 if dtype == np.float32 else 2**-8)


@needs_compiler
@pytest.mark.parametrize("codewords, length", [(256, 4), (64, 2), (256, 8)])
def test_compiled_for_dit_xl_nothing_spills(codewords, length):
    stack, rows, columns, n = 28, 4608, 1152, 2
    shape = lambda *dimensions, dtype=jnp.float32: jax.ShapeDtypeStruct((stack, *dimensions), dtype)
    gradient, codebook = shape(rows, columns), shape(1, codewords, length)
    candidates = shape(n, rows, columns // length, dtype=jnp.uint8)
    ratios = shape(n, rows, columns // length)
    backward = compiler.compile(codebook_grad_kernel.codebook_grad, gradient, candidates, ratios, codebook)
    forward = compiler.compile(soft_decode_kernel.soft_decode, codebook, candidates, ratios)
    # Behind the kernel one or two sums by XLA.
    assert len(backward.launches()) <= 3 and len(forward.launches()) == 1
    for compiled, registers in ((backward, 160), (forward, 80)):
        (found,) = (kernel.assembly for kernel in compiled.mosaic_kernels)
        assert found.spill_bytes == 0 and found.registers <= registers
        assert not {"ATOM", "ATOMS", "ATOMG", "RED"} & set(found.opcodes())
