"""The learned variance makes up for the error of the mean, so that the sampler's steps are as wide as the teacher's.

The teacher's step is a draw from N(mu, s^2). The student's has the mean mu + e; over pixels and images e behaves as noise, and
what the student draws has the variance s'^2 + v, v = mean e^2. It is the teacher's for

    s'^2 = s^2 - v

(PTQD, He et al. 2023, arXiv 2305.10657, calibration of the variance schedule; there the sampler's table is changed, here the
network's own output, so that the saved model is complete). The variance is computed by the last Linear: its columns are
found by least squares over a trajectory of the teacher, each step weighted by how much an error of s' leaves in the image
(`lasting`).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.diffusion.schedule import Index, Schedule
from vq4dit_jax.methods import lasting
from vq4dit_jax.methods.passes import Context, Report
from vq4dit_jax.networks.network import Network, random_problem
from vq4dit_jax.qarray.base import Kernel
from vq4dit_jax.qarray.tree import flatten, replace

_LEAST = 0.25
"""Smallest fraction of the teacher's variance that the student may keep."""
_RIDGE = 1e-4
"""Added to the diagonal of the normal equations, in units of its mean: columns stay as they are where nothing was seen."""


@dataclasses.dataclass(frozen=True)
class FitVariance:
    """Solves for the variance columns of the last Linear; the prediction stays.

    Attributes:
      images, num_steps, cfg_scale: of the trajectory. The variance is fitted for a sampler with so many steps.
    """

    images: int = 16
    num_steps: int = 50
    cfg_scale: float = 1.5
    name: ClassVar[str] = "variance"

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        network = run.network
        layer = network.output_layer
        if layer is None:
            return params, {"skipped": "the network names no last Linear with a learned variance"}
        problem = random_problem(network, run.teacher, key, images=self.images, cfg_scale=self.cfg_scale)
        _, equations = trajectory.observed(
            network,
            run.teacher,
            problem,
            num_steps=self.num_steps,
            scale=self.cfg_scale,
            observe=_Equations(network, self.num_steps, self.cfg_scale),
            given=params,
            reduce="sum",
        )
        leaves = flatten(params)
        names = [f"{layer.path}/{name}" for name in ("kernel", "bias")]
        changed = _changed(network.sample_shape[-1], *equations, *(leaves[name] for name in names))
        return replace(params, dict(zip(names, changed, strict=True))), {}


class _Reader(Kernel):
    """Stands in a kernel's place and keeps what the Linear reads."""

    def __init__(self, kernel: jax.Array):
        self.kernel = kernel
        self.inputs: list[jax.Array] = []

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        self.inputs.append(x)
        return jnp.matmul(x, self.kernel.astype(x.dtype))


def widened_variance(
    sched: Schedule, i: Index, interpolation: Float[Array, "B *S C"], variance: Float[Array, ""]
) -> Float[Array, "B *S C"]:
    """The variance output (`schedule.ddpm_gaussian`) of a step that has `variance` less, and at least a quarter of its own, so
    that with an error of that variance in the mean the draws are as wide as before.

    Where the schedule leaves no choice of the variance (the last of two steps), the output means nothing and stays.
    """
    span = sched.log_variance_max[i] - sched.log_variance_min[i]
    wide = jnp.exp((interpolation + 1) / 2 * span + sched.log_variance_min[i])
    less = jnp.log(jnp.maximum(1 - variance / wide, _LEAST))
    return interpolation + jnp.where(span > 0, 2 / jnp.where(span > 0, span, 1.0), 0.0) * less


@dataclasses.dataclass(frozen=True)
class _Equations:
    """The normal equations (X^T X, X^T Y) of one evaluation: X what the last Linear reads and a 1, Y what the variance lacks."""

    network: Network
    num_steps: int
    cfg_scale: float

    def __call__(self, evaluation: trajectory.Evaluation, student: Any) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):
            return self._equations(evaluation, student)

    def _equations(self, evaluation: trajectory.Evaluation, student: Any) -> tuple[Array, Array]:
        network, scale, layer = self.network, self.cfg_scale, self.network.output_layer
        sched = network.process.schedule(self.num_steps)
        channels, i = network.sample_shape[-1], evaluation.i
        images = network.images(len(evaluation.x), scale)
        x = evaluation.x[:images]
        kernel = f"{layer.path}/kernel"
        reader = _Reader(flatten(student)[kernel])
        reading = replace(student, {kernel: reader})
        output, _ = network.run(reading, evaluation.x, evaluation.t, evaluation.cond)
        gaussian = lambda out: sched.gaussian(i, x, network.combine(out, scale))
        (mean, _), (wanted, deviation) = gaussian(output), gaussian(evaluation.output)
        # The sampler reads the variance of the conditional half.
        own = evaluation.output[:images, ..., channels:]
        target = widened_variance(sched, i, own, jnp.square(mean - wanted).mean())
        residual = layer.tokens(target - output[:images, ..., channels:])
        inputs = reader.inputs[0][:images].reshape(len(residual), -1)
        inputs = jnp.concatenate([inputs, jnp.ones((len(inputs), 1), inputs.dtype)], 1)

        clean = sched.clean(i, x, network.prediction(evaluation.output, scale))
        left = lasting.lasting(sched, i, lasting.octaves(clean))
        # ds' = s' / 4 (log_variance_max - log_variance_min) d interpolation
        span = sched.log_variance_max[i] - sched.log_variance_min[i]
        moved = jnp.square(deviation).mean() * jnp.square(span / 4)
        weighted = inputs * (moved * (left.squared * left.fraction).sum())
        return weighted.T @ inputs, weighted.T @ residual


@functools.partial(jax.jit, static_argnames="channels")
def _changed(
    channels: int, matrix: Float[Array, "J J"], right: Float[Array, "J F"], kernel: Array, bias: Array
) -> tuple[Array, Array]:
    """The kernel (I, O) and the bias (O,) with the solution added to their variance columns."""
    with jax.default_matmul_precision("highest"):
        scale = jnp.trace(matrix) / len(matrix)
        change = jnp.linalg.solve(matrix / scale + _RIDGE * jnp.eye(len(matrix)), right / scale)
    return _added(kernel, change[:-1], channels), _added(bias, change[-1], channels)


def _added(weight: Float[Array, "*I O"], change: Float[Array, "*I F"], channels: int) -> Float[Array, "*I O"]:
    """`change` added to the variance columns: a patch's pixels have `channels` for the noise, then as many for the variance."""
    pixels = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, 2, channels)
    pixels = pixels.at[..., 1, :].add(change.reshape(*change.shape[:-1], -1, channels))
    return pixels.reshape(weight.shape).astype(weight.dtype)
