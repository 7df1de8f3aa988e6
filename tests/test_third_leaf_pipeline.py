"""The third leaf through a whole run: the config's rules name its kind, and metrics, layers, files and the report have it."""

import json

import jax
import numpy as np
import pytest
import test_third_leaf  # registers the kind

import vq4dit_jax as vq
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import pipeline

KIND = test_third_leaf.LowRank.kind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run of a small random model without an evaluation network."""
    folder = tmp_path_factory.mktemp("third")
    c = configs.default()
    c.model.variant, c.model.random_init = "DiT-S/8", True
    c.model.depth, c.model.num_classes, c.model.input_size = 2, 5, 8
    c.quantize.rules = (
        (r"blocks/\d+/mlp/fc1/kernel", {"kind": KIND, "rank": 3}),
        (r"blocks/\d+/mlp/fc2/kernel", {"kind": "int", "bits": 4, "group": 64}),
        (r"blocks/\d+/attn/qkv/kernel", (16, 4, 3)),
        (r".*", ()),
    )
    c.quantize.kmeans_iterations = 1
    c.quantize.method = "rules"
    c.sample.num_images, c.sample.batch, c.sample.steps, c.sample.grid_images = 2, 2, 2, 2
    configs.validate(c)
    pipeline.run(c, str(folder), "python -m vq4dit_jax.main")
    return folder


def test_a_run_has_its_bytes_layers_and_files(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["quality"]) == ["fp", "quantized"]
    assert {p.name for p in (finished / "samples").glob("*.npz")} == {"fp.npz", "quantized.npz"}
    model, packed, manifest = vq.load_quantized(finished / "quantized")
    found = vq.sizes(packed)
    size = metrics["size"]
    assert size["assignment_bytes"] == found.assignment_bytes and size["codebook_bytes"] == found.codebook_bytes
    assert {facts["kind"] for facts in manifest["quantized"].values()} == {KIND, "int", "vq"}
    layers = json.loads((finished / "layers.json").read_text())
    assert {row["kind"] for row in layers} == {KIND, "int", "vq"}
    assert all(0 < row["final_error"] < 2 and row["bits"] > 0 for row in layers)
    report = (finished / "report.html").read_text()
    assert all(row["path"] in report for row in layers)
    same = vq.load_safetensors(finished / "model.safetensors")[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), packed, same)
