"""Calibration that solves layers first: its promises on bits, quality and being killed; the loss of the sampler's step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax import calibration, diffusion
from vq4dit_jax.calibration import LAYERWISE, Recipe, losses
from vq4dit_jax.errors import InputError
from vq4dit_jax.quantization import matrices, quantize, sizes

pytestmark = pytest.mark.once  # a program for every shape and codebook is compiled
RECIPE = Recipe(**LAYERWISE, steps=3, batch=2, trajectory_steps=3)


@pytest.fixture(scope="module")
def given():
    model, teacher = tiny()
    return model, teacher, quantize(teacher, 2, key=jax.random.key(0), codebook_dtype=jnp.float16)


def calibrated(given, recipe, **changes):
    model, teacher, packed = given
    return calibration.calibrate(model, teacher, packed, key=jax.random.key(1), recipe=recipe, **changes)


@pytest.fixture(scope="module")
def by_layers(given, tmp_path_factory):
    """A run with an allocation over layers, and its folder."""
    folder = tmp_path_factory.mktemp("layers")
    recipe = dataclasses.replace(RECIPE, allocation="layers", budget=3.0)
    return recipe, calibrated(given, recipe, folder=folder, save_every=1), folder


def test_solved_layers_are_much_nearer_to_the_teacher_than_k_means(given):
    model, teacher, packed = given
    hard = calibrated(given, RECIPE)
    assert sizes(hard) == sizes(packed)
    found = calibration.held_out_agreement(model, teacher, {"kmeans": packed, "hard": hard}, 1.5, jax.random.key(9))
    assert found["hard"][0] < 0.75 * found["kmeans"][0] and found["hard"][1] < 0.9 * found["kmeans"][1]


def test_an_allocation_keeps_the_budget_and_what_is_not_quantized(given, by_layers):
    _, teacher, packed = given
    _, hard, _ = by_layers
    before, after = sizes(packed), sizes(hard)
    assert 8 * (after.assignment_bytes + after.codebook_bytes) <= 3.0 * 8 * before.assignment_bytes
    assert after.quantized_parameters == before.quantized_parameters and after.other_bytes == before.other_bytes
    assert {path for path, _, _ in matrices(hard)} == {path for path, _, _ in matrices(packed)}
    np.testing.assert_array_equal(
        np.asarray(hard["x_embedder"]["proj"]["kernel"]), np.asarray(packed["x_embedder"]["proj"]["kernel"])
    )


def test_the_steps_leave_the_solved_assignments(by_layers):
    from vq4dit_jax import checkpoint

    _, hard, folder = by_layers
    _, start, _ = checkpoint.load_quantized(folder / "start")
    moved = 0
    for (path, block, a), (_, _, b) in zip(matrices(start), matrices(hard), strict=True):
        np.testing.assert_array_equal(np.asarray(a.assignments), np.asarray(b.assignments), err_msg=f"{path} {block}")
        moved += bool((np.asarray(a.codebook) != np.asarray(b.codebook)).any())
    assert moved


def test_a_killed_run_ends_with_the_same_bits(given, by_layers, tmp_path):
    recipe, wanted, _ = by_layers

    class Killed(Exception):
        pass

    def die(line):
        if line["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        calibrated(given, recipe, folder=tmp_path, save_every=1, on_step=die)
    begun = (tmp_path / "start").stat().st_mtime_ns
    found = calibrated(given, recipe, folder=tmp_path, save_every=1)
    assert (tmp_path / "start").stat().st_mtime_ns == begun
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_roles_stay_stacks(given):
    hard = calibrated(given, dataclasses.replace(RECIPE, allocation="roles", budget=3.0, steps=1))
    assert not any(isinstance(leaf, tuple) for leaf in hard["blocks"]["mlp"]["fc1"].values())


def test_the_distance_of_the_next_step_is_that_of_two_gaussians(given):
    """Squared 2-Wasserstein distance with independent pixels; 0 at the last step for what the variance alone differs in."""
    model, _, _ = given
    network = calibration.as_network(model)
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, wanted, found = make(4, 8, 8, 3), make(4, 8, 8, 6), make(4, 8, 8, 6)
    sched = diffusion.make_schedule(5)
    for i in (0, 3):
        zeros = jnp.zeros(4, jnp.int32)
        batch = calibration.Batch(jnp.int32(i), x, zeros, zeros, wanted, None)
        both = [
            diffusion.ddpm_gaussian(sched, i, x[:2], jnp.asarray(network.guide(out, 1.5))) for out in (found, wanted)
        ]
        (mean, deviation), (wanted_mean, wanted_deviation) = [[np.asarray(a, np.float64) for a in g] for g in both]
        distance = np.square(mean - wanted_mean).mean() + np.square(deviation - wanted_deviation).mean()
        got = float(losses.step_distance(network, sched, batch, found, 1.5)[0])
        assert got == pytest.approx(distance, rel=1e-5)
        only_variance = jnp.concatenate([wanted[..., :3], found[..., 3:]], -1)
        assert (float(losses.step_distance(network, sched, batch, only_variance, 1.5)[0]) == 0) == (i == 0)
        assert losses.step_distance(network, sched, batch, wanted, 1.5) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_candidates": 2}, "calibration.num_candidates=2 with layerwise=True"),
        ({"allocation": "blocks"}, "calibration.allocation='blocks'"),
        ({"layerwise": False, "allocation": "layers"}, "calibration.allocation='layers'"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(changes, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(RECIPE, **changes)
