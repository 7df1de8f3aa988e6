"""The calibration loop: steps, log lines and checkpoints. Killed at any step and started again it ends with the same bits."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax import files
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import contrast, variance
from vq4dit_jax.methods import solve_layers as layerwise
from vq4dit_jax.methods import tune as optimize
from vq4dit_jax.methods.recipe import LAYERWISE, Recipe
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import Network, as_network, check
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.tree import flatten, map_slots
from vq4dit_jax.storage import checkpoint

_HISTOGRAM_EVERY = 25
_LAYERWISE, _VARIANCE, _CONTRAST = ((1 << 31) + i for i in range(3))
"""Folded into the key for what comes before and after the steps; trajectories fold their numbers."""


def make_student(recipe: Recipe, teacher: Any, kmeans: Any) -> dict[str, Any]:
    """The tree of `kmeans` with `SoftVQArray` leaves; candidates come from the teacher's weights."""
    weights = flatten(teacher)
    if alone := sorted(set(weights) ^ set(flatten(kmeans))):
        raise InputError(
            f"the quantized tree is not that of the teacher: {alone[0]} is in one of them alone; quantize the very "
            "parameters that are given as the teacher"
        )

    def one(path: str, leaf: Any, kernel: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        weight = np.swapaxes(np.asarray(kernel, np.float32), -1, -2)
        if weight.shape != (*leaf.stack, *leaf.matrix):
            raise InputError(
                f"{path} stands for weights {(*leaf.stack, *leaf.matrix)}, the teacher's are {weight.shape}; quantize the "
                "very parameters that are given as the teacher"
            )
        return leaf.soften(weight, recipe.num_candidates, recipe.ratio_start)

    return map_slots(lambda slot: one(slot.path, slot.leaf, slot.cut(weights[slot.path])), kmeans)


def calibrate(
    model: DiT | Network,
    params: Any,
    packed: Any,
    *,
    key: jax.Array,
    recipe: Recipe | None = None,
    folder: str | os.PathLike | None = None,
    log_file: str | os.PathLike | None = None,
    save_every: int = 50,
    on_step: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Calibrates a k-means model against its teacher and returns the hard model.

    It is a tree like `packed`; with an allocation, one with other numbers of codewords and sub-vector lengths.

    Args:
      model: a `DiT`, or the `Network` that says how any other one is run.
      params: the teacher, full precision.
      packed: what `quantize` made of it. Codebooks and biases are trained in float32 and returned in their types here.
      key: of the noise and the classes that the trajectories start from.
      recipe: how long, and in which form. None: `Recipe(**LAYERWISE)` for a DiT, and `Recipe()` for a `Network`, whose
        Linears need not be ours.
      folder: where `start` (with layerwise: what the steps begin with) is written, and `step_NNNNNN` (orbax: state and
        trajectory) every `save_every` steps and at the end. The same call continues from it, with the same bits as if it
        had never stopped. None: nothing is written.
      log_file: one JSON line for each step, see `read_log`; continued as well. The seconds of the first are those of the
        layerwise solution, too, and those of the last what comes after the steps.
      on_step: is given each line after its step.

    Raises:
      InputError: the network does not do as `Network` says, nothing is quantized, the trees do not fit each other, or
        `folder` holds the run of another recipe.
    """
    recipe = recipe or (Recipe(**LAYERWISE) if isinstance(model, DiT) else Recipe())
    network = as_network(model, recipe.remat)
    check(network, params)
    sched = diffusion.make_schedule(recipe.trajectory_steps)
    run, before = _Folder(folder, recipe), 0.0
    if recipe.layerwise:
        packed, before = run.start(
            lambda: layerwise.start(recipe, model, params, packed, jax.random.fold_in(key, _LAYERWISE))
        )
    student = make_student(recipe, params, packed)
    check(network, student)
    state = optimize.init(recipe, student)
    where = trajectory.begin(network, sched, jax.random.key_data(key), jnp.int32(0), recipe.batch)

    def step(state, where, student, teacher):
        new = where.i == sched.num_steps - 1
        info = {"trajectory": where.number, "timestep": sched.timesteps[where.i]}
        batch, where = trajectory.advance(network, teacher, sched, recipe.cfg_scale, where)
        state, metrics = optimize.update(recipe, network, state, student, batch, new)
        return state, where, {**info, **metrics}

    def finish(state):
        hard = optimize.finalize(student, state)
        hard = jax.tree.map(lambda new, old: new.astype(old.dtype), hard, packed)
        sampler = dict(num_steps=recipe.trajectory_steps, cfg_scale=recipe.cfg_scale)
        if recipe.gains:
            hard = contrast.fit(network, params, hard, key=jax.random.fold_in(key, _CONTRAST), **sampler)
        if not variance.is_wanted(recipe, model, state.trainable.kept):
            return hard
        key_of_variance = jax.random.fold_in(key, _VARIANCE)
        return variance.fit(model, params, hard, key=key_of_variance, images=recipe.batch, **sampler)

    step, hard = jax.jit(step, donate_argnums=(0, 1)), None
    # The step gives its state away, so the state may share no buffer with the student.
    done, (state, where) = run.resume(jax.tree.map(jnp.copy, (state, where)))
    # Candidates are arguments, not constants: constants would be compiled into the program.
    with progress(recipe.steps, "calibrate", "step") as bar, _open_log(log_file, done) as log:
        bar.update(done)
        for number in range(done + 1, recipe.steps + 1):
            begun = time.perf_counter()
            state, where, metrics = step(state, where, student, params)
            line = {"step": number, **_plain(metrics)}  # waits for the step
            if number == recipe.steps:
                hard = jax.block_until_ready(finish(state))
            seconds = time.perf_counter() - begun + (before if number == 1 else 0.0)
            line["seconds"] = round(seconds, 4)
            if number % _HISTOGRAM_EVERY and number not in (1, recipe.steps):
                del line["ratio_histogram"]
            log.write(json.dumps(line) + "\n")
            log.flush()
            on_step(line)
            bar.set_postfix(l_d=f"{line['l_d']:.5f}", frozen=f"{line['frozen_fraction']:.0%}")
            bar.update(1)
            if number % save_every == 0 or number == recipe.steps:
                run.save(number, (state, where))
    return finish(state) if hard is None else hard


def _plain(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


class _Folder:
    """The checkpoints of a run; of the folder None, nothing."""

    def __init__(self, path: str | os.PathLike | None, recipe: Recipe):
        self.path, self.recipe = path and pathlib.Path(path), dataclasses.asdict(recipe)

    def _steps(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step_")) for p in self.path.glob("step_*"))

    def _file(self, step: int) -> pathlib.Path:
        return self.path / f"step_{step:06d}"

    def start(self, make: Callable[[], Any]) -> tuple[Any, float]:
        """What `make` makes, from its file where that is already there; and the seconds that it took to make."""
        file = self.path and self.path / "start"
        if file and file.exists():
            _, tree, manifest = checkpoint.load_quantized(file)
            self._same(manifest["extra"])
            return tree, manifest["extra"]["seconds"]
        begun = time.perf_counter()
        tree = jax.block_until_ready(make())
        seconds = time.perf_counter() - begun
        if file:
            checkpoint.save_quantized(file, {"stage": "layerwise"}, tree, {"recipe": self.recipe, "seconds": seconds})
        return tree, seconds

    def _same(self, metadata: dict[str, Any]) -> None:
        theirs = metadata.get("recipe", {})
        differing = [f"{k} ({v} here, {theirs.get(k)} there)" for k, v in self.recipe.items() if theirs.get(k) != v]
        if differing:
            raise InputError(
                f"{self.path} holds a run of another recipe: {', '.join(differing)}; give another folder, or remove it"
            )

    def resume(self, like: Any) -> tuple[int, Any]:
        """(steps done, state) of the last checkpoint, or (0, like)."""
        if self.path is None or not (steps := self._steps()):
            return 0, like
        self._same(checkpoint.load_metadata(self._file(steps[-1])))
        return steps[-1], checkpoint.load_state(self._file(steps[-1]), like)[0]

    def save(self, step: int, state: Any) -> None:
        """Writes the new state before the old ones go."""
        if self.path is None:
            return
        old = [s for s in self._steps() if s != step]
        checkpoint.save_state(self._file(step), state, {"step": step, "recipe": self.recipe})
        for s in old:
            files.remove(self._file(s))


def read_log(log_file: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of train_log.jsonl; an unfinished last line is left out."""
    if not os.path.exists(log_file):
        return []
    text = pathlib.Path(log_file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("}\n")]


def _open_log(log_file: str | os.PathLike | None, done: int) -> TextIO:
    """The log, open at its end. Kept are the lines of steps that the checkpoint has; the others are run again."""
    if log_file is None:
        return open(os.devnull, "w", encoding="utf-8")
    kept = [line for line in read_log(log_file) if line["step"] <= done]
    files.write_text(log_file, "".join(json.dumps(line) + "\n" for line in kept))
    return open(log_file, "a", encoding="utf-8")
