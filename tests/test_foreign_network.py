"""A network that is no DiT goes all the way: the specification of `networks.network` and `diffusion`.

Two stacks of blocks under a deeper prefix, text features with a mask as its condition, a null that is a parameter, videos, flow.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vq4dit_jax as vq
from vq4dit_jax import methods
from vq4dit_jax.diffusion.guidance import Guidance
from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.networks.conditioning import Features
from vq4dit_jax.networks.network import Network, Prediction, Role, Stack
from vq4dit_jax.qarray.linear import linear
from vq4dit_jax.qarray.parts import scan
from vq4dit_jax.qarray.tree import flatten, matrices

WIDTH, LENGTH, TEXT, FEATURES = 64, 2, 5, 8
SHAPE = (2, 4, 4, 3)  # frames, height, width, channels


def _linear(rng, rows, columns, *stack):
    kernel = rng.normal(size=(*stack, columns, rows)) / np.sqrt(columns)
    return {"kernel": kernel.astype(np.float32), "bias": (0.1 * rng.normal(size=(*stack, rows))).astype(np.float32)}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    stack = lambda: {name: _linear(rng, WIDTH, WIDTH, LENGTH) for name in ("condition", "up", "down")}
    return {
        "net": {
            "embed": _linear(rng, WIDTH, 3),
            "time": _linear(rng, WIDTH, 4),
            "text": _linear(rng, WIDTH, FEATURES),
            "null_text": rng.normal(size=(TEXT, FEATURES)).astype(np.float32),
            "trunk": {"spatial": stack(), "temporal": stack()},
            "out": _linear(rng, 3, WIDTH),
        }
    }


def apply(params, x, t, cond):
    net = params["net"]
    one = lambda p, h: linear(h, p["kernel"], p["bias"])
    h = one(net["embed"], x)
    angles = t[:, None] * jnp.asarray([1.0, 2.0, 4.0, 8.0])[None]
    mask = cond["mask"].astype(jnp.float32)[..., None]
    words = (cond["text"] * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)
    c = one(net["time"], jnp.sin(angles)) + one(net["text"], words)

    def run(h, stack, axes):
        def block(h, p, _):
            mixed = h + h.mean(axes, keepdims=True) + one(p["condition"], jax.nn.silu(c))[:, None, None, None]
            h = h + 0.5 * one(p["down"], jax.nn.gelu(one(p["up"], mixed)))
            return h, h

        return scan(block, h, stack)

    h, spatial = run(h, net["trunk"]["spatial"], (2, 3))
    h, temporal = run(h, net["trunk"]["temporal"], (1,))
    return Prediction(one(net["out"], h), {"spatial": spatial, "temporal": temporal})


def null_of(params, cond):
    rows = cond["text"].shape[0]
    text = jnp.broadcast_to(params["net"]["null_text"][None], (rows, TEXT, FEATURES))
    return {"text": text, "mask": jnp.ones((rows, TEXT), jnp.int32)}


ROLES = (
    Role("condition/kernel", "conditioning", "conditioning"),
    Role("up/kernel", "tokens", "mlp"),
    Role("down/kernel", "tokens", "mlp"),
)
RULES = [(r"net/trunk/(spatial|temporal)/\d+/.*/kernel", vq.VQSpec(256, 4)), (".*", vq.KEEP)]
STACKED = ("net/trunk/spatial", "net/trunk/temporal")


def _network():
    rng = np.random.default_rng(1)
    bank = {
        "text": rng.normal(size=(6, TEXT, FEATURES)).astype(np.float32),
        "mask": (np.arange(TEXT)[None] < rng.integers(1, TEXT + 1, (6, 1))).astype(np.int32),
    }
    stacks = tuple(Stack(path, LENGTH, ROLES) for path in STACKED)
    return Network(apply, SHAPE, Features(bank, null_of), Process("flow"), Guidance(), stacks)


NETWORK = _network()


@pytest.fixture(scope="module")
def kmeans():
    return vq.quantize(
        make_params(),
        rules=RULES,
        key=jax.random.key(0),
        stacked=STACKED,
        codebook_dtype=jnp.float16,
        max_iterations=10,
    )


@pytest.fixture(scope="module")
def calibrated(kmeans, tmp_path_factory):
    """Allocated by layers, solved, tuned; and the folder that it was done in."""
    folder = tmp_path_factory.mktemp("foreign")
    return _calibrate(kmeans, folder), folder


def _calibrate(kmeans, folder, **changes):
    settings = {**methods.vq4dit.LAYERWISE, "allocation": "layers", "budget": 1.6, "steps": 4, "batch": 4}
    passes = methods.vq4dit.passes(settings | {"trajectory_steps": 4, "tuned": "net/out/.*"} | changes)
    return vq.calibrate(NETWORK, make_params(), kmeans, key=jax.random.key(1), passes=passes, folder=folder)


def test_rules_name_blocks_of_stacks_under_a_deeper_prefix(kmeans):
    found = {(path, block) for path, block, _ in matrices(kmeans)}
    assert len(found) == 2 * LENGTH * 3 and ("net/trunk/temporal/up/kernel", 1) in found


def test_it_is_allocated_solved_and_tuned(kmeans, calibrated):
    """Nearer to the teacher than k-means within its budget; layers differ in their codebooks."""
    hard, _ = calibrated
    found = methods.held_out_agreement(NETWORK, make_params(), {"kmeans": kmeans, "hard": hard}, 1.5, jax.random.key(9))
    assert 0 < found["hard"][0] < found["kmeans"][0] and 0 < found["hard"][1] < found["kmeans"][1]
    specs = {(leaf.num_codewords, leaf.subvector_length) for _, _, leaf in matrices(hard)}
    assert len(specs) > 1
    size = vq.sizes(hard)
    assert size.assignment_bytes + size.codebook_bytes <= 1.6 * vq.sizes(kmeans).assignment_bytes


def test_a_second_run_continues_the_first_and_another_is_refused(kmeans, calibrated):
    hard, folder = calibrated
    again = _calibrate(kmeans, folder)
    assert jax.tree.structure(again) == jax.tree.structure(hard)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again, hard)
    with pytest.raises(vq.errors.InputError, match=r"lambda_d \(2.0 here, 1.0 there\)"):
        _calibrate(kmeans, folder, lambda_d=2.0)


@pytest.mark.parametrize("sampler", [None, "euler", "heun"])
def test_it_samples_videos_from_packed_parameters(calibrated, sampler):
    hard, _ = calibrated
    cond = NETWORK.conditioning.choose("balanced", jax.random.key(0), np.arange(3))
    how = dict(key=jax.random.key(5), num_steps=4, sampler=sampler, cfg_scale=2.0)
    videos = np.asarray(vq.sample(NETWORK, hard, cond, **how))
    teacher = np.asarray(vq.sample(NETWORK, make_params(), cond, **how))
    assert videos.shape == (3, *SHAPE) and np.isfinite(videos).all()
    assert 0 < np.linalg.norm(videos - teacher) < 0.5 * np.linalg.norm(teacher)
    swapped = {name: a[::-1].copy() for name, a in cond.items()}
    other = np.asarray(vq.sample(NETWORK, hard, swapped, **how))
    assert not np.allclose(other[0], videos[0])  # the text is read


def test_the_null_is_the_parameter(calibrated):
    """Guidance by hand from two evaluations, one of them with the tree's own null."""
    params, rng = jax.tree.map(jnp.asarray, make_params()), np.random.default_rng(3)
    cond = NETWORK.conditioning.choose("balanced", jax.random.key(0), np.arange(2))
    start = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    how = dict(key=jax.random.key(0), num_steps=1, initial=start)
    found = np.asarray(vq.sample(NETWORK, params, cond, cfg_scale=3.0, **how), np.float64)
    t = jnp.zeros(2)
    label = np.asarray(apply(params, jnp.asarray(start), t, cond).output, np.float64)
    null = np.asarray(apply(params, jnp.asarray(start), t, null_of(params, cond)).output, np.float64)
    np.testing.assert_allclose(found, start + null + 3.0 * (label - null), atol=1e-4)
    given = {name: np.zeros_like(a) for name, a in cond.items()}
    assert not np.allclose(np.asarray(vq.sample(NETWORK, params, cond, cfg_scale=3.0, null=given, **how)), found)


def test_it_is_saved_and_loaded(calibrated, tmp_path):
    hard, _ = calibrated
    about = {"network": "two stacks"}
    vq.save_quantized(tmp_path / "model", about, hard)
    vq.save_safetensors(tmp_path / "model.safetensors", about, hard)
    for described, loaded, _ in (
        vq.load_quantized(tmp_path / "model"),
        vq.load_safetensors(tmp_path / "model.safetensors"),
    ):
        assert described == about and flatten(loaded).keys() == flatten(hard).keys()
        assert jax.tree.structure(loaded) == jax.tree.structure(hard)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), loaded, hard)


def test_a_flow_takes_no_sampler_of_noise_predictions():
    cond = NETWORK.conditioning.choose("balanced", jax.random.key(0), np.arange(1))
    with pytest.raises(vq.errors.InputError, match="sampler='ddpm': a network that predicts 'flow' takes euler, heun"):
        vq.sample(NETWORK, make_params(), cond, key=jax.random.key(0), sampler="ddpm")


def test_a_network_without_a_null_is_not_guided():
    plain = dataclasses.replace(NETWORK, conditioning=Features(NETWORK.conditioning.bank))
    cond = plain.conditioning.choose("balanced", jax.random.key(0), np.arange(1))
    with pytest.raises(vq.errors.InputError, match="cfg_scale: this network has no null condition"):
        vq.sample(plain, make_params(), cond, key=jax.random.key(0), num_steps=2)
    assert vq.sample(plain, make_params(), cond, key=jax.random.key(0), num_steps=2, cfg_scale=1.0).shape == (1, *SHAPE)
