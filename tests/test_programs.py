"""What stands in the programs that are compiled: how exact their products are, what memory they need, and how many there are."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import compilations, evaluations, tiny

import vq4dit_jax
from vq4dit_jax import methods
from vq4dit_jax.codebook import solver
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import contrast, loop, solve_layers, variance
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.moments import InputMoments
from vq4dit_jax.methods.tune import Tune, initial_student
from vq4dit_jax.methods.vq4dit import LAYERWISE, passes
from vq4dit_jax.networks.network import as_network, random_problem
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray import vq
from vq4dit_jax.qarray.parts import is_parts
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import dequantize, flatten, quantized_paths

pytestmark = pytest.mark.once
NETWORK = as_network(tiny()[0])
KEY = jax.random.key(0)
MOST_PROGRAMS = 40
"""Of a whole calibration; 122 at 0.1.0."""


@pytest.fixture(scope="module")
def kmeans():
    return quantize(tiny()[1], 2, key=KEY, codebook_dtype=jnp.float16)


@pytest.fixture(scope="module")
def mixed():
    """Blocks of one role with different specs."""
    rules = ((r"blocks/0/mlp/fc1/kernel", VQSpec(64, 2)), (r"blocks/1/attn/proj/kernel", VQSpec(16, 4)), *dit_rules(2))
    found = quantize(tiny()[1], rules=rules, key=KEY)
    assert sum(map(is_parts, jax.tree.leaves(found, is_leaf=is_parts))) == 2
    return found


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its inner ones included, whatever platform they are for."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


@pytest.fixture
def observed_programs(monkeypatch):
    """Of each trajectory that is observed meanwhile its program and the model that is measured: a student that is `given`, or
    whose trajectory it is. None is run; the results are zeros."""
    seen, observed = [], trajectory._observed

    def look(network, sampler, sched, params, problem, scale, given, **static):
        inner = functools.partial(observed, **static)
        trace = jax.make_jaxpr(inner, static_argnums=(0, 1), return_shape=True)
        jaxpr, shapes = trace(network, sampler, sched, params, problem, scale, given)
        seen.append((jaxpr.jaxpr, params if given is None else given))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    monkeypatch.setattr(trajectory, "_observed", look)
    return seen


# Precision: XLA takes TF32 for float32 products on NVIDIA GPUs where nothing is said --------------------------------


def inexact(jaxpr: Any) -> tuple[int, list[str]]:
    """(how many float32 products, those that are not in full precision)."""
    products = [
        e for e in equations(jaxpr) if e.primitive.name == "dot_general" and e.outvars[0].aval.dtype == jnp.float32
    ]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    return len(products), [str(e)[:200] for e in products if e.params["precision"] != highest]


def assert_exact(function: Any, *args: Any) -> None:
    count, wrong = inexact(jax.make_jaxpr(function)(*args).jaxpr)
    assert count and not wrong, f"{len(wrong)} of {count}: {wrong[:3]}"


def test_the_inspection_finds_products_of_less():
    inner = lambda x: jax.lax.scan(
        lambda c, _: (jax.lax.cond(c[0, 0] > 0, lambda a: a @ a, lambda a: a, c), None), x, None, 2
    )
    count, wrong = inexact(jax.make_jaxpr(jax.jit(inner))(jnp.ones((3, 3))).jaxpr)
    assert count == len(wrong) == 1


def test_layers_are_solved_in_full_precision():
    weight, moments, codebook = jnp.ones((12, 8)), jnp.eye(8), jnp.ones((3, 16, 4))
    assert_exact(solver.solve, weight, moments, codebook)
    assert_exact(lambda k, h: vq._solve(k, h, codebook, 1, 1, 1), jnp.ones((2, 8, 12)), jnp.ones((2, 8, 8)))


def test_gains_are_found_in_full_precision():
    seen = InputMoments(jnp.ones((2, 8, 8)), jnp.ones((3, 2, 8)), jnp.ones(3))
    leaf = vq.from_codes(jnp.ones((2, 1, 4, 4)), np.zeros((2, 12, 2), int))
    restored = functools.partial(solve_layers._restored, (("w", None),), (False,))
    assert_exact(restored, {"w": jnp.ones((2, 8, 12))}, [leaf], {"w": seen})


def test_the_variance_is_fitted_in_full_precision(kmeans):
    _, teacher = tiny()
    first = evaluations(NETWORK, teacher, key=KEY)[0]
    assert_exact(variance._Equations(NETWORK, 4, 1.5), first, kmeans)
    layer = teacher["final_layer"]["linear"]
    changed = functools.partial(variance._changed, 3)
    assert_exact(changed, jnp.eye(33), jnp.ones((33, 12)), layer["kernel"], layer["bias"])


def test_images_for_the_contrast_are_made_in_full_precision(kmeans, observed_programs):
    """The very programs that the pass runs, of the teacher and of the student."""
    run = methods.begin(tiny()[0], tiny()[1], KEY)
    contrast.FitContrast(images=2, num_steps=2)(run, kmeans, KEY)
    seen = [inexact(program) for program, _ in observed_programs]
    assert len(seen) == 3
    assert all(count and not wrong for count, wrong in seen), seen


def test_a_step_counts_ratios_in_integers(kmeans):
    """All the way to its histogram: float32 stops at 2^24, whatever it is cast to in the end."""
    _, teacher = tiny()
    student = initial_student(Tune(), teacher, kmeans)
    first = evaluations(NETWORK, teacher, key=KEY)[0]
    update = lambda state: Tune().update(NETWORK, state, student, first, jnp.bool_(True))
    program = jax.make_jaxpr(update)(Tune().init(student)).jaxpr
    counts = [v.aval for e in equations(program) for v in e.outvars if getattr(v.aval, "shape", ()) == (20,)]
    assert counts and all(jnp.issubdtype(a.dtype, jnp.integer) for a in counts), counts


# Memory -----------------------------------------------------------------------------------------------------------


def stacks(jaxpr: Any, teacher: Any, paths: list[str]) -> list[str]:
    """Results in float32 that are as large as a whole stack (L, I, O) of a quantized kernel, in either order."""
    shapes = {flatten(teacher)[path].shape for path in paths}
    shapes |= {(depth, rows, columns) for depth, columns, rows in shapes}
    made = ((e.primitive.name, v.aval) for e in equations(jaxpr) for v in e.outvars)
    return [f"{name} {a}" for name, a in made if getattr(a, "shape", ()) in shapes and a.dtype == jnp.float32]


@pytest.mark.parametrize("candidates", [1, 3])  # not the number of blocks
def test_the_step_of_a_model_in_parts_decodes_no_whole_stack(mixed, candidates):
    """At 0.1.0 it was decoded before the loss: 2.7 GB and as much for its gradient at XL/2."""
    _, teacher = tiny()
    tune = Tune(batch=2, trajectory_steps=3, num_candidates=candidates)
    student = initial_student(tune, teacher, mixed)
    state, walk = tune.init(student), loop.begin(tune, NETWORK, teacher, KEY, jnp.int32(0))
    step = lambda student, teacher: loop.step(tune, NETWORK, state, walk, student, teacher, KEY)
    paths = quantized_paths(mixed)
    assert stacks(jax.make_jaxpr(step)(student, teacher).jaxpr, teacher, paths) == []
    assert stacks(jax.make_jaxpr(lambda p: dequantize(p, jnp.float32))(mixed).jaxpr, teacher, paths)


def test_measures_of_a_model_in_parts_decode_no_whole_stack(mixed, observed_programs):
    """Held-out agreement, contrast and variance get it packed, and it stays so inside."""
    model, teacher = tiny()
    paths, run = quantized_paths(mixed), methods.begin(model, teacher, KEY)
    methods.held_out_agreement(model, teacher, {"mixed": mixed}, 1.5, KEY)
    contrast.FitContrast(images=2, num_steps=2)(run, mixed, KEY)
    variance.FitVariance(images=2, num_steps=2)(run, mixed, KEY)
    measured = [quantized_paths(params) for _, params in observed_programs]
    assert measured == [paths, [], paths, paths, paths]  # the second is the teacher, for the contrast
    assert [stacks(program, teacher, paths) for program, _ in observed_programs] == [[]] * 5


def test_frozen_dicts_with_blocks_of_different_bits_run(mixed):
    model, teacher = tiny()
    frozen = flax.core.freeze(mixed)
    first = evaluations(model, teacher, key=KEY)[0]
    wanted, found = (NETWORK.apply(params, first.x, first.t, first.cond).output for params in (mixed, frozen))
    np.testing.assert_array_equal(found, wanted)
    settings = (Tune(steps=1, batch=2, trajectory_steps=2),)
    how = dict(key=KEY, passes=settings)
    wanted = methods.calibrate(model, teacher, mixed, **how)
    found = methods.calibrate(model, flax.core.freeze(teacher), frozen, **how)
    jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(found), wanted)


# How many programs ------------------------------------------------------------------------------------------------


def test_a_second_call_compiles_nothing(kmeans):
    model, teacher = tiny()

    def calls():
        problem = random_problem(NETWORK, teacher, KEY, images=2, cfg_scale=1.5)
        trajectory.observed(NETWORK, teacher, problem, num_steps=3, scale=1.5)
        methods.held_out_agreement(model, teacher, {"kmeans": kmeans}, 1.5, KEY)
        vq4dit_jax.sample(model, kmeans, np.arange(2), key=KEY, num_steps=2)
        vq4dit_jax.activation_ranges(*tiny(hidden_size=64), key=KEY, weights="int8", images=2, num_steps=2)
        settings = (Tune(steps=2, batch=2, trajectory_steps=2),)
        return methods.calibrate(model, teacher, kmeans, key=KEY, passes=settings)

    with compilations() as first:
        calls()
    with compilations() as second:
        calls()
    assert first and not second, second


def test_a_whole_calibration_compiles_few_programs_and_a_second_one_none(kmeans):
    """Allocation by layers, layers solved, gains, steps, contrast, variance."""
    model, teacher = tiny()
    settings = {**LAYERWISE, "allocation": "layers", "budget": 3.0, "gains": True, "steps": 2, "batch": 2}
    calibrate = lambda: methods.calibrate(model, teacher, kmeans, key=KEY, passes=passes(settings, trajectory_steps=3))
    jax.clear_caches()
    with compilations() as programs:
        calibrate()
    with compilations() as second:
        calibrate()
    print(f"{len(programs)} programs: {', '.join(sorted(programs))}")
    assert len(programs) <= MOST_PROGRAMS and not second, second
