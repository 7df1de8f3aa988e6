"""Int8 files with ConvRot: read from the format's description, written again to the same bytes, and refused where damaged."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import vq4dit_jax as vq
from convert import convrot
from convert.diffusers import DIFFUSERS
from convert.to_safetensors import to_safetensors
from tests.models import inputs, tiny
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.tree import dequantize, quantized_paths, replace

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
SIZES = dict(width=64, hidden=128, depth=2)


# ---- The format, from its description alone and in float64


def rotated(w: np.ndarray, group: int) -> np.ndarray:
    """W R along the last axis; R is its own inverse."""
    if not group:
        return w
    powers = {4: 1, 16: 2, 64: 3, 256: 4}
    h = functools.reduce(np.kron, [H4 / 2] * powers[group])
    return (w.reshape(*w.shape[:-1], -1, group) @ h).reshape(w.shape)


def quantized(layer: str, w: np.ndarray, group: int, **said) -> dict[str, np.ndarray]:
    """The three tensors of a Linear."""
    turned = rotated(w.astype(np.float64), group)
    scale = np.maximum(np.abs(turned).max(1, keepdims=True) / 127, 1e-30).astype(np.float32)
    facts = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": group} if group else {}), **said}
    return {
        f"{layer}.weight": np.clip(np.round(turned / scale), -127, 127).astype(np.int8),
        f"{layer}.weight_scale": scale,
        f"{layer}.comfy_quant": marked(facts),
    }


def marked(facts) -> np.ndarray:
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def decoded(tensors: dict[str, np.ndarray], layer: str, group: int) -> np.ndarray:
    return rotated(tensors[f"{layer}.weight"].astype(np.float64) * tensors[f"{layer}.weight_scale"], group)


def dense(width=64, hidden=128, depth=2) -> dict[str, np.ndarray]:
    """A small DiT with facebookresearch's names: 8 x 8 pixels, 3 channels, patches of 2, 5 classes."""
    rng = np.random.default_rng(0)
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (24, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden), (6 * width, width))
    for i in range(depth):
        linears |= {f"blocks.{i}.{name}": shape for name, shape in zip(BLOCK, shapes, strict=True)}
    w = {
        "x_embedder.proj.weight": (width, 3, 2, 2),
        "x_embedder.proj.bias": (width,),
        "pos_embed": (1, 16, width),
        "y_embedder.embedding_table.weight": (6, width),
        **{f"{name}.weight": shape for name, shape in linears.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linears.items()},
    }
    return {name: 0.2 * rng.standard_normal(shape, np.float32) for name, shape in w.items()}


def block_layers(depth=2) -> list[str]:
    return [f"blocks.{i}.{name}" for i in range(depth) for name in BLOCK]


def converted(w, groups: dict[str, int], **said) -> dict[str, np.ndarray]:
    """The file's tensors with these layers quantized, each in its group."""
    out = {name: a for name, a in w.items() if name.removesuffix(".weight") not in groups}
    for layer, group in groups.items():
        out |= quantized(layer, w[f"{layer}.weight"], group, **said)
    return out


@pytest.fixture
def save(tmp_path):
    def save(tensors, metadata=None, name="int8.safetensors"):
        save_file(tensors, tmp_path / name, metadata={"num_heads": "2", **(metadata or {})})
        return tmp_path / name

    return save


def same_tensors(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, a in wanted.items():
        assert found[name].dtype == a.dtype and found[name].tobytes() == a.tobytes(), name


# ---- Reading


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
def test_their_rotation_is_the_power_of_their_matrix(group):
    powers = {4: 1, 16: 2, 64: 3, 256: 4, 1024: 5}[group]
    np.testing.assert_array_equal(convrot.rotation(group), functools.reduce(np.kron, [H4] * powers))


@pytest.mark.parametrize("group", [0, 4, 16, 64])
def test_a_linear_of_a_file_is_the_product_of_integers_that_the_format_says(save, group):
    tensors = converted(dense(), dict.fromkeys(block_layers(), group))
    _, params = vq.load_pretrained(save(tensors))
    leaf = params["blocks"]["mlp"]["fc2"]["kernel"]
    assert (leaf.stack, leaf.matrix, leaf.rotation, leaf.bits) == ((2,), (64, 128), group, 8)
    x = np.random.default_rng(1).standard_normal((9, 128)).astype(np.float32)
    for i in range(2):
        codes, scale = (tensors[f"blocks.{i}.mlp.fc2.{name}"] for name in ("weight", "weight_scale"))
        turned = rotated(x.astype(np.float64), group)
        token = np.abs(turned).max(1, keepdims=True) / 127
        wanted = np.round(turned / token) @ codes.T.astype(np.float64) * token * scale.T
        found = np.asarray(leaf.block(i).matmul(jnp.asarray(x)), np.float64)
        # A code of x on the border between two levels may fall on the other side in float32.
        flips = np.abs(found - wanted) / (token * np.abs(codes).max() * scale.T)
        assert np.sort(flips.ravel())[-10] < 1e-3 and flips.max() < 1.01
        exact = x @ decoded(tensors, f"blocks.{i}.mlp.fc2", group).T
        bound = token / 2 * (np.abs(codes).sum(1)[None] * scale.T)
        assert (np.abs(found - exact) <= 1.001 * bound).all()


def test_the_network_of_a_file_is_that_of_its_decoded_weights(save):
    """Without rounding of activations nothing but float32 stands between them."""
    w, groups = dense(), {**dict.fromkeys(block_layers(), 16), "final_layer.linear": 64, "t_embedder.mlp.0": 256}
    tensors = converted(w, groups, full_precision_matrix_mult=True)
    model, params = vq.load_pretrained(save(tensors))
    assert params["blocks"]["attn"]["qkv"]["kernel"].bits is None
    w |= {f"{layer}.weight": decoded(tensors, layer, group).astype(np.float32) for layer, group in groups.items()}
    plain, weights = vq.load_pretrained(save(w, name="dense.safetensors"))
    assert plain == model
    x, t, y = inputs(model)
    found, wanted = (model.apply({"params": p}, x, t, y) for p in (params, weights))
    assert float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < 1e-5


def test_a_rotated_file_is_the_dense_model_up_to_rounding(save):
    w = dense()
    plain, weights = vq.load_pretrained(save(w, name="dense.safetensors"))
    model, params = vq.load_pretrained(save(converted(w, dict.fromkeys(block_layers(), 64))))
    x, t, y = inputs(model)
    error = lambda p, q: float(jnp.linalg.norm(p - q) / jnp.linalg.norm(q))
    wanted = plain.apply({"params": weights}, x, t, y)
    packed = model.apply({"params": params}, x, t, y)
    assert 1e-4 < error(packed, wanted) < 0.1
    prepared = model.apply({"params": vq.prepare_for_inference(params, "int8")}, x, t, y)
    assert error(prepared, packed) < 0.1  # bfloat16
    images = vq.sample(model, params, jnp.arange(2), key=jax.random.key(0), num_steps=2)
    assert images.shape == (2, 8, 8, 3) and bool(jnp.isfinite(images).all())
    sizes = vq.sizes(params)
    rows = 2 * (3 * 64 + 64 + 128 + 64 + 6 * 64)
    assert (sizes.assignment_bytes, sizes.codebook_bytes) == (sizes.quantized_parameters, 4 * rows)


def test_prepared_blocks_stand_beside_packed_layers(save):
    w, groups = dense(), {**dict.fromkeys(block_layers(), 16), "final_layer.linear": 64, "t_embedder.mlp.2": 0}
    model, params = vq.load_pretrained(save(converted(w, groups)))
    x, t, y = inputs(model)
    packed, prepared = (model.apply({"params": p}, x, t, y) for p in (params, vq.prepare_for_inference(params, "int8")))
    assert float(jnp.linalg.norm(prepared - packed) / jnp.linalg.norm(packed)) < 0.1  # bfloat16


@pytest.mark.parametrize(
    "write, read", [(vq.save_quantized, vq.load_quantized), (vq.save_safetensors, vq.load_safetensors)]
)
def test_our_own_files_hold_such_a_model(save, tmp_path, write, read):
    tensors = converted(dense(), dict.fromkeys(block_layers(), 16))
    model, params = vq.load_pretrained(save(tensors))
    write(tmp_path / "ours", model, params)
    again, back, _ = read(tmp_path / "ours")
    vq.save_convrot(tmp_path / "again.safetensors", again, back)
    same_tensors(load_file(tmp_path / "again.safetensors"), tensors)


@pytest.mark.parametrize("shape", [(96,), (1,), ()], ids=str)
def test_other_shapes_of_scales(save, shape):
    tensors = converted(dense(), {"blocks.0.attn.proj": 0, "blocks.1.attn.proj": 0})
    scale = np.full((64, 1), 0.25, np.float32)
    tensors["blocks.0.attn.proj.weight_scale"] = scale
    _, wanted = vq.load_pretrained(save(tensors))
    short = {(96,): (64,)}.get(shape, shape)
    tensors["blocks.0.attn.proj.weight_scale"] = np.full(short, 0.25, np.float32)
    _, found = vq.load_pretrained(save(tensors))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_entries_one_level_down_input_scales_and_prefixes_are_read_alike(save):
    tensors = converted(dense(), dict.fromkeys(block_layers(), 16))
    model, wanted = vq.load_pretrained(save(tensors))
    inner = marked({"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}})
    tensors |= {name: inner for name in tensors if name.endswith(".comfy_quant")}
    tensors["blocks.1.attn.qkv.input_scale"] = np.ones(1, np.float32)
    again, found = vq.load_pretrained(save({f"model.diffusion_model.{name}": a for name, a in tensors.items()}))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_what_is_no_linear_is_decoded_and_said(save, capsys):
    w = dense()
    groups = {"y_embedder.embedding_table": 16, "final_layer.linear": 16, "t_embedder.mlp.0": 16, "t_embedder.mlp.2": 0}
    tensors = converted(w, groups)
    _, params = vq.load_pretrained(save(tensors))
    assert quantized_paths(params) == [
        "t_embedder/mlp/0/kernel",
        "t_embedder/mlp/2/kernel",
        "final_layer/linear/kernel",
    ]
    table = decoded(tensors, "y_embedder.embedding_table", 16)
    np.testing.assert_allclose(params["y_embedder"]["embedding_table"]["embedding"], table, atol=1e-6)
    assert "decoding int8 weights that are not kept packed here: y_embedder.embedding" in capsys.readouterr().err
    # REPA's weights are turned when they are read.
    _, turned = vq.load_pretrained(save(tensors, {"prediction": "v", "path_type": "Linear"}))
    assert quantized_paths(turned) == ["t_embedder/mlp/2/kernel"]
    last = decoded(tensors, "final_layer.linear", 16)
    np.testing.assert_allclose(turned["final_layer"]["linear"]["kernel"], -last.T, atol=1e-6)


def test_diffusers_names_and_16_bits_get_the_decoded_weights(save, tmp_path):
    w, layer = dense(), "transformer_blocks.1.ff.net.2"
    _, params = vq.load_pretrained(save(w, name="dense.safetensors"))
    theirs, flat = {}, vq.qarray.tree.flatten(params)
    for rule in DIFFUSERS.rules:
        leaf, count = np.asarray(flat[rule.path]), len(rule.sources)
        for j, source in enumerate(rule.sources):
            for i in range(2 if "{}" in source else 1):
                part = np.split(leaf[i] if rule.stacked else leaf, count, axis=-1)[j] if count > 1 else None
                whole = leaf[i] if rule.stacked else leaf
                theirs[source.format(i)] = np.ascontiguousarray(rule.kind.back(whole if part is None else part))
    tensors = {**theirs, **quantized(layer, theirs[f"{layer}.weight"], 16)}
    _, found = vq.load_pretrained(save(tensors), input_size=8)
    wanted = decoded(tensors, layer, 16)
    np.testing.assert_allclose(found["blocks"]["mlp"]["fc2"]["kernel"][1], wanted.T, atol=1e-6)
    file = save(converted(w, {"blocks.0.attn.qkv": 64}))
    to_safetensors(file, tmp_path / "narrow.safetensors")
    narrow = load_file(tmp_path / "narrow.safetensors")["blocks.0.attn.qkv.weight"]
    assert narrow.dtype == np.float16
    np.testing.assert_allclose(narrow, decoded(load_file(file), "blocks.0.attn.qkv", 64), atol=1e-3)


# ---- Round trips


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    width=st.sampled_from([8, 20, 32, 64]),
    hidden=st.sampled_from([12, 48, 256]),
    depth=st.integers(1, 3),
)
def test_a_file_that_is_read_and_written_again_has_the_same_bytes(save, tmp_path, data, width, hidden, depth):
    """Of any groups, different ones in different blocks, dense Linears among them, and packed ones outside the blocks."""
    w = dense(width, hidden, depth)
    groups = {}
    for layer in [*block_layers(depth), "t_embedder.mlp.0", "final_layer.linear"]:
        columns = w[f"{layer}.weight"].shape[1]
        fitting = [g for g in (0, 4, 16, 64, 256) if not g or columns % g == 0]
        if (group := data.draw(st.sampled_from([None, *fitting]))) is not None:
            groups[layer] = group
    tensors = converted(w, groups)
    if groups:
        codes = tensors[f"{next(iter(groups))}.weight"]
        codes[0, :3] = (-128, 127, 0)
    model, params = vq.load_pretrained(save(tensors))
    if not groups:
        assert quantized_paths(params) == []
        return
    vq.save_convrot(tmp_path / "again.safetensors", model, params)
    same_tensors(load_file(tmp_path / "again.safetensors"), tensors)


@pytest.mark.parametrize("group", [None, 0, 16])
def test_dense_params_are_rounded_as_the_format_says(save, tmp_path, group):
    w = dense()
    w["blocks.1.mlp.fc1.weight"][3] = 0
    model, params = vq.load_pretrained(save(w))
    file = tmp_path / "made.safetensors"
    vq.save_convrot(file, model, params, group=group)
    same_tensors(load_file(file), converted(w, dict.fromkeys(block_layers(), 64 if group is None else group)))
    again, packed = vq.load_pretrained(file)
    assert again == model
    vq.save_convrot(tmp_path / "again.safetensors", again, packed)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_sit_and_a_model_without_null_label_come_back(tmp_path):
    model, params = tiny(predicts="flow", null_label=False)
    vq.save_convrot(tmp_path / "sit.safetensors", model, params)
    again, packed = vq.load_pretrained(tmp_path / "sit.safetensors")
    assert again == model and packed["blocks"]["mlp"]["fc2"]["kernel"].rotation == 64


def test_leaves_of_the_library_in_that_form_are_written(tmp_path):
    """An IntArray rounds no activations, and is marked so."""
    model, params = tiny()
    rotating = vq.OperandSpec(vq.IntSpec(8, None, "symmetric"), 8, rotation=16)
    rules = ((r"blocks/\d+/mlp/.*kernel", rotating), (r"blocks/\d+/attn/.*kernel", vq.IntSpec(8, None, "symmetric")))
    packed = vq.quantize(params, rules=(*rules, (r".*", vq.KEEP)), key=jax.random.key(0))
    vq.save_convrot(tmp_path / "x.safetensors", model, packed)
    _, back = vq.load_pretrained(tmp_path / "x.safetensors")
    assert back["blocks"]["attn"]["qkv"]["kernel"].bits is None and back["blocks"]["mlp"]["fc1"]["kernel"].bits == 8
    jax.tree.map(np.testing.assert_array_equal, dequantize(back), dequantize(packed))


# ---- Refusals


def test_a_run_wants_full_precision(save):
    from vq4dit_jax.run import config, pipeline

    c = config.default().model
    c.checkpoint = str(save(converted(dense(), {"blocks.0.attn.qkv": 16})))
    with pytest.raises(InputError, match="holds int8 weights already"):
        pipeline.load_teacher(c, jax.random.key(0))


L = "blocks.1.attn.qkv"
GOOD = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
DAMAGED = {
    "fp8": ({"comfy_quant": marked({"format": "float8_e4m3fn"})}, "has the format 'float8_e4m3fn'; only int8_tensorwise"),
    "int4": ({"comfy_quant": marked({"format": "convrot_w4a4"})}, "has the format 'convrot_w4a4'"),
    "no format": ({"comfy_quant": marked({"convrot": True})}, "has the format None"),
    "a list": ({"comfy_quant": marked([1])}, "holds a JSON list; an object"),
    "no JSON": ({"comfy_quant": np.frombuffer(b'{"format": "int8', np.uint8)}, "is no JSON"),
    "no text": ({"comfy_quant": np.full(20, 255, np.uint8)}, "is no JSON"),
    "nested": ({"comfy_quant": np.full(4096, ord("["), np.uint8)}, "is no JSON"),
    "long": ({"comfy_quant": np.full(4097, ord(" "), np.uint8)}, "1 to 4096 bytes of JSON are wanted"),
    "no bytes": ({"comfy_quant": np.zeros(0, np.uint8)}, "1 to 4096 bytes"),
    "floats": ({"comfy_quant": np.zeros(20, np.float32)}, "is of type float32; bytes of JSON (U8)"),
    "a word": ({"comfy_quant": marked({**GOOD, "convrot": "yes"})}, "convrot='yes'; true or false"),
    "group 32": ({"comfy_quant": marked({**GOOD, "convrot_groupsize": 32})}, "convrot_groupsize=32 for 64 inputs"),
    "group 256": ({"comfy_quant": marked({**GOOD, "convrot_groupsize": 256})}, "convrot_groupsize=256 for 64 inputs"),
    "group true": ({"comfy_quant": marked({**GOOD, "convrot_groupsize": True})}, "convrot_groupsize=True"),
    "no group": ({"comfy_quant": marked({"format": "int8_tensorwise", "convrot": True})}, "convrot_groupsize=256 for 64"),
    "no scale": ({"weight_scale": None}, "has a comfy_quant and no weight_scale"),
    "no weight": ({"weight": None}, "has a comfy_quant and no weight"),
    "scale of inputs": ({"weight_scale": np.ones((64, 1), np.float32)}, "has shape (64, 1); (192, 1), one for each output"),
    "scale in 64 bits": ({"weight_scale": np.ones((192, 1))}, "weight_scale is of type float64; float32"),
    "scale NaN": ({"weight_scale": np.full((192, 1), np.nan, np.float32)}, "a scale is negative, NaN or infinity"),
    "scale negative": ({"weight_scale": -np.ones((192, 1), np.float32)}, "a scale is negative"),
    "float weight": ({"weight": np.zeros((192, 64), np.float32)}, "weight is of type float32; int8_tensorwise has int8"),
    "bytes": ({"weight": np.zeros((192, 64), np.uint8)}, "weight is of type uint8; int8_tensorwise has int8"),
    "other shape": ({"weight": np.zeros((192, 32), np.int8)}, "has shape (192, 32), wanted (192, 64)"),
    "four axes": ({"weight": np.zeros((192, 16, 2, 2), np.int8)}, "an int8 matrix (outputs, inputs) is wanted"),
    "no mark": ({"comfy_quant": None}, "is of type I8; floating-point weights are wanted, or int8 ones with a comfy_quant"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_in_one_line(save, change, message):
    tensors = converted(dense(), dict.fromkeys(block_layers(), 16))
    tensors |= {f"{L}.{name}": a for name, a in change.items()}
    file = save({name: a for name, a in tensors.items() if a is not None})
    with pytest.raises(InputError) as caught:
        vq.load_pretrained(file)
    text = str(caught.value)
    assert message in text and str(file) in text and L in text and "\n" not in text


def test_leaves_without_a_form_are_refused_and_nothing_is_written(tmp_path):
    model, params = tiny()
    file, key, int8 = tmp_path / "x.safetensors", jax.random.key(0), vq.IntSpec(8, None, "symmetric")
    specs = {
        "the VQArray": vq.OperandSpec(vq.VQSpec(16, 4), 8, rotation=16),
        "4 bits on a symmetric grid": vq.OperandSpec(vq.IntSpec(4, None, "symmetric"), 8, rotation=16),
        "8 bits on a asymmetric grid": vq.OperandSpec(vq.IntSpec(8, None, "asymmetric"), 8, rotation=16),
        "with 2 scales a row": vq.OperandSpec(vq.IntSpec(8, 32, "symmetric"), 8, rotation=16),
        "the scale of an operand": vq.OperandSpec(int8, 8, rotation=16, scaled=True),
        "the signs of an operand": vq.OperandSpec(int8, 8, rotation=16, signed=True),
        "the centre of an operand": vq.OperandSpec(int8, 8, rotation=16, centred=True),
        "activations in 4 bits": vq.OperandSpec(int8, 4, rotation=16),
        "activations in 8 bits (asymmetric)": vq.OperandSpec(int8, 8, "asymmetric", rotation=16),
    }
    for words, spec in specs.items():
        packed = vq.quantize(params, rules=((r"blocks/.*fc2/kernel", spec), (r".*", vq.KEEP)), key=key)
        with pytest.raises(InputError, match=r"^blocks.0.mlp.fc2: .*no form for") as caught:
            vq.save_convrot(file, model, packed)
        assert words in str(caught.value)
    bad = replace(params, {"blocks/mlp/fc1/bias": params["blocks"]["mlp"]["fc1"]["bias"].at[1, 2].set(jnp.nan)})
    calls = {
        "group=32 for 32 inputs": lambda: vq.save_convrot(file, model, params, group=32),
        "group=64 for 32 inputs": lambda: vq.save_convrot(file, model, params, group=64),
        "group=16 is for dense": lambda: vq.save_convrot(file, model, packed, group=16),
        "model is a dict": lambda: vq.save_convrot(file, {"name": "mine"}, params),
        "freq_shift": lambda: vq.save_convrot(file, model.clone(freq_shift=1), params),
        "the model wants": lambda: vq.save_convrot(file, model.clone(depth=3), params),
        "blocks/mlp/fc1/bias holds NaN": lambda: vq.save_convrot(file, model, bad),
    }
    for words, call in calls.items():
        with pytest.raises(InputError, match=words):
            call()
    assert list(tmp_path.iterdir()) == []
