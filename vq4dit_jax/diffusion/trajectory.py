"""The loop over time steps, from noise to data. It stands here alone; sampling and all that calibration looks at are its uses.

    x_T ~ N(0, I)
    for j = E - 1, ..., 0:    output = network(x, t_j, cond);    seen += observe(x, t_j, output);    x = sampler.step(x, output)

`observe` is a hashable callable (evaluation, given) -> tree. What it returns is summed over the evaluations, or stacked.
A network is anything with the methods of `networks.network.Network` that are called here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from vq4dit_jax.diffusion.keys import INITIAL, STEPS, noise
from vq4dit_jax.diffusion.samplers import Sampler, noise_or_none, sampler_for


class Evaluation(NamedTuple):
    """One evaluation of a network. R = 2B rows with guidance, B with the condition and then B with the null; else R = B.

    Attributes:
      i: the step into the schedule, int32 ().
      x: (R, *S, C) float32.
      t: (R,), the network's time.
      cond: what the rows are conditioned on, a tree whose leaves lead with R.
      output: (R, *S, F).
      blocks: the outputs of the network's blocks, where they were asked for, else None.
    """

    i: Int[Array, ""]
    x: Float[Array, "R *S C"]
    t: Shaped[Array, " R"]
    cond: Any
    output: Float[Array, "R *S F"]
    blocks: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """What a trajectory is of: the images' keys, their conditions, and the null (None: no guidance)."""

    keys: Any  # (B,) keys
    cond: Any
    null: Any = None

    @property
    def images(self) -> int:
        return self.keys.shape[0]


class Position(NamedTuple):
    """Where a trajectory stands: the images, the sampler's state, and the evaluation to come, E - 1 at first."""

    x: Float[Array, "B *S C"]
    state: Any
    j: Int[Array, ""]


def begin(
    network: Any, sampler: Sampler, num_steps: int, keys: Shaped[PRNGKeyArray, " B"], initial: Any = None
) -> Position:
    """x_T from each image's own stream, or `initial` (B, *S, C)."""
    x = noise(keys, INITIAL, 0, network.sample_shape) if initial is None else initial
    return Position(x, sampler.init(x), jnp.int32(num_steps * sampler.evaluations - 1))


def evaluate(
    network: Any,
    params: Any,
    x: Float[Array, "B *S C"],
    t: Shaped[Array, ""],
    problem: Problem,
    *,
    i: Any = 0,
    blocks: bool = False,
    hoisted: Any = None,
) -> Evaluation:
    """The network at x and its time t, on the rows that guidance needs."""
    cond = problem.cond
    if problem.null is not None:
        x, cond = network.guidance.rows(x, cond, problem.null)
    times = jnp.full((x.shape[0],), t)
    output, seen = network.run(params, x, times, cond, blocks, hoisted)
    return Evaluation(jnp.asarray(i, jnp.int32), x, times, cond, output, seen)


def guided(network: Any, evaluation: Evaluation, problem: Problem, scale: Any) -> Float[Array, "B *S F"]:
    """The guided output of an evaluation."""
    return combine(network, evaluation.output, problem, scale)


def combine(network: Any, output: Float[Array, "R *S F"], problem: Problem, scale: Any) -> Float[Array, "B *S F"]:
    """The guided output of R rows."""
    return output if problem.null is None else network.guidance.combine(output, scale, network.sample_shape[-1])


def advance(
    network: Any,
    sampler: Sampler,
    sched: Any,
    params: Any,
    problem: Problem,
    scale: Any,
    position: Position,
    *,
    blocks: bool = False,
    hoisted: Any = None,
) -> tuple[Evaluation, Position]:
    """One evaluation, and where the sampler goes from there."""
    x, state, j = position
    i = j // sampler.evaluations
    t = sampler.times(sched)[j]
    found = evaluate(network, params, x, t, problem, i=i, blocks=blocks, hoisted=hoisted)
    draw = lambda: noise(problem.keys, STEPS, j, network.sample_shape)
    x, state = sampler.step(sched, j, x, guided(network, found, problem, scale), state, noise_or_none(sampler, draw))
    return found, Position(x, state, j - 1)


Observe = Callable[[Evaluation, Any], Any]


def run(
    network: Any,
    sampler: Sampler,
    sched: Any,
    params: Any,
    problem: Problem,
    scale: Any,
    *,
    observe: Observe | None = None,
    given: Any = None,
    reduce: str = "stack",
    blocks: bool = False,
    hoist: bool = False,
    initial: Any = None,
    every_step: bool = False,
) -> tuple[Float[Array, "..."], Any]:
    """(the images at the end, what `observe` saw). Pure and jittable; `trajectory` is the jitted form.

    Args:
      observe: (evaluation, given) -> tree, at every evaluation.
      given: arguments of `observe`, such as the parameters of students.
      reduce: "sum" over the evaluations, or "stack", the first evaluation first.
      blocks: whether evaluations have the blocks' outputs.
      hoist: what depends on time and condition alone is computed for all evaluations before the first (`Network.hoist`).
      initial: the noise to begin with, (B, *S, C); None: of the images' keys.
      every_step: return the images after each step, (N, B, *S, C), the first step first.
    """
    start = begin(network, sampler, sched.num_steps, problem.keys, initial)
    order = jnp.arange(sched.num_steps * sampler.evaluations - 1, -1, -1, dtype=jnp.int32)
    hoisted = _hoisted(network, sampler, sched, params, problem) if hoist else None

    def look(position: Position, j: Any) -> tuple[Position, Any]:
        own = None if hoisted is None else jax.tree.map(lambda a: a[j], hoisted)
        position = position._replace(j=j)
        found, position = advance(network, sampler, sched, params, problem, scale, position, blocks=blocks, hoisted=own)
        return position, None if observe is None else observe(found, given)

    def step(carry: tuple[Position, Any], j: Any) -> tuple[tuple[Position, Any], Any]:
        position, seen = look(carry[0], j)
        image = position.x if every_step else None
        if reduce == "sum":
            return (position, jax.tree.map(jnp.add, carry[1], seen)), (image, None)
        return (position, None), (image, seen)

    total = None
    if reduce == "sum":
        shapes = jax.eval_shape(lambda p: look(p, order[0])[1], start)
        total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (position, total), (images, seen) = jax.lax.scan(step, (start, total), order)
    if every_step:
        images = images[sampler.evaluations - 1 :: sampler.evaluations]
    return images if every_step else position.x, total if reduce == "sum" else seen


def _hoisted(network: Any, sampler: Sampler, sched: Any, params: Any, problem: Problem) -> Any:
    """`network.hoist` at the times of all evaluations, stacked."""
    cond = problem.cond
    if problem.null is not None:
        _, cond = network.guidance.rows(jnp.zeros((problem.images, 1)), cond, problem.null)
    rows = problem.images * (1 if problem.null is None else 2)
    return jax.lax.map(lambda t: network.hoist(params, jnp.full((rows,), t), cond), sampler.times(sched))


@functools.partial(jax.jit, static_argnames=("network", "sampler", "observe", "reduce", "blocks"))
def _observed(network, sampler, sched, params, problem, scale, given, *, observe, reduce, blocks):
    return run(
        network, sampler, sched, params, problem, scale, observe=observe, given=given, reduce=reduce, blocks=blocks
    )


def observed(
    network: Any,
    params: Any,
    problem: Problem,
    *,
    num_steps: int,
    scale: float,
    observe: Observe | None = None,
    given: Any = None,
    reduce: str = "stack",
    blocks: bool = False,
) -> tuple[Float[Array, "B *S C"], Any]:
    """(images, what `observe` saw) of a trajectory of the process' own sampler: one program for each network and `observe`.

    `observe` must be hashable, equal where it does the same, and hold no arrays: those are `given`.
    """
    sampler = sampler_for(network.process)
    sched = network.process.schedule(num_steps)
    how = dict(observe=observe, reduce=reduce, blocks=blocks)
    return _observed(network, sampler, sched, params, problem, np.float32(scale), given, **how)
