"""How much of an error in one step of the sampler is left in the image.

An error in x_{t-1} = sqrt(a) x_0 + sqrt(1 - a) noise is an error of 1/sqrt(a) in units of the image, if it stays. The steps that
follow take it for noise as far as images have no such detail: of a coefficient with variance v the least-squares estimate of
x_0 keeps a v / (a v + 1 - a) (Wiener). Fine detail has small v: errors in it last from the last few steps alone. Broad shapes
are settled much earlier.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import schedule as diffusion

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


def octaves(x: Float[Array, "B H W C"]) -> list[Float[Array, "B H W C"]]:
    """Orthogonal parts that sum to x, the finest first: means of 2^k x 2^k pixels minus those of 2^(k+1) x 2^(k+1); last are the
    means that remain where three parts are taken, or height or width can no more be halved."""
    parts, side = [], 1
    while len(parts) < _OCTAVES and x.shape[1] % (2 * side) == 0 and x.shape[2] % (2 * side) == 0:
        side *= 2
        coarse = _means(x, side)
        parts.append(x - coarse)
        x = coarse
    return [*parts, x]


def lasting(sched: diffusion.Schedule, i: diffusion.Index, clean: list[Float[Array, "B H W C"]]) -> Lasting:
    """Of errors in the step at i, for images whose octaves are `clean`."""
    finer = len(clean) - 1
    fraction = jnp.asarray([0.75 * 0.25**k for k in range(finer)] + [0.25**finer], jnp.float32)
    variance = jnp.stack([jnp.square(part).mean() for part in clean]) / fraction + 1e-12
    a = sched.alpha_bar_prev[:, None]
    kept = a * variance[None] / (a * variance[None] + (1 - a))
    return Lasting(jnp.square(kept[i]) / a[i], kept.sum(0), fraction)


def noise_prediction_weight(
    sched: diffusion.Schedule, i: diffusion.Index, clean: list[Float[Array, "B H W C"]]
) -> Float[Array, ""]:
    """What is left of the square of an error in the noise prediction at i, all octaves but the coarsest counting alike."""
    moved = sched.posterior_x0[i] * sched.sqrt_one_minus_alpha_bar[i] / sched.sqrt_alpha_bar[i]
    squared = lasting(sched, i, clean).squared
    return jnp.square(moved) * squared[: max(len(clean) - 1, 1)].sum()


def _means(x: Float[Array, "B H W C"], side: int) -> Float[Array, "B H W C"]:
    batch, height, width, channels = x.shape
    tiles = x.reshape(batch, height // side, side, width // side, side, channels)
    return jnp.broadcast_to(tiles.mean((2, 4), keepdims=True), tiles.shape).reshape(x.shape)
