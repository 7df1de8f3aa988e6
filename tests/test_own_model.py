"""docs/your_own_model.md does what it says, and a network that does not fit is told so in one line."""

import dataclasses
import pathlib
import re
import types

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

import vq4dit_jax as vq
from vq4dit_jax import methods
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.losses import block_distance
from vq4dit_jax.methods.tune import Tune, initial_student
from vq4dit_jax.networks.conditioning import ClassLabels
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.qarray.linear import Linear
from vq4dit_jax.qarray.tree import map_leaves

pytestmark = pytest.mark.once

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "your_own_model.md"
NETWORK, PROGRAM, SAMPLING = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def _run(source: str, names: dict) -> types.SimpleNamespace:
    exec(compile(source, str(PAGE), "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's names stand for after its program has run in an empty folder."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = _run(NETWORK + PROGRAM, {"__name__": "page"})
    return types.SimpleNamespace(**vars(names), working_folder=folder)


# The page ---------------------------------------------------------------------------------------------------------


def test_the_program_is_short():
    assert len(PROGRAM.splitlines()) < 40 and "vq4dit" not in NETWORK


def test_calibration_brings_the_foreign_network_nearer_to_its_teacher(page):
    (kmeans, kmeans_error), (calibrated, error) = page.found["k-means"], page.found["calibrated"]
    assert 0 < calibrated < 0.6 * kmeans
    assert 0 < error < 0.9 * kmeans_error


def test_what_is_loaded_is_what_was_saved(page):
    """Bit for bit, static shapes too, without our DiT; in both formats."""
    about = {"network": "Denoiser", "width": 128, "depth": 2}
    assert page.about == about and page.manifest["model"] == {"class": "foreign", "metadata": about}
    saved = page.packed  # the page loads over the name, so it is saved again from there
    vq.save_safetensors(page.working_folder / "my_model.safetensors", about, saved)
    described, loaded, _ = vq.load_safetensors(page.working_folder / "my_model.safetensors")
    assert described == about
    assert jax.tree.structure(loaded) == jax.tree.structure(saved) == jax.tree.structure(page.kmeans)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), loaded, saved)
    again = methods.held_out_agreement(page.network, page.params, {"loaded": loaded}, 1.5, jax.random.key(3))
    assert again["loaded"] == page.found["calibrated"]


def test_its_size_is_the_count_of_bits(page):
    """Each Dense of the layers: 8 bits for 4 weights, and 256 codewords of 4 float16; nothing else is quantized."""
    flat = flax.traverse_util.flatten_dict(page.params, sep="/")
    kernels = [a for path, a in flat.items() if re.fullmatch(r"layers_\d/.*/kernel", path)]
    weights = sum(a.size for a in kernels)
    assert len(kernels) == 2 * 7
    found = vq.sizes(page.packed)
    assert found.quantized_parameters == weights and found.assignment_bytes == weights // 4
    assert found.codebook_bytes == len(kernels) * 256 * 4 * 2
    assert found.bits_per_quantized_weight == pytest.approx(2 + len(kernels) * 256 * 4 * 16 / weights)
    assert found.parameters == sum(a.size for a in flat.values())


def test_its_parameters_keep_their_names_and_types(page):
    dense = vq.dequantize(page.packed, jnp.float32)
    shape = lambda a: (a.shape, a.dtype)
    assert jax.tree.map(shape, dense) == jax.tree.map(shape, page.params)


def test_it_samples(page):
    names = _run(SAMPLING, dict(vars(page)))
    assert names.images.shape == (4, 32, 32, 3) and names.images.dtype == np.uint8
    sample = lambda params: np.asarray(vq.sample(page.network, params, names.labels, **names.how))
    fp = sample(page.params)
    error = {m: np.linalg.norm(sample(getattr(page, m)) - fp) for m in ("kmeans", "packed")}
    assert 0 < error["packed"] < error["kmeans"]
    # Guidance and both labels matter: one of the two images of class 7 has another key, and that is all.
    assert not np.array_equal(names.images[1], names.images[2])


def test_linear_stands_in_for_dense(page):
    """The page's section on memory: the same parameters, packed ones as they are."""
    names = _run(NETWORK.replace("nn.Dense(", "Linear("), {"__name__": "page", "Linear": Linear})
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    t, y = jnp.asarray([10, 900], jnp.int32), jnp.asarray([0, 10], jnp.int32)
    wanted, _ = page.apply(page.packed, x, t, y)
    as_float32 = map_leaves(
        lambda a: a.with_codebook(a.codebook.astype(jnp.float32)) if isinstance(a, vq.VQArray) else a, page.packed
    )
    found = names.Denoiser().apply({"params": as_float32}, x, t, y)
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=2e-5 * float(jnp.abs(wanted).max()))


# What does not fit ------------------------------------------------------------------------------------------------


def _calibrate(page, network=None, **changes):
    given = {"params": page.params, "packed": page.kmeans, "tune": Tune(steps=1, batch=1), **changes}
    passes = (given.pop("tune"),)
    return vq.calibrate(network or page.network, key=jax.random.key(0), passes=passes, **given)


def _refused(message: str):
    return pytest.raises(InputError, match=message)


def _returning(page, change):
    return dataclasses.replace(page.network, apply=lambda *args: change(*page.apply(*args)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, blocks: out, r"apply returns float32\(2, 32, 32, 3\); wanted a pair"),
        (lambda out, blocks: (out, blocks, 0), "apply returns a tuple of .*; wanted a pair"),
        (lambda out, blocks: (blocks, out), "apply returns a tuple of .*; wanted a pair"),
        (lambda out, blocks: (out, []), "a list of nothing as block outputs"),
        (lambda out, blocks: (out, [out.astype(jnp.int32)]), r"a list of int32\(2, 32, 32, 3\) as block outputs"),
        (lambda out, blocks: (out[..., :2], blocks), r"output \(2, 32, 32, 2\) for x \(2, 32, 32, 3\); wanted"),
        (lambda out, blocks: (out[:, :16], blocks), r"output \(2, 16, 32, 3\) for x"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(page, change, message):
    with _refused(message) as caught:
        _calibrate(page, _returning(page, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_shape": (64, 64, 3)}, r"fails on the params and x \(2, 64, 64, 3\).*is sample_shape=\(64, 64, 3\)"),
        ({"sample_shape": (32, 32, 4)}, r"fails on the params and x \(2, 32, 32, 4\)"),
        ({"sample_shape": (32, 3)}, r"sample_shape=\(32, 3\): wanted \(H, W, C\)"),
    ],
)
def test_wrong_sizes_are_refused(page, changes, message):
    with _refused(message) as caught:
        _calibrate(page, dataclasses.replace(page.network, **changes))
    assert "\n" not in str(caught.value)


def test_a_condition_of_no_classes_is_refused():
    with _refused("num_classes=0: wanted at least 1") as caught:
        ClassLabels(0)
    assert "\n" not in str(caught.value)


def test_a_function_that_cannot_run_quantized_parameters_is_told_how(page):
    def apply(params, x, t, cond):
        output = page.module.apply({"params": params}, x, t, cond)
        return output, [output]

    with _refused("fails on quantized params .*dequantize"):
        _calibrate(page, dataclasses.replace(page.network, apply=apply))


def test_trees_that_do_not_fit_each_other_are_refused(page):
    without = {name: a for name, a in page.kmeans.items() if name != "time"}
    with _refused("time/bias is in one of them alone"):
        _calibrate(page, packed=without)
    wider = page.Denoiser(width=64).init(jax.random.key(0), page.x, page.label, page.label)["params"]
    other = vq.quantize(wider, rules=page.rules, key=jax.random.key(0), max_iterations=1)
    with _refused(r"/kernel stands for weights .* the teacher's are"):
        _calibrate(page, packed=other)
    with _refused("no parameter is quantized"):
        _calibrate(page, packed=page.params)


def test_remat_is_for_the_networks_of_the_library(page):
    with _refused("remat=True is for the networks of this library"):
        _calibrate(page, tune=Tune(steps=1, remat=True))


def test_a_folder_of_other_passes_is_refused(tmp_path):
    model, params = tiny()
    kmeans = vq.quantize(params, 1, key=jax.random.key(0), codebook_dtype=jnp.float16)

    def run(**changes):
        lines = []
        how = dict(passes=(Tune(**{"steps": 2, "batch": 1, **changes}),), folder=tmp_path, on_step=lines.append)
        out = vq.calibrate(model, params, kmeans, key=jax.random.key(0), **how)
        return out, [line["step"] for line in lines]

    first, steps = run()
    again, none = run()
    assert (steps, none) == ([1, 2], [])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), first, again)
    assert jax.tree.map(lambda a: a.dtype, first) == jax.tree.map(lambda a: a.dtype, kmeans)
    with _refused(r"made from something else: passes.00_tune.num_candidates \(3 here, 2 there\)"):
        run(num_candidates=3)


def test_a_rule_that_quantizes_nothing_is_refused(page):
    rules = [(r"layer\d+/.*/kernel", vq.VQSpec(256, 4)), *page.rules]
    with _refused(r"rule 'layer\\\\d\+/.*/kernel' quantizes nothing.*layers_0/"):
        vq.quantize(page.params, rules=rules, key=jax.random.key(0))
    # One that an earlier rule leaves nothing to is no mistake: it is how a single layer is given a rule of its own.
    vq.quantize(page.params, rules=[*page.rules[:1], *page.rules], key=jax.random.key(0), max_iterations=1)


@pytest.mark.parametrize("params", [[np.zeros((4, 4))], {0: np.zeros((4, 4))}, {}])
def test_trees_without_names_are_refused(params):
    with _refused("wanted nested dicts of arrays with names"):
        vq.quantize(params, rules=[(".*", vq.KEEP)], key=jax.random.key(0))


@pytest.mark.parametrize("about", [{"activation": jnp.tanh}, {"rate": float("nan")}])
def test_metadata_that_is_no_json_is_refused(page, tmp_path, about):
    with _refused("is no JSON"):
        vq.save_quantized(tmp_path / "m", about, page.kmeans)
    with _refused("model is a Denoiser; wanted a vq4dit_jax.DiT, or"):
        vq.save_quantized(tmp_path / "m", page.module, page.kmeans)
    assert not list(tmp_path.iterdir())


# The parts --------------------------------------------------------------------------------------------------------


def test_an_unstacked_module_named_blocks_is_not_taken_for_a_stack():
    """Two-dimensional kernels under `blocks` are layers, also where all leading axes happen to agree."""
    params = {"blocks": {"0": {"up": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}}}
    rules = [("blocks/0/up/kernel", vq.VQSpec(4, 2)), (".*", vq.KEEP)]
    packed = vq.quantize(params, rules=rules, key=jax.random.key(0))
    assert packed["blocks"]["0"]["up"]["kernel"].stack == ()
    stacked = {"layers": {"up": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))}}}
    rules = [("layers/1/up/kernel", vq.VQSpec(4, 2)), (".*", vq.KEEP)]
    kept, packed, _ = vq.quantize(stacked, rules=rules, key=jax.random.key(0), stacked=("layers",))["layers"]["up"][
        "kernel"
    ]
    assert kept.shape == (1, 8, 8) and packed.stack == (1,)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_soft_leaves_are_dequantized_as_their_matmul_computes_and_have_a_gradient(stack):
    weight = np.random.default_rng(0).normal(size=(*stack, 8, 12)).astype(np.float32)
    tree = {"blocks": {"kernel": jnp.asarray(weight)}}
    hard = vq.quantize(tree, rules=[(".*", vq.VQSpec(8, 4))], key=jax.random.key(0))
    soft = initial_student(Tune(), tree, hard)["blocks"]["kernel"]
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)

    def through_dense(logits):
        return vq.dequantize({"k": dataclasses.replace(soft, logits=logits)})["k"]

    kernel, layers = jax.jit(through_dense)(soft.logits), stack[0] if stack else 1
    assert kernel.shape == (*stack, 8, 12)
    for i in range(layers):
        one = jax.tree.map(lambda a, i=i: a[i], soft) if stack else soft
        found = x @ np.asarray(kernel).reshape(layers, 8, 12)[i]
        np.testing.assert_allclose(found, np.asarray(one.matmul(jnp.asarray(x))), atol=1e-5)
    gradient = jax.grad(lambda z: jnp.square(through_dense(z)).sum())(soft.logits)
    assert np.isfinite(np.asarray(gradient)).all() and np.asarray(gradient).any()


def test_guidance_is_the_models(page):
    """`Network.combine` against the formula and, of a DiT on latents, against the model's own."""
    out = jax.random.normal(jax.random.key(0), (6, 2, 2, 8))
    network = vq.Network(page.apply, (2, 2, 4), ClassLabels(10))
    label, null = np.asarray(out[:3], np.float64), np.asarray(out[3:], np.float64)
    wanted = np.concatenate([null[..., :4] + 1.5 * (label - null)[..., :4], label[..., 4:]], -1)
    np.testing.assert_allclose(np.asarray(network.combine(out, 1.5)), wanted, atol=1e-6)
    model, params = tiny(in_channels=4)
    x, t = jax.random.normal(jax.random.key(1), (6, 8, 8, 4)), jnp.full((6,), 500)
    x, y = jnp.concatenate([x[:3], x[:3]]), jnp.asarray([0, 1, 2, 5, 5, 5])
    own = model.apply({"params": params}, x, t, y, 1.5, method="forward_with_cfg")[:3]
    found = as_network(model).combine(model.apply({"params": params}, x, t, y), 1.5)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(own))


def test_the_block_distance_weighs_blocks_alike():
    rng = np.random.default_rng(0)
    first, second = (
        {"a": rng.normal(size=(2, 3, 4)).astype(np.float32), "b": [rng.normal(size=(2, 5)).astype(np.float32)]}
        for _ in "ab"
    )
    wanted = np.mean([np.square(first["a"] - second["a"]).mean(), np.square(first["b"][0] - second["b"][0]).mean()])
    assert float(block_distance(first, second)) == pytest.approx(wanted, rel=1e-6)
