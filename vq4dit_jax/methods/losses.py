"""The loss of calibration (VQ4DiT, eq 8 to 10) and the measures that it is judged by."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion.trajectory import Batch
from vq4dit_jax.methods import lasting
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray.soft import SoftVQArray


def block_distance(student: Any, teacher: Any) -> Float[Array, ""]:
    """L_d (eq 8): mean over blocks of the mean squared difference of the block outputs.

    Both are trees of the same arrays, each one block's output or a stack of equal blocks'; the arrays count alike.
    """
    distances = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.square(a - b).mean(dtype=jnp.float32), student, teacher))
    return sum(distances) / len(distances)


def paper_regularizer(leaves: list[SoftVQArray]) -> Float[Array, ""]:
    """L_r (eq 9): sum_n (1 - |2r - 1|) averaged over all sub-vectors; n at r = 1/2, 0 where all ratios are 0 or 1."""
    total = sum((1 - jnp.abs(2 * leaf.ratios() - 1)).sum() for leaf in leaves)
    return total / sum(leaf.num_subvectors for leaf in leaves)


def released_regularizer(leaves: list[SoftVQArray]) -> Float[Array, ""]:
    """n * mean of r (1 - r) over the sub-vectors not yet frozen, averaged over layers (the released code)."""

    def one(leaf: SoftVQArray) -> Float[Array, "*stack"]:
        if leaf.num_candidates == 1:
            return jnp.zeros(leaf.stack)
        ratios = leaf.ratios()
        spread = (ratios * (1 - ratios)).sum((-3, -2, -1))  # 0 where frozen
        live = jnp.maximum((~leaf.frozen).sum((-2, -1), dtype=jnp.float32), 1.0)
        return spread / live

    return jnp.concatenate([jnp.atleast_1d(one(leaf)) for leaf in leaves]).mean()


def guided_eps(network: Network, output: Float[Array, "R H W _"], cfg_scale: float) -> Float[Array, "B H W C"]:
    """The guided noise prediction of 2B rows."""
    return network.guide(output, cfg_scale)[..., : network.sample_shape[-1]]


def step_distance(
    network: Network, sched: diffusion.Schedule, batch: Batch, output: Float[Array, "R H W _"], cfg_scale: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(L_s, L_c): what of the student's error in the sampler's next step is left in the image (`lasting`), per pixel.

    The step is a draw from a Gaussian, the teacher's N(mu, sigma^2), the student's N(mu', sigma'^2). L_s is their squared
    2-Wasserstein distance, (mu - mu')^2 + (sigma - sigma')^2 for independent pixels, each octave with what lasts of it.

    Errors of single pixels are as good as independent from step to step, and their squares add up. What all images have in
    common does not average out, and grows with the square of the number of steps that it lasts for. L_c is the energy of
    e = mu - mu' along such directions of a whole batch, times that number: the mean of each channel, a colour cast; and every
    octave of the teacher's noise prediction, of what the label changes in it, and of the teacher's clean image. Weights that
    were rounded for the smallest error make faint what they cannot represent well: fine detail, and the class.
    """
    half = batch.x[: len(batch.x) // 2]
    gaussian = lambda out: diffusion.ddpm_gaussian(sched, batch.i, half, network.guide(out, cfg_scale))
    (mean, deviation), (wanted_mean, wanted_deviation) = gaussian(output), gaussian(batch.output)
    error = mean - wanted_mean
    eps = guided_eps(network, batch.output, cfg_scale)
    clean = lasting.octaves(diffusion.predict_x0(sched, batch.i, half, eps))
    left = lasting.lasting(sched, batch.i, clean)
    errors = lasting.octaves(error)
    directions = zip(lasting.octaves(eps), lasting.octaves(label_part(network, batch)), clean, strict=True)
    alone = jnp.stack([jnp.square(e).mean() for e in errors])
    shared = jnp.stack([sum(_along(e, d) for d in part) for e, part in zip(errors, directions, strict=True)])
    spread = jnp.square(deviation - wanted_deviation).mean() * left.fraction
    cast = jnp.square(error.mean((0, 1, 2))).mean() * left.squared[-1] * left.steps[-1]
    return (left.squared * (alone + spread)).sum(), cast + (left.squared * left.steps * shared).sum()


def label_part(network: Network, batch: Batch) -> Float[Array, "B H W C"]:
    """What the label changes in the teacher's noise prediction."""
    label, null = jnp.split(batch.output[..., : network.sample_shape[-1]], 2)
    return label - null


def _along(error: Float[Array, "B H W C"], direction: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """The energy of `error` along one direction of the whole batch, per pixel."""
    energy = jnp.square(direction).mean()
    return jnp.square((error * direction).mean()) / jnp.where(energy > 0, energy, 1.0)


def agreement(
    network: Network, params: Any, batch: Batch, cfg_scale: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(L_d, relative L2 error of the guided noise prediction, mean over images) of `params` on a teacher's batch."""
    output, blocks = network.apply(params, batch.x, batch.t, batch.y)

    def eps(out: jax.Array) -> jax.Array:
        guided = guided_eps(network, out, cfg_scale)
        return guided.reshape(len(guided), -1)

    wanted = eps(batch.output)
    error = jnp.linalg.norm(eps(output) - wanted, axis=1) / jnp.linalg.norm(wanted, axis=1)
    return block_distance(blocks, batch.blocks), error.mean()
