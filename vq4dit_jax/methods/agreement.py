"""How far models are from their teacher, on one fresh held-out trajectory that no calibration has seen."""

from typing import Any

import jax
import numpy as np

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import losses
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import Network, as_network, check
from vq4dit_jax.qarray.tree import densify

HELD_OUT_IMAGES, HELD_OUT_STEPS = 16, 10


def held_out_agreement(
    model: DiT | Network, teacher: Any, students: dict[str, Any], cfg_scale: float, key: jax.Array
) -> dict[str, tuple[float, float]]:
    """For each student (L_d, relative L2 error of the guided noise prediction), means over the trajectory's steps.

    The trajectory is the teacher's own, 16 images and 10 DDPM steps; every student sees the same x_t.
    """
    network = as_network(model)
    check(network, teacher)
    measure = jax.jit(lambda params, batch: losses.agreement(network, params, batch, cfg_scale))
    students = {name: densify(params) for name, params in students.items()}
    found: dict[str, list] = {name: [] for name in students}
    for batch in trajectory.batches(
        network, teacher, HELD_OUT_STEPS, key=key, images=HELD_OUT_IMAGES, cfg_scale=cfg_scale
    ):
        for name, params in students.items():
            found[name].append([float(v) for v in measure(params, batch)])
    return {name: tuple(np.mean(values, axis=0).tolist()) for name, values in found.items()}
