"""The learned variance makes room for the error of the mean: the width of a step, and least squares against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import evaluations, tiny

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.methods import lasting, variance
from vq4dit_jax.methods.passes import begin
from vq4dit_jax.networks.network import as_network

IMAGES, STEPS, SCALE = 3, 4, 1.5
C = 4  # of which three are guided
KEY = jax.random.key(2)
HOW = dict(images=IMAGES, num_steps=STEPS, cfg_scale=SCALE)
FIT = variance.FitVariance(**HOW)
SCHEDULE = diffusion.make_schedule(STEPS)


@pytest.mark.parametrize("i", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_room_takes_its_share_of_the_variance_and_leaves_a_quarter(i, share):
    x = jnp.zeros((1, 2, 2, 3))
    interpolation = jnp.linspace(-1.1, 1.1, 12).reshape(x.shape)
    deviation = lambda out: diffusion.ddpm_gaussian(SCHEDULE, i, x, jnp.concatenate([x, out], -1))[1]
    smallest = jnp.square(deviation(interpolation)).min()
    left = variance.widened_variance(SCHEDULE, i, interpolation, share * smallest)
    wide = np.square(np.asarray(deviation(interpolation), np.float64))
    wanted = np.maximum(wide - share * wide.min(), wide / 4)
    np.testing.assert_allclose(np.square(deviation(left)), wanted, rtol=1e-4)


def test_where_there_is_no_choice_of_the_variance_the_output_stays():
    """Of two steps the last one's bounds are equal."""
    two = diffusion.make_schedule(2)
    assert two.log_variance_max[0] == two.log_variance_min[0]
    interpolation = jnp.linspace(-1.0, 1.0, 12).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(variance.widened_variance(two, 0, interpolation, jnp.float32(0.1)), interpolation)


@pytest.fixture(scope="module")
def given():
    """A teacher, a student whose blocks are off by a tenth, that student with room, and the teacher's evaluations."""
    model, teacher = tiny(in_channels=C)
    # Outputs as small as those of a trained network: variances are exponentials of them.
    last = {**teacher["final_layer"], "linear": jax.tree.map(lambda a: 0.1 * a, teacher["final_layer"]["linear"])}
    teacher = {**teacher, "final_layer": last}
    keys = iter(jax.random.split(jax.random.key(1), 100))
    off = lambda a: a * (1 + 0.1 * jax.random.normal(next(keys), a.shape))
    student = {**teacher, "blocks": jax.tree.map(off, teacher["blocks"])}
    return model, teacher, student, fit(model, teacher, student), evaluations(model, teacher, key=KEY, **HOW)


def fit(model, teacher, student):
    """The pass' own trajectory is that of `evaluations`."""
    return FIT(begin(model, teacher, jax.random.key(0)), student, KEY)[0]


def test_the_noise_prediction_stays_as_it_is(given):
    model, _, student, fitted, seen = given
    before, after = (as_network(model).apply(p, seen[0].x, seen[0].t, seen[0].cond)[0] for p in (student, fitted))
    np.testing.assert_array_equal(before[..., :C], after[..., :C])
    assert float(jnp.abs(before[..., C:] - after[..., C:]).max()) > 1e-3
    leaves = lambda tree: {path: leaf for path, leaf in jax.tree.leaves_with_path(tree) if "linear" not in str(path)}
    assert all(leaf is leaves(student)[path] for path, leaf in leaves(fitted).items())


def test_a_student_without_error_is_left_alone(given):
    model, teacher, *_ = given
    same = fit(model, teacher, teacher)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(teacher), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def cost(model, params, seen):
    """Sum over steps and pixels of the squared error of the variance output, as each step counts; in float64."""
    network, total = as_network(model), 0.0
    for one in seen:
        i, x = int(one.i), one.x[:IMAGES]
        if i == 0:  # no noise is drawn
            continue
        output = network.apply(params, one.x, one.t, one.cond)[0]
        (mean, _), (wanted, deviation) = (
            diffusion.ddpm_gaussian(SCHEDULE, i, x, network.combine(out, SCALE)) for out in (output, one.output)
        )
        error, wide = (np.square(np.asarray(a, np.float64)) for a in (mean - wanted, deviation))
        span = float(SCHEDULE.log_variance_max[i] - SCHEDULE.log_variance_min[i])
        target = np.asarray(one.output[:IMAGES, ..., C:], np.float64)
        target += 2 / span * np.log(np.maximum(1 - error.mean() / wide, 0.25))
        clean = diffusion.predict_x0(SCHEDULE, i, x, network.prediction(one.output, SCALE))
        left = lasting.lasting(SCHEDULE, i, lasting.octaves(clean))
        counts = wide.mean() * (span / 4) ** 2 * float((left.squared * left.fraction).sum())
        total += counts * np.square(target - np.asarray(output[:IMAGES, ..., C:], np.float64)).sum()
    return total


def test_no_other_columns_are_better(given):
    """The cost is stationary: a small change of the columns makes nothing of first order."""
    model, _, student, fitted, seen = given
    best = cost(model, fitted, seen)
    assert best < 0.9 * cost(model, student, seen)
    rng, linear = np.random.default_rng(0), fitted["final_layer"]["linear"]
    for name in ("kernel", "bias"):
        change = np.zeros((*linear[name].shape[:-1], 4, 2, C), np.float32)
        change[..., 1, :] = rng.standard_normal(change[..., 1, :].shape) * np.asarray(linear["kernel"]).std()
        change = change.reshape(linear[name].shape)
        moved = [{**linear, name: linear[name] + sign * change} for sign in (1, -1)]
        found = [
            cost(model, {**fitted, "final_layer": {**fitted["final_layer"], "linear": new}}, seen) for new in moved
        ]
        assert min(found) > best
        assert abs(found[0] - found[1]) < 0.01 * (sum(found) / 2 - best)
