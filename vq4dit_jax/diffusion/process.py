"""What a network predicts, and of which path from noise to data: all that a sampler has to know of it."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from vq4dit_jax.diffusion.flow import FlowSchedule, flow_schedule
from vq4dit_jax.diffusion.schedule import TRAIN_STEPS, Schedule, make_schedule
from vq4dit_jax.errors import InputError

PREDICTIONS = ("eps", "v", "flow")


@dataclasses.dataclass(frozen=True)
class Process:
    """The process that a network was trained for.

    Attributes:
      predicts: "eps", the noise; "v" = sqrt(a) eps - sqrt(1 - a) x_0; or "flow", the velocity of the straight path.
      learned_variance: the output has as many channels again, an interpolation of log variances (`schedule`).
      beta_start, beta_end: of the linear schedule of 1000 steps; not read by a flow.
      data_time: of a flow, the network's time at which data is: 1 (SiT) or 0 (REPA).
    """

    predicts: str = "eps"
    learned_variance: bool = False
    beta_start: float = 1e-4
    beta_end: float = 0.02
    data_time: int = 1

    def __post_init__(self):
        if self.predicts not in PREDICTIONS:
            raise InputError(f"predicts={self.predicts!r}: wanted one of {', '.join(PREDICTIONS)}")
        if self.data_time not in (0, 1):
            raise InputError(f"data_time={self.data_time}: wanted 0 or 1, the network's time of the data")

    @property
    def is_flow(self) -> bool:
        return self.predicts == "flow"

    @property
    def sampler(self) -> str:
        """The sampler that calibration follows, and that is taken where none is named."""
        return "euler" if self.is_flow else "ddpm"

    def done(self, t: Shaped[Array, "*batch"]) -> Float[Array, "*batch"]:
        """How much of the way from noise to data lies behind the network's time t: 0 at the first step, below or at 1."""
        t = jnp.asarray(t).astype(jnp.float32)
        if self.is_flow:
            return t if self.data_time == 1 else 1 - t
        return 1 - (t + 1) / TRAIN_STEPS

    def schedule(self, num_steps: int) -> Schedule | FlowSchedule:
        """`num_steps` steps from noise to data."""
        if self.is_flow:
            return flow_schedule(num_steps, self.data_time)
        return make_schedule(num_steps, self.beta_start, self.beta_end, self.predicts)
