"""Mixed precision: the bits of each layer's integer weights, within a budget."""

import itertools
import re

import jax
import numpy as np
import pytest
from models import tiny

import vq4dit_jax as vq
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import passes, sensitivity, viditq
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.methods.mixed import Mix
from vq4dit_jax.networks.network import random_problem
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.spec import IntSpec
from vq4dit_jax.qarray.tree import flatten, matrices, replace, sizes

BITS = (2, 4, 8)
FEW = (3, 8)
"""Of the model, because every form compiles programs of its own."""
WANTED = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", None)]


def _menus(seed: int) -> tuple[dict, dict, int]:
    """(bits stored, errors) by bits and matrix, and how many weights there are."""
    rng = np.random.default_rng(seed)
    weights = {one: int(rng.integers(1, 5)) * 8 for one in WANTED}
    costs = {b: {one: b * weights[one] for one in WANTED} for b in BITS}
    scale = {one: rng.uniform(0.1, 10) for one in WANTED}
    errors = {b: {one: scale[one] * 4.0**-b for one in WANTED} for b in BITS}
    return costs, errors, sum(weights.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["layers", "roles"])
def test_the_choice_is_the_best_of_all_that_fit(seed, by):
    costs, errors, weights = _menus(seed)
    chosen = Mix(3.5, BITS, by).choose(WANTED, costs, errors, weights)
    total = lambda of, choice: sum(of[b][one] for one, b in choice.items())
    fitting = []
    for bits in itertools.product(BITS, repeat=len(WANTED)):
        choice = dict(zip(WANTED, bits, strict=True))
        alike = all(choice[path, 0] == choice[path, 1] for path in ("a", "b"))
        if total(costs, choice) <= 3.5 * weights and (by == "layers" or alike):
            fitting.append(choice)
    assert chosen in fitting
    assert total(errors, chosen) == pytest.approx(min(total(errors, choice) for choice in fitting))


def test_a_budget_below_the_least_is_refused_with_what_it_would_take():
    costs, errors, weights = _menus(0)
    with pytest.raises(
        InputError, match=re.escape("viditq.budget=1.5 bits a weight: the least that 2 bits take with their")
    ):
        Mix(1.5, BITS).choose(WANTED, costs, errors, weights)


@pytest.fixture(scope="module")
def mixed():
    model, teacher = tiny()
    spec = viditq.spec({"weight_bits": 4, "weight_group": 16, "rotation": 16})
    run = passes.begin(model, teacher, jax.random.key(0))
    rounded, _ = passes.apply((KMeans(rules=dit_rules(spec)),), run, teacher)
    budget = sizes(rounded).bits_per_quantized_weight
    found, (report,) = passes.apply((Mix(budget, FEW, images=2),), run, rounded)
    return model, teacher, rounded, found, report


def test_the_error_of_the_prediction_is_that_of_a_teacher_with_one_decoded_matrix():
    """Against the definition: every step's prediction of a dense network, of which one block's weights are the decoded ones."""
    model, teacher = tiny()
    network, (path, block) = model.network(), ("blocks/mlp/fc1/kernel", 1)
    packed = vq.quantize(teacher, rules=dit_rules(lambda role: IntSpec(3)), key=jax.random.key(0))
    how = dict(images=2, cfg_scale=1.5)
    measured = sensitivity.one_at_a_time(
        network, teacher, packed, [(path, block)], key=jax.random.key(3), error="prediction", **how
    )
    decoded = np.array(flatten(teacher)[path])
    decoded[block] = np.asarray(flatten(packed)[path].decode())[block].T
    problem = random_problem(network, teacher, jax.random.key(3), **how)
    _, steps = trajectory.observed(network, teacher, problem, num_steps=10, scale=1.5, observe=_keep)
    wanted = {}
    for name, student in {"one": replace(teacher, {path: decoded}), "all": vq.dequantize(packed)}.items():
        run = jax.jit(lambda x, t, cond, student=student: network.run(student, x, t, cond)[0])
        predict = lambda out: np.asarray(network.prediction(out, 1.5), np.float64)
        each = [jax.tree.map(lambda a, i=i: a[i], steps) for i in range(10)]
        wanted[name] = sum(np.square(predict(run(x, t, cond)) - predict(out)).mean() for x, t, cond, out in each)
    one = measured.alone[path, block]
    assert one == pytest.approx(wanted["one"], rel=1e-3)
    assert measured.by_step[path, block].sum() == pytest.approx(one, rel=1e-5) and len(measured.by_step) == 1
    assert measured.together == pytest.approx(wanted["all"], rel=1e-3) and measured.together > one
    assert measured.done[0] == 0 and (np.diff(measured.done) > 0).all() and measured.done[-1] < 1


def _keep(evaluation: trajectory.Evaluation, given) -> tuple:
    return evaluation.x, evaluation.t, evaluation.cond, evaluation.output


def test_a_mixed_model_keeps_its_budget_and_is_what_the_report_says(mixed):
    _, _, rounded, found, report = mixed
    budget = sizes(rounded).bits_per_quantized_weight
    assert 0.8 * budget < sizes(found).bits_per_quantized_weight <= budget
    for path, block, leaf in matrices(found):
        assert leaf.weight.bits == report["bits"][path][block]
        assert leaf.weight.group == (None if leaf.weight.bits == 8 else 16)
    assert len({bits for own in report["bits"].values() for bits in own}) > 1
    for path, by_bits in report["sensitivity"].items():
        assert list(by_bits) == ["3", "8"] and all(len(own) == 2 for own in by_bits.values())
        assert (np.asarray(by_bits["8"]) < np.asarray(by_bits["3"])).all(), path
    assert set(report["groups"]) == {"self", "mlp", "conditioning"}
    for bits in ("3", "8"):
        every = sum(sum(own[bits]) for own in report["sensitivity"].values())
        assert sum(own[bits] for own in report["groups"].values()) == pytest.approx(every, rel=1e-3)


def test_a_mixed_model_is_sampled(mixed):
    model, _, _, found, _ = mixed
    images = vq.sample(model, found, np.arange(2), key=jax.random.key(0), num_steps=2)
    assert images.shape == (2, 8, 8, 3) and np.isfinite(np.asarray(images)).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(bits=(1, 4)), "mix.bits=(1, 4): wanted whole numbers from 2 to 8"),
        (dict(by="blocks"), "mix.by='blocks': wanted one of layers, roles"),
    ],
)
def test_settings_out_of_range_are_refused(how, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Mix(4.0, **how)


def test_a_budget_goes_with_solved_integers_and_names_the_model():
    assert viditq.name({"weight_bits": 4.0, "budget": 4.0}) == "w4a8-mp"
    assert [one.name for one in viditq.passes({"budget": 4.0}, {})] == ["balance", "mix"]
    for more in ({"solve": False}, {"weights": "codebooks", "weight_bits": 2.0}):
        with pytest.raises(InputError, match="viditq.budget=4: bits are mixed of integers that are solved"):
            viditq.check({"budget": 4.0, **more})
