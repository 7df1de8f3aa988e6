"""Flow and velocity: orders of the samplers on an equation with a known solution, conventions of time, recorded trajectories."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.load import load_pretrained
from vq4dit_jax.diffusion import flow, trajectory
from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.diffusion.samplers import SAMPLERS, sampler_for
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.conditioning import Unconditional
from vq4dit_jax.networks.network import Network
from vq4dit_jax.networks.sampling import sample

SHAPE, RATE, DRIFT = (4, 4, 1), 0.7, 1.3
KEY = jax.random.key(0)


def velocity(params, x, t, cond):
    """dx/dt = a x + b t."""
    return RATE * x + DRIFT * t[:, None, None, None], None


def backwards(params, x, t, cond):
    """The same in REPA's time: t from 1 to 0, and dx/dt of the other sign."""
    return -velocity(params, x, 1 - t, cond)[0], None


NETWORK = Network(velocity, SHAPE, Unconditional(), Process("flow"))
BEGUN = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)


def sampled(network, steps, sampler, **options):
    how = dict(key=KEY, num_steps=steps, sampler=sampler, cfg_scale=1.0, initial=BEGUN)
    return np.asarray(sample(network, {}, np.zeros((3, 0)), **how, **options), np.float64)


def solution(t):
    """x(t) of the equation with x(0) = BEGUN."""
    particular = lambda t: -DRIFT / RATE * t - DRIFT / RATE**2
    return (BEGUN.astype(np.float64) - particular(0)) * np.exp(RATE * t) + particular(t)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_samplers_order(sampler, order):
    errors = [np.abs(sampled(NETWORK, steps, sampler) - solution(1.0)).max() for steps in (4, 8, 16)]
    orders = np.log2(np.asarray(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.25)
    assert orders[1] > order - 0.15


def test_euler_is_its_formula():
    x = BEGUN.astype(np.float64)
    for n in range(5):
        x = x + (RATE * x + DRIFT * n / 5) / 5
    np.testing.assert_allclose(sampled(NETWORK, 5, "euler"), x, rtol=1e-5)


@pytest.mark.parametrize("data_time", [1, 0])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_schedule_runs_from_noise_to_data_in_equal_steps(steps, data_time):
    sched = flow.flow_schedule(steps, data_time)
    assert sched.num_steps == steps
    # The last entry is the first step.
    assert sched.level[-1] == 1 and sched.level_after[0] == 0
    np.testing.assert_allclose(sched.level - sched.level_after, 1 / steps, rtol=1e-6)
    np.testing.assert_array_equal(sched.level[:-1], sched.level_after[1:])
    assert sched.timesteps[-1] == 1 - data_time and sched.timesteps_after[0] == data_time
    time = (lambda level: 1 - level) if data_time else (lambda level: level)
    np.testing.assert_allclose(sched.timesteps, time(sched.level), atol=1e-7)
    np.testing.assert_allclose(sched.timesteps_after, time(sched.level_after), atol=1e-7)


def test_no_steps_are_refused():
    with pytest.raises(InputError, match="num_steps=0: wanted at least 1"):
        flow.flow_schedule(0)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_two_conventions_of_time_are_one_process(sampler):
    """t -> 1 - t and v -> -v."""
    other = dataclasses.replace(NETWORK, apply=backwards, process=Process("flow", data_time=0))
    found = sampled(other, 6, sampler)
    np.testing.assert_allclose(found, sampled(NETWORK, 6, sampler), rtol=1e-5, atol=1e-6)
    wrong = dataclasses.replace(NETWORK, apply=backwards)
    assert np.abs(sampled(wrong, 6, sampler) - found).max() > 0.1


@pytest.mark.parametrize("data_time", [1, 0])
def test_the_clean_image_is_that_of_the_straight_path(data_time):
    """x = (1 - s) data + s noise and the velocity of the path give the data back, at any level."""
    rng = np.random.default_rng(1)
    data, noise = rng.standard_normal((2, 2, *SHAPE)).astype(np.float32)
    sched = flow.flow_schedule(5, data_time)
    for i in range(5):
        s = float(sched.level[i])
        x = jnp.asarray((1 - s) * data + s * noise)
        prediction = jnp.asarray((data - noise) * (1 if data_time else -1))
        np.testing.assert_allclose(sched.clean(i, x, prediction), data, atol=1e-5)
        after = flow.euler_step(sched, i, x, prediction)
        s = float(sched.level_after[i])
        np.testing.assert_allclose(after, (1 - s) * data + s * noise, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class _Times:
    def __call__(self, evaluation, given):
        return evaluation.t[0], evaluation.i


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 1), ("heun", 2)])
def test_evaluations_of_a_step_are_at_its_ends(name, evaluations):
    steps, problem = 4, trajectory.Problem(jax.random.split(KEY, 2), jnp.zeros((2, 0)))
    how = dict(observe=_Times(), initial=jnp.asarray(BEGUN[:2]))
    sched = NETWORK.process.schedule(steps)
    _, (times, numbers) = trajectory.run(NETWORK, SAMPLERS[name], sched, {}, problem, 1.0, **how)
    begins = np.arange(steps) / steps
    wanted = begins if evaluations == 1 else np.stack([begins, begins + 1 / steps], 1).ravel()
    np.testing.assert_allclose(times, wanted, atol=1e-6)
    np.testing.assert_array_equal(numbers, np.repeat(np.arange(steps)[::-1], evaluations))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_trajectory_has_an_image_for_each_step(sampler):
    """Each is where a run of so many of the same steps ends: the solution, up to the sampler's error."""
    images = sampled(NETWORK, 10, sampler, trajectory=True)
    assert images.shape == (10, *BEGUN.shape)
    np.testing.assert_array_equal(images[-1], sampled(NETWORK, 10, sampler))
    wanted = np.stack([solution((n + 1) / 10) for n in range(10)])
    np.testing.assert_allclose(images, wanted, atol=(0.05 if sampler == "euler" else 0.002) * np.abs(wanted).max())


# Predictions of v -------------------------------------------------------------------------------------------------


def _noise_prediction(params, x, t, cond):
    return 0.9 * jnp.tanh(x) + 0.1 * jnp.cos(t.astype(jnp.float32))[:, None, None, None], None


def _as_v(params, x, t, cond):
    """The same network, which says sqrt(a) eps - sqrt(1 - a) x_0."""
    eps = _noise_prediction(params, x, t, cond)[0]
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    root, rest = (jnp.asarray(np.sqrt(a), jnp.float32)[t][:, None, None, None] for a in (table, 1 - table))
    return root * eps - rest * (x - rest * eps) / root, None


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_a_network_that_predicts_v_gives_what_its_noise_prediction_gives(sampler):
    of_noise = Network(_noise_prediction, SHAPE, Unconditional())
    of_v = Network(_as_v, SHAPE, Unconditional(), Process("v"))
    wanted, found = (sampled(network, 8, sampler, trajectory=True) for network in (of_noise, of_v))
    assert np.abs(wanted[-1] - wanted[0]).max() > 0.1
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    mistaken = sampled(dataclasses.replace(of_v, process=Process()), 8, sampler)
    assert np.abs(mistaken - wanted[-1]).max() > 0.01 * np.abs(wanted[-1]).max()


def test_samplers_are_those_that_fit_the_prediction():
    assert [sampler_for(Process(p)).name for p in ("eps", "v", "flow")] == ["ddpm", "ddpm", "euler"]
    for predicts, name, words in (("eps", "heun", "ddpm, ddim, dpm"), ("flow", "ddim", "euler, heun")):
        with pytest.raises(InputError, match=f"sampler='{name}': a network that predicts '{predicts}' takes {words}"):
            sampler_for(Process(predicts), name)
    with pytest.raises(InputError, match="predicts='x0': wanted one of eps, v, flow"):
        Process("x0")


# What the original code computed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_recorded_trajectories_of_sit(shared, sampler):
    """Ten steps with guidance of the first three channels, state by state; the weights and the noise are recorded as well."""
    pytest.importorskip("torch", reason="reading a PyTorch checkpoint needs torch")
    folder = shared / "data" / "reference_io" / "trajectories" / "sit"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/reference_io/trajectories/sit (recorded trajectories of the original SiT)")
    model, params = load_pretrained(folder / "model.pt")
    with np.load(folder / "io.npz") as io:
        noise, labels, times, states = (
            io[name] for name in ("z", "cfg_y", f"ode_{sampler}_n11_model_times", f"ode_{sampler}_n11_states")
        )
    channels_last = lambda a: np.moveaxis(a, -3, -1)
    images = sample(
        model,
        params,
        labels[:2],
        key=KEY,
        num_steps=10,
        sampler=sampler,
        cfg_scale=4.0,
        initial=channels_last(noise[:2]),
        trajectory=True,
    )
    np.testing.assert_array_equal(states[0], noise[:2])
    assert (labels[2:] == model.num_classes).all() and len(times) == 10 * SAMPLERS[sampler].evaluations
    for found, wanted in zip(np.asarray(images), channels_last(states[1:]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
