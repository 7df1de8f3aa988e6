"""The schedule and the reverse steps against diffusers' schedulers and against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.errors import InputError

SHAPE = (2, 4, 4, 4)


@pytest.mark.parametrize("steps", [10, 50, 100, 250, 1000])
def test_respacing_spreads_the_steps_over_both_ends(steps):
    timesteps = diffusion.respaced_timesteps(steps)
    np.testing.assert_array_equal(timesteps, np.linspace(0, 999, steps).round())


@given(st.integers(2, 1000))
def test_respaced_steps_are_distinct_and_ascend_from_first_to_last(steps):
    timesteps = diffusion.respaced_timesteps(steps)
    assert timesteps[0] == 0 and timesteps[-1] == 999
    assert (np.diff(timesteps) > 0).all()


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_a_number_of_steps_out_of_range_is_an_input_error(steps):
    with pytest.raises(InputError, match=f"num_steps={steps}"):
        diffusion.make_schedule(steps)


def _trajectory(seed: int, steps: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """x_T and, for each step, an output of a model that sees x only through its sign, so that no error is amplified."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE).astype(np.float32)
    outputs = [rng.normal(size=(*SHAPE[:3], 2 * SHAPE[3])).astype(np.float32) for _ in range(steps)]
    noises = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(steps)]
    return x, outputs, noises


def test_ddpm_agrees_with_diffusers_over_a_whole_trajectory(monkeypatch):
    torch = pytest.importorskip("torch")
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    steps = 10
    sched = diffusion.make_schedule(steps)
    scheduler = ddpm.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=list(map(int, np.asarray(sched.timesteps)[::-1])))
    x, outputs, noises = _trajectory(0, steps)
    ours, theirs = jnp.asarray(x), torch.tensor(x.transpose(0, 3, 1, 2))
    for i, t in zip(reversed(range(steps)), scheduler.timesteps, strict=True):
        noise = torch.tensor(noises[i].transpose(0, 3, 1, 2))
        monkeypatch.setattr(ddpm, "randn_tensor", lambda *_, noise=noise, **__: noise)
        theirs = scheduler.step(torch.tensor(outputs[i].transpose(0, 3, 1, 2)), t, theirs).prev_sample
        ours = diffusion.ddpm_step(sched, i, ours, jnp.asarray(outputs[i]), jnp.asarray(noises[i]))
        scale = float(theirs.abs().max())
        np.testing.assert_allclose(np.asarray(ours), theirs.numpy().transpose(0, 2, 3, 1), atol=3e-6 * scale, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 and torch, inside diffusers
def test_dpm_solver_agrees_with_diffusers_over_a_whole_trajectory():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    steps = 20
    sched = diffusion.make_schedule(steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, solver_order=2, final_sigmas_type="zero", algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(timesteps=list(map(int, np.asarray(sched.timesteps)[::-1])))
    x, outputs, _ = _trajectory(1, steps)
    ours, theirs = jnp.asarray(x), torch.tensor(x.transpose(0, 3, 1, 2))
    x0 = jnp.zeros(SHAPE)
    for i, t in zip(reversed(range(steps)), scheduler.timesteps, strict=True):
        eps = outputs[i][..., : SHAPE[3]]
        theirs = scheduler.step(torch.tensor(eps.transpose(0, 3, 1, 2)), t, theirs).prev_sample
        ours, x0 = diffusion.dpmpp_2m_step(sched, i, ours, jnp.asarray(eps), x0)
        scale = float(theirs.abs().max())
        np.testing.assert_allclose(np.asarray(ours), theirs.numpy().transpose(0, 2, 3, 1), atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_its_formula_in_float64(eta):
    steps = 10
    sched = diffusion.make_schedule(steps)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.asarray(sched.timesteps)]
    x, outputs, noises = _trajectory(2, steps)
    for i in range(steps):
        a, prev = alpha_bar[i], alpha_bar[i - 1] if i else 1.0
        eps = outputs[i][..., : SHAPE[3]].astype(np.float64)
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        sigma = eta * np.sqrt((1 - prev) / (1 - a) * (1 - a / prev))
        wanted = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps + (sigma * noises[i] if i else 0)
        found = diffusion.ddim_step(sched, i, jnp.asarray(x), jnp.asarray(outputs[i]), jnp.asarray(noises[i]), eta)
        np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-6 * np.abs(wanted).max(), rtol=0)


def test_ddim_with_eta_needs_noise():
    sched = diffusion.make_schedule(4)
    with pytest.raises(ValueError, match="needs noise"):
        diffusion.ddim_step(sched, 2, jnp.zeros(SHAPE), jnp.zeros((*SHAPE[:3], 8)), eta=0.5)


def test_a_perfect_noise_prediction_brings_the_image_back():
    """x_t made from a known image and noise: DDIM and DPM-Solver++ with the true noise end at the image."""
    image = jax.random.uniform(jax.random.key(0), SHAPE, minval=-1.0, maxval=1.0)
    eps = jax.random.normal(jax.random.key(1), SHAPE)
    sched = diffusion.make_schedule(25)
    last = sched.num_steps - 1
    start = sched.sqrt_alpha_bar[last] * image + sched.sqrt_one_minus_alpha_bar[last] * eps
    ddim, solver, x0 = start, start, jnp.zeros(SHAPE)
    for i in range(last, -1, -1):
        a, b = sched.sqrt_alpha_bar[i], sched.sqrt_one_minus_alpha_bar[i]
        ddim = diffusion.ddim_step(sched, i, ddim, (ddim - a * image) / b)
        solver, x0 = diffusion.dpmpp_2m_step(sched, i, solver, (solver - a * image) / b, x0)
    np.testing.assert_allclose(np.asarray(ddim), np.asarray(image), atol=1e-4)
    np.testing.assert_allclose(np.asarray(solver), np.asarray(image), atol=1e-4)


def test_the_last_step_adds_no_noise():
    sched = diffusion.make_schedule(10)
    x, outputs, noises = _trajectory(3, 1)
    quiet = diffusion.ddpm_step(sched, 0, jnp.asarray(x), jnp.asarray(outputs[0]), jnp.zeros(SHAPE))
    loud = diffusion.ddpm_step(sched, 0, jnp.asarray(x), jnp.asarray(outputs[0]), jnp.asarray(noises[0]))
    np.testing.assert_array_equal(np.asarray(quiet), np.asarray(loud))


def test_the_learned_variance_lies_between_its_bounds():
    """Interpolation -1 gives the posterior variance, +1 gives beta (Nichol & Dhariwal, eq 15)."""
    sched = diffusion.make_schedule(50)
    i, zero, one = 20, jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    for value, wanted in ((-1.0, sched.log_variance_min[i]), (1.0, sched.log_variance_max[i])):
        output = jnp.concatenate([zero, jnp.full((1, 1, 1, 1), value)], axis=-1)
        spread = diffusion.ddpm_step(sched, i, zero, output, one)
        np.testing.assert_allclose(2 * np.log(float(spread[0, 0, 0, 0])), float(wanted), rtol=1e-5)
