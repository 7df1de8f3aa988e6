"""How far models are from their teacher, on one fresh held-out trajectory that no calibration has seen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import losses
from vq4dit_jax.networks.network import Network, as_network, check, random_problem

HELD_OUT_IMAGES, HELD_OUT_STEPS = 16, 10


@dataclasses.dataclass(frozen=True)
class _Agreement:
    network: Network
    cfg_scale: float

    def __call__(self, evaluation: trajectory.Evaluation, student: Any) -> jax.Array:
        return jnp.stack(losses.agreement(self.network, student, evaluation, self.cfg_scale))


def held_out_agreement(
    model: Any, teacher: Any, students: dict[str, Any], cfg_scale: float, key: jax.Array
) -> dict[str, tuple[float, float]]:
    """For each student (L_d, relative L2 error of the guided prediction), means over the trajectory's steps.

    The trajectory is the teacher's own, 16 images and 10 steps of the process' sampler; every student sees the same x_t.
    """
    network = as_network(model)
    check(network, teacher)
    problem = random_problem(network, teacher, key, images=HELD_OUT_IMAGES, cfg_scale=cfg_scale)
    how = dict(num_steps=HELD_OUT_STEPS, scale=cfg_scale, observe=_Agreement(network, cfg_scale), blocks=True)
    found = {}
    for name, student in students.items():
        _, seen = trajectory.observed(network, teacher, problem, **how, given=student)
        found[name] = tuple(np.asarray(seen, np.float64).mean(0).tolist())
    return found
