"""Flow along the straight path between noise and data: the schedule and single steps.

    x = (1 - s) data + s noise,   u = dx/ds = noise - data,   s the noise level, from 1 to 0

(Lipman et al. 2023, arXiv 2210.02747; Ma et al. 2024, SiT, arXiv 2401.08740, with the linear path.) A network is asked at its own
time t. In SiT's convention data is at t = 1, so that t = 1 - s and the network's velocity dx/dt is -u; in REPA's it is at t = 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vq4dit_jax.errors import InputError

Index = int | Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """N equal steps. Step i begins at level `level[i]` and ends at `level_after[i]`; N - 1 is the first, 0 the last.

    `timesteps[i]` and `timesteps_after[i]` are the network's times of the two; `sign` turns its velocity into u.
    """

    timesteps: Float[Array, " N"]
    timesteps_after: Float[Array, " N"]
    level: Float[Array, " N"]
    level_after: Float[Array, " N"]
    sign: int = dataclasses.field(metadata={"static": True})
    predicts: str = dataclasses.field(default="flow", metadata={"static": True})

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def signal_after(self) -> Float[Array, " N"]:
        """The squared factor of the clean image in x after each step."""
        return jnp.square(1 - self.level_after)

    @property
    def noise_after(self) -> Float[Array, " N"]:
        """The variance of the noise in x after each step."""
        return jnp.square(self.level_after)

    def moved(self, i: Index) -> Float[Array, ""]:
        """How far the next state moves for an error of 1 in the prediction at step i."""
        return self.level[i] - self.level_after[i]

    def clean(self, i: Index, x: Float[Array, "B *S C"], prediction: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        """The estimate of the clean image: x - s u."""
        return x - self.level[i] * self.sign * prediction

    def gaussian(self, i: Index, x: Float[Array, "B *S C"], output: Float[Array, "B *S _"]) -> tuple[Array, Array]:
        """(the state after an Euler step, its standard deviation, which is 0)."""
        return euler_step(self, i, x, output), jnp.float32(0.0)


def flow_schedule(num_steps: int, data_time: int = 1) -> FlowSchedule:
    """Levels 1, 1 - 1/N, ..., 0. `data_time`: the network's time of the data, 1 (SiT) or 0 (REPA)."""
    if num_steps < 1:
        raise InputError(f"num_steps={num_steps}: wanted at least 1")
    level, after = np.arange(1, num_steps + 1) / num_steps, np.arange(num_steps) / num_steps
    time = (lambda s: 1 - s) if data_time == 1 else (lambda s: s)
    as_f32 = lambda a: jax.device_put(np.asarray(a, np.float32))
    return FlowSchedule(
        as_f32(time(level)), as_f32(time(after)), as_f32(level), as_f32(after), sign=-1 if data_time == 1 else 1
    )


def _velocity(sched: FlowSchedule, x: jax.Array, output: jax.Array) -> jax.Array:
    """u in float32; channels after the prediction are not read."""
    return sched.sign * output[..., : x.shape[-1]].astype(jnp.float32)


def euler_step(
    sched: FlowSchedule, i: Index, x: Float[Array, "B *S C"], output: Float[Array, "B *S _"]
) -> Float[Array, "B *S C"]:
    """x + (s' - s) u."""
    return x + (sched.level_after[i] - sched.level[i]) * _velocity(sched, x, output)


def heun_correction(
    sched: FlowSchedule,
    i: Index,
    x: Float[Array, "B *S C"],
    first: Float[Array, "B *S _"],
    second: Float[Array, "B *S _"],
) -> Float[Array, "B *S C"]:
    """x + (s' - s) (u + u') / 2 with the outputs at both ends of step i (Heun's method, second order)."""
    mean = 0.5 * (_velocity(sched, x, first) + _velocity(sched, x, second))
    return x + (sched.level_after[i] - sched.level[i]) * mean
