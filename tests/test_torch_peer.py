"""The PyTorch network that ours is timed against computes the same, in float32 with the same random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert.load import load_pretrained
from vq4dit_jax.diffusion import schedule as diffusion

torch = pytest.importorskip("torch", reason="the peer is PyTorch's")

CLASSES, SIZE = 10, 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The peer, and our model and parameters made from its state dict."""
    from benchmarks.gpu.torch_dit import DiT

    torch.manual_seed(0)
    peer = DiT(SIZE, width=64, depth=3, heads=4, num_classes=CLASSES).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("peer") / "model.pt"
    torch.save(peer.state_dict(), path)
    return peer, *load_pretrained(path, num_heads=4)


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)


def nchw(a):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(a).transpose(0, 3, 1, 2)))


def nhwc(a):
    return a.numpy().transpose(0, 2, 3, 1)


def test_the_peer_is_our_network(pair):
    peer, model, params = pair
    x = np.random.default_rng(0).standard_normal((4, SIZE, SIZE, 4), np.float32)
    t, y = np.array([0, 20, 500, 999], np.int32), np.array([0, 3, CLASSES - 1, CLASSES], np.int32)
    ours = model.apply({"params": params}, *map(jnp.asarray, (x, t, y)))
    theirs = peer(nchw(x), torch.from_numpy(t), torch.from_numpy(y))
    assert relative_error(ours, nhwc(theirs)) < 1e-5


@pytest.mark.parametrize("i", [0, 125, 249])
def test_the_peers_sampler_step_is_ours(pair, i):
    from benchmarks.gpu.network import schedule_table
    from benchmarks.gpu.torch_dit import sampler_step

    peer, model, params = pair
    rng = np.random.default_rng(i)
    x, noise = rng.standard_normal((2, 3, SIZE, SIZE, 4), np.float32)
    labels, null = np.array([1, 2, 3], np.int32), np.full(3, CLASSES, np.int32)
    schedule = diffusion.make_schedule(250)
    t = jnp.full(6, schedule.timesteps[i], jnp.int32)
    both, y = (jnp.asarray(np.concatenate(pair)) for pair in ((x, x), (labels, null)))
    out = model.apply({"params": params}, both, t, y, 4.0, method="forward_with_cfg")
    # The last step of a sampler adds no noise, which the peer leaves to its caller.
    added = noise if i else np.zeros_like(noise)
    ours = diffusion.ddpm_step(schedule, i, jnp.asarray(x), out[:3], jnp.asarray(added))
    table = torch.from_numpy(schedule_table(schedule))
    theirs = sampler_step(peer, table, nchw(x), torch.tensor([i]), torch.from_numpy(labels), nchw(added))
    assert relative_error(ours, nhwc(theirs)) < 1e-5
