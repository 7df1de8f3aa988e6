"""Gaussian diffusion on a respaced linear schedule: the schedule and single reverse steps.

As DiT's reference: 1000 steps, betas linear from 1e-4 to 0.02, noise prediction, learned-range variance
(Nichol & Dhariwal 2021, arXiv 2102.09672, eq 15). A step takes i, the index into the respaced `timesteps`; the model
is evaluated at `timesteps[i]`. Nothing here runs a network.

A schedule with predicts="v" takes v = sqrt(a) eps - sqrt(1 - a) x_0 in place of eps (Salimans & Ho 2022, arXiv 2202.00512).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vq4dit_jax.errors import InputError

TRAIN_STEPS = 1000
Index = int | Int[Array, ""]
"""Of a step in `Schedule.timesteps`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A respaced schedule. All arrays are (N,), computed in float64, stored in float32.

    `timesteps` ascending, the originals out of 0..999; a_i is the cumulative product of alphas at `timesteps[i]`, and
    its predecessor a_{i-1} is 1 for i = 0; beta_i = 1 - a_i / a_{i-1}.
    """

    timesteps: Int[Array, " N"]
    sqrt_alpha_bar: Float[Array, " N"]
    sqrt_one_minus_alpha_bar: Float[Array, " N"]
    alpha_bar: Float[Array, " N"]
    alpha_bar_prev: Float[Array, " N"]
    # x_{t-1} = posterior_x0 * x0 + posterior_xt * x_t + sigma * noise (Ho et al. 2020, eq 7)
    posterior_x0: Float[Array, " N"]
    posterior_xt: Float[Array, " N"]
    # The learned variance lies between these two, in log space.
    log_variance_min: Float[Array, " N"]
    log_variance_max: Float[Array, " N"]
    # lambda_t = log(sqrt(a) / sqrt(1 - a)), for DPM-Solver++
    half_log_snr: Float[Array, " N"]
    predicts: str = dataclasses.field(default="eps", metadata={"static": True})

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def signal_after(self) -> Float[Array, " N"]:
        """The squared factor of the clean image in x after each step."""
        return self.alpha_bar_prev

    @property
    def noise_after(self) -> Float[Array, " N"]:
        """The variance of the noise in x after each step."""
        return 1 - self.alpha_bar_prev

    def moved(self, i: Index) -> Float[Array, ""]:
        """How far the next mean moves for an error of 1 in the prediction at step i."""
        if self.predicts == "v":
            return self.posterior_x0[i] * self.sqrt_one_minus_alpha_bar[i]
        return self.posterior_x0[i] * self.sqrt_one_minus_alpha_bar[i] / self.sqrt_alpha_bar[i]

    def clean(self, i: Index, x: Float[Array, "B *S C"], prediction: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        """The estimate of the clean image from a prediction without variance channels."""
        return predict_x0(self, i, x, _eps(self, i, x, prediction))

    def gaussian(self, i: Index, x: Float[Array, "B *S C"], output: Float[Array, "B *S _"]) -> tuple[Array, Array]:
        """`ddpm_gaussian`."""
        return ddpm_gaussian(self, i, x, output)


def respaced_timesteps(num_steps: int) -> np.ndarray:
    """`num_steps` of 0..999, evenly spread, both ends included; rounded half to even, as the reference does."""
    if not 1 <= num_steps <= TRAIN_STEPS:
        raise InputError(f"num_steps={num_steps}: wanted 1 to {TRAIN_STEPS}")
    stride = (TRAIN_STEPS - 1) / (num_steps - 1) if num_steps > 1 else 1.0
    # The reference adds the stride up; a product can round the other way at a half.
    position, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(position))
        position += stride
    return np.asarray(steps, np.int32)


def make_schedule(
    num_steps: int = 250, beta_start: float = 1e-4, beta_end: float = 0.02, predicts: str = "eps"
) -> Schedule:
    """Linear schedule respaced to `num_steps` (1 to 1000), of a network that predicts "eps" or "v"."""
    timesteps = respaced_timesteps(num_steps)
    alpha_bar = np.cumprod(1 - np.linspace(beta_start, beta_end, TRAIN_STEPS, dtype=np.float64))[timesteps]
    previous = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / previous
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # The last step's posterior variance is 0; its logarithm is clipped to its neighbour's.
    clipped = np.append(variance[1], variance[1:]) if num_steps > 1 else beta
    # Not `jnp.asarray`, which compiles a program for every length.
    as_f32 = lambda a: jax.device_put(np.asarray(a, np.float32))
    return Schedule(
        timesteps=jax.device_put(timesteps),
        sqrt_alpha_bar=as_f32(np.sqrt(alpha_bar)),
        sqrt_one_minus_alpha_bar=as_f32(np.sqrt(1 - alpha_bar)),
        alpha_bar=as_f32(alpha_bar),
        alpha_bar_prev=as_f32(previous),
        posterior_x0=as_f32(beta * np.sqrt(previous) / (1 - alpha_bar)),
        posterior_xt=as_f32((1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar)),
        log_variance_min=as_f32(np.log(clipped)),
        log_variance_max=as_f32(np.log(beta)),
        half_log_snr=as_f32(0.5 * np.log(alpha_bar / (1 - alpha_bar))),
        predicts=predicts,
    )


def _eps(sched: Schedule, i: Index, x: jax.Array, prediction: jax.Array) -> jax.Array:
    """The noise prediction of what the network predicts."""
    if sched.predicts == "eps":
        return prediction
    return sched.sqrt_alpha_bar[i] * prediction + sched.sqrt_one_minus_alpha_bar[i] * x


def _split(sched: Schedule, i: Index, x: jax.Array, model_output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(eps, variance interpolation or None) in float32."""
    channels = x.shape[-1]
    output = model_output.astype(jnp.float32)
    if output.shape[-1] == channels:
        return _eps(sched, i, x, output), None
    return _eps(sched, i, x, output[..., :channels]), output[..., channels:]


def predict_x0(sched: Schedule, i: Index, x: Float[Array, "B *S C"], eps: Float[Array, "B *S C"]) -> jax.Array:
    return (x - sched.sqrt_one_minus_alpha_bar[i] * eps) / sched.sqrt_alpha_bar[i]


def ddpm_gaussian(
    sched: Schedule, i: Index, x: Float[Array, "B *S C"], model_output: Float[Array, "B *S _"]
) -> tuple[Float[Array, "B *S C"], jax.Array]:
    """(mean, standard deviation) of x_{t-1}, what an ancestral step draws from; the deviation at i = 0, the last step, is 0.

    `model_output` has 2C channels (learned-range variance) or C (the larger fixed variance, a scalar).
    """
    eps, interpolation = _split(sched, i, x, model_output)
    if interpolation is None:
        log_variance = sched.log_variance_max[i]
    else:
        fraction = (interpolation + 1) / 2
        log_variance = fraction * sched.log_variance_max[i] + (1 - fraction) * sched.log_variance_min[i]
    mean = sched.posterior_x0[i] * predict_x0(sched, i, x, eps) + sched.posterior_xt[i] * x
    return mean, jnp.where(jnp.asarray(i) > 0, 1.0, 0.0) * jnp.exp(0.5 * log_variance)


def ddpm_step(
    sched: Schedule,
    i: Index,
    x: Float[Array, "B *S C"],
    model_output: Float[Array, "B *S _"],
    noise: Float[Array, "B *S C"],
) -> Float[Array, "B *S C"]:
    """One ancestral step, a draw from `ddpm_gaussian`. `noise` is not used at i = 0, the last step."""
    mean, deviation = ddpm_gaussian(sched, i, x, model_output)
    return mean + deviation * noise


def ddim_step(
    sched: Schedule,
    i: Index,
    x: Float[Array, "B *S C"],
    model_output: Float[Array, "B *S _"],
    noise: Float[Array, "B *S C"] | None = None,
    eta: float = 0.0,
) -> Float[Array, "B *S C"]:
    """One DDIM step (Song et al. 2021, eq 12 and 16); `noise` is wanted where eta > 0 and not used at i = 0."""
    eps, _ = _split(sched, i, x, model_output)
    x0 = predict_x0(sched, i, x, eps)
    a, prev = sched.alpha_bar[i], sched.alpha_bar_prev[i]
    sigma = eta * jnp.sqrt((1 - prev) / (1 - a)) * jnp.sqrt(1 - a / prev)
    mean = jnp.sqrt(prev) * x0 + jnp.sqrt(jnp.maximum(1 - prev - sigma**2, 0.0)) * eps
    if noise is None:
        if not isinstance(eta, jax.core.Tracer) and eta > 0:
            raise ValueError(f"ddim_step with eta={eta} needs noise")
        return mean
    return mean + jnp.where(jnp.asarray(i) > 0, 1.0, 0.0) * sigma * noise


def dpmpp_2m_step(
    sched: Schedule,
    i: Index,
    x: Float[Array, "B *S C"],
    model_output: Float[Array, "B *S _"],
    previous_x0: Float[Array, "B *S C"],
) -> tuple[Float[Array, "B *S C"], Float[Array, "B *S C"]]:
    """One DPM-Solver++(2M) step (Lu et al. 2022, arXiv 2211.01095, algorithm 2); returns (x, x0), x0 for the next call.

    First order at the first step (i = N-1, where `previous_x0` is not read) and at the last, where the
    log-SNR difference is infinite and the step returns x0.
    """
    eps, _ = _split(sched, i, x, model_output)
    x0 = predict_x0(sched, i, x, eps)
    i = jnp.asarray(i)
    last = sched.num_steps - 1
    lam, earlier = sched.half_log_snr[i], sched.half_log_snr[jnp.minimum(i + 1, last)]
    later = sched.half_log_snr[jnp.maximum(i - 1, 0)]
    h = later - lam
    ratio = (lam - earlier) / jnp.where(i > 0, h, 1.0)
    second_order = jnp.logical_and(i < last, i > 0)
    correction = jnp.where(second_order, 0.5 / jnp.where(second_order, ratio, 1.0), 0.0)
    target = x0 + correction * (x0 - previous_x0)
    prev = sched.alpha_bar_prev[i]
    shrink = jnp.sqrt(1 - prev) / sched.sqrt_one_minus_alpha_bar[i]
    step = shrink * x - jnp.sqrt(prev) * jnp.expm1(-h) * target
    return jnp.where(i > 0, step, x0), x0
