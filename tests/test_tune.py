"""Calibration: its parts against the paper's formulas, and the loop's promises."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import inputs, tiny
from vq4dit_jax.methods.recipe import Recipe

from vq4dit_jax import files, methods
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.tune import _threshold
from vq4dit_jax.qarray.soft import SoftVQArray
from vq4dit_jax.qarray.vq import VQArray

NETWORK = methods.as_network(tiny()[0])
RECIPE = Recipe(steps=6, batch=2, trajectory_steps=4, freeze_from=1.0, freeze_by=1.0)
_update = jax.jit(methods.update, static_argnames=("recipe", "network"))
_advance = jax.jit(methods.advance, static_argnames=("network", "cfg_scale"))


@pytest.fixture(scope="module")
def quantized():
    """A tiny teacher and a coarse k-means model of it, so that there is something to mend."""
    model, teacher = tiny()
    return model, teacher, quantize(teacher, 1, key=jax.random.key(0))


def _leaves(tree) -> list[SoftVQArray]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, SoftVQArray))
    return [leaf for leaf in leaves if isinstance(leaf, SoftVQArray)]


def _one_update(quantized, recipe, state=None, new_trajectory=True):
    model, teacher, kmeans = quantized
    student = methods.make_student(recipe, teacher, kmeans)
    state = methods.init(recipe, student) if state is None else state
    sched = diffusion.make_schedule(recipe.trajectory_steps)
    where = methods.begin(NETWORK, sched, jax.random.key_data(jax.random.key(3)), jnp.int32(0), recipe.batch)
    batch, _ = _advance(NETWORK, teacher, sched, recipe.cfg_scale, where)
    return student, state, *_update(recipe, NETWORK, state, student, batch, jnp.asarray(new_trajectory))


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


def test_the_released_regularizer_counts_only_above_its_minimum_of_the_trajectory(quantized):
    recipe = dataclasses.replace(RECIPE, regularizer="released", lambda_r=3.0, lambda_d=0.0)
    _, state, after, metrics = _one_update(quantized, recipe)
    assert float(metrics["loss"]) == 0  # the first step of a trajectory has no minimum yet to be above of
    l_r = float(metrics["l_r"])
    for floor, wanted in ((l_r / 2, 3 * l_r), (l_r * 2, 0)):
        low = dataclasses.replace(state, regularizer_floor=jnp.float32(floor))
        _, _, low_after, metrics = _one_update(quantized, recipe, low, new_trajectory=False)
        assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-6)
        assert float(low_after.regularizer_floor) == pytest.approx(min(floor, l_r))
    assert float(after.regularizer_floor) == pytest.approx(l_r)


# The update -------------------------------------------------------------------------------------------------------


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_error(quantized):
    model, teacher, _ = quantized
    sched = diffusion.make_schedule(4)
    where = methods.begin(NETWORK, sched, jax.random.key_data(jax.random.key(0)), jnp.int32(0), 2)
    batch, _ = _advance(NETWORK, teacher, sched, 1.5, where)
    found = [float(v) for v in losses.agreement(NETWORK, teacher, batch, 1.5)]
    assert found == pytest.approx([0, 0], abs=1e-6)  # the batch was compiled in another program


def test_the_block_distance_is_the_mean_of_the_blocks_distances(quantized):
    model, teacher, kmeans = quantized
    sched = diffusion.make_schedule(4)
    where = methods.begin(NETWORK, sched, jax.random.key_data(jax.random.key(0)), jnp.int32(0), 2)
    batch, _ = _advance(NETWORK, teacher, sched, 1.5, where)
    _, blocks = model.apply({"params": kmeans}, batch.x, batch.t, batch.y, return_blocks=True)
    pairs = zip(np.asarray(blocks, np.float64), np.asarray(batch.blocks, np.float64), strict=True)
    wanted = np.mean([np.square(a - b).mean() for a, b in pairs])
    found, _ = losses.agreement(NETWORK, kmeans, batch, 1.5)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_update_is_rmsprop_with_the_rates_of_the_recipe(quantized):
    """One step from nu = 0 moves by rate / sqrt(1 - decay) against the sign of the gradient, wherever it is not 0."""
    recipe = dataclasses.replace(
        RECIPE, learning_rate_ratios=0.05, learning_rate_codebooks=1e-3, learning_rate_biases=2e-3
    )
    _, before, after, _ = _one_update(quantized, recipe)
    for name, rate in (("logits", 0.05), ("codebooks", 1e-3), ("biases", 2e-3)):
        for path, old in getattr(before.trainable, name).items():
            moved = np.abs(np.asarray(getattr(after.trainable, name)[path] - old))
            assert moved.max() <= rate / np.sqrt(0.1) * 1.001
            assert np.median(moved) == pytest.approx(rate / np.sqrt(0.1), rel=0.05), (name, path)


def test_update_trains_nothing_else(quantized):
    student, _, after, _ = _one_update(quantized, RECIPE)
    merged = methods.merge(student, after)
    for path in (("pos_embed",), ("x_embedder", "proj", "kernel"), ("final_layer", "linear", "bias")):
        a, b = merged, student
        for key in path:
            a, b = a[key], b[key]
        assert a is b


def test_where_nothing_is_chosen_codebooks_move_as_with_logits_that_are_frozen(quantized):
    """n = 1 beside n = 2 with its first candidates frozen: the same model, and the same step."""
    one, two = (dataclasses.replace(RECIPE, num_candidates=n, ratio_start="uniform") for n in (1, 2))
    _, _, found, metrics = _one_update(quantized, one)
    before = methods.init(two, methods.make_student(two, *quantized[1:]))
    logits = {path: z.at[..., 0, :, :].set(1.0) for path, z in before.trainable.logits.items()}
    before = dataclasses.replace(
        before,
        trainable=before.trainable._replace(logits=logits),
        frozen={path: jnp.ones_like(mask) for path, mask in before.frozen.items()},
    )
    _, _, wanted, _ = _one_update(quantized, two, before)
    assert not found.trainable.logits and not found.frozen
    assert float(metrics["frozen_fraction"]) == 1 and int(metrics["ratio_histogram"][-1]) > 0
    for path, codebook in found.trainable.codebooks.items():
        steps, same = (np.asarray(tree.trainable.codebooks[path] - codebook) for tree in (before, wanted))
        assert np.median(np.abs(steps)) > 1e-4
        assert (np.abs(same) < 1e-6).mean() > 0.99  # the first step is one by sign, and a gradient near 0 has either


def test_ratios_past_the_threshold_are_frozen_and_stay_so(quantized):
    recipe = dataclasses.replace(RECIPE, freeze_threshold=0.7)
    _, _, after, metrics = _one_update(quantized, recipe)
    for path, logits in after.trainable.logits.items():
        ratios = np.asarray(jax.nn.softmax(logits, axis=-3))
        np.testing.assert_array_equal(np.asarray(after.frozen[path]), ratios.max(-3) >= np.float32(0.7))
    assert 0 < float(metrics["frozen_fraction"]) < 1
    _, _, later, _ = _one_update(quantized, recipe, after)
    for path, mask in after.frozen.items():
        moved = np.asarray(later.trainable.logits[path] != after.trainable.logits[path]).any(-3)
        assert not moved[np.asarray(mask)].any()
        assert np.asarray(later.frozen[path])[np.asarray(mask)].all()


def test_codebooks_wait_for_their_layer_in_the_released_form(quantized):
    recipe = dataclasses.replace(RECIPE, codebook_training="after_freezing")
    _, before, after, _ = _one_update(quantized, recipe)
    for path, codebook in before.trainable.codebooks.items():
        np.testing.assert_array_equal(np.asarray(after.trainable.codebooks[path]), np.asarray(codebook))
    # One layer of one role is all frozen: its codebook moves, and no other.
    path = "blocks/mlp/fc1/kernel"
    frozen = dict(before.frozen) | {path: before.frozen[path].at[1].set(True)}
    _, _, after, _ = _one_update(quantized, recipe, dataclasses.replace(before, frozen=frozen))
    moved = np.asarray(after.trainable.codebooks[path] != before.trainable.codebooks[path])
    assert moved[1].any() and not moved[0].any()


def test_the_threshold_falls_to_one_over_n():
    recipe = dataclasses.replace(RECIPE, steps=100, freeze_threshold=0.99, freeze_from=0.2, freeze_by=0.7)
    values = [float(_threshold(recipe, jnp.int32(i))) for i in range(100)]
    assert values[0] == values[18] == pytest.approx(0.99)
    assert values[69:] == pytest.approx([0.5] * 31)
    assert (np.diff(values) <= 0).all()
    assert float(_threshold(RECIPE, jnp.int32(5))) == pytest.approx(0.99)


def test_calibration_lowers_the_loss_of_the_hard_model(quantized):
    """On a held-out trajectory the hard, calibrated model is nearer to its teacher than k-means."""
    model, teacher, kmeans = quantized
    recipe = Recipe(steps=60, batch=4, trajectory_steps=5, freeze_from=0.2, freeze_by=0.6, learning_rate_codebooks=2e-3)
    student = methods.make_student(recipe, teacher, kmeans)
    state = methods.init(recipe, student)
    sched = diffusion.make_schedule(recipe.trajectory_steps)
    where = methods.begin(NETWORK, sched, jax.random.key_data(jax.random.key(5)), jnp.int32(0), recipe.batch)
    for _ in range(recipe.steps):
        new = where.i == sched.num_steps - 1
        batch, where = _advance(NETWORK, teacher, sched, recipe.cfg_scale, where)
        state, metrics = _update(recipe, NETWORK, state, student, batch, new)
    assert float(metrics["frozen_fraction"]) == 1
    hard = methods.finalize(student, state)
    models = {"teacher": teacher, "kmeans": kmeans, "hard": hard}
    found = methods.held_out_agreement(model, teacher, models, 1.5, jax.random.key(9))
    assert found["teacher"] == pytest.approx((0, 0), abs=1e-6)
    assert found["hard"][0] < 0.9 * found["kmeans"][0]
    assert found["hard"][1] < 0.9 * found["kmeans"][1]


def test_finalize_takes_the_largest_ratio(quantized):
    student, _, after, _ = _one_update(quantized, RECIPE)
    hard = methods.finalize(student, after)
    soft = _leaves(methods.merge(student, after))
    packed = [
        leaf for leaf in jax.tree.leaves(hard, is_leaf=lambda n: isinstance(n, VQArray)) if isinstance(leaf, VQArray)
    ]
    for leaf, found in zip(soft, packed, strict=True):
        best = np.asarray(leaf.logits).argmax(-3)
        wanted = np.take_along_axis(np.asarray(leaf.candidates), best[..., None, :, :], -3)[..., 0, :, :]
        np.testing.assert_array_equal(np.asarray(found.codes()), wanted)
        np.testing.assert_array_equal(np.asarray(found.codebook), np.asarray(leaf.codebook))


# The teacher's trajectory -----------------------------------------------------------------------------------------


def test_the_trajectory_is_the_teachers_guided_ddpm_and_begins_anew_after_its_end(quantized):
    model, teacher, _ = quantized
    teacher = jax.tree.map(lambda a: 0.25 * a, teacher)  # x stays near 1, and its noise can be told from rounding
    sched = diffusion.make_schedule(3)
    key = jax.random.key(4)
    where = methods.begin(NETWORK, sched, jax.random.key_data(key), jnp.int32(0), 2)
    for i in (2, 1, 0):
        assert int(where.i) == i and int(where.number) == 0
        batch, after = _advance(NETWORK, teacher, sched, 1.5, where)
        np.testing.assert_array_equal(np.asarray(batch.t), int(sched.timesteps[i]))
        both = jnp.concatenate([where.x, where.x])
        guided = model.apply({"params": teacher}, both, batch.t, batch.y, 1.5, method="forward_with_cfg")[:2]
        if i:  # the noise of a step is whatever makes the step; its variance is the model's
            silent = diffusion.ddpm_step(sched, i, where.x, guided, jnp.zeros_like(where.x))
            loud = diffusion.ddpm_step(sched, i, where.x, guided, jnp.ones_like(where.x))
            noise = np.asarray((after.x - silent) / (loud - silent))
            assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
        where = after
    assert int(where.i) == 2 and int(where.number) == 1
    fresh = methods.begin(NETWORK, sched, jax.random.key_data(key), jnp.int32(1), 2)
    for name in ("labels", "i", "number", "key_data"):
        np.testing.assert_array_equal(np.asarray(getattr(where, name)), np.asarray(getattr(fresh, name)))
    # Inside and outside of jit XLA may contract a multiplication and an addition differently: a last bit.
    np.testing.assert_allclose(np.asarray(where.x), np.asarray(fresh.x), rtol=1e-6)


# The loop ---------------------------------------------------------------------------------------------------------


def _run(quantized, folder, recipe=RECIPE):
    model, teacher, kmeans = quantized
    return methods.calibrate(
        model,
        teacher,
        kmeans,
        key=jax.random.key(2),
        recipe=recipe,
        folder=folder / "calibration",
        log_file=folder / "log.jsonl",
        save_every=2,
    )


def _same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def whole(quantized, tmp_path_factory):
    """A run that nothing interrupted: its folder and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, _run(quantized, folder)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_that_dies_and_starts_again_ends_with_the_same_bits(quantized, whole, tmp_path, monkeypatch, stop_at):
    """It dies after a step that was saved (4) and after one that was not (1, 3 with save_every = 2)."""
    whole_folder, model = whole

    class Killed(BaseException):
        pass

    from vq4dit_jax.methods import loop as module

    dumps = json.dumps

    def dying(line):
        if isinstance(line, dict) and line.get("step") == stop_at + 1:
            raise Killed
        return dumps(line)

    monkeypatch.setattr(module.json, "dumps", dying)
    with pytest.raises(Killed):
        _run(quantized, tmp_path / "parts")
    monkeypatch.undo()
    _same(model, _run(quantized, tmp_path / "parts"))
    timeless = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in methods.read_log(folder / "log.jsonl")]
        for folder in (whole_folder, tmp_path / "parts")
    ]
    assert timeless[0] == timeless[1] and [line["step"] for line in timeless[0]] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in (tmp_path / "parts" / "calibration").iterdir()] == ["step_000006"]


def test_a_log_line_cut_short_is_written_again(tmp_path):
    files.write_text(tmp_path / "log", '{"step": 1}\n{"st')
    assert methods.read_log(tmp_path / "log") == [{"step": 1}]


@pytest.mark.parametrize(
    ("field", "value"),
    [("ratio_start", "random"), ("regularizer", "l2"), ("steps", 0), ("num_candidates", 0), ("schedule", "x")],
)
def test_a_recipe_refuses_what_it_does_not_know(field, value):
    with pytest.raises(InputError, match=f"calibration.{field}"):
        Recipe(**{field: value})


def test_inputs_of_the_tiny_model_matter(quantized):
    """Guards the tests above: with zero-initialised weights they would all pass."""
    model, teacher, _ = quantized
    x, t, y = inputs(model)
    out = model.apply({"params": teacher}, x, t, y)
    assert float(jnp.abs(out - model.apply({"params": teacher}, x, t, (y + 1) % 5)).max()) > 1e-3
    assert float(jnp.abs(out - model.apply({"params": teacher}, x, t + 100, y)).max()) > 1e-3
