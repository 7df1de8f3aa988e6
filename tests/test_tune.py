"""Candidates, codebooks and biases by gradients: the parts of `Tune` against the paper's formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import evaluations, inputs, tiny

from vq4dit_jax import methods
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses, tune
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.tune import Tune, _threshold
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.qarray.soft import SoftVQArray
from vq4dit_jax.qarray.vq import VQArray

NETWORK = as_network(tiny()[0])
TUNE = Tune(steps=6, batch=2, trajectory_steps=4, freeze_from=1.0, freeze_by=1.0)
_update = jax.jit(tune.update, static_argnames=("tune", "network"))


@pytest.fixture(scope="module")
def quantized():
    """A tiny teacher and a coarse k-means model of it, so that there is something to mend."""
    model, teacher = tiny()
    return model, teacher, quantize(teacher, 1, key=jax.random.key(0))


def _leaves(tree) -> list[SoftVQArray]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, SoftVQArray))
    return [leaf for leaf in leaves if isinstance(leaf, SoftVQArray)]


@pytest.fixture(scope="module")
def first():
    """The teacher's first evaluation."""
    return evaluations(NETWORK, tiny()[1], key=jax.random.key(3))[0]


def _one_update(quantized, first, settings, state=None, new_trajectory=True):
    _, teacher, kmeans = quantized
    student = tune.initial_student(settings, teacher, kmeans)
    state = tune.init(settings, student) if state is None else state
    return student, state, *_update(settings, NETWORK, state, student, first, jnp.asarray(new_trajectory))


# The regularizers -------------------------------------------------------------------------------------------------


def _soft_leaf(ratios: np.ndarray, frozen: np.ndarray) -> SoftVQArray:
    """A leaf of one layer whose ratios are as given, (n, O, S)."""
    n, rows, columns = ratios.shape
    candidates = jnp.zeros((n, rows, columns), jnp.int32)
    logits = jnp.log(jnp.asarray(ratios, jnp.float32))
    return SoftVQArray(jnp.zeros((1, 4, 2)), candidates, logits, jnp.asarray(frozen), (rows, 2 * columns))


def test_the_papers_regularizer_is_two_at_one_half_and_zero_when_decided():
    """design.md section 2, item 6."""
    even = np.full((2, 3, 5), 0.5)
    free = np.zeros((3, 5), bool)
    assert float(losses.paper_regularizer([_soft_leaf(even, free)])) == pytest.approx(2, abs=1e-6)
    sure = np.stack([np.full((3, 5), 1 - 1e-9), np.full((3, 5), 1e-9)])
    assert float(losses.paper_regularizer([_soft_leaf(sure, free)])) == pytest.approx(0, abs=1e-6)
    assert float(losses.paper_regularizer([_soft_leaf(even, ~free)])) == 0


def test_regularizers_follow_their_formulas():
    rng = np.random.default_rng(0)
    first = rng.uniform(0.05, 0.95, (2, 4, 6))
    frozen = rng.random((2, 4, 6)) < 0.3
    ratios = [np.stack([r, 1 - r]) for r in first]
    leaves = [_soft_leaf(r, f) for r, f in zip(ratios, frozen, strict=True)]
    live = [np.where(f, np.round(r), r) for r, f in zip(ratios, frozen, strict=True)]
    paper = np.mean([(1 - np.abs(2 * r - 1)).sum(0) for r in live])
    assert float(losses.paper_regularizer(leaves)) == pytest.approx(paper, rel=1e-5)
    released = np.mean([2 * (r * (1 - r))[:, ~f].mean() for r, f in zip(ratios, frozen, strict=True)])
    assert float(losses.released_regularizer(leaves)) == pytest.approx(released, rel=1e-5)


def test_the_released_regularizer_counts_only_above_its_minimum_of_the_trajectory(quantized, first):
    settings = dataclasses.replace(TUNE, regularizer="released", lambda_r=3.0, lambda_d=0.0)
    _, state, after, metrics = _one_update(quantized, first, settings)
    assert float(metrics["loss"]) == 0  # the first step of a trajectory has no minimum yet to be above of
    l_r = float(metrics["l_r"])
    for floor, wanted in ((l_r / 2, 3 * l_r), (l_r * 2, 0)):
        low = dataclasses.replace(state, regularizer_floor=jnp.float32(floor))
        _, _, low_after, metrics = _one_update(quantized, first, settings, low, new_trajectory=False)
        assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-6)
        assert float(low_after.regularizer_floor) == pytest.approx(min(floor, l_r))
    assert float(after.regularizer_floor) == pytest.approx(l_r)


# The update -------------------------------------------------------------------------------------------------------


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_error(quantized, first):
    _, teacher, _ = quantized
    found = [float(v) for v in losses.agreement(NETWORK, teacher, first, 1.5)]
    assert found == pytest.approx([0, 0], abs=1e-6)  # the evaluation was compiled in another program


def test_the_block_distance_is_the_mean_of_the_blocks_distances(quantized, first):
    model, _, kmeans = quantized
    _, blocks = model.apply({"params": kmeans}, first.x, first.t, first.cond, return_blocks=True)
    pairs = zip(np.asarray(blocks, np.float64), np.asarray(first.blocks, np.float64), strict=True)
    wanted = np.mean([np.square(a - b).mean() for a, b in pairs])
    found, _ = losses.agreement(NETWORK, kmeans, first, 1.5)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_update_is_rmsprop_with_its_rates(quantized, first):
    """One step from nu = 0 moves by rate / sqrt(1 - decay) against the sign of the gradient, wherever it is not 0."""
    settings = dataclasses.replace(
        TUNE, learning_rate_ratios=0.05, learning_rate_codebooks=1e-3, learning_rate_biases=2e-3
    )
    _, before, after, _ = _one_update(quantized, first, settings)
    for name, rate in (("logits", 0.05), ("tables", 1e-3), ("biases", 2e-3)):
        for path, old in getattr(before.trainable, name).items():
            moved = np.abs(np.asarray(getattr(after.trainable, name)[path] - old))
            assert moved.max() <= rate / np.sqrt(0.1) * 1.001
            assert np.median(moved) == pytest.approx(rate / np.sqrt(0.1), rel=0.05), (name, path)


def test_update_trains_nothing_else(quantized, first):
    student, _, after, _ = _one_update(quantized, first, TUNE)
    merged = tune.merge(student, after)
    for path in (("pos_embed",), ("x_embedder", "proj", "kernel"), ("final_layer", "linear", "bias")):
        a, b = merged, student
        for key in path:
            a, b = a[key], b[key]
        assert a is b


def test_where_nothing_is_chosen_codebooks_move_as_with_logits_that_are_frozen(quantized, first):
    """n = 1 beside n = 2 with its first candidates frozen: the same model, and the same step."""
    one, two = (dataclasses.replace(TUNE, num_candidates=n, ratio_start="uniform") for n in (1, 2))
    _, _, found, metrics = _one_update(quantized, first, one)
    before = tune.init(two, tune.initial_student(two, *quantized[1:]))
    logits = {path: z.at[..., 0, :, :].set(1.0) for path, z in before.trainable.logits.items()}
    before = dataclasses.replace(
        before,
        trainable=before.trainable._replace(logits=logits),
        frozen={path: jnp.ones_like(mask) for path, mask in before.frozen.items()},
    )
    _, _, wanted, _ = _one_update(quantized, first, two, before)
    assert not found.trainable.logits and not found.frozen
    assert float(metrics["frozen_fraction"]) == 1 and int(metrics["ratio_histogram"][-1]) > 0
    for path, codebook in found.trainable.tables.items():
        steps, same = (np.asarray(tree.trainable.tables[path] - codebook) for tree in (before, wanted))
        assert np.median(np.abs(steps)) > 1e-4
        assert (np.abs(same) < 1e-6).mean() > 0.99  # the first step is one by sign, and a gradient near 0 has either


def test_ratios_past_the_threshold_are_frozen_and_stay_so(quantized, first):
    settings = dataclasses.replace(TUNE, freeze_threshold=0.7)
    _, _, after, metrics = _one_update(quantized, first, settings)
    for path in after.frozen:
        ratios = np.asarray(jax.nn.softmax(after.trainable.logits[f"{path}:logits"], axis=-3))
        np.testing.assert_array_equal(np.asarray(after.frozen[path]), ratios.max(-3) >= np.float32(0.7))
    assert 0 < float(metrics["frozen_fraction"]) < 1
    _, _, later, _ = _one_update(quantized, first, settings, after)
    for path, mask in after.frozen.items():
        moved = np.asarray(later.trainable.logits[f"{path}:logits"] != after.trainable.logits[f"{path}:logits"]).any(-3)
        assert not moved[np.asarray(mask)].any()
        assert np.asarray(later.frozen[path])[np.asarray(mask)].all()


def test_codebooks_wait_for_their_layer_in_the_released_form(quantized, first):
    settings = dataclasses.replace(TUNE, codebook_training="after_freezing")
    _, before, after, _ = _one_update(quantized, first, settings)
    for path, codebook in before.trainable.tables.items():
        np.testing.assert_array_equal(np.asarray(after.trainable.tables[path]), np.asarray(codebook))
    # One layer of one role is all frozen: its codebook moves, and no other.
    path = "blocks/mlp/fc1/kernel"
    frozen = dict(before.frozen) | {path: before.frozen[path].at[1].set(True)}
    _, _, after, _ = _one_update(quantized, first, settings, dataclasses.replace(before, frozen=frozen))
    name = f"{path}:codebook"
    moved = np.asarray(after.trainable.tables[name] != before.trainable.tables[name])
    assert moved[1].any() and not moved[0].any()


def test_the_threshold_falls_to_one_over_n():
    settings = dataclasses.replace(TUNE, steps=100, freeze_threshold=0.99, freeze_from=0.2, freeze_by=0.7)
    values = [float(_threshold(settings, jnp.int32(i))) for i in range(100)]
    assert values[0] == values[18] == pytest.approx(0.99)
    assert values[69:] == pytest.approx([0.5] * 31)
    assert (np.diff(values) <= 0).all()
    assert float(_threshold(TUNE, jnp.int32(5))) == pytest.approx(0.99)


def test_calibration_lowers_the_loss_of_the_hard_model(quantized):
    """On a held-out trajectory the hard, calibrated model is nearer to its teacher than k-means."""
    model, teacher, kmeans = quantized
    settings = Tune(steps=60, batch=4, trajectory_steps=5, freeze_from=0.2, freeze_by=0.6, learning_rate_codebooks=2e-3)
    run = methods.begin(model, teacher, jax.random.key(5))
    hard, report = settings(run, kmeans, jax.random.key(5))
    assert report["frozen_fraction"] == 1
    models = {"teacher": teacher, "kmeans": kmeans, "hard": hard}
    found = methods.held_out_agreement(model, teacher, models, 1.5, jax.random.key(9))
    assert found["teacher"] == pytest.approx((0, 0), abs=1e-6)
    assert found["hard"][0] < 0.9 * found["kmeans"][0]
    assert found["hard"][1] < 0.9 * found["kmeans"][1]


def test_finalize_takes_the_largest_ratio(quantized, first):
    student, _, after, _ = _one_update(quantized, first, TUNE)
    hard = tune.finalize(student, after)
    soft = _leaves(tune.merge(student, after))
    packed = [
        leaf for leaf in jax.tree.leaves(hard, is_leaf=lambda n: isinstance(n, VQArray)) if isinstance(leaf, VQArray)
    ]
    for leaf, found in zip(soft, packed, strict=True):
        best = np.asarray(leaf.logits).argmax(-3)
        wanted = np.take_along_axis(np.asarray(leaf.candidates), best[..., None, :, :], -3)[..., 0, :, :]
        np.testing.assert_array_equal(np.asarray(found.codes()), wanted)
        np.testing.assert_array_equal(np.asarray(found.codebook), np.asarray(leaf.codebook))


@pytest.mark.parametrize(
    ("field", "value"),
    [("ratio_start", "random"), ("regularizer", "l2"), ("steps", 0), ("num_candidates", 0), ("schedule", "x")],
)
def test_settings_refuse_what_they_do_not_know(field, value):
    with pytest.raises(InputError, match=f"calibration.{field}"):
        Tune(**{field: value})


def test_inputs_of_the_tiny_model_matter(quantized):
    """Guards the tests above: with zero-initialised weights they would all pass."""
    model, teacher, _ = quantized
    x, t, y = inputs(model)
    out = model.apply({"params": teacher}, x, t, y)
    assert float(jnp.abs(out - model.apply({"params": teacher}, x, t, (y + 1) % 5)).max()) > 1e-3
    assert float(jnp.abs(out - model.apply({"params": teacher}, x, t + 100, y)).max()) > 1e-3
