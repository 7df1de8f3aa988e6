"""How much of an error in one step of the sampler is left in the image.

After a step x = sqrt(a) x_0 + sqrt(b) noise (b = 1 - a of a Gaussian process; of a flow a = (1 - s)^2, b = s^2). An error in x
is an error of 1/sqrt(a) in units of the image, if it stays. The steps that follow treat it as noise where images have no such
detail: of a coefficient with variance v the least-squares estimate of x_0 keeps a v / (a v + b) (Wiener). Fine detail has
small v, so errors in it last from the last few steps alone; broad shapes are settled much earlier.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion.flow import FlowSchedule
from vq4dit_jax.diffusion.schedule import Index, Schedule

_OCTAVES = 3


@dataclasses.dataclass(frozen=True)
class Lasting:
    """Of each part of `octaves`, the finest first.

    Attributes:
      squared: what is left in the image of the square of an error in x_{t-1}.
      steps: as many steps the same error, made in all of them, adds up over.
      fraction: of all coefficients that are in the part; they sum to 1.
    """

    squared: Float[Array, " P"]
    steps: Float[Array, " P"]
    fraction: Float[Array, " P"]


def octaves(x: Float[Array, "B *S C"]) -> list[Float[Array, "B *S C"]]:
    """Orthogonal parts that sum to x, the finest first: means of 2^k x 2^k pixels minus those of 2^(k+1) x 2^(k+1); last are the
    means that remain where three parts are taken, or height or width can no more be halved."""
    parts, side = [], 1
    while len(parts) < _OCTAVES and x.shape[-3] % (2 * side) == 0 and x.shape[-2] % (2 * side) == 0:
        side *= 2
        coarse = _means(x, side)
        parts.append(x - coarse)
        x = coarse
    return [*parts, x]


def lasting(sched: Schedule | FlowSchedule, i: Index, clean: list[Float[Array, "B *S C"]]) -> Lasting:
    """Of errors in the step at i, for images whose octaves are `clean`."""
    finer = len(clean) - 1
    fraction = jnp.asarray([0.75 * 0.25**k for k in range(finer)] + [0.25**finer], jnp.float32)
    variance = jnp.stack([jnp.square(part).mean() for part in clean]) / fraction + 1e-12
    a, b = sched.signal_after[:, None], sched.noise_after[:, None]
    kept = a * variance[None] / (a * variance[None] + b)
    return Lasting(jnp.square(kept[i]) / a[i], kept.sum(0), fraction)


def prediction_weight(
    sched: Schedule | FlowSchedule, i: Index, clean: list[Float[Array, "B *S C"]]
) -> Float[Array, ""]:
    """What is left of the square of an error in the prediction at step i, all octaves but the coarsest counting alike."""
    squared = lasting(sched, i, clean).squared
    return jnp.square(sched.moved(i)) * squared[: max(len(clean) - 1, 1)].sum()


def _means(x: Float[Array, "*B H W C"], side: int) -> Float[Array, "*B H W C"]:
    *batch, height, width, channels = x.shape
    tiles = x.reshape(*batch, height // side, side, width // side, side, channels)
    return jnp.broadcast_to(tiles.mean((-4, -2), keepdims=True), tiles.shape).reshape(x.shape)
