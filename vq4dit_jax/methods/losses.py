"""The losses of calibration (VQ4DiT, eq 8 to 10) and the measures that it is judged by.

All take an `Evaluation` of the teacher on its own trajectory and what a student gives for the same rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion.flow import FlowSchedule
from vq4dit_jax.diffusion.schedule import Schedule
from vq4dit_jax.diffusion.trajectory import Evaluation
from vq4dit_jax.methods import lasting
from vq4dit_jax.networks.network import Network


def block_distance(student: Any, teacher: Any) -> Float[Array, ""]:
    """L_d (eq 8): mean over blocks of the mean squared difference of the block outputs.

    Both are trees of the same arrays, each one block's output or a stack of equal blocks'; the arrays count alike.
    """
    distances = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.square(a - b).mean(dtype=jnp.float32), student, teacher))
    return sum(distances) / len(distances)


def paper_regularizer(leaves: list[Any]) -> Float[Array, ""]:
    """L_r (eq 9) of soft leaves: sum_n (1 - |2r - 1|) averaged over all sub-vectors; n at r = 1/2, 0 at 0 or 1."""
    total = sum((1 - jnp.abs(2 * leaf.ratios() - 1)).sum() for leaf in leaves)
    return total / sum(leaf.num_subvectors for leaf in leaves)


def released_regularizer(leaves: list[Any]) -> Float[Array, ""]:
    """n * mean of r (1 - r) over the sub-vectors not yet frozen, averaged over layers (the released code)."""

    def one(leaf: Any) -> Float[Array, "*stack"]:
        ratios = leaf.ratios()
        impurity = (ratios * (1 - ratios)).sum((-3, -2, -1))  # 0 where frozen
        live = jnp.maximum((~leaf.frozen).sum((-2, -1), dtype=jnp.float32), 1.0)
        return impurity / live

    return jnp.concatenate([jnp.atleast_1d(one(leaf)) for leaf in leaves]).mean()


def step_distance(
    network: Network,
    sched: Schedule | FlowSchedule,
    evaluation: Evaluation,
    output: Float[Array, "R *S F"],
    cfg_scale: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(L_s, L_c): the part of the student's error in the sampler's next step that is left in the image (`lasting`), per pixel.

    The step is a draw from a Gaussian, the teacher's N(mu, sigma^2), the student's N(mu', sigma'^2). L_s is their squared
    2-Wasserstein distance, (mu - mu')^2 + (sigma - sigma')^2 for independent pixels, each octave weighted by what lasts of it.

    Errors of single pixels are nearly independent from step to step, so their squares add up. An error that all images share
    does not average out: it grows with the square of the number of steps that it lasts for. L_c is the energy of e = mu - mu'
    along such directions of a whole batch, times that number: the mean of each channel (a colour cast); and every octave of
    the teacher's prediction, of what the condition changes in it, and of the teacher's clean image. Weights that were rounded
    for the smallest error lose contrast in what they cannot represent well: fine detail, and the difference between classes.
    """
    i, x = evaluation.i, evaluation.x[: network.images(len(evaluation.x), cfg_scale)]
    gaussian = lambda out: sched.gaussian(i, x, network.combine(out, cfg_scale))
    (mean, deviation), (wanted_mean, wanted_deviation) = gaussian(output), gaussian(evaluation.output)
    error = mean - wanted_mean
    prediction = network.prediction(evaluation.output, cfg_scale)
    clean = lasting.octaves(sched.clean(i, x, prediction))
    left = lasting.lasting(sched, i, clean)
    errors = lasting.octaves(error)
    directions = [lasting.octaves(prediction)]
    if cfg_scale != 1.0:
        directions.append(lasting.octaves(condition_part(network, evaluation)))
    directions.append(clean)
    alone = jnp.stack([jnp.square(e).mean() for e in errors])
    shared = jnp.stack(
        [sum(_along(e, d) for d in part) for e, part in zip(errors, zip(*directions, strict=True), strict=True)]
    )
    spread = jnp.square(deviation - wanted_deviation).mean() * left.fraction
    channels = tuple(range(error.ndim - 1))
    cast = jnp.square(error.mean(channels)).mean() * left.squared[-1] * left.steps[-1]
    return (left.squared * (alone + spread)).sum(), cast + (left.squared * left.steps * shared).sum()


def condition_part(network: Network, evaluation: Evaluation) -> Float[Array, "B *S C"]:
    """What the condition changes in the teacher's prediction."""
    label, null = jnp.split(evaluation.output[..., : network.sample_shape[-1]], 2)
    return label - null


def _along(error: Float[Array, "B *S C"], direction: Float[Array, "B *S C"]) -> Float[Array, ""]:
    """The energy of `error` along one direction of the whole batch, per pixel."""
    energy = jnp.square(direction).mean()
    return jnp.square((error * direction).mean()) / jnp.where(energy > 0, energy, 1.0)


def agreement(
    network: Network, params: Any, evaluation: Evaluation, cfg_scale: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(L_d, relative L2 error of the guided prediction, mean over images) of `params` on a teacher's evaluation.

    L_d is NaN for a network that returns no block outputs.
    """
    output, blocks = network.run(params, evaluation.x, evaluation.t, evaluation.cond, blocks=True)

    def flat(out: jax.Array) -> jax.Array:
        prediction = network.prediction(out, cfg_scale)
        return prediction.reshape(len(prediction), -1)

    wanted = flat(evaluation.output)
    error = jnp.linalg.norm(flat(output) - wanted, axis=1) / jnp.linalg.norm(wanted, axis=1)
    distance = jnp.float32(jnp.nan) if blocks is None else block_distance(blocks, evaluation.blocks)
    return distance, error.mean()
