"""What lasts of an error: octaves are orthogonal parts, and the fractions are those of the best linear denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.methods import lasting


@settings(max_examples=20)  # each new shape is compiled
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6, 8, 16]), st.sampled_from([1, 2, 4, 12, 16]), st.integers(0, 9)
)
def test_octaves_are_orthogonal_parts_of_the_whole(batch, height, width, seed):
    x = jax.random.normal(jax.random.key(seed), (batch, height, width, 2))
    parts = [np.asarray(part, np.float64) for part in lasting.octaves(x)]
    np.testing.assert_allclose(sum(parts), x, atol=1e-6)
    for k, a in enumerate(parts):
        for b in parts[:k]:
            assert abs((a * b).sum()) <= 1e-5 * (1 + np.linalg.norm(a) * np.linalg.norm(b))
    assert sum(np.square(part).sum() for part in parts) == pytest.approx(
        np.square(np.asarray(x, np.float64)).sum(), rel=1e-5
    )


def test_fractions_are_the_shares_of_white_noise():
    noise = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    parts = lasting.octaves(noise)
    found = lasting.lasting(diffusion.make_schedule(10), jnp.int32(3), parts)
    np.testing.assert_allclose(found.fraction, [float(jnp.square(part).mean()) for part in parts], rtol=0.05)
    assert float(found.fraction.sum()) == 1


def test_what_lasts_is_what_the_best_linear_denoiser_keeps():
    """x_0 ~ N(0, v) in each coefficient of an octave: the slope of E[x_0 | x_t] is measured by regression."""
    rng = np.random.default_rng(0)
    sched, i = diffusion.make_schedule(20), 6
    octaves = lasting.octaves(jnp.asarray(rng.standard_normal((400, 16, 16, 1)), jnp.float32))
    clean = [part * scale for part, scale in zip(octaves, (0.05, 0.3, 1.0, 2.0), strict=True)]
    found = lasting.lasting(sched, jnp.int32(i), clean)
    a = float(sched.alpha_bar_prev[i])
    noise = lasting.octaves(jnp.asarray(rng.standard_normal((400, 16, 16, 1)), jnp.float32))
    for k, (x0, eps) in enumerate(zip(clean, noise, strict=True)):
        x0, eps = np.asarray(x0, np.float64), np.asarray(eps, np.float64)
        # Noise that is exactly uncorrelated and of variance 1, so that the sample is as good as the population.
        eps -= x0 * (x0 * eps).sum() / np.square(x0).sum()
        eps *= np.sqrt(float(found.fraction[k]) / np.square(eps).mean())
        noisy = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
        slope = (x0 * noisy).sum() / np.square(noisy).sum()  # of x_0 on x_t
        assert float(found.squared[k]) == pytest.approx(slope**2, rel=1e-4)


def test_after_the_last_step_all_of_it_is_left_and_fine_detail_lasts_from_late_steps_alone():
    clean = [jnp.full((1, 8, 8, 1), scale) for scale in (0.05, 0.2, 0.5, 1.0)]
    sched = diffusion.make_schedule(50)
    np.testing.assert_allclose(lasting.lasting(sched, jnp.int32(0), clean).squared, 1.0, rtol=1e-6)
    steps = np.asarray(lasting.lasting(sched, jnp.int32(0), clean).steps)
    assert (np.diff(steps) > 0).all() and 1 < steps[0] < steps[-1] < 50


def test_nothing_at_all_in_an_octave_is_no_division_by_zero():
    found = lasting.lasting(diffusion.make_schedule(5), jnp.int32(0), lasting.octaves(jnp.zeros((1, 8, 8, 3))))
    assert all(bool(jnp.isfinite(a).all()) for a in (found.squared, found.steps))
