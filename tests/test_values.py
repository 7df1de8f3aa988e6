"""Values rotated head by head: the network stays the same function, and what attention makes is easier to round."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import inputs, tiny

import vq4dit_jax as vq
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import activations
from vq4dit_jax.methods import passes, viditq
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.network import Network, Role, Stack, as_network
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.networks.values import rotate_values
from vq4dit_jax.qarray.tree import flatten, unflatten

QKV, PROJ = "blocks/attn/qkv/kernel", "blocks/attn/proj/kernel"


@pytest.mark.parametrize("heads", [1, 2, 8], ids="{} heads".format)
def test_the_network_computes_the_same(heads):
    model, params = tiny(num_heads=heads)
    turned = rotate_values(as_network(model), params)
    with jax.default_matmul_precision("highest"):
        for one, other in zip(
            model.apply({"params": params}, *inputs(model), return_blocks=True),
            model.apply({"params": turned}, *inputs(model), return_blocks=True),
            strict=True,
        ):
            np.testing.assert_allclose(other, one, atol=2e-5 * float(jnp.abs(one).max()))


def test_only_values_and_what_reads_them_change_and_twice_is_nothing():
    model, params = tiny()
    network, width = as_network(model), model.hidden_size
    before, after = flatten(params), flatten(rotate_values(network, params))
    assert {path for path in before if after[path] is not before[path]} == {QKV, PROJ, "blocks/attn/qkv/bias"}
    for path in (QKV, "blocks/attn/qkv/bias"):
        assert (after[path][..., : 2 * width] == before[path][..., : 2 * width]).all()
        assert not np.allclose(after[path][..., 2 * width :], before[path][..., 2 * width :])
    # Each head's values have the energy that they had.
    energy = lambda a: np.square(np.asarray(a)[..., 2 * width :].reshape(2, width, 2, -1)).sum((1, 3))
    np.testing.assert_allclose(energy(after[QKV]), energy(before[QKV]), rtol=1e-5)
    for path, again in flatten(rotate_values(network, rotate_values(network, params))).items():
        np.testing.assert_allclose(again, before[path], atol=1e-6)


def test_rows_with_one_loud_value_lose_less_in_eight_bits_with_one_scale():
    model, params = tiny()
    channel = 2 * model.hidden_size + 5
    flat = flatten(params)
    loud = vq.dequantize(params)
    loud["blocks"]["attn"]["qkv"]["kernel"] = flat[QKV].at[..., channel].multiply(30.0)
    turned = rotate_values(as_network(model), loud)
    x = jax.random.normal(jax.random.key(3), (64, model.hidden_size))

    def lost(tree: dict) -> float:
        values = x @ flatten(tree)[QKV][0, :, 2 * model.hidden_size :]
        rounded = activations.quantize(values.reshape(1, -1), 8, "symmetric").decode().reshape(values.shape)
        return float(jnp.square(rounded - values).sum() / jnp.square(values).sum())

    assert lost(turned) < lost(loud) / 4


def test_the_method_quantizes_the_rotated_values_and_rotates_nothing_behind_them():
    model, teacher = tiny()
    network = as_network(model)
    settings = dict(weight_bits=8.0, rotation=16)
    source = viditq.source(settings, network, teacher)
    run = passes.begin(model, source, jax.random.key(0))
    made, _ = passes.apply((KMeans(rules=dit_rules(viditq.spec(settings))),), run, source)
    leaves = flatten(made)
    assert leaves[PROJ].rotation == 0 and leaves[PROJ].has_scale and leaves[QKV].rotation == 16
    assert viditq.source({**settings, "rotate_values": False}, network, teacher) is teacher
    assert viditq.source({"rotation": 0}, network, teacher) is teacher
    of = lambda s: {role.pattern: viditq.spec(s)(role).rotation for role in network.stacks[0].roles}
    assert set(of({**settings, "rotate_values": False}).values()) == {16} and set(of({"rotation": 0}).values()) == {0}
    # 8 bits of everything leave the teacher's outputs within 3 %: the rotated values and their reader belong together.
    wanted, found = (model.apply({"params": p}, *inputs(model)) for p in (teacher, made))
    assert float(jnp.square(found - wanted).mean() / jnp.square(wanted).mean()) < 0.03**2
    apart = unflatten({**leaves, QKV: flatten(teacher)[QKV]})
    assert (
        float(jnp.square(model.apply({"params": apart}, *inputs(model)) - wanted).mean() / jnp.square(wanted).mean())
        > 0.1**2
    )


@pytest.mark.parametrize(
    ("heads", "message"), [(0, "heads=0 with 32 values"), (16, "heads of 2 values; wanted a multiple of 4")]
)
def test_heads_that_cannot_be_rotated_are_refused(heads, message):
    model, params = tiny()
    role = Role("attn/proj/kernel", values="attn/qkv/kernel")
    network = Network(model.network().apply, (8, 8, 3), None, stacks=(Stack("blocks", 2, (role,), heads),))
    with pytest.raises(InputError, match=re.escape(message)):
        rotate_values(network, params)
