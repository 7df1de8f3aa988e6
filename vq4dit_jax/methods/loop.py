"""The loop of gradient methods: steps, log lines and checkpoints. A run that was killed at any step ends with the same bits.

A method is a frozen dataclass with `steps`, `batch`, `trajectory_steps`, `cfg_scale`, `remat` and three pure functions:

    state = method.init(student)
    state, metrics = method.update(network, state, student, evaluation, new_trajectory)
    params = method.finalize(student, state)

Step n of the loop is one evaluation of the teacher on its own trajectory, and one update. Image b of trajectory m has the key of
image m * batch + b, so a trajectory is the same whatever came before it.
"""

import functools
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vq4dit_jax import files
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.diffusion.keys import image_keys
from vq4dit_jax.diffusion.samplers import sampler_for
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.passes import REMEDY, Context, Report
from vq4dit_jax.networks.network import Network, check, problem
from vq4dit_jax.progress import progress
from vq4dit_jax.storage import checkpoint, identity

_HISTOGRAM_EVERY = 25
_DIVERGED = 1e3
"""A run whose L_d is so many times that of its first trajectory, at the same time step, is stopped."""


class Walk(NamedTuple):
    """Where the teacher's trajectories stand: the position in this one, and how many came before."""

    position: trajectory.Position
    number: Int[Array, ""]


def _problem(method: Any, network: Network, teacher: Any, key: jax.Array, number: Array) -> trajectory.Problem:
    first = number.astype(jnp.uint32) * jnp.uint32(method.batch)
    keys = image_keys(key, first + jnp.arange(method.batch, dtype=jnp.uint32))
    return problem(network, teacher, keys, method.cfg_scale)


def _begin(method: Any, network: Network, teacher: Any, key: jax.Array, number: Array) -> Walk:
    sampler = sampler_for(network.process)
    keys = _problem(method, network, teacher, key, number).keys
    return Walk(trajectory.begin(network, sampler, method.trajectory_steps, keys), number)


begin = jax.jit(_begin, static_argnames=("method", "network"))


@functools.partial(jax.jit, static_argnames=("method", "network"), donate_argnums=(2, 3))
def step(
    method: Any, network: Network, state: Any, walk: Walk, student: Any, teacher: Any, key: jax.Array
) -> tuple[Any, Walk, dict[str, Array]]:
    """One evaluation of the teacher and one update. The state and the walk are given away."""
    sampler, sched = sampler_for(network.process), network.process.schedule(method.trajectory_steps)
    here = _problem(method, network, teacher, key, walk.number)
    new = walk.position.j == sched.num_steps * sampler.evaluations - 1
    evaluation, position = trajectory.advance(
        network, sampler, sched, teacher, here, method.cfg_scale, walk.position, blocks=True
    )
    state, metrics = method.update(network, state, student, evaluation, new)
    metrics = {"trajectory": walk.number, "timestep": evaluation.t[0], **metrics}
    following = jax.lax.cond(
        position.j < 0,
        lambda: _begin(method, network, teacher, key, walk.number + 1),
        lambda: Walk(position, walk.number),
    )
    return state, following, metrics


def run_steps(method: Any, run: Context, student: Any, key: jax.Array) -> tuple[Any, list[dict[str, Any]]]:
    """(what `finalize` gives after all steps, the lines of the log).

    Where `run.folder` is given, `step_NNNNNN` (orbax: state and walk) is written there every `save_every` steps and at the end;
    the same call goes on from it, with the same bits as if it had never stopped.

    Raises InputError where the loss is not finite or L_d grows a thousandfold, with the step and the first parameter that is not
    finite; the last good state stays in the folder.
    """
    network = run.network
    if method.remat:
        network = run.recomputing()
    state = method.init(student)
    check(run.network, student)  # the teacher was: here, whether it runs quantized parameters
    walk = begin(method, network, run.teacher, key, np.int32(0))
    steps = _Steps(run.folder, run.made_of)
    done, (state, walk) = steps.resume((state, walk))
    lines = read_log(run.log_file)[:done] if run.log_file else []
    begun_with = {line["timestep"]: line["l_d"] for line in lines if line["trajectory"] == 0}
    with progress(method.steps, "calibrate", "step") as bar, _open_log(run.log_file, done) as log:
        bar.update(done)
        for number in range(done + 1, method.steps + 1):
            begun = time.perf_counter()
            state, walk, metrics = step(method, network, state, walk, student, run.teacher, key)
            line = {"step": number, **_plain(metrics)}  # waits for the step
            _require_sound(line, begun_with.get(line["timestep"], math.inf), state, steps)
            if line["trajectory"] == 0:
                begun_with[line["timestep"]] = line["l_d"]
            line["seconds"] = round(time.perf_counter() - begun, 4)
            if number % _HISTOGRAM_EVERY and number not in (1, method.steps):
                line.pop("ratio_histogram", None)
            log.write(json.dumps(line) + "\n")
            log.flush()
            lines.append(line)
            run.on_step(line)
            bar.set_postfix(l_d=f"{line['l_d']:.5f}", frozen=f"{line.get('frozen_fraction', 1):.0%}")
            bar.update(1)
            if number % run.save_every == 0 or number == method.steps:
                steps.save(number, (state, walk))
    return method.finalize(student, state), lines


def summary(lines: list[dict[str, Any]]) -> Report:
    """For a pass' report: the last line's figures, and the seconds of all steps, also of those before a kill."""
    wanted = ("step", "loss", "l_d", "l_r", "frozen_fraction")
    last = {name: lines[-1][name] for name in wanted if lines and name in lines[-1]}
    return {**last, "seconds": round(sum(line["seconds"] for line in lines), 4)}


def _plain(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


def _require_sound(line: dict[str, Any], first: float, state: Any, steps: "_Steps") -> None:
    """InputError for a step that has diverged. `first`: L_d of the first trajectory at the same time step."""
    bad = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
    grown = line["l_d"] > _DIVERGED * first > 0
    if not bad and not grown:
        return
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    broken = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        and "floor" not in str(path)
        and not np.isfinite(np.asarray(leaf)).all()
    ]
    what = (
        f"{bad[0]} is {line[bad[0]]}"
        if bad
        else f"L_d is {line['l_d']:.3g} and was {first:.3g} at this time step of the first trajectory"
    )
    where = f"; the first parameter that is not finite is {broken[0]}" if broken else ""
    raise InputError(
        f"calibration diverged at step {line['step']}: {what}{where}; {steps.kept()}lower the learning rates "
        "(calibration.learning_rate_codebooks and the others)"
    )


class _Steps:
    """The checkpoints of a run; of the folder None, nothing."""

    def __init__(self, folder: pathlib.Path | None, made_of: dict[str, Any] | None):
        self.folder, self.made_of = folder, made_of

    def _numbers(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step_")) for p in self.folder.glob("step_*")) if self.folder else []

    def _file(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step:06d}"

    def kept(self) -> str:
        """Words that say which state is still there."""
        return f"the state of step {self._numbers()[-1]} is kept in {self.folder}; " if self._numbers() else ""

    def resume(self, like: Any) -> tuple[int, Any]:
        """(steps done, state) of the last checkpoint, or (0, like)."""
        numbers = self._numbers()
        if not numbers:
            return 0, like
        file = self._file(numbers[-1])
        theirs = checkpoint.load_metadata(file).get("made_of") or {}
        identity.refuse_others(self.folder, self.made_of or {}, theirs, REMEDY)
        return numbers[-1], checkpoint.load_state(file, like)[0]

    def save(self, step: int, state: Any) -> None:
        """Writes the new state before the old ones go."""
        if self.folder is None:
            return
        old = [s for s in self._numbers() if s != step]
        checkpoint.save_state(self._file(step), state, {"step": step, "made_of": self.made_of})
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
