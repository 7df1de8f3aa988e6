"""Saved models come back bit for bit, describe themselves, and open without this library."""

import hashlib
import json
import os
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import inputs, tiny

from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.rules import KEEP
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import dequantize, flatten, map_leaves, sizes
from vq4dit_jax.storage import checkpoint, provenance


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with 2-bit, 3-bit and mixed leaves in both formats."""
    folder = tmp_path_factory.mktemp("saved")
    model, params = tiny(depth=3)
    rules = (
        (r"blocks/\d+/mlp/fc1/kernel", VQSpec(64, 2)),
        (r"blocks/1/mlp/fc2/kernel", VQSpec(16, 2)),
        (r"blocks/2/mlp/fc2/kernel", KEEP),
        *dit_rules(2),
    )
    packed = quantize(params, key=jax.random.key(0), rules=rules, codebook_dtype=jnp.bfloat16)
    checkpoint.save_quantized(folder / "orbax", model, packed, {"note": "x"})
    checkpoint.save_safetensors(folder / "model.safetensors", model, packed, {"note": "x"})
    return folder, model, packed


@pytest.mark.parametrize(
    ("load", "name"),
    [(checkpoint.load_quantized, "orbax"), (checkpoint.load_safetensors, "model.safetensors")],
)
def test_a_saved_model_comes_back_bit_for_bit(saved, load, name):
    folder, model, packed = saved
    loaded_model, loaded, manifest = load(folder / name)
    assert loaded_model == model and manifest["extra"] == {"note": "x"}
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(packed), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    out = loaded_model.apply({"params": loaded}, *inputs(model))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(model.apply({"params": packed}, *inputs(model))))


def test_plain_orbax_and_five_lines_of_numpy_decode_it(saved):
    """The recipe of docs/checkpoints.md: nothing of ours is imported for it."""
    from orbax.checkpoint import v1 as ocp

    folder, _, packed = saved
    tree = ocp.load(folder / "orbax")
    manifest = ocp.metadata(folder / "orbax").custom_metadata
    leaf, facts = tree["blocks"]["mlp"]["fc1"]["kernel"], manifest["quantized"]["blocks/mlp/fc1/kernel"]

    (rows, columns), bits, d = facts["shape"], facts["code_bits"], facts["subvector"]
    codebook, packed_codes = np.asarray(leaf["codebook"][0]), np.asarray(leaf["assignments"][0])  # block 0
    codes = np.unpackbits(packed_codes, axis=-1, bitorder="little")[:, : columns // d * bits]
    codes = codes.reshape(rows, columns // d, bits) @ (1 << np.arange(bits))
    group = np.arange(rows)[:, None] // (rows // facts["groups"])
    weight = codebook[group, codes].reshape(rows, columns)

    wanted = dequantize(packed)["blocks"]["mlp"]["fc1"]["kernel"][0].T
    np.testing.assert_array_equal(weight.astype(np.float32), np.asarray(wanted, np.float32))


def test_bytes_on_disk_are_the_count_of_bits(tmp_path):
    model, params = tiny(hidden_size=192, num_heads=6, depth=4, mlp_ratio=4.0, input_size=16)
    packed = quantize(params, 2, key=jax.random.key(0), codebook_dtype=jnp.float16, max_iterations=1)
    packed = map_leaves(lambda a: a if hasattr(a, "codebook") else a.astype(jnp.float16), packed)
    checkpoint.save_quantized(tmp_path / "orbax", model, packed)
    checkpoint.save_safetensors(tmp_path / "file", model, packed)
    counted = sizes(packed)
    total = counted.assignment_bytes + counted.codebook_bytes + counted.other_bytes
    for name in ("orbax", "file"):
        assert files.bytes_on_disk(tmp_path / name) == pytest.approx(total, rel=0.05)


def test_saving_again_replaces_what_was_there(tmp_path):
    model, params = tiny()
    for seed in (0, 1):
        packed = quantize(params, 2, key=jax.random.key(seed), max_iterations=1)
        checkpoint.save_quantized(tmp_path / "m", model, packed)
    _, loaded, _ = checkpoint.load_quantized(tmp_path / "m")
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_missing_truncated_and_foreign_files_are_input_errors(saved, tmp_path):
    folder, _, _ = saved
    with pytest.raises(InputError, match="no such folder"):
        checkpoint.load_quantized(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file"):
        checkpoint.load_safetensors(tmp_path / "nowhere")
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated or damaged"):
        checkpoint.load_safetensors(tmp_path / "half")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="no vq4dit-jax manifest"):
        checkpoint.load_safetensors(tmp_path / "foreign")
    checkpoint.save_tree(tmp_path / "other", {"a": np.zeros(3)}, {})
    with pytest.raises(InputError, match="no vq4dit-jax model"):
        checkpoint.load_quantized(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no readable orbax checkpoint"):
        checkpoint.load_quantized(tmp_path / "empty")


def test_a_newer_format_and_a_damaged_code_are_refused(saved, tmp_path):
    folder, model, packed = saved
    manifest = checkpoint.make_manifest(model, packed)
    arrays = checkpoint.flatten(packed)
    from safetensors.numpy import save_file

    def write(name, arrays, manifest):
        save_file(arrays, tmp_path / name, metadata={"manifest": json.dumps(manifest)})
        return tmp_path / name

    with pytest.raises(InputError, match="version 3"):
        checkpoint.load_safetensors(write("newer", arrays, {**manifest, "version": 3}))
    codes = "blocks/mlp/fc2/kernel/part_0/assignments"
    with pytest.raises(InputError, match="wanted uint8"):
        checkpoint.load_safetensors(write("short", {**arrays, codes: arrays[codes][..., 1:].copy()}, manifest))
    without = {name: a for name, a in arrays.items() if name != codes}
    with pytest.raises(InputError, match="in the manifest and not in the file"):
        checkpoint.load_safetensors(write("without", without, manifest))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_states_of_any_structure_come_back(tmp_path):
    state = (jnp.arange(3), {"a/b": jnp.float32(2), "c": [jnp.ones((2, 2), bool)]})
    checkpoint.save_state(tmp_path / "s", state, {"step": 7})
    loaded, metadata = checkpoint.load_state(tmp_path / "s", jax.tree.map(jnp.zeros_like, state))
    assert metadata == {"step": 7}
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    with pytest.raises(InputError, match="wanted int32"):
        checkpoint.load_state(tmp_path / "s", (jnp.arange(4), state[1]))


# Files of 0.1.0 ---------------------------------------------------------------------------------------------------

DATA = pathlib.Path(__file__).parent / "data"
OLD_DIGEST = "71bcfae8e88a398707dacd67796f1bab6e3e5badea2e2d75fb83f7dd4587886a"
"""Of all arrays, as 0.1.0 loads its own file (`provenance.digest`)."""
OLD_WEIGHTS = "822fcb5c9624db7883988b5351d38d3c5c9e4d549403680ec51cd6ff6ec70540"
"""SHA-256 of the float32 values of its `dequantize`, by path."""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with what 0.1.0 wrote: 6- and 8-bit codes, one leaf in parts, float16 codebooks."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA / "quantized_0.1.0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    (folder / "model_0.1.0.safetensors").write_bytes((DATA / "model_0.1.0.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("load", "name"),
    [(checkpoint.load_quantized, "quantized_0.1.0"), (checkpoint.load_safetensors, "model_0.1.0.safetensors")],
)
def test_files_of_the_first_version_load_to_the_same_bits(old, load, name):
    model, params, manifest = load(old / name)
    assert manifest["version"] == 1 and model == tiny()[0]
    assert provenance.digest(params) == OLD_DIGEST
    weights = hashlib.sha256()
    for _, leaf in sorted(flatten(dequantize(params, jnp.float32)).items()):
        weights.update(np.ascontiguousarray(leaf).tobytes())
    assert weights.hexdigest() == OLD_WEIGHTS
    again = checkpoint.make_manifest(model, params, manifest["extra"])
    assert {**again, "version": 1, "model": None} == {
        **manifest,
        "model": None,
        "quantized": {name: {"kind": "vq", **facts} for name, facts in manifest["quantized"].items()},
    }


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    """In another process too, whatever the order of the caller's dicts."""
    folder, model, packed = saved
    reordered = {name: packed[name] for name in sorted(packed, reverse=True)}
    for name, extra in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        checkpoint.save_safetensors(tmp_path / name, model, reordered if name == "b" else packed, extra)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # Entries of a header's metadata come in an order that differs from process to process, so there is one.
    raw = (tmp_path / "a").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == ["manifest"]


def test_an_orbax_folder_does_not_say_where_it_was_written(saved):
    folder, _, _ = saved
    for file in (folder / "orbax").rglob("*"):
        if file.is_file():
            assert str(folder).encode() not in file.read_bytes(), file


# Damage -----------------------------------------------------------------------------------------------------------


def _written(saved, tmp_path, change=lambda manifest: manifest, arrays=lambda arrays: arrays):
    """A file with the model's arrays and a manifest that `change` has been at (or its text)."""
    from safetensors.numpy import save_file

    _, model, packed = saved
    manifest = change(checkpoint.make_manifest(model, packed))
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    save_file(arrays(checkpoint.flatten(packed)), tmp_path / "m", metadata={"manifest": text})
    return tmp_path / "m"


def _set(*keys_and_value):
    """A change that sets one entry of the manifest."""
    *keys, value = keys_and_value

    def change(manifest):
        node = manifest
        for key in keys[:-1]:
            node = node[key]
        if value is KeyError:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
        return manifest

    return change


FC1 = ("quantized", "blocks/mlp/fc1/kernel")
FIELDS = ("model", "fields")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "is no JSON"),
        (lambda m: "[" * 100_000, "is no JSON"),
        (lambda m: '{"format": "vq4dit-jax", "format": "vq4dit-jax"}', "a key stands twice"),
        (lambda m: [1], "no vq4dit-jax model"),
        (_set("version", "2"), "version='2'"),
        (_set("version", True), "version='True'"),
        (_set("version", 0), "version='0'"),
        (_set("quantized", KeyError), "lacks 'quantized'"),
        (_set("more", 1), "unknown 'more'"),
        (_set("quantized", []), "quantized of its manifest is a list"),
        (_set("mixed", 3), "mixed of its manifest is a int"),
        (_set("mixed", "blocks/mlp/fc2/kernel", -1), "'-1' parts"),
        (_set("mixed", "blocks/mlp/fc2/kernel", 10**9), "parts; wanted"),
        (_set("mixed", "blocks/mlp/fc2/kernel", 4), "part_3 is in the manifest and not in the file"),
        (_set("mixed", "nothing/kernel", 2), "nothing/kernel/part_0 is in the manifest and not in the file"),
        (_set(*FC1, []), "the facts of blocks/mlp/fc1/kernel are a list"),
        (_set(*FC1, "kind", KeyError), "of kind 'None'"),
        (_set(*FC1, "kind", "int"), "bits=None"),
        (_set(*FC1, "kind", "soft"), "kind 'soft'"),
        (_set(*FC1, "shape", KeyError), "shape=None"),
        (_set(*FC1, "shape", [64, "32"]), "shape='32'"),
        (_set(*FC1, "shape", [64, 10**12]), "shape=1000000000000"),
        (_set(*FC1, "shape", [64, 64]), "assignments are"),
        (_set(*FC1, "codewords", 7), "the manifest has codewords=7, the arrays 64"),
        (_set(*FC1, "groups", 2.0), "groups=2.0"),
        (_set("model", "x"), "model of its manifest is a str"),
        (_set("model", "class", "GAN"), "model is 'GAN'"),
        (_set("model", "class", ["DiT"]), "wanted|knows"),
        (_set("model", "fields", 3), "no fields"),
        (_set(*FIELDS, "input_size", 10**6), "there is no such model"),
        (_set(*FIELDS, "input_size", 16), "pos_embed has shape"),
        (_set(*FIELDS, "depth", 2), "blocks/.* has shape"),
        (_set(*FIELDS, "depth", "3"), "depth=3; wanted a whole number"),
        (_set(*FIELDS, "hidden_size", 0), "there is no such model"),
        (_set(*FIELDS, "num_heads", 5), "there is no such model"),
        (_set(*FIELDS, "num_classes", 9), "y_embedder/.* has shape"),
        (_set(*FIELDS, "learn_sigma", 1), "learn_sigma=1; wanted true"),
        (_set(*FIELDS, "norm2_eps", -0.5), "norm2_eps=-0.5"),
        (_set(*FIELDS, "norm2_eps", float("inf")), "norm2_eps=inf"),
        (_set(*FIELDS, "dtype", "float8"), "dtype=float8"),
        (_set(*FIELDS, "predicts", "nothing"), "predicts='nothing'"),
        (_set(*FIELDS, "colour", 3), "'colour'"),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(saved, tmp_path, change, message):
    file = _written(saved, tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_safetensors(file)
    said = str(caught.value)
    assert str(file) in said and "\n" not in said and len(said) < 700


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("final_layer/linear/bias", np.full(24, np.nan, np.float32), "final_layer/linear/bias holds NaN or infinity"),
        (
            "final_layer/linear/bias",
            np.zeros(23, np.float32),
            r"final_layer/linear/bias has shape \(23,\); wanted \(24,\)",
        ),
        ("blocks/mlp/fc2/kernel/part_2", np.zeros((1, 64, 33), np.float32), "its parts are of matrices"),
        ("blocks/mlp/fc1/kernel/more", np.zeros(3, np.float32), "the file holds 'more' beside"),
        ("final_layer/more", np.zeros(3, np.float32), "final_layer/more has shape .* its model has no such parameter"),
        ("final_layer/linear/bias/more", np.zeros(3, np.float32), "is an array and has others under it"),
        ("final_layer/linear/bias", None, "final_layer/linear/bias is missing"),
    ],
)
def test_damaged_arrays_are_refused_in_one_line(saved, tmp_path, name, array, message):
    def change(arrays):
        return {k: a for k, a in {**arrays, name: array}.items() if a is not None}

    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_safetensors(_written(saved, tmp_path, arrays=change))
    assert "\n" not in str(caught.value)
