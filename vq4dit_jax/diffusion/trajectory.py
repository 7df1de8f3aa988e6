"""The producer of calibration data: the full-precision teacher denoises from pure noise (zero-data calibration)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.networks.network import Network

_LABELS, _START, _NOISE = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Where the teacher stands: images x_t, their classes, the index i into the schedule, and how many came before."""

    x: Any  # float32 (B, H, W, C)
    labels: Any  # int32 (B,)
    i: Any  # int32 ()
    number: Any  # int32 ()
    key_data: Any  # uint32 (2,), of `jax.random.key_data`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What the student is shown, and what the teacher made of it. R = 2B rows: B with labels, then B with the null label."""

    i: Any  # int32 (), into the schedule
    x: Float[Array, "R H W C"]
    t: Int[Array, " R"]
    y: Int[Array, " R"]
    output: Float[Array, "R H W _"]
    blocks: Any  # as `Network.apply` returns them


def begin(
    network: Network, sched: diffusion.Schedule, key_data: Array, number: Int[Array, ""], batch: int
) -> Trajectory:
    """x_T ~ N(0, I) and random classes; trajectory `number` of the key is the same whatever came before it."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
    x = jax.random.normal(jax.random.fold_in(key, _START), (batch, *network.sample_shape), jnp.float32)
    labels = jax.random.randint(jax.random.fold_in(key, _LABELS), (batch,), 0, network.num_classes, jnp.int32)
    return Trajectory(x, labels, jnp.int32(sched.num_steps - 1), jnp.asarray(number, jnp.int32), key_data)


def advance(
    network: Network, teacher: Any, sched: diffusion.Schedule, cfg_scale: float, trajectory: Trajectory
) -> tuple[Batch, Trajectory]:
    """One teacher evaluation: the batch at x_t, and the trajectory at the teacher's x_{t-1} (or a new one after x_0)."""
    i, count = trajectory.i, len(trajectory.labels)
    x, t, y = network.rows(trajectory.x, sched.timesteps[i], trajectory.labels)
    output, blocks = network.apply(teacher, x, t, y)

    key = jax.random.fold_in(jax.random.wrap_key_data(trajectory.key_data), trajectory.number)
    noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, _NOISE), i), trajectory.x.shape, jnp.float32)
    guided = network.guide(output, cfg_scale)
    following = dataclasses.replace(trajectory, x=diffusion.ddpm_step(sched, i, trajectory.x, guided, noise), i=i - 1)
    fresh = begin(network, sched, trajectory.key_data, trajectory.number + 1, count)
    following = jax.tree.map(lambda new, old: jnp.where(i == 0, new, old), fresh, following)
    return Batch(i, x, t, y, output, blocks), following


def batches(
    network: Network, teacher: Any, num_steps: int, *, key: jax.Array, images: int, cfg_scale: float
) -> Iterator[Batch]:
    """The `num_steps` batches of one trajectory, from noise to image."""
    sched = diffusion.make_schedule(num_steps)
    # The teacher is an argument, not a constant: constants would be compiled into the program.
    step = jax.jit(lambda teacher, where: advance(network, teacher, sched, cfg_scale, where))
    where = begin(network, sched, jax.random.key_data(key), jnp.int32(0), images)
    for _ in range(num_steps):
        batch, where = step(teacher, where)
        yield batch
