"""The sampling loop: the same image whatever the batch and the devices, guidance, and each sampler's steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax.diffusion import sampling
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.kmeans import quantize

LABELS = np.asarray([0, 1, 2, 3, 4, 0, 1])
KEY = jax.random.key(7)


def _sample(labels=LABELS, **options):
    model, params = tiny()
    return np.asarray(sampling.sample(model, params, labels, key=KEY, num_steps=4, **options))


def test_there_are_two_devices_to_shard_over():
    assert jax.device_count() == 2


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_image_i_is_the_same_in_any_batch(sampler):
    """Also for a batch that the devices do not divide."""
    whole = _sample(sampler=sampler)
    parts = np.concatenate(
        [_sample(LABELS[i : i + 3], sampler=sampler, indices=np.arange(i, min(i + 3, 7))) for i in (0, 3, 6)]
    )
    assert whole.shape == (7, 8, 8, 3) and np.isfinite(whole).all()
    np.testing.assert_allclose(parts, whole, atol=2e-4 * np.abs(whole).max())


def test_one_device_gives_what_two_give(monkeypatch):
    two = _sample()
    one = jax.make_mesh((1,), ("batch",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    monkeypatch.setattr(sampling, "batch_mesh", lambda: one)
    np.testing.assert_allclose(_sample(), two, atol=2e-4 * np.abs(two).max())


def test_images_differ_from_each_other_and_between_keys():
    images = _sample(np.zeros(4, np.int64))
    assert min(np.abs(images[i] - images[j]).mean() for i in range(4) for j in range(i)) > 1e-3
    model, params = tiny()
    other = sampling.sample(model, params, np.zeros(4, int), key=jax.random.key(8), num_steps=4)
    assert np.abs(np.asarray(other) - images).mean() > 1e-3


def test_ddim_is_its_steps_one_after_the_other_with_guidance():
    model, params = tiny()
    sched, labels = diffusion.make_schedule(4), np.asarray([3, 1])
    keys = sampling.image_keys(KEY, np.arange(2))
    x = sampling.noise(keys, 0, 0, (8, 8, 3))
    for i in (3, 2, 1, 0):
        both, t = jnp.concatenate([x, x]), jnp.full((4,), sched.timesteps[i])
        y = jnp.asarray([3, 1, 5, 5])
        cond, null = jnp.split(model.apply({"params": params}, both, t, y), 2)
        eps = null[..., :3] + 2.5 * (cond[..., :3] - null[..., :3])
        x = diffusion.ddim_step(sched, i, x, eps)
    found = sampling.sample(model, params, labels, key=KEY, num_steps=4, sampler="ddim", cfg_scale=2.5)
    np.testing.assert_allclose(np.asarray(found), np.asarray(x), atol=1e-4 * float(jnp.abs(x).max()))


def test_guidance_of_one_is_no_guidance():
    model, params = tiny()
    sched, keys = diffusion.make_schedule(4), sampling.image_keys(KEY, np.arange(7))
    labels = jnp.asarray(LABELS, jnp.int32)
    wanted = sampling.denoise(
        lambda x, t: sampling.guided(model, params, x, t, labels, 1.0), sched, keys, (8, 8, 3), "ddpm"
    )
    np.testing.assert_allclose(_sample(cfg_scale=1.0), np.asarray(wanted), atol=1e-3 * float(jnp.abs(wanted).max()))


def test_the_packed_model_samples():
    model, params = tiny()
    packed = quantize(params, 2, key=jax.random.key(0))
    images = sampling.sample(model, packed, LABELS, key=KEY, num_steps=2)
    assert images.shape == (7, 8, 8, 3) and bool(jnp.isfinite(images).all())


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (LABELS, {"sampler": "euler"}, "sampler='euler'"),
        (LABELS + 2, {}, "wanted 0..5"),
        (LABELS[None], {}, "wanted integers"),
        (LABELS * 0.5, {}, "wanted integers"),
    ],
)
def test_what_cannot_be_sampled_is_refused(labels, options, words):
    with pytest.raises(InputError, match=words):
        _sample(labels, **options)


def test_pixels_are_rounded_as_the_reference_rounds():
    np.testing.assert_array_equal(
        sampling.to_uint8(np.asarray([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])), [0, 0, 128, 255, 255, 255]
    )
