"""Saved models come back bit for bit, describe themselves, and open without this library."""

import json
import os

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
from vq4dit_jax.qarray.tree import dequantize, map_leaves, sizes
from vq4dit_jax.storage import checkpoint


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
