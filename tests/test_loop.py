"""The loop of gradient methods: the trajectory that it walks, its log, and its promises to a run that is killed or diverges."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax import files, methods
from vq4dit_jax.diffusion import keys
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion.guidance import Guidance
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import loop
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.tune import Tune
from vq4dit_jax.networks.network import as_network

NETWORK = as_network(tiny()[0])
TUNE = Tune(steps=6, batch=2, trajectory_steps=4, freeze_from=1.0, freeze_by=1.0)


@pytest.fixture(scope="module")
def quantized():
    """A tiny teacher and a coarse k-means model of it, so that there is something to mend."""
    model, teacher = tiny()
    return model, teacher, quantize(teacher, 1, key=jax.random.key(0))


# The teacher's trajectory -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Watch:
    """A gradient method that trains nothing and logs what it is given."""

    steps: int = 4
    batch: int = 2
    trajectory_steps: int = 3
    cfg_scale: float = 1.5
    remat: bool = False

    def update(self, network: Any, state: Any, student: Any, evaluation: Any, new_trajectory: Any) -> Any:
        return state + 1, {"l_d": jnp.float32(0), "seen": evaluation, "new": new_trajectory}


def test_the_trajectory_is_the_teachers_guided_ddpm_and_begins_anew_after_its_end():
    """Each image with its own noise and label: image b of trajectory m is image 2 m + b of the key."""
    model, teacher = tiny()
    # x stays near 1, and its noise can be told from rounding.
    watch, key, teacher = _Watch(), jax.random.key(4), jax.tree.map(lambda a: 0.25 * a, teacher)
    sched = diffusion.make_schedule(3)
    own = lambda m, b, stream: jax.random.fold_in(jax.random.fold_in(key, 2 * m + b), stream)
    noise = lambda m, stream, j: np.stack(
        [jax.random.normal(jax.random.fold_in(own(m, b, stream), j), (8, 8, 3)) for b in range(2)]
    )
    state, walk = jnp.int32(0), loop.begin(watch, NETWORK, teacher, key, jnp.int32(0))
    x = noise(0, keys.INITIAL, 0)
    for m, i in ((0, 2), (0, 1), (0, 0), (1, 2)):
        assert int(walk.number) == m and int(walk.position.j) == i
        state, walk, line = loop.step(watch, NETWORK, state, walk, {}, teacher, key)
        seen = line["seen"]
        assert bool(line["new"]) == (i == 2) and int(seen.i) == i and int(line["trajectory"]) == m
        np.testing.assert_array_equal(np.asarray(seen.t), int(sched.timesteps[i]))
        labels = [int(jax.random.randint(own(m, b, keys.CONDITION), (), 0, 5, jnp.int32)) for b in range(2)]
        np.testing.assert_array_equal(seen.cond, [*labels, 5, 5])
        # Inside and outside of jit XLA may contract a multiplication and an addition differently: a last bit.
        np.testing.assert_allclose(seen.x, np.concatenate([x, x]), rtol=1e-5, atol=1e-5)
        guided = model.apply({"params": teacher}, seen.x, seen.t, seen.cond, 1.5, method="forward_with_cfg")[:2]
        np.testing.assert_allclose(NETWORK.combine(seen.output, 1.5), guided, rtol=1e-5, atol=1e-5)
        x = noise(m + 1, keys.INITIAL, 0)
        if i:
            x = np.asarray(diffusion.ddpm_step(sched, i, seen.x[:2], guided, jnp.asarray(noise(m, keys.STEPS, i))))
    assert int(state) == 4


# The loop ---------------------------------------------------------------------------------------------------------


def _run(quantized, folder, settings=TUNE, **changes):
    model, teacher, kmeans = quantized
    given = {"key": jax.random.key(2), "save_every": 2, **changes}
    how = dict(passes=(settings,), folder=folder / "calibration", log_file=folder / "log.jsonl")
    return methods.calibrate(model, teacher, kmeans, **how, **given)


def _same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def whole(quantized, tmp_path_factory):
    """A run that nothing interrupted: its folder and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, _run(quantized, folder)


class Killed(BaseException):
    pass


def _die_at(step: int, monkeypatch) -> None:
    """Lets the loop die where it writes the line of `step`."""
    dumps = json.dumps

    def dying(line):
        if isinstance(line, dict) and line.get("step") == step:
            raise Killed
        return dumps(line)

    monkeypatch.setattr(loop.json, "dumps", dying)


def _states(folder) -> list[str]:
    return sorted(p.name for p in (folder / "calibration" / "00_tune_steps").iterdir())


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_that_dies_and_starts_again_ends_with_the_same_bits(quantized, whole, tmp_path, monkeypatch, stop_at):
    """It dies after a step that was saved (4) and after one that was not (1, 3 with save_every = 2)."""
    whole_folder, model = whole
    _die_at(stop_at + 1, monkeypatch)
    with pytest.raises(Killed):
        _run(quantized, tmp_path / "parts")
    monkeypatch.undo()
    _same(model, _run(quantized, tmp_path / "parts"))
    timeless = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in methods.read_log(folder / "log.jsonl")]
        for folder in (whole_folder, tmp_path / "parts")
    ]
    assert timeless[0] == timeless[1] and [line["step"] for line in timeless[0]] == [1, 2, 3, 4, 5, 6]
    assert _states(tmp_path / "parts") == ["step_000006"]


def test_a_finished_run_is_read_and_not_run_again(quantized, whole):
    folder, model = whole
    lines = []
    _same(model, _run(quantized, folder, on_step=lines.append))
    assert lines == []


def test_keys_of_another_generator_and_parameters_of_numpy_are_taken(quantized, tmp_path, monkeypatch):
    """TPUs have "rbg" keys as a rule; a stopped run continues with them, too."""
    model, teacher, kmeans = quantized
    plain = (model, jax.tree.map(np.asarray, teacher), jax.tree.map(np.asarray, kmeans))
    settings, how = dataclasses.replace(TUNE, steps=3), dict(key=jax.random.key(0, impl="rbg"), save_every=1)
    wanted = _run(plain, tmp_path / "whole", settings, **how)
    _die_at(3, monkeypatch)
    with pytest.raises(Killed):
        _run(plain, tmp_path / "parts", settings, **how)
    monkeypatch.undo()
    assert _states(tmp_path / "parts") == ["step_000002"]
    _same(wanted, _run(plain, tmp_path / "parts", settings, **how))


def test_a_log_line_cut_short_is_written_again(tmp_path):
    files.write_text(tmp_path / "log", '{"step": 1}\n{"st')
    assert methods.read_log(tmp_path / "log") == [{"step": 1}]


# A run of something else ------------------------------------------------------------------------------------------


def _moved(tree):
    return {**tree, "pos_embed": tree["pos_embed"] + 1}


@pytest.mark.parametrize("stopped", [False, True])
def test_a_folder_of_another_run_is_refused_and_said_what_differs(quantized, whole, tmp_path, monkeypatch, stopped):
    """Of a finished run and of one that was stopped, by all that a result is made of."""
    model, teacher, kmeans = quantized
    folder, settings = whole[0], TUNE
    if stopped:
        folder, settings = tmp_path, dataclasses.replace(TUNE, steps=3)
        _die_at(3, monkeypatch)
        with pytest.raises(Killed):
            _run(quantized, folder, settings)
        monkeypatch.undo()
        assert _states(folder) == ["step_000002"]
    other = quantize(teacher, 2, key=jax.random.key(0), max_iterations=1)
    for changed, words in (
        (lambda: _run((model, teacher, other), folder, settings), r"parameters \("),
        (lambda: _run((model, _moved(teacher), kmeans), folder, settings), r"teacher \("),
        (lambda: _run(quantized, folder, settings, key=jax.random.key(3)), r"key \("),
        (
            lambda: _run(quantized, folder, dataclasses.replace(settings, lambda_d=2.0)),
            r"passes\.00_tune\.lambda_d \(2.0 here, 1.0 there\)",
        ),
        # Parameters of the same shapes run differently.
        (
            lambda: _run((model.clone(num_heads=4), teacher, kmeans), folder, settings),
            r"network\.apply\.model\.fields\.num_heads \(4 here, 2 there\)",
        ),
        (
            lambda: _run((dataclasses.replace(NETWORK, guidance=Guidance(1)), teacher, kmeans), folder, settings),
            r"network\.guidance\.channels \(1 here, 3 there\)",
        ),
    ):
        with pytest.raises(InputError, match=f"was made from something else: {words}.*another folder") as caught:
            changed()
        assert "\n" not in str(caught.value)


# Divergence -------------------------------------------------------------------------------------------------------


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(quantized, tmp_path):
    wild = dataclasses.replace(TUNE, learning_rate_codebooks=1e30, learning_rate_biases=1e30)
    with pytest.raises(InputError, match=r"diverged at step \d") as caught:
        _run(quantized, tmp_path, wild, save_every=1)
    message = str(caught.value)
    assert "\n" not in message and "learning_rate_codebooks" in message
    assert "the first parameter that is not finite is" in message and "blocks/" in message
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=_refuse) for line in text.splitlines()]
    # What is kept is of the steps in the log, and finite.
    (kept,) = _states(tmp_path)
    assert kept == f"step_{lines[-1]['step']:06d}" and kept in message.replace("step ", "step_00000")
    assert not (tmp_path / "calibration" / "00_tune").exists()
    # The same command says the same again, and a smaller rate wants a folder of its own.
    with pytest.raises(InputError, match=r"diverged at step \d"):
        _run(quantized, tmp_path, wild, save_every=1)


def test_a_run_that_diverges_is_stopped(quantized, tmp_path):
    """All numbers finite: at 0.1.0 such a model was exported."""
    fast = dataclasses.replace(TUNE, learning_rate_codebooks=10.0, steps=30)
    with pytest.raises(InputError, match=r"diverged at step \d+: L_d is .* and was .* at this time step"):
        _run(quantized, tmp_path, fast)
    lines = methods.read_log(tmp_path / "log.jsonl")
    assert len(lines) < 30 and all(np.isfinite(line["l_d"]) for line in lines)
