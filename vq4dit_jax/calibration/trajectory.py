"""The producer of calibration data: the full-precision teacher denoises from pure noise (zero-data calibration)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vq4dit_jax import diffusion
from vq4dit_jax.calibration.network import Network

_LABELS, _START, _NOISE = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Where the teacher stands: images x_t, their classes, their indices i into the schedule, and how many came before.

    An index of N or more waits: the image is x_T until it has come down to N - 1.
    """

    x: Any  # float32 (B, H, W, C)
    labels: Any  # int32 (B,)
    i: Any  # int32 (B,)
    number: Any  # int32 (B,)
    key_data: Any  # uint32 (2,), of `jax.random.key_data`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What the student is shown, and what the teacher made of it. R = 2B rows: B with labels, then B with the null label."""

    i: Int[Array, " B"]
    x: Float[Array, "R H W C"]
    t: Int[Array, " R"]
    y: Int[Array, " R"]
    output: Float[Array, "R H W _"]
    blocks: Any  # as `Network.apply` returns them


def begin(
    network: Network,
    sched: diffusion.Schedule,
    key_data: Array,
    number: Int[Array, ""],
    batch: int,
    staggered: bool = False,
) -> Trajectory:
    """x_T ~ N(0, I) and random classes; image b of trajectory `number` is the same whatever came before it.

    `staggered`: the images set out one after the other, evenly over the N steps of a trajectory, so that from then on a batch
    holds all time steps. In step with each other, they show the student one time step at a time.
    """
    images = jnp.arange(batch, dtype=jnp.int32)
    numbers = jnp.full((batch,), number, jnp.int32)
    x, labels = jax.vmap(functools.partial(_fresh, network, key_data))(numbers, images)
    waiting = images * sched.num_steps // batch if staggered else jnp.zeros_like(images)
    return Trajectory(x, labels, sched.num_steps - 1 + waiting, numbers, key_data)


def _fresh(network: Network, key_data: Array, number: Int[Array, ""], image: Int[Array, ""]) -> tuple[Array, Array]:
    """(x_T, class) of one image."""
    key = _key(key_data, number, image)
    x = jax.random.normal(jax.random.fold_in(key, _START), network.sample_shape, jnp.float32)
    return x, jax.random.randint(jax.random.fold_in(key, _LABELS), (), 0, network.num_classes, jnp.int32)


def _key(key_data: Array, number: Int[Array, ""], image: Int[Array, ""]) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key_data), number), image)


def advance(
    network: Network, teacher: Any, sched: diffusion.Schedule, cfg_scale: float, trajectory: Trajectory
) -> tuple[Batch, Trajectory]:
    """One teacher evaluation: the batch at x_t, and the trajectory at the teacher's x_{t-1} (or a new one after x_0)."""
    last = sched.num_steps - 1
    i = jnp.minimum(trajectory.i, last)
    x, t, y = network.rows(trajectory.x, sched.timesteps[i], trajectory.labels)
    output, blocks = network.apply(teacher, x, t, y)

    def follow(now: Trajectory, image: Array, i: Array, guided: Array) -> tuple[Array, ...]:
        """One image's x, class, index and number after this step."""
        key = jax.random.fold_in(jax.random.fold_in(_key(trajectory.key_data, now.number, image), _NOISE), i)
        noise = jax.random.normal(key, now.x.shape, jnp.float32)
        stepped = diffusion.ddpm_step(sched, i, now.x[None], guided[None], noise[None])[0]
        x = jnp.where(now.i > last, now.x, stepped)
        fresh = _fresh(network, trajectory.key_data, now.number + 1, image)
        new, old = (*fresh, jnp.int32(last), now.number + 1), (x, now.labels, now.i - 1, now.number)
        return jax.tree.map(lambda a, b: jnp.where(now.i == 0, a, b), new, old)

    images = jnp.arange(len(trajectory.labels), dtype=jnp.int32)
    axes = Trajectory(0, 0, 0, 0, None)
    guided = network.guide(output, cfg_scale)
    following = jax.vmap(follow, in_axes=(axes, 0, 0, 0))(trajectory, images, i, guided)
    return Batch(i, x, t, y, output, blocks), Trajectory(*following, trajectory.key_data)
