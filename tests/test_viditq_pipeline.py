"""ViDiT-Q through a whole run: mixed bits, 8-bit activations in the sampler, files, table and report."""

import json
import re

import jax
import numpy as np
import pytest
from models import inputs, tiny

import vq4dit_jax as vq
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import agreement, passes, viditq
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import pipeline


def _config():
    c = configs.w4a8_mp(configs.default())
    c.model.variant, c.model.random_init = "DiT-S/8", True
    c.viditq.mixed_bits, c.viditq.budget = (4, 8), 5.0
    c.calibration.batch = 2
    c.sample.num_images, c.sample.batch, c.sample.steps, c.sample.grid_images = 2, 2, 2, 2
    return c


@pytest.fixture(scope="module", autouse=True)
def small():
    """A network of two blocks in the place of the variant's, and a short held-out trajectory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_teacher", lambda c, key: tiny())
        patch.setattr(agreement, "HELD_OUT_IMAGES", 2)
        patch.setattr(agreement, "HELD_OUT_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run without an evaluation network."""
    folder, c = tmp_path_factory.mktemp("viditq"), _config()
    configs.validate(c)
    pipeline.run(c, str(folder), "python -m vq4dit_jax.main")
    return folder


def test_a_run_has_the_models_of_the_method_and_their_names(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["quality"]) == ["fp", "rtn", "w4a8-mp"]
    c = metrics["calibration"]
    assert 0 < c["hard_l_d"] < c["kmeans_l_d"] and 0 < c["hard_eps_error"] < c["kmeans_eps_error"]
    assert 4 < metrics["size"]["bits_per_quantized_weight"] <= 5.0
    assert "ViDiT-Q W4A8, mixed" in (finished / "table.md").read_text()
    report = (finished / "report.html").read_text()
    assert "Bits of every layer" in report and report.count("<strong>") >= 10
    assert "Rounded to nearest" in report and "4 bits" in report


def test_files_hold_the_model_that_runs_in_8_bits(finished):
    model, packed, _ = vq.load_quantized(finished / "quantized")
    same = vq.load_safetensors(finished / "model.safetensors")[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), packed, same)
    ready = vq.prepare_for_inference(packed, "int8")
    runs = ready["blocks"] if isinstance(ready["blocks"], tuple) else (ready["blocks"],)
    assert {str(run.operand_dtype) for run in runs} == {"int8"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("viditq.weight_bits", 9.0, "viditq.weight_bits=9 of integers: wanted a whole number from 2 to 8"),
        ("quantize.method", "vidit", "--config.quantize.method=vidit: wanted one of vq4dit, viditq, rules"),
        ("viditq.mixed_by", "blocks", "mix.by='blocks': wanted one of layers, roles"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_the_run(key, value, message):
    c = _config()
    section, name = key.split(".")
    c[section][name] = value
    with pytest.raises(InputError, match=re.escape(message)):
        configs.validate(c)


def test_a_budget_that_cannot_be_met_is_refused_before_the_run(tmp_path):
    c = _config()
    c.viditq.mixed_bits, c.viditq.budget = (8,), 5.0
    with pytest.raises(InputError, match="--config.viditq.budget=5 bits a weight: the least that 8 bits take"):
        pipeline.run(c, str(tmp_path), "python -m vq4dit_jax.main")
    assert not (tmp_path / "calibration").exists()


def test_a_flow_network_goes_through_the_same_passes_and_runs_in_8_bits():
    """SiT is DiT's own modules with a flow: balance, rotation and solved weights, then int8 products in its sampler."""
    model, teacher = tiny(predicts="flow", learn_sigma=False)
    settings = {"weight_bits": 4.0, "rotation": 16}
    run = passes.begin(model, teacher, jax.random.key(0))
    rounded, _ = passes.apply((KMeans(rules=dit_rules(viditq.spec(settings))),), run, teacher)
    solved, _ = passes.apply(viditq.passes(settings, {"batch": 2}), run, rounded)
    found = agreement.held_out_agreement(model, teacher, {"a": rounded, "b": solved}, 1.5, jax.random.key(1))
    assert 0 < found["b"][1] < found["a"][1]
    ready = vq.prepare_for_inference(solved, "int8")
    how = dict(key=jax.random.key(2), num_steps=3, cfg_scale=1.5)
    exact, mine = (np.asarray(vq.sample(model, tree, np.arange(2), **how)) for tree in (solved, ready))
    # bfloat16's roundings make 0.008 of it; the weights' make 0.044, which both have.
    assert np.linalg.norm(exact - mine) < 0.02 * np.linalg.norm(exact)
    x, t, y = inputs(model)
    text = jax.jit(model.apply).lower({"params": ready}, x, t.astype(np.float32) / 1000, y).as_text()
    products = re.findall(r"dot_general.*: \((tensor<[^>]*>), (tensor<[^>]*>)\)", text)
    # qkv, proj, fc1 and fc2 in the loop over blocks, and adaLN of all blocks.
    assert sum(all(kind.endswith("xi8>") for kind in pair) for pair in products) == 5
