"""Samplers in optax's grammar: pure functions `init` and `step`, and at which times a network is evaluated.

    state = sampler.init(x)
    x, state = sampler.step(sched, j, x, output, state, noise)      j = E - 1, ..., 0

A sampler evaluates the network E = N * evaluations times. `output` is what the network gives at x and at `times(sched)[j]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import flow, schedule
from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.errors import InputError

Images = Float[Array, "B *S C"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A named sampler. `SAMPLERS` has all of them, `sampler_for` the one that fits a process.

    Attributes:
      name: as users write it.
      takes: predictions that it can use.
      init: x (B, *S, C) -> state, a tree of arrays.
      step: (schedule, j, x, output, state, noise) -> (x, state).
      evaluations: of the network, for a step.
      draws: whether `noise` is read.
    """

    name: str
    takes: tuple[str, ...]
    init: Callable[[Images], Any]
    step: Callable[..., tuple[Images, Any]]
    evaluations: int = 1
    draws: bool = False

    def times(self, sched: Any) -> Array:
        """The network's times of the E evaluations; the last entry is the first evaluation."""
        if self.evaluations == 1:
            return sched.timesteps
        return jnp.stack([sched.timesteps_after, sched.timesteps], 1).reshape(-1)


def _stateless(step: Callable[..., Images]) -> dict[str, Any]:
    return dict(
        init=lambda x: (), step=lambda sched, j, x, output, state, noise: (step(sched, j, x, output, noise), ())
    )


def _heun(sched: Any, j: Any, x: Images, output: Array, state: tuple[Images, Array], noise: Any) -> tuple[Images, Any]:
    """j odd: the Euler step of step j // 2, which keeps where it began; j even: the correction from there."""
    begun, first = state
    i, begins = j // 2, j % 2 == 1
    first = jnp.where(begins, output[..., : x.shape[-1]].astype(jnp.float32), first)
    begun = jnp.where(begins, x, begun)
    ahead = flow.euler_step(sched, i, begun, first)
    return jnp.where(begins, ahead, flow.heun_correction(sched, i, begun, first, output)), (begun, first)


_GAUSSIAN, _FLOW = ("eps", "v"), ("flow",)
SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddpm", _GAUSSIAN, **_stateless(schedule.ddpm_step), draws=True),
        Sampler(
            "ddim", _GAUSSIAN, **_stateless(lambda sched, j, x, output, noise: schedule.ddim_step(sched, j, x, output))
        ),
        Sampler(
            "dpm++",
            _GAUSSIAN,
            init=jnp.zeros_like,
            step=lambda sched, j, x, output, x0, noise: schedule.dpmpp_2m_step(sched, j, x, output, x0),
        ),
        Sampler("euler", _FLOW, **_stateless(lambda sched, j, x, output, noise: flow.euler_step(sched, j, x, output))),
        Sampler("heun", _FLOW, init=lambda x: (x, jnp.zeros_like(x)), step=_heun, evaluations=2),
    )
}


def sampler_for(process: Process, name: str | None = None) -> Sampler:
    """The sampler of this name, by default the process' own; InputError where it cannot use what the network predicts."""
    sampler = SAMPLERS.get(name or process.sampler)
    usable = [s.name for s in SAMPLERS.values() if process.predicts in s.takes]
    if sampler is None or process.predicts not in sampler.takes:
        raise InputError(f"sampler={name!r}: a network that predicts {process.predicts!r} takes {', '.join(usable)}")
    return sampler


def noise_or_none(sampler: Sampler, draw: Callable[[], jax.Array]) -> jax.Array | None:
    """Noise for a step, where the sampler reads it."""
    return draw() if sampler.draws else None
