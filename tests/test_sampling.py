"""The sampling loop: the same image whatever the batch and the devices, guidance, and each sampler's steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from vq4dit_jax.diffusion import keys, sampling
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion.guidance import Guidance
from vq4dit_jax.diffusion.samplers import SAMPLERS
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.networks.conditioning import ClassLabels
from vq4dit_jax.networks.network import as_network, problem
from vq4dit_jax.networks.sampling import sample

LABELS = np.asarray([0, 1, 2, 3, 4, 0, 1])
KEY = jax.random.key(7)


def _sample(labels=LABELS, **options):
    model, params = tiny()
    return np.asarray(sample(model, params, labels, key=KEY, num_steps=4, **options))


def test_there_are_two_devices_to_shard_over():
    assert jax.device_count() == 2


@pytest.mark.parametrize("sampler", [name for name, s in SAMPLERS.items() if "eps" in s.takes])
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
    monkeypatch.setattr("vq4dit_jax.networks.sampling.batch_mesh", lambda: one)
    np.testing.assert_allclose(_sample(), two, atol=2e-4 * np.abs(two).max())


def test_images_differ_from_each_other_and_between_keys():
    images = _sample(np.zeros(4, np.int64))
    assert min(np.abs(images[i] - images[j]).mean() for i in range(4) for j in range(i)) > 1e-3
    model, params = tiny()
    other = sample(model, params, np.zeros(4, int), key=jax.random.key(8), num_steps=4)
    assert np.abs(np.asarray(other) - images).mean() > 1e-3


def test_ddim_is_its_steps_one_after_the_other_with_guidance():
    model, params = tiny()
    sched, labels = diffusion.make_schedule(4), np.asarray([3, 1])
    x = noise_of(2, keys.INITIAL, 0)
    for i in (3, 2, 1, 0):
        both, t = jnp.concatenate([x, x]), jnp.full((4,), sched.timesteps[i])
        y = jnp.asarray([3, 1, 5, 5])
        cond, null = jnp.split(model.apply({"params": params}, both, t, y), 2)
        eps = null[..., :3] + 2.5 * (cond[..., :3] - null[..., :3])
        x = diffusion.ddim_step(sched, i, x, eps)
    found = sample(model, params, labels, key=KEY, num_steps=4, sampler="ddim", cfg_scale=2.5)
    np.testing.assert_allclose(np.asarray(found), np.asarray(x), atol=1e-4 * float(jnp.abs(x).max()))


def test_guidance_of_one_is_no_guidance():
    """Ancestral steps one after the other, without a null, with each image's own noise."""
    model, params = tiny()
    sched, y = diffusion.make_schedule(4), jnp.asarray(LABELS, jnp.int32)
    run = jax.jit(lambda x, t: model.apply({"params": params}, x, t, y))
    x = noise_of(7, keys.INITIAL, 0)
    for i in (3, 2, 1, 0):
        output = run(x, jnp.full((7,), sched.timesteps[i]))
        x = diffusion.ddpm_step(sched, i, x, output, noise_of(7, keys.STEPS, i))
    np.testing.assert_allclose(_sample(cfg_scale=1.0), np.asarray(x), atol=1e-3 * float(jnp.abs(x).max()))


def noise_of(images, stream, step, key=KEY):
    """As `diffusion.keys` says it, image by image."""
    one = lambda b: jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, b), stream), step)
    return jnp.stack([jax.random.normal(one(b), (8, 8, 3)) for b in range(images)])


def test_no_two_streams_share_a_key():
    """The random class of images and their noise: at 0.1.0 the key of the labels was that of image 2."""
    data = lambda key: tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())
    used = []
    for b in range(4):
        image = jax.random.fold_in(KEY, b)
        used += [image, jax.random.fold_in(image, keys.CONDITION)]
        used += [jax.random.fold_in(jax.random.fold_in(image, keys.INITIAL), 0)]
        used += [jax.random.fold_in(jax.random.fold_in(image, keys.STEPS), j) for j in range(4)]
    assert len(set(map(data, used))) == len(used)
    # They are those in use: in calibration, and by the sample command.
    network, found = as_network(tiny()[0]), keys.image_keys(KEY, np.arange(4))
    assert [data(key) for key in keys.condition_keys(found)] == [data(key) for key in used[1::7]]
    labels = [int(jax.random.randint(key, (), 0, 5, jnp.int32)) for key in used[1::7]]
    np.testing.assert_array_equal(problem(network, tiny()[1], found, 1.0).cond, labels)
    drawn = [int(jax.random.randint(key, (), 0, 1000, jnp.int32)) for key in used[1::7]]
    np.testing.assert_array_equal(ClassLabels(1000).choose("random", KEY, np.arange(4)), drawn)
    np.testing.assert_array_equal(keys.noise(found, keys.STEPS, 3, (8, 8, 3)), noise_of(4, keys.STEPS, 3))


def test_guidance_acts_on_the_channels_that_it_names():
    rng = np.random.default_rng(0)
    label, null = rng.standard_normal((2, 3, 2, 2, 8)).astype(np.float32)
    both = jnp.asarray(np.concatenate([label, null]))
    for channels, guided in ((None, 4), (3, 3), (1, 1)):
        wanted = np.concatenate([null + 2.5 * (label - null), label], -1)[..., [*range(guided), *range(8 + guided, 16)]]
        np.testing.assert_allclose(Guidance(channels).combine(both, 2.5, 4), wanted, atol=1e-5)


@pytest.mark.parametrize("channels", [0, -1])
def test_guidance_of_no_channels_is_refused(channels):
    with pytest.raises(InputError, match=f"channels={channels}: wanted at least 1, or None for all"):
        Guidance(channels)


def test_a_network_without_a_null_label_is_not_guided():
    model, params = tiny()
    plain = model.clone(null_label=False)
    assert plain.network().conditioning == ClassLabels(5, has_null=False)
    with pytest.raises(InputError, match="cfg_scale: this network has no null label"):
        sample(plain, params, LABELS, key=KEY, num_steps=2)


def test_the_packed_model_samples():
    model, params = tiny()
    packed = quantize(params, 2, key=jax.random.key(0))
    images = sample(model, packed, LABELS, key=KEY, num_steps=2)
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
