"""The calibration loop: steps, log lines and checkpoints. Killed at any step and started again it ends with the same bits."""

import json
import pathlib
import time
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax import checkpoint, diffusion, files
from vq4dit_jax.calibration import calibrate, trajectory
from vq4dit_jax.calibration.recipe import Recipe
from vq4dit_jax.models import DiT
from vq4dit_jax.reporting import progress
from vq4dit_jax.vq import VQArray, soften

_HISTOGRAM_EVERY = 25


def make_student(recipe: Recipe, teacher: Any, kmeans: Any) -> dict[str, Any]:
    """The tree of `kmeans` with `SoftVQArray` leaves; candidates come from the teacher's weights."""
    weights = flax.traverse_util.flatten_dict(teacher, sep="/")
    out = {}

    def one(leaf: Any, kernel: Any) -> Any:
        if not isinstance(leaf, VQArray):
            return leaf
        weight = np.swapaxes(np.asarray(kernel, np.float32), -1, -2)
        return soften(leaf, weight, min(recipe.num_candidates, leaf.num_codewords), recipe.ratio_start)

    for path, leaf in flax.traverse_util.flatten_dict(kmeans, sep="/").items():
        if not isinstance(leaf, tuple):
            out[path] = one(leaf, weights[path])
            continue
        start, parts = 0, []
        for part in leaf:
            stop = start + jax.tree.leaves(part)[0].shape[0]
            parts.append(one(part, weights[path][start:stop]))
            start = stop
        out[path] = tuple(parts)
    return flax.traverse_util.unflatten_dict(out, sep="/")


def run(
    recipe: Recipe,
    model: DiT,
    teacher: Any,
    kmeans: Any,
    key: jax.Array,
    folder: pathlib.Path,
    log_file: pathlib.Path,
    save_every: int,
) -> dict[str, Any]:
    """Calibrates and returns the hard model (float32 codebooks).

    `folder` holds `step_NNNNNN` (orbax: state and trajectory), `log_file` one JSON line a step; both continue where
    they stopped.
    """
    sched = diffusion.make_schedule(recipe.trajectory_steps)
    student = make_student(recipe, teacher, kmeans)
    state = calibrate.init(recipe, student)
    where = trajectory.begin(model, sched, jax.random.key_data(key), jnp.int32(0), recipe.batch)
    # The step gives its state away, so the state may share no buffer with the student.
    done, (state, where) = _resume(folder, jax.tree.map(jnp.copy, (state, where)))
    _truncate_log(log_file, done)

    def step(state, where, student, teacher):
        new = where.i == sched.num_steps - 1
        info = {"trajectory": where.number, "timestep": sched.timesteps[where.i]}
        batch, where = trajectory.advance(model, teacher, sched, recipe.cfg_scale, where)
        state, metrics = calibrate.update(recipe, model, state, student, batch, new)
        return state, where, {**info, **metrics}

    step = jax.jit(step, donate_argnums=(0, 1))
    # Candidates are arguments, not constants: constants would be compiled into the program.
    with progress(recipe.steps, "calibrate", "step") as bar, open(log_file, "a", encoding="utf-8") as log:
        bar.update(done)
        for number in range(done + 1, recipe.steps + 1):
            begun = time.perf_counter()
            state, where, metrics = step(state, where, student, teacher)
            line = {"step": number, **_plain(metrics), "seconds": round(time.perf_counter() - begun, 4)}
            if number % _HISTOGRAM_EVERY and number not in (1, recipe.steps):
                del line["ratio_histogram"]
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix(l_d=f"{line['l_d']:.5f}", frozen=f"{line['frozen_fraction']:.0%}")
            bar.update(1)
            if number % save_every == 0 or number == recipe.steps:
                _save(folder, number, (state, where))
    return calibrate.finalize(student, state)


def _plain(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


def _saved_steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in folder.glob("step_*"))


def _resume(folder: pathlib.Path, like: Any) -> tuple[int, Any]:
    steps = _saved_steps(folder)
    if not steps:
        return 0, like
    state, _ = checkpoint.load_state(folder / f"step_{steps[-1]:06d}", like)
    return steps[-1], state


def _save(folder: pathlib.Path, step: int, state: Any) -> None:
    """Writes the new state before the old ones go."""
    old = [s for s in _saved_steps(folder) if s != step]
    checkpoint.save_state(folder / f"step_{step:06d}", state, {"step": step})
    for s in old:
        files.remove(folder / f"step_{s:06d}")


def read_log(log_file: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of train_log.jsonl; an unfinished last line is left out."""
    if not log_file.exists():
        return []
    return [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")]


def _truncate_log(log_file: pathlib.Path, done: int) -> None:
    """Keeps the lines of steps that the checkpoint has; the others are run again."""
    kept = [line for line in read_log(log_file) if line["step"] <= done]
    files.write_text(log_file, "".join(json.dumps(line) + "\n" for line in kept))
