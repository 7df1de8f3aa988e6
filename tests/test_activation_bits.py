"""Activation bits by layer and range of time."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

import vq4dit_jax as vq
from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import activations
from vq4dit_jax.methods import passes, viditq
from vq4dit_jax.methods.activation_bits import MixActivations, _by_range
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.operand import OperandSpec
from vq4dit_jax.qarray.spec import IntSpec
from vq4dit_jax.qarray.tree import at_time, flatten, map_quantized, matrices, sizes
from vq4dit_jax.reporting.markup import render
from vq4dit_jax.reporting.sensitivity import sensitivity as report_of

BITS = (4, 8)


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_best_of_all_that_fit(seed):
    rng = np.random.default_rng(seed)
    wanted = [("a", 0), ("a", 1), ("b", None)]
    inputs = {one: int(rng.integers(1, 4)) * 16 for one in wanted}
    scale = {one: rng.uniform(0.1, 10, 2) for one in wanted}
    errors = {b: {one: scale[one] * 4.0**-b for one in wanted} for b in BITS}
    chosen = MixActivations(6.0, BITS, ranges=2).choose(wanted, inputs, errors)
    cost = lambda choice: sum(inputs[one] * b for one, own in choice.items() for b in own)
    error = lambda choice: sum(errors[b][one][r] for one, own in choice.items() for r, b in enumerate(own))
    every = itertools.product(itertools.product(BITS, repeat=2), repeat=3)
    fitting = [c for own in every if cost(c := dict(zip(wanted, own, strict=True))) <= 6 * 2 * sum(inputs.values())]
    assert chosen in fitting and len(fitting) < 64
    assert error(chosen) == pytest.approx(min(map(error, fitting)))


def test_an_evaluation_counts_in_the_range_that_it_lies_in():
    done = np.array([0.0, 0.2, 0.49, 0.5, 0.9, 1.0])
    np.testing.assert_array_equal(_by_range(np.arange(6.0), done, 2), [0 + 1 + 2, 3 + 4 + 5])
    np.testing.assert_array_equal(_by_range(np.ones(6), done, 5), [1, 1, 2, 0, 2])


def test_the_way_from_noise_to_data():
    t = jnp.array([999, 499, 0])
    np.testing.assert_allclose(Process().done(t), [0, 0.5, 0.999], atol=1e-6)
    at = jnp.array([0.0, 0.25, 1.0], jnp.float32)
    np.testing.assert_array_equal(Process("flow", data_time=1).done(at), at)
    np.testing.assert_array_equal(Process("flow", data_time=0).done(at), 1 - at)


@pytest.mark.parametrize("grid", activations.KINDS)
def test_a_leaf_at_a_time_is_the_leaf_with_the_bits_of_its_range(grid):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((24, 32)).astype(np.float32), jnp.asarray(rng.standard_normal((5, 32)), jnp.float32)
    leaf = OperandSpec(IntSpec(8), 8, grid, 16).quantize(weight, jax.random.key(0))
    timed = dataclasses.replace(leaf, times=jnp.asarray([4, 8, 6], jnp.int8))
    for done, bits in ((0.0, 4), (0.3, 4), (0.34, 8), (0.99, 6), (1.0, 6)):
        fixed = dataclasses.replace(leaf, bits=bits)
        found = jax.jit(lambda x, done: timed.at(done).matmul(x))(x, jnp.float32(done))
        np.testing.assert_allclose(found, fixed.matmul(x), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(timed.at(jnp.float32(0)).matmul(x) - leaf.matmul(x))).max() > 0.1
    with pytest.raises(
        InputError, match="activations have other bits at other times; run the network through its Network"
    ):
        timed.matmul(x)
    assert timed.cost().table_bytes == leaf.cost().table_bytes + 3


@pytest.fixture(scope="module")
def mixed():
    model, teacher = tiny()
    settings = {"rotation": 16, "balance": False, "centre": False, "solve": False}
    settings |= {"activation_budget": 6.0, "mixed_activation_bits": BITS, "time_ranges": 2}
    run = passes.begin(model, teacher, jax.random.key(0))
    rounded, _ = passes.apply((KMeans(rules=dit_rules(viditq.spec(settings))),), run, teacher)
    found, (report,) = passes.apply(viditq.passes(settings, {"batch": 2}), run, rounded)
    return model, rounded, found, report


def test_a_mixed_model_keeps_its_budget_and_runs_each_range_with_its_bits(mixed):
    model, rounded, found, report = mixed
    spent = total = 0
    for path, block, leaf in matrices(found):
        if "adaLN" in path:
            assert leaf.times is None
            continue
        assert leaf.times.tolist() == list(report["bits"][path][block])
        spent, total = spent + leaf.matrix[1] * int(leaf.times.sum()), total + 2 * leaf.matrix[1]
    assert 5.5 < spent / total <= 6.0
    for errors in report["sensitivity"].values():
        assert (np.asarray(errors["8"]) < np.asarray(errors["4"])).all() and np.shape(errors["4"]) == (2, 2)
    network, x = model.network(), jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    run = jax.jit(lambda tree, t: network.run(tree, x, jnp.full(2, t), jnp.arange(2))[0])
    for t, r in ((999, 0), (500, 0), (499, 1), (0, 1)):
        of_range = lambda leaf, r=r: (
            leaf if leaf.times is None else dataclasses.replace(leaf, times=leaf.times[..., r : r + 1])
        )
        wanted = run(map_quantized(of_range, found), t)
        np.testing.assert_array_equal(run(found, t), wanted)
    assert np.abs(np.asarray(run(found, 0) - run(rounded, 0))).max() > 1e-3
    assert at_time(rounded, lambda: pytest.fail("no leaf has times")) is rounded


def test_its_file_is_read_back_and_the_kernels_refuse_it(mixed, tmp_path):
    model, _, found, _ = mixed
    vq.save_quantized(tmp_path / "packed", model, found)
    _, again, _ = vq.load_quantized(tmp_path / "packed")
    assert sizes(again) == sizes(found)
    for path, leaf in flatten(again).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, flatten(found)[path])
    with pytest.raises(InputError, match="its activations have other bits at other times, and all kernels read 8 bits"):
        vq.prepare_for_inference(found, "int8")


def test_the_report_has_a_line_for_each_range_and_number_of_bits(mixed):
    report = mixed[3]
    text = render(report_of([{"name": "mix_activations", **report}]))
    assert text.count("range 1, 4 bits") == text.count("range 2, 8 bits") == 4
    assert text.count("<strong>") == 4 * 2 * 2  # roles, ranges, blocks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_budget": 3.0}, "mix_activations.budget=3: wanted at least the least of bits=(4, 6, 8)"),
        ({"activation_budget": 6.0, "activation_bits": 6}, "viditq.activation_bits=6 downwards; wanted the largest of"),
        ({"activation_budget": 6.0, "time_ranges": 11}, "mix_activations.ranges=11: wanted 1 to 10"),
        (
            {"activation_budget": 6.0, "mixed_activation_bits": (1, 8)},
            "mix_activations.bits=(1, 8): wanted whole numbers",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        viditq.check(settings)
    assert viditq.name({"activation_budget": 5.5, "weight_bits": 4.0}) == "w4a5.5-mp"
