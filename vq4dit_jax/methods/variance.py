"""The learned variance makes room for the error of the mean, so that the sampler's steps are as wide as the teacher's.

The teacher's step is a draw from N(mu, s^2). The student's has the mean mu + e; over pixels and images e is as good as noise, and
what the student draws has the variance s'^2 + v, v = mean e^2. It is the teacher's for

    s'^2 = s^2 - v

(PTQD, He et al. 2023, arXiv 2305.10657, calibration of the variance schedule; there the sampler's table is changed, here the
network's own output, so that the saved model is all there is). The variance is the last Linear's: its columns are found by
least squares over a trajectory of the teacher, the error of s' counting as much as is left of it in the image (`lasting`).
"""

import dataclasses
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import lasting, losses
from vq4dit_jax.methods.recipe import Recipe
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import Network, as_network
from vq4dit_jax.qarray.tree import densify

_LEAST = 0.25
"""Of the teacher's variance is what the student keeps at least."""
_RIDGE = 1e-4
"""Added to the diagonal of the normal equations, in units of its mean: what the columns are now counts where nothing was seen."""


@dataclasses.dataclass
class _Reader:
    """Stands in a kernel's place and keeps what the Linear reads."""

    kernel: jax.Array
    inputs: list[jax.Array] = dataclasses.field(default_factory=list)

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        self.inputs.append(x)
        return jnp.matmul(x, self.kernel.astype(x.dtype))


def room(
    sched: diffusion.Schedule, i: diffusion.Index, interpolation: Float[Array, "B H W C"], variance: Float[Array, ""]
) -> Float[Array, "B H W C"]:
    """The variance output (`diffusion.ddpm_gaussian`) whose step has `variance` less, and a quarter of its own at least.

    Where the schedule leaves no choice of the variance (the last of two steps), the output means nothing and stays.
    """
    span = sched.log_variance_max[i] - sched.log_variance_min[i]
    wide = jnp.exp((interpolation + 1) / 2 * span + sched.log_variance_min[i])
    less = jnp.log(jnp.maximum(1 - variance / wide, _LEAST))
    return interpolation + jnp.where(span > 0, 2 / jnp.where(span > 0, span, 1.0), 0.0) * less


def is_wanted(recipe: Recipe, model: DiT | Network, tuned: Container[str]) -> bool:
    """Whether `fit` belongs to a run: where the steps count L_s and the last Linear of a DiT is among the `tuned` paths."""
    learned = isinstance(model, DiT) and model.learn_sigma
    return learned and recipe.lambda_s > 0 and "final_layer/linear/kernel" in tuned


def fit(
    model: DiT, teacher: Any, student: Any, *, key: jax.Array, images: int, num_steps: int, cfg_scale: float
) -> dict[str, Any]:
    """`student` with other variance columns in its last Linear, in the type that it has; the noise prediction stays.

    Args:
      model: with a learned variance.
      teacher: full precision.
      student: packed or dense; its last Linear is dense.
      key: of the trajectory's noise and classes.
      images, num_steps, cfg_scale: of the trajectory; the room is that of a sampler with so many steps.
    """
    network, sched = as_network(model), diffusion.make_schedule(num_steps)
    channels, side, grid = model.in_channels, model.patch_size, model.grid

    @jax.jit
    def equations(student: Any, batch: trajectory.Batch) -> tuple[Float[Array, "J J"], Float[Array, "J F"]]:
        reader = _Reader(student["final_layer"]["linear"]["kernel"])
        layer = {**student["final_layer"], "linear": {**student["final_layer"]["linear"], "kernel": reader}}
        output, _ = network.apply({**student, "final_layer": layer}, batch.x, batch.t, batch.y)
        x, i = batch.x[:images], batch.i
        gaussian = lambda out: diffusion.ddpm_gaussian(sched, i, x, network.guide(out, cfg_scale))
        (mean, _), (wanted, deviation) = gaussian(output), gaussian(batch.output)
        # The sampler reads the variance of the half with labels.
        target = room(sched, i, batch.output[:images, ..., channels:], jnp.square(mean - wanted).mean())
        residual = target - output[:images, ..., channels:]
        residual = residual.reshape(images, grid, side, grid, side, channels).transpose(0, 1, 3, 2, 4, 5)
        inputs = reader.inputs[0][:images].reshape(images * grid**2, -1)
        inputs = jnp.concatenate([inputs, jnp.ones((len(inputs), 1), inputs.dtype)], 1)

        clean = diffusion.predict_x0(sched, i, x, losses.guided_eps(network, batch.output, cfg_scale))
        left = lasting.lasting(sched, i, lasting.octaves(clean))
        # ds' = s' / 4 (log_variance_max - log_variance_min) d interpolation
        moved = jnp.square(deviation).mean() * jnp.square((sched.log_variance_max[i] - sched.log_variance_min[i]) / 4)
        weighted = inputs * (moved * (left.squared * left.fraction).sum())
        return weighted.T @ inputs, weighted.T @ residual.reshape(len(inputs), -1)

    batches = trajectory.batches(network, teacher, num_steps, key=key, images=images, cfg_scale=cfg_scale)
    whole = densify(student)
    found = [equations(whole, dataclasses.replace(batch, blocks=None)) for batch in batches]
    matrix, right = (sum(parts) for parts in zip(*found, strict=True))
    scale = jnp.trace(matrix) / len(matrix)
    change = jnp.linalg.solve(matrix / scale + _RIDGE * jnp.eye(len(matrix)), right / scale)

    linear = student["final_layer"]["linear"]
    kernel, bias = (
        _add(linear[name], part, channels) for name, part in (("kernel", change[:-1]), ("bias", change[-1]))
    )
    return {**student, "final_layer": {**student["final_layer"], "linear": {**linear, "kernel": kernel, "bias": bias}}}


def _add(weight: Float[Array, "*I O"], change: Float[Array, "*I F"], channels: int) -> Float[Array, "*I O"]:
    """`change` added to the variance columns: a patch's pixels have `channels` for the noise, then as many for the variance."""
    pixels = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, 2, channels)
    pixels = pixels.at[..., 1, :].add(change.reshape(*change.shape[:-1], -1, channels))
    return pixels.reshape(weight.shape).astype(weight.dtype)
