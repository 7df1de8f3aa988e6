"""Balance: the scale of each input between activations and weights, and the exponent that each layer gets."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

import vq4dit_jax as vq
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import balance, passes, viditq
from vq4dit_jax.methods.balance import Balance
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.tree import flatten, matrices

INT8 = vq.IntSpec(8, None, "symmetric")
FEW = dict(points=4, images=2, steps=3, rows=4)


def _inputs(rows: np.ndarray) -> balance.Inputs:
    return balance.Inputs(rows, rows.min(0), rows.max(0), rows.mean(0))


def _loud(channel: int = 5, times: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """(weight (O, I), rows (N, I)) where one input is much larger than the others."""
    rng = np.random.default_rng(0)
    weight, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 16), (64, 16)))
    rows[:, channel] *= times
    return weight, rows


def test_an_exponent_of_0_levels_the_weights_and_1_the_activations():
    weight, rows = _loud()
    top = np.abs(rows).max(0)
    level = lambda a: a.max() / a.min()
    of = lambda a: balance.scale(weight, top, a)
    assert level(np.abs(weight / of(0.0)).max(0)) == pytest.approx(1, rel=1e-5)
    assert level(np.abs(rows * of(1.0)).max(0)) == pytest.approx(1, rel=1e-5)
    # Between them, both have the same largest magnitudes up to one factor: s^2 = max |x| / max |w|.
    assert level(np.abs(weight / of(0.5)).max(0) / np.abs(rows * of(0.5)).max(0)) == pytest.approx(1, rel=1e-5)
    for a in (0.0, 0.3, 1.0):
        assert np.log(of(a)).mean() == pytest.approx(0, abs=1e-5)


def test_inputs_and_weights_that_are_always_0_have_finite_scales():
    weight, rows = _loud()
    weight[:, 2], rows[:, 3] = 0, 0
    spec = vq.OperandSpec(INT8, 8, rotation=0, scaled=True)
    leaf, a, errors = balance.best(spec, weight, _inputs(rows), 4, jax.random.key(0))
    assert np.isfinite(np.asarray(leaf.scale, np.float32)).all() and (np.asarray(leaf.scale) > 0).all()
    assert np.isfinite(errors).all() and min(errors) < 1e-2 and a is not None


@pytest.mark.parametrize("rotation", [0, 16])
def test_a_loud_input_is_balanced_and_the_least_error_is_taken(rotation):
    """With one scale for each token a loud input costs all others their bits; the balanced layer has far less error."""
    weight, rows = _loud()
    spec = vq.OperandSpec(INT8, 4, rotation=rotation, scaled=True)
    leaf, a, errors = balance.best(spec, weight, _inputs(rows), 10, jax.random.key(0))
    assert len(errors) == 11 and min(errors) < errors[0] / 2
    assert a == np.argmin(errors[1:]) / 10 > 0
    wanted = rows.astype(np.float64) @ weight.T.astype(np.float64)
    found = np.asarray(leaf.matmul(jnp.asarray(rows)), np.float64)
    assert np.square(found - wanted).sum() / np.square(wanted).sum() == pytest.approx(min(errors), rel=1e-3)


def test_where_nothing_is_gained_there_is_no_scale():
    """Weights that are whole numbers of one step lose nothing to rounding as they are; activations are not rounded."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (24, 16)).astype(np.float32)
    weight[:, 0] = 127.5  # each row's grid has the step 1
    rows = rng.standard_normal((64, 16)).astype(np.float32)
    spec = vq.OperandSpec(INT8, None, rotation=0, scaled=True)
    leaf, a, errors = balance.best(spec, weight, _inputs(rows), 5, jax.random.key(0))
    assert a is None and errors[0] == min(errors)
    np.testing.assert_array_equal(leaf.scale, np.ones(16))


@pytest.fixture(scope="module")
def balanced():
    model, teacher = tiny()
    spec = vq.OperandSpec(INT8, 4, rotation=0, scaled=True)
    run = passes.begin(model, teacher, jax.random.key(0))
    first = KMeans(rules=dit_rules(lambda role: spec))
    rounded, _ = passes.apply((first,), run, teacher)
    found, reports = passes.apply((first, Balance(**FEW)), run, teacher)
    return teacher, rounded, found, reports[1]


def test_the_pass_balances_every_layer_and_says_what_it_tried(balanced):
    teacher, rounded, found, report = balanced
    paths = [path for path, _, leaf in matrices(found) if leaf.kind == "operand"]
    assert sorted(set(paths)) == sorted(report["exponents"]) == sorted(report["errors"])
    for path in set(paths):
        assert [len(e) for e in report["errors"][path]] == [5, 5]  # two blocks; no scale, and four points
        for a, errors in zip(report["exponents"][path], report["errors"][path], strict=True):
            assert errors[0 if a is None else 1 + round(4 * a)] == min(errors)
        kernel = flatten(found)[path]
        alike = (kernel.scale[0] == kernel.scale[1]).all()
        assert alike == ("adaLN" in path), path  # all blocks' adaLN read the same, and are one product
    same = [path for path, leaf in flatten(teacher).items() if path not in paths]
    for path in same:
        np.testing.assert_array_equal(flatten(found)[path], flatten(rounded)[path])


def test_balance_samples_what_the_layers_read(balanced):
    """Rows are rows of the layer's input, so they lie between the least and the largest that were seen."""
    teacher, *_ = balanced
    model, _ = tiny()
    run = passes.begin(model, teacher, jax.random.key(0))
    path = "blocks/mlp/fc1/kernel"
    take = lambda **more: balance.samples(run, (path,), Balance(**FEW, **more), jax.random.key(2))[path]
    found = take()
    assert found.rows.shape == (2, 3 * 4, 32) and found.low.shape == found.high.shape == found.mean.shape == (2, 32)
    assert (found.low <= found.rows.min(1)).all() and (found.rows.max(1) <= found.high).all()
    assert (found.low < found.mean).all() and (found.mean < found.high).all()
    np.testing.assert_array_equal(take(noisiest=0.3).rows, found.rows[:, :4])
    np.testing.assert_array_equal(take().rows, found.rows)


def test_a_centre_is_the_mean_of_what_is_read():
    rng = np.random.default_rng(0)
    weight, rows = (
        rng.standard_normal((24, 16)).astype(np.float32),
        (5 + rng.standard_normal((64, 16))).astype(np.float32),
    )
    spec = vq.OperandSpec(INT8, 4, rotation=0, centred=True)
    leaf, a, errors = balance.best(spec, weight, _inputs(rows), 5, jax.random.key(0))
    assert a is None and len(errors) == 1 and leaf.scale is None
    np.testing.assert_allclose(leaf.centre, rows.mean(0), rtol=1e-3)


def test_leaves_without_a_scale_are_left_alone():
    model, teacher = tiny()
    run = passes.begin(model, teacher, jax.random.key(0))
    first = KMeans(rules=dit_rules(2))
    found, reports = passes.apply((first, Balance(**FEW)), run, teacher)
    rounded, _ = passes.apply((first,), run, teacher)
    assert reports[1]["exponents"] == {}
    jax.tree.map(np.testing.assert_array_equal, found, rounded)


@pytest.mark.parametrize(("field", "value"), [("points", 0), ("rows", 0), ("noisiest", 0.0), ("noisiest", 1.5)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=re.escape(f"balance.{field}={value}: wanted")):
        Balance(**{field: value})


# The method ------------------------------------------------------------------------------------------------------


def test_solved_weights_lie_nearer_than_rounded_ones(balanced):
    teacher, _, found, _ = balanced
    model, _ = tiny()
    *_, solve = viditq.passes({}, {"batch": 2})
    assert solve.name == "solve_layers"
    run = passes.begin(model, teacher, jax.random.key(0))
    solved, _ = passes.apply((solve,), run, found)
    agreement = vq.methods.held_out_agreement(
        as_network(model), teacher, {"rounded": found, "solved": solved}, 1.5, jax.random.key(1)
    )
    assert agreement["solved"][1] < agreement["rounded"][1] * 1.05


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "w8a8"),
        ({"weight_bits": 4.0}, "w4a8"),
        ({"weight_bits": 6.0, "activation_bits": 6}, "w6a6"),
        ({"weights": "codebooks", "weight_bits": 2.0}, "w2a8"),
        ({"activation_bits": 0}, "w8a16"),
        ({"weights": "codebooks", "weight_bits": 1.5}, "w1.5a8"),
    ],
)
def test_models_are_named_by_their_bits(given, name):
    assert viditq.name(viditq.check(given)) == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 4}, "viditq.weight: no such setting; there are weights, weight_bits"),
        ({"weights": "floats"}, "viditq.weights='floats': wanted integers or codebooks"),
        ({"weight_bits": 9.0}, "viditq.weight_bits=9 of integers: wanted a whole number from 2 to 8"),
        ({"weight_bits": 2.5}, "viditq.weight_bits=2.5 of integers"),
        ({"weights": "codebooks", "weight_bits": 8.0}, "viditq: bits=8.0: wanted one of 1, 1.5, 2, 3, 4"),
        ({"activation_bits": 1}, "viditq: activation bits=1: wanted 2 to 8"),
        ({"activation_grid": "centred"}, "viditq: activation grid='centred'"),
        ({"rotation": 20}, "viditq: no regular Hadamard matrix of order 20"),
        ({"rotation": -2}, "viditq.rotation=-2: wanted"),
        ({"weight_group": -1}, "viditq.weight_group=-1: wanted"),
    ],
)
def test_what_is_no_recipe_is_refused_by_its_key(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        viditq.check(given)
