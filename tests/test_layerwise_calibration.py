"""Calibration that solves layers first: its promises on bits, quality and being killed; the loss of the sampler's step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models import tiny

from vq4dit_jax import methods
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion.trajectory import Evaluation
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses
from vq4dit_jax.methods import solve_layers as layerwise
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.moments import input_moments
from vq4dit_jax.methods.vq4dit import LAYERWISE, passes
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.qarray import is_quantized
from vq4dit_jax.qarray.parts import Parts, is_parts
from vq4dit_jax.qarray.tree import map_leaves, matrices, quantized_paths, sizes
from vq4dit_jax.storage import checkpoint

pytestmark = pytest.mark.once  # a program for every shape and codebook is compiled
SETTINGS = {**LAYERWISE, "steps": 3, "batch": 2, "trajectory_steps": 3}
ALLOCATED = {**SETTINGS, "allocation": "layers", "budget": 3.0, "gains": True}


@pytest.fixture(scope="module")
def given():
    model, teacher = tiny()
    return model, teacher, quantize(teacher, 2, key=jax.random.key(0), codebook_dtype=jnp.float16)


def calibrated(given, settings, **changes):
    model, teacher, packed = given
    return methods.calibrate(model, teacher, packed, key=jax.random.key(1), passes=passes(settings), **changes)


@pytest.fixture(scope="module")
def by_layers(given, tmp_path_factory):
    """A run with an allocation over layers and gains, of a teacher in numpy arrays, and its folder."""
    folder = tmp_path_factory.mktemp("layers")
    model, teacher, packed = given
    plain = (model, jax.tree.map(np.asarray, teacher), packed)
    return calibrated(plain, ALLOCATED, folder=folder, save_every=1), folder


def test_solved_layers_are_much_nearer_to_the_teacher_than_k_means(given):
    model, teacher, packed = given
    hard = calibrated(given, SETTINGS)
    assert sizes(hard) == sizes(packed)
    found = methods.held_out_agreement(model, teacher, {"kmeans": packed, "hard": hard}, 1.5, jax.random.key(9))
    assert found["hard"][0] < 0.75 * found["kmeans"][0] and found["hard"][1] < 0.9 * found["kmeans"][1]


def test_layers_solved_side_by_side_are_those_solved_one_by_one(given, monkeypatch):
    _, teacher, packed = given
    paths = quantized_paths(packed)
    moments = input_moments(*given[:2], paths, key=jax.random.key(2), images=2, num_steps=2)
    several = layerwise.solve(teacher, packed, moments, rounds=1)
    monkeypatch.setattr(layerwise, "_AT_ONCE", 1)
    jax.tree.map(np.testing.assert_array_equal, several, layerwise.solve(teacher, packed, moments, rounds=1))


def test_passes_share_the_moments_whatever_the_order_of_the_tree(given):
    """An allocation replaces leaves, and may hand on a tree in another order."""
    model, teacher, packed = given
    reverse = lambda tree: {k: reverse(tree[k]) for k in reversed(tree)} if isinstance(tree, dict) else tree
    run = methods.begin(model, teacher, jax.random.key(0))
    first = layerwise.moments_for(run, packed, 2, 1.5)
    assert quantized_paths(reverse(packed)) != quantized_paths(packed)
    assert layerwise.moments_for(run, reverse(packed), 2, 1.5) is first


def test_an_allocation_keeps_the_budget_and_what_is_not_quantized(given, by_layers):
    _, teacher, packed = given
    hard, _ = by_layers
    before, after = sizes(packed), sizes(hard)
    assert 8 * (after.assignment_bytes + after.codebook_bytes) <= 3.0 * 8 * before.assignment_bytes
    assert after.quantized_parameters == before.quantized_parameters and after.other_bytes == before.other_bytes
    assert {path for path, _, _ in matrices(hard)} == {path for path, _, _ in matrices(packed)}
    np.testing.assert_array_equal(
        np.asarray(hard["x_embedder"]["proj"]["kernel"]), np.asarray(packed["x_embedder"]["proj"]["kernel"])
    )


def test_gains_scale_codebooks_and_shift_biases_and_nothing_else(given):
    """Stacks and leaves in parts alike; adaLN keeps its scale. Layer by layer the outputs then have the teacher's mean."""
    model, teacher, packed = given
    how = dict(key=jax.random.key(2), images=2, num_steps=3)
    moments = methods.input_moments(model, teacher, quantized_paths(packed), **how)
    kernels = {"/".join(key[:-1]): a for key, a in flatten_dict(teacher).items() if key[-1] == "kernel"}
    for tree in (packed, allocated(packed)):
        found = layerwise.restore(as_network(model), teacher, tree, moments)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        old, new = (flatten_dict(a, sep="/") for a in (tree, found))
        biases = {path.replace("kernel", "bias") for path in moments}
        for path in set(old) - set(moments) - biases:
            np.testing.assert_array_equal(old[path], new[path])
        for (path, block, a), (_, _, b) in zip(matrices(tree), matrices(found), strict=True):
            np.testing.assert_array_equal(np.asarray(a.assignments), np.asarray(b.assignments))
            a, b = (np.asarray(leaf.codebook, np.float32) for leaf in (a, b))
            factor = (a * b).sum() / (a * a).sum()
            np.testing.assert_allclose(b, factor * a, rtol=2e-3)  # float16
            assert factor == 1 if "adaLN" in path else factor > 1.001
            layer = path.removesuffix("/kernel")
            weight, mean = (np.asarray(a[block], np.float64) for a in (kernels[layer], moments[path].mean()))
            dense = np.asarray(decoded(found, path, block), np.float64)
            shift = np.asarray(new[f"{layer}/bias"][block] - old[f"{layer}/bias"][block])
            np.testing.assert_allclose(mean @ dense.T + shift, mean @ weight, atol=2e-3 * np.abs(mean @ weight).max())


def allocated(packed):
    """The same, each block a part of its own."""

    def parts(leaf):
        if not is_quantized(leaf):
            return leaf
        return Parts(tuple(leaf.block(slice(i, i + 1)) for i in range(leaf.stack[0])))

    return map_leaves(parts, packed)


def decoded(tree, path, block):
    return next(leaf.decode() for p, b, leaf in matrices(tree) if (p, b) == (path, block))


def test_gains_need_solved_layers():
    with pytest.raises(InputError, match="gains=True without layerwise=True: .* wanted False, or layerwise=True"):
        passes(gains=True)


def test_the_steps_leave_the_solved_assignments(by_layers):
    hard, folder = by_layers
    start = solved(folder)
    moved = 0
    for (path, block, a), (_, _, b) in zip(matrices(start), matrices(hard), strict=True):
        np.testing.assert_array_equal(np.asarray(a.assignments), np.asarray(b.assignments), err_msg=f"{path} {block}")
        moved += bool((np.asarray(a.codebook) != np.asarray(b.codebook)).any())
    assert moved


def solved(folder):
    """What the passes before the steps have made."""
    return checkpoint.load_quantized(folder / "01_solve_layers")[1]


def test_after_the_steps_the_variance_is_fitted(by_layers):
    """Three steps of the optimizer move a number by less than a hundred times their rate; least squares moves the variance
    further, and leaves the noise prediction."""
    hard, folder = by_layers
    trees = (solved(folder), hard)
    before, after = (np.asarray(tree["final_layer"]["linear"]["kernel"], np.float64) for tree in trees)
    moved = np.abs(after - before).reshape(len(after), -1, 2, 3).max((0, 1, 3))
    assert moved[0] < 100 * SETTINGS["learning_rate_tuned"] < moved[1]


def test_a_killed_run_ends_with_the_same_bits(given, by_layers, tmp_path):
    wanted, _ = by_layers

    class Killed(Exception):
        pass

    def die(line):
        if line["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        calibrated(given, ALLOCATED, folder=tmp_path, save_every=1, on_step=die)
    begun = (tmp_path / "01_solve_layers").stat().st_mtime_ns
    found = calibrated(given, ALLOCATED, folder=tmp_path, save_every=1)
    assert (tmp_path / "01_solve_layers").stat().st_mtime_ns == begun
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_roles_stay_stacks(given):
    hard = calibrated(given, {**SETTINGS, "allocation": "roles", "budget": 3.0, "steps": 1})
    assert not any(map(is_parts, jax.tree.leaves(hard, is_leaf=is_parts)))


def gaussians(network, sched, i, x, outputs):
    """(mean, deviation) of each in float64."""
    found = [diffusion.ddpm_gaussian(sched, i, x, jnp.asarray(network.combine(out, 1.5))) for out in outputs]
    return [[np.asarray(a, np.float64) for a in g] for g in found]


def test_the_distance_of_the_next_step_is_that_of_two_gaussians(given):
    """Squared 2-Wasserstein distance with independent pixels, where all of it lasts: at the last step. There the variance does
    not count; and elsewhere it does."""
    model, _, _ = given
    network = as_network(model)
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, wanted, found = make(4, 8, 8, 3), make(4, 8, 8, 6), make(4, 8, 8, 6)
    sched = diffusion.make_schedule(5)
    zeros = jnp.zeros(4, jnp.int32)
    distance = lambda i, out: losses.step_distance(
        network, sched, Evaluation(jnp.int32(i), x, zeros, zeros, wanted, None), out, 1.5
    )
    (mean, _), (wanted_mean, _) = gaussians(network, sched, 0, x[:2], (found, wanted))
    assert float(distance(0, found)[0]) == pytest.approx(np.square(mean - wanted_mean).mean(), rel=1e-5)
    only_variance = jnp.concatenate([wanted[..., :3], found[..., 3:]], -1)
    for i in (0, 3):
        assert (float(distance(i, only_variance)[0]) == 0) == (i == 0)
        assert distance(i, wanted) == (0, 0)


def test_what_a_batch_has_in_common_counts_and_what_it_has_not_does_not(given):
    """A tint of all images, and a thousandth less of their detail, are in L_c; the same energy with random signs is not."""
    model, _, _ = given
    network = as_network(model)
    sched, i, rows = diffusion.make_schedule(50), 2, 64
    key = jax.random.split(jax.random.key(0), 3)
    x, wanted = jax.random.normal(key[0], (2 * rows, 8, 8, 3)), jax.random.normal(key[1], (2 * rows, 8, 8, 6))
    x = jnp.concatenate([x[:rows]] * 2)
    batch = Evaluation(jnp.int32(i), x, *[jnp.zeros(2 * rows, jnp.int32)] * 2, wanted, None)
    l_c = lambda error: float(
        losses.step_distance(network, sched, batch, wanted.at[..., :3].add(jnp.concatenate([error] * 2)), 1.5)[1]
    )
    signs = jnp.where(jax.random.bernoulli(key[2], shape=(rows, 1, 1, 1)), 1.0, -1.0)
    eps = network.combine(wanted, 1.5)[..., :3]
    detail = diffusion.predict_x0(sched, i, x[:rows], eps)
    for common in (jnp.full((rows, 8, 8, 3), 1e-3), 1e-3 * detail, 1e-3 * eps):
        assert l_c(common) > 10 * l_c(common * signs)


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
        passes({**SETTINGS, **changes})
