"""The training loss of a DiT with learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672), as facebookresearch/DiT.

    q(x_t | x_0) = N(sqrt(a_t) x_0, 1 - a_t)                                      a_t the cumulative product of alphas
    L = E |eps - eps_hat(x_t, t)|^2 + L_vlb, in the mean over the numbers of an image
    L_vlb = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) / ln 2,  at t = 0  -log2 p(x_0 | x_1)

The mean of p is a constant in L_vlb, so that term trains the variance alone. The paper's hybrid loss adds 0.001 times the
sum of L_vlb over the T = 1000 steps: for one uniformly drawn t that is T / 1000 = 1 times its term.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vq4dit_jax.diffusion.schedule import Schedule

_LN2 = 0.6931471805599453
_HALF_LEVEL = 1 / 255
"""Half the distance between neighbours of the 256 levels in [-1, 1]."""
_SMALLEST_PROBABILITY = 1e-12

Images = Float[Array, "B H W C"]
Timesteps = Int[Array, " B"]


def _at(per_step: Float[Array, " N"], t: Timesteps) -> Float[Array, "B 1 1 1"]:
    return per_step[t][:, None, None, None]


def diffuse(sched: Schedule, x0: Images, noise: Images, t: Timesteps) -> Images:
    """x_t of x_0 and standard normal noise."""
    return _at(sched.sqrt_alpha_bar, t) * x0 + _at(sched.sqrt_one_minus_alpha_bar, t) * noise


def losses(
    sched: Schedule, output: Float[Array, "B H W 2C"], x0: Images, noise: Images, t: Timesteps
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(squared error of the noise, L_vlb in bits) of each image, means over its numbers; float32.

    Args:
      sched: all 1000 steps, `make_schedule(1000)`, so that t indexes it.
      output: of the network at (diffuse(sched, x0, noise, t), t): noise prediction, then variance interpolation.
      x0: images in [-1, 1].
      noise: what x_t was made with.
    """
    eps, interpolation = jnp.split(output.astype(jnp.float32), 2, axis=-1)
    squared_error = jnp.square(eps - noise)

    fraction = (interpolation + 1) / 2
    lowest, highest = _at(sched.log_variance_min, t), _at(sched.log_variance_max, t)
    log_variance = fraction * highest + (1 - fraction) * lowest
    # Both means are linear in x_t and in the noise, so x_t drops out of their difference.
    noise_to_x0 = _at(sched.sqrt_one_minus_alpha_bar, t) / _at(sched.sqrt_alpha_bar, t)
    gap = _at(sched.posterior_x0, t) * noise_to_x0 * (noise - jax.lax.stop_gradient(eps))
    first = (t == 0)[:, None, None, None]
    # At t = 0 the posterior is x_0 itself, and so the gap is the distance of p's mean from x_0.
    bound = jnp.where(first, _decoder_nll(x0, gap, log_variance), _kl(gap, lowest, log_variance))
    mean = lambda a: a.mean((1, 2, 3))
    return mean(squared_error), mean(bound) / _LN2


def _kl(gap: Images, log_variance_q: Array, log_variance_p: Images) -> Images:
    """KL(N(0, q) || N(gap, p)), nats."""
    log_ratio = log_variance_q - log_variance_p
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + jnp.square(gap) * jnp.exp(-log_variance_p))


def _decoder_nll(x0: Images, gap: Images, log_variance: Images) -> Images:
    """-log of the mass of N(x0 + gap, p) in the interval of x0's level, nats; the outermost levels reach to infinity."""
    inverse = jnp.exp(-0.5 * log_variance)
    ndtr = jax.scipy.special.ndtr
    # By symmetry of |gap|, which keeps both terms of the difference small: near 1 they would cancel.
    inside = ndtr(inverse * (_HALF_LEVEL - jnp.abs(gap))) - ndtr(inverse * (-_HALF_LEVEL - jnp.abs(gap)))
    from_lowest, from_highest = ndtr(inverse * (_HALF_LEVEL - gap)), ndtr(inverse * (_HALF_LEVEL + gap))
    mass = jnp.where(x0 < -0.999, from_lowest, jnp.where(x0 > 0.999, from_highest, inside))
    return -jnp.log(jnp.maximum(mass, _SMALLEST_PROBABILITY))
