"""Moments of the inputs of Linears: against what one finds by hand."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import evaluations, tiny

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.moments import Moments, input_moments
from vq4dit_jax.methods.probe import Probe
from vq4dit_jax.networks.conditioning import ClassLabels
from vq4dit_jax.networks.layers import layer_norm, modulate
from vq4dit_jax.networks.network import Network, as_network
from vq4dit_jax.qarray.linear import linear

KERNELS = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "adaLN_modulation/1")
PATHS = [f"blocks/{name}/kernel" for name in KERNELS]
STEPS = 4
NETWORK = as_network(tiny()[0])


@pytest.fixture(scope="module")
def teacher():
    return tiny()[1]


@pytest.fixture(scope="module")
def moments(teacher):
    return input_moments(tiny()[0], teacher, PATHS, key=jax.random.key(3), images=2, num_steps=STEPS)


@pytest.fixture(scope="module")
def seen(teacher):
    """The evaluations that `moments` were collected on."""
    return evaluations(NETWORK, teacher, key=jax.random.key(3), num_steps=STEPS)


def test_moments_are_those_of_inputs_collected_by_hand(teacher, seen, moments):
    """The first block reads what the embedders alone make: silu(c), and the modulated tokens. Every block reads silu(c)."""
    model, _ = tiny()
    adaln = jax.tree.map(lambda a: a[0], teacher["blocks"]["adaLN_modulation"]["1"])

    @jax.jit
    def inputs(evaluation):
        c = jax.nn.silu(model.apply({"params": teacher}, evaluation.t, evaluation.cond, method="conditioning"))
        shift, scale, *_ = jnp.split(linear(c, adaln["kernel"], adaln["bias"]), 6, axis=-1)
        tokens = model.apply({"params": teacher}, evaluation.x, method="_tokens")
        return c, modulate(layer_norm(tokens, 1e-6), shift, scale).reshape(-1, 32)

    conditions, tokens = zip(
        *[[np.asarray(a, np.float64) for a in inputs(evaluation)] for evaluation in seen], strict=True
    )
    for path, block, rows in (
        ("blocks/adaLN_modulation/1/kernel", 0, conditions),
        ("blocks/adaLN_modulation/1/kernel", 1, conditions),
        ("blocks/attn/qkv/kernel", 0, tokens),
    ):
        rows = np.concatenate(rows)
        wanted = rows.T @ rows / len(rows)
        found = np.asarray(moments[path].second[block])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * wanted.max())


def test_means_and_spread_are_those_of_inputs_collected_by_hand(teacher, seen):
    """Around each time step's own mean, steps counting as their weights say."""
    path, weights = "blocks/adaLN_modulation/1/kernel", np.array([0.5, 1.5, 1.25, 0.75])
    how = dict(key=jax.random.key(3), images=2, num_steps=STEPS)
    found = input_moments(tiny()[0], teacher, [path], weights={path: jnp.asarray(weights, jnp.float32)}, **how)[path]
    conditioning = jax.jit(lambda t, y: tiny()[0].apply({"params": teacher}, t, y, method="conditioning"))
    rows = [np.asarray(jax.nn.silu(conditioning(evaluation.t, evaluation.cond)), np.float64) for evaluation in seen]
    rows = rows[::-1]  # a trajectory begins at the last index
    means = np.stack([r.mean(0) for r in rows])
    spread = sum(w * (r - m).T @ (r - m) / len(r) for w, r, m in zip(weights, rows, means, strict=True)) / STEPS
    for block in range(2):
        np.testing.assert_allclose(np.asarray(found.means[:, block]), means, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.asarray(found.mean()[block]), weights @ means / STEPS, rtol=1e-4, atol=1e-6)
        # Two large numbers of float32 are subtracted.
        size = np.abs(np.asarray(found.second)).max()
        np.testing.assert_allclose(np.asarray(found.covariance()[block]), spread, rtol=0, atol=2e-6 * size)


def test_steps_count_as_their_weights_say(teacher):
    """Weights 2 and 0 leave the moments of half of the steps, for the kernel that has them; the halves' mean is the whole."""
    how = dict(key=jax.random.key(3), images=2, num_steps=STEPS)
    alike, first, last = (
        input_moments(tiny()[0], teacher, PATHS[:2], weights={PATHS[0]: jnp.asarray(w)} if w else {}, **how)
        for w in (None, (2.0, 2.0, 0.0, 0.0), (0.0, 0.0, 2.0, 2.0))
    )
    alike, first, last = ([found[path].second for path in PATHS[:2]] for found in (alike, first, last))
    np.testing.assert_allclose((first[0] + last[0]) / 2, alike[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(first[0], last[0], rtol=0.1)
    np.testing.assert_array_equal(first[1], alike[1])


def test_differences_are_the_moments_of_what_the_label_changes(teacher, seen):
    """At the share of the trace that was asked for; and nothing where labels change nothing."""
    path, share = "blocks/adaLN_modulation/1/kernel", 0.5
    how = dict(key=jax.random.key(3), images=2, num_steps=1)
    plain = input_moments(tiny()[0], teacher, [path], **how)[path].second[0]
    found = input_moments(tiny()[0], teacher, [path], differences={path: share}, **how)[path].second[0]
    # One step of one trajectory starts with the noise and the labels of `seen`, at the first of its time steps.
    evaluation = seen[0]
    c = np.asarray(
        jax.nn.silu(tiny()[0].apply({"params": teacher}, evaluation.t * 0, evaluation.cond, method="conditioning")),
        np.float64,
    )
    changed = c[: len(c) // 2] - c[len(c) // 2 :]
    wanted = changed.T @ changed
    wanted *= share * np.trace(np.asarray(plain)) / np.trace(wanted)
    np.testing.assert_allclose(np.asarray(found - plain), wanted, rtol=1e-3, atol=1e-5 * wanted.max())

    same = {**teacher, "y_embedder": jax.tree.map(jnp.zeros_like, teacher["y_embedder"])}
    nothing = [input_moments(tiny()[0], same, [path], differences=d, **how)[path].second for d in ({}, {path: share})]
    np.testing.assert_array_equal(*nothing)


def test_every_layer_is_reached_and_has_a_positive_semi_definite_moment(moments):
    assert list(moments) == PATHS
    for path, found in moments.items():
        columns, found = 64 if "fc2" in path else 32, found.second
        assert found.shape == (2, columns, columns) and found.dtype == jnp.float32
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, found.swapaxes(1, 2), rtol=1e-6, atol=1e-6 * found.max())
        values = np.linalg.eigvalsh(found)
        assert (values[:, -1] > 1e-3).all() and (values[:, 0] > -1e-5 * values[:, -1]).all()
    assert not np.allclose(*moments[PATHS[0]].second, rtol=0.1)


def test_moments_are_held_twice_and_no_more(monkeypatch):
    """The sum, and what one step adds to it: by XLA's own account of the program, and what its caller holds meanwhile."""
    width = 512
    kernel = lambda *shape: {"kernel": jnp.ones((3, *shape))}

    def two_linears(params, x, t, cond):
        def block(h, p):
            h = h + linear(jax.nn.gelu(linear(h, p["up"]["kernel"], None)), p["down"]["kernel"], None) / width
            return h, h

        return jax.lax.scan(block, x, params["blocks"])

    measured, observed = [], trajectory._observed

    def measure(network, sampler, *args, **static):
        held = sum(a.nbytes for a in jax.live_arrays() if a.shape[-2:] == (width, width))
        leaves, tree = jax.tree.flatten(args)
        program = jax.jit(lambda leaves: observed(network, sampler, *jax.tree.unflatten(tree, leaves), **static))
        found = program.lower(leaves).compile().memory_analysis()
        measured.append(held + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes)
        return observed(network, sampler, *args, **static)

    monkeypatch.setattr(trajectory, "_observed", measure)
    network = Network(two_linears, (1, 1, 8), ClassLabels(5))
    params = {"blocks": {"up": kernel(8, width), "down": kernel(width, 8)}}
    found = input_moments(network, params, ["blocks/down/kernel"], key=jax.random.key(0), images=2, num_steps=3)
    (taken,) = measured
    assert 1.9 < taken / found["blocks/down/kernel"].second.nbytes < 2.5


def test_a_probe_does_not_change_the_network(teacher, seen):
    flat = flax.traverse_util.flatten_dict(teacher, sep="/")
    zeros = {path: jnp.zeros((2, flat[path].shape[1])) for path in PATHS}
    flat |= {
        path: Probe(flat[path], (jnp.einsum("bi,bj->bij", zero, zero), zero), Moments()) for path, zero in zeros.items()
    }
    probed = flax.traverse_util.unflatten_dict(flat, sep="/")
    output, _ = jax.jit(NETWORK.apply)(probed, seen[0].x, seen[0].t, seen[0].cond)
    wanted = np.asarray(seen[0].output)
    np.testing.assert_allclose(np.asarray(output), wanted, atol=5e-6 * np.abs(wanted).max())


def test_what_has_no_moments_is_refused(teacher):
    with pytest.raises(InputError, match="wanted the path of a kernel .*, such as blocks/"):
        input_moments(NETWORK, teacher, ["blocks/attn/nothing"], key=jax.random.key(0))

    def one_linear(params, x, t, cond):
        out = linear(x, params["used"]["kernel"], None)
        return out, [out]

    network = Network(one_linear, (4, 4, 3), ClassLabels(5))
    eye = {"used": {"kernel": jnp.eye(3)}, "spare": {"kernel": jnp.eye(4)}}
    with pytest.raises(InputError, match="spare/kernel: the network does not use"):
        input_moments(network, eye, ["used/kernel", "spare/kernel"], key=jax.random.key(0), images=1, num_steps=1)

    def foreign(params, x, t, cond):
        kernel = params["blocks"]["attn"]["qkv"]["kernel"]
        return x, [x * jnp.asarray(kernel).mean()]

    with pytest.raises(InputError, match=r"Linears of vq4dit_jax\.qarray\.linear"):
        input_moments(dataclasses.replace(NETWORK, apply=foreign), teacher, PATHS, key=jax.random.key(0))
