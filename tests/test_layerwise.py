"""Codebooks and assignments for a layer's outputs: descent, its two halves against numpy, feedback against the textbook."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from vq4dit_jax.codebook import solver as layerwise
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import allocate, knapsack
from vq4dit_jax.methods.moments import InputMoments
from vq4dit_jax.methods.solve_layers import _restored
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.vq import from_codes


def problem(rows=24, columns=16, groups=2, codewords=8, d=4, seed=0):
    """A layer whose inputs are correlated, and a codebook of some of its own sub-vectors."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    inputs = rng.standard_normal((200, columns)) @ (np.eye(columns) + 0.7 * rng.standard_normal((columns, columns)))
    moments = np.asarray(layerwise.condition(jnp.asarray(inputs.T @ inputs / 200, jnp.float32)))
    own = weight.reshape(groups, -1, d)
    codebook = np.stack([v[rng.choice(len(v), codewords, replace=False)] for v in own])
    codes = rng.integers(0, codewords, (rows, columns // d)).astype(np.int32)
    return tuple(map(jnp.asarray, (weight, moments, codebook, codes)))


def decoded(codebook, codes):
    per_row = np.repeat(np.asarray(codebook), len(codes) // len(codebook), axis=0)
    return np.take_along_axis(per_row, np.asarray(codes)[..., None], 1).reshape(len(codes), -1)


def numpy_error(weight, moments, codebook, codes):
    w, h = np.asarray(weight, np.float64), np.asarray(moments, np.float64)
    lost = w - decoded(codebook, codes)
    return np.trace(lost @ h @ lost.T) / np.trace(w @ h @ w.T)


def test_the_error_is_that_of_the_outputs():
    weight, moments, codebook, codes = problem()
    np.testing.assert_allclose(
        float(layerwise.error(weight, moments, codebook, codes)),
        numpy_error(weight, moments, codebook, codes),
        rtol=1e-5,
    )


@pytest.mark.parametrize("seed", range(3))
def test_neither_half_raises_the_error(seed):
    weight, moments, codebook, codes = problem(seed=seed)
    errors = [numpy_error(weight, moments, codebook, codes)]
    for _ in range(4):
        codes = layerwise.descend(weight, moments, codebook, codes)
        errors.append(numpy_error(weight, moments, codebook, codes))
        codebook = layerwise.fit_codebook(weight, moments, codebook, codes)
        errors.append(numpy_error(weight, moments, codebook, codes))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


def restored(weight, leaf, seen, keep=False):
    """Of one matrix that is no stack: the leaf and what its bias gets."""
    return _restored((("w", None),), (keep,), {"w": weight.T}, [leaf], {"w": seen})[0]


@pytest.mark.parametrize("seed", range(3))
def test_restored_outputs_have_slope_one_on_the_teachers_and_its_mean(seed):
    """On any inputs; and without `scale` the mean alone. Before, solved codes are fainter by their error."""
    weight, moments, codebook, _ = problem(seed=seed)
    codebook, codes, error = layerwise.solve(weight, moments, codebook)
    leaf = from_codes(codebook, np.asarray(codes))
    rng = np.random.default_rng(seed)
    x = rng.multivariate_normal(rng.standard_normal(16), np.asarray(moments, np.float64), 300)
    mean = x.mean(0)
    seen = InputMoments(*(jnp.asarray(a, jnp.float32) for a in (x.T @ x / len(x), mean[None], np.ones(1))))

    def slope_and_shift(leaf, shift):
        wanted, found = (x @ np.asarray(w, np.float64).T for w in (weight, decoded(leaf.codebook, codes)))
        found = found + np.asarray(shift)
        around = wanted - wanted.mean(0)
        return (around * found).sum() / np.square(around).sum(), np.abs(found.mean(0) - wanted.mean(0)).max()

    fainter, _ = slope_and_shift(leaf, np.zeros(24))
    assert fainter < 1 - 0.3 * float(error)
    slope, shift = slope_and_shift(*restored(weight, leaf, seen))
    assert abs(slope - 1) < 1e-5 and shift < 1e-5 * np.abs(x).max()
    same, shift = restored(weight, leaf, seen, keep=True)
    np.testing.assert_array_equal(same.codebook, codebook)
    assert slope_and_shift(same, shift)[1] < 1e-5 * np.abs(x).max()


def test_a_layer_of_nothing_but_zeros_stays_so():
    weight, moments, codebook, codes = problem()
    zeros = from_codes(jnp.zeros_like(codebook), np.asarray(codes))
    seen = InputMoments(moments + 1, jnp.ones((1, 16)), jnp.ones(1))
    found, shift = restored(weight, zeros, seen)
    np.testing.assert_array_equal(found.codebook, zeros.codebook)
    np.testing.assert_allclose(shift, np.asarray(weight).sum(1), rtol=1e-5)


def test_descent_ends_where_no_single_code_can_be_bettered():
    weight, moments, codebook, codes = problem(rows=6, columns=8, groups=1)
    for _ in range(20):
        codes = layerwise.descend(weight, moments, codebook, codes)
    best = numpy_error(weight, moments, codebook, codes)
    for row, place, code in itertools.product(range(6), range(2), range(8)):
        other = np.array(codes)
        other[row, place] = code
        assert numpy_error(weight, moments, codebook, other) >= best * (1 - 1e-5)


def test_without_correlation_the_halves_are_those_of_lloyds_iteration():
    weight, _, codebook, codes = problem()
    identity = jnp.eye(16)
    vectors = np.asarray(weight).reshape(2, -1, 4)
    distances = np.square(vectors[:, :, None] - np.asarray(codebook)[:, None]).sum(-1)
    nearest = distances.argmin(-1).reshape(24, 4)
    np.testing.assert_array_equal(np.asarray(layerwise.descend(weight, identity, codebook, codes)), nearest)
    np.testing.assert_array_equal(np.asarray(layerwise.feedback(weight, identity, codebook)), nearest)
    fitted = np.asarray(layerwise.fit_codebook(weight, identity, codebook, jnp.asarray(nearest, jnp.int32)))
    labels = nearest.reshape(2, -1)
    for group, code in itertools.product(range(2), range(8)):
        members = vectors[group][labels[group] == code]
        wanted = members.mean(0) if len(members) else np.asarray(codebook)[group, code]
        np.testing.assert_allclose(fitted[group, code], wanted, atol=1e-5)


def test_the_fitted_codebook_is_the_least_squares_solution():
    weight, moments, codebook, codes = problem(rows=40, groups=1, codewords=4)
    found = layerwise.fit_codebook(weight, moments, codebook, codes, steps=60)
    # vec(C[A]) = P vec(C); minimise |(W - C[A]) H^1/2| by numpy.
    root = np.linalg.cholesky(np.asarray(moments, np.float64))
    columns = []
    for k, j in itertools.product(range(4), range(4)):
        unit = np.zeros((1, 4, 4))
        unit[0, k, j] = 1
        columns.append((decoded(unit, codes) @ root).ravel())
    wanted = np.linalg.lstsq(np.stack(columns, 1), (np.asarray(weight, np.float64) @ root).ravel(), rcond=None)[0]
    np.testing.assert_allclose(np.asarray(found).ravel(), wanted, atol=2e-3)


def test_feedback_is_gptq_with_a_codebook_in_float64():
    weight, moments, codebook, _ = problem(groups=1)
    factor = np.linalg.cholesky(np.linalg.inv(np.asarray(moments, np.float64))).T
    left, wanted = np.asarray(weight, np.float64).copy(), np.zeros((24, 4), int)
    for b in range(4):
        own, right = slice(4 * b, 4 * b + 4), slice(4 * b + 4, None)
        inverse = np.linalg.inv(factor[own, own])
        offsets = (left[:, None, own] - np.asarray(codebook)[0][None]) @ inverse
        wanted[:, b] = np.square(offsets).sum(-1).argmin(-1)
        left[:, right] -= offsets[np.arange(24), wanted[:, b]] @ factor[own, right]
    np.testing.assert_array_equal(np.asarray(layerwise.feedback(weight, moments, codebook)), wanted)


def test_rows_and_groups_do_not_see_each_other():
    weight, moments, codebook, _ = problem()
    together = layerwise.solve(weight, moments, codebook)
    order = np.random.default_rng(1).permutation(12)
    shuffled = layerwise.solve(weight[jnp.asarray([*order, *range(12, 24)])], moments, codebook)
    np.testing.assert_array_equal(np.asarray(shuffled[1])[:12], np.asarray(together[1])[order])
    for group in range(2):
        alone = layerwise.solve(weight[12 * group : 12 * group + 12], moments, codebook[group : group + 1])
        np.testing.assert_array_equal(np.asarray(alone[1]), np.asarray(together[1])[12 * group : 12 * group + 12])
        np.testing.assert_allclose(np.asarray(alone[0])[0], np.asarray(together[0])[group], atol=1e-4)


def test_a_codeword_that_nobody_uses_stays():
    weight, moments, codebook, codes = problem(groups=1)
    codes = jnp.where(codes == 3, 4, codes)
    fitted = layerwise.fit_codebook(weight, moments, codebook, codes)
    np.testing.assert_array_equal(np.asarray(fitted)[0, 3], np.asarray(codebook)[0, 3])


def layer(path, share, spec=(256, 4), rows=768, columns=192):
    return allocate.Layer(path, rows, columns, VQSpec(*spec, dtype="float16"), share)


LAYERS = [layer("blocks/0/a", 0.5), layer("blocks/1/a", 0.01), layer("blocks/0/b", 0.1, rows=1152)]


def cost(chosen, layers):
    bits = sum(chosen[each.path].stored_bits(each.rows, each.columns) for each in layers)
    return bits, sum(each.menu()[chosen[each.path]] for each in layers)


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.1, 2.15, 2.2, 3.0, 5.0])
def test_an_allocation_keeps_its_budget_and_none_that_does_is_better(bits):
    budget = int(bits * sum(each.rows * each.columns for each in LAYERS))
    chosen = allocate.spread(LAYERS, budget)
    size, error = cost(chosen, LAYERS)
    assert size <= budget
    every = itertools.product(*(each.menu() for each in LAYERS))
    for specs in every:
        other = cost(dict(zip([each.path for each in LAYERS], specs, strict=True)), LAYERS)
        assert other[0] > budget or other[1] >= error * (1 - 1e-9)


@pytest.mark.parametrize("states", [20, 97, 1000])
def test_a_coarse_count_of_bits_keeps_the_budget(states, monkeypatch):
    monkeypatch.setattr(knapsack, "_STATES", states)
    budget = int(2.2 * sum(each.rows * each.columns for each in LAYERS))
    size, error = cost(allocate.spread(LAYERS, budget), LAYERS)
    fine = cost(allocate.spread(LAYERS, int(budget * (1 - 4 / states))), LAYERS)
    assert size <= budget and error <= fine[1]
    tight = sum(min(spec.stored_bits(each.rows, each.columns) for spec in each.menu()) for each in LAYERS)
    assert cost(allocate.spread(LAYERS, tight), LAYERS)[0] == tight


def test_what_costs_most_gets_most_and_together_means_alike():
    budget = int(2.1 * sum(each.rows * each.columns for each in LAYERS))
    rate = lambda spec: np.log2(spec.codewords) / spec.subvector
    chosen = allocate.spread(LAYERS, budget)
    assert rate(chosen["blocks/0/a"]) > rate(chosen["blocks/0/b"]) > rate(chosen["blocks/1/a"])
    alike = allocate.spread(LAYERS, budget, together=True)
    assert alike["blocks/0/a"] == alike["blocks/1/a"] and cost(alike, LAYERS)[0] <= budget


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(InputError, match="the least that the layers can have"):
        allocate.spread(LAYERS, 1000)


def test_rules_match_their_paths_alone():
    rules = allocate.rules({"blocks/1/mlp/fc1/kernel": VQSpec(64, 2)})
    from vq4dit_jax.qarray.rules import spec_of

    assert spec_of("blocks/1/mlp/fc1/kernel", rules) == VQSpec(64, 2)
    assert spec_of("blocks/11/mlp/fc1/kernel", rules) is None


def test_a_small_part_of_the_inputs_is_kept_where_it_counts_on_its_own():
    """adaLN's case: what labels change is a small part of the inputs' energy, in directions of its own. Counted with all the rest
    it is lost, though the whole is right; counted on its own (`moments.Moments.differences`) it is kept."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((96, 32)), jnp.float32)
    codebook = jnp.asarray(rng.standard_normal((1, 16, 4)), jnp.float32)

    def moments(directions, energy):
        inputs = rng.standard_normal((directions, 32))
        return inputs.T @ inputs * (energy / np.square(inputs).sum())

    times, labels = moments(24, 1.0), moments(4, 0.003)
    whole = times + labels

    def lost(counted):
        found = layerwise.solve(weight, layerwise.condition(jnp.asarray(counted, jnp.float32)), codebook)[:2]
        return numpy_error(weight, whole, *found), numpy_error(weight, labels, *found)

    plain, own = lost(whole), lost(whole + 0.5 * labels / np.trace(labels) * np.trace(whole))
    assert own[1] < plain[1] / 5 and own[0] < 2 * plain[0]
