"""Foreign checkpoints become our parameter trees exactly, or are refused in one line that says what is wrong."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert.load import load_pretrained
from convert.readers import open_checkpoint
from convert.to_safetensors import main as to_safetensors
from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.files import asset

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, GRID, CLASSES = 16, 3, 2, 2, 4, 4, 5


def weights(
    width=WIDTH,
    depth=DEPTH,
    patch=PATCH,
    channels=CHANNELS,
    grid=GRID,
    classes=CLASSES,
    hidden=4 * WIDTH,
    out=2 * CHANNELS,
) -> dict[str, np.ndarray]:
    """A checkpoint with facebookresearch's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "pos_embed": (1, grid**2, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch**2 * out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (hidden, width),
            f"blocks.{i}.mlp.fc2": (width, hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch files need torch")


@pytest.fixture
def save(tmp_path):
    def save(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None):
        save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
        return tmp_path / "model.safetensors"

    return save


@pytest.fixture
def save_torch(tmp_path, torch):
    def save(value, **options):
        torch.save(value, tmp_path / "model.pt", **options)
        return tmp_path / "model.pt"

    return save


def refused(path, *words: str, **options) -> None:
    """`path` is refused in one line that has all of `words`."""
    with pytest.raises(InputError) as caught:
        load_pretrained(path, **{"num_heads": HEADS, **options})
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path.name), *words):
        assert word in message


def assert_same_tree(params, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, other)


# ---- What is read


def test_every_tensor_finds_its_leaf(save):
    w = weights()
    model, params = load_pretrained(save(w), num_heads=HEADS)
    assert (model.hidden_size, model.depth, model.num_heads, model.patch_size) == (WIDTH, DEPTH, HEADS, PATCH)
    assert (model.in_channels, model.input_size, model.num_classes) == (CHANNELS, GRID * PATCH, CLASSES)
    assert model.learn_sigma and model.freq_shift == 0 and model.norm2_eps == 1e-6
    np.testing.assert_array_equal(
        params["x_embedder"]["proj"]["kernel"], np.einsum("dchw->hwcd", w["x_embedder.proj.weight"])
    )
    np.testing.assert_array_equal(params["pos_embed"], w["pos_embed"][0])
    np.testing.assert_array_equal(
        params["y_embedder"]["embedding_table"]["embedding"], w["y_embedder.embedding_table.weight"]
    )
    for theirs, ours in {
        "t_embedder.mlp.0": params["t_embedder"]["mlp"]["0"],
        "final_layer.linear": params["final_layer"]["linear"],
    }.items():
        np.testing.assert_array_equal(ours["kernel"], w[f"{theirs}.weight"].T)
        np.testing.assert_array_equal(ours["bias"], w[f"{theirs}.bias"])
    for role, part in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"), ("adaLN_modulation", "1")):
        for i in range(DEPTH):
            np.testing.assert_array_equal(
                params["blocks"][role][part]["kernel"][i], w[f"blocks.{i}.{role}.{part}.weight"].T
            )
            np.testing.assert_array_equal(params["blocks"][role][part]["bias"][i], w[f"blocks.{i}.{role}.{part}.bias"])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 3),
    depth=st.integers(1, 4),
    patch=st.sampled_from([1, 2, 4, 8]),
    channels=st.integers(1, 4),
    grid=st.integers(1, 5),
    classes=st.integers(1, 12),
    hidden=st.integers(1, 100),
    learn_sigma=st.booleans(),
)
def test_sizes_are_read_off_the_shapes(save, heads, depth, patch, channels, grid, classes, hidden, learn_sigma):
    out = channels * (1 + learn_sigma)
    width = 8 * heads
    path = save(weights(width, depth, patch, channels, grid, classes, hidden, out))
    model, params = load_pretrained(path, num_heads=heads)
    assert (model.depth, model.hidden_size, model.patch_size, model.in_channels) == (depth, width, patch, channels)
    assert (model.input_size, model.num_classes, model.learn_sigma) == (grid * patch, classes, learn_sigma)
    x = jnp.zeros((1, model.input_size, model.input_size, channels))
    fresh = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(lambda p: (p.shape, p.dtype), fresh)


@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"ema": w}, lambda w: {"model": w}, lambda w: {"state_dict": {"model": w}}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(torch, save_torch, save, wrap, zipped):
    w = weights()
    _, wanted = load_pretrained(save(w), num_heads=HEADS)
    state = {name: torch.from_numpy(tensor) for name, tensor in w.items()}
    _, params = load_pretrained(save_torch(wrap(state), _use_new_zipfile_serialization=zipped), num_heads=HEADS)
    assert_same_tree(params, wanted)


def test_a_training_checkpoint_gives_its_ema_weights(torch, save_torch, save):
    w = weights()
    state = {name: torch.from_numpy(tensor) for name, tensor in w.items()}
    training = {
        "model": {name: tensor + 1 for name, tensor in state.items()},
        "ema": state,
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-XL/2", num_classes=1000),
    }
    path = save_torch(training)
    assert open_checkpoint(path).wrapper == "ema"
    _, params = load_pretrained(path, num_heads=HEADS)
    assert_same_tree(params, load_pretrained(save(w), num_heads=HEADS)[1])


def test_16_bit_weights(torch, save_torch, save):
    w = weights()
    for dtype, torch_dtype in ((np.float16, torch.float16), (ml_dtypes.bfloat16, torch.bfloat16)):
        rounded = {name: tensor.astype(dtype) for name, tensor in w.items()}
        _, wanted = load_pretrained(save({n: t.astype(np.float32) for n, t in rounded.items()}), num_heads=HEADS)
        _, params = load_pretrained(save(rounded), num_heads=HEADS)
        assert_same_tree(params, wanted)
        path = save_torch({name: torch.from_numpy(tensor).to(torch_dtype) for name, tensor in w.items()})
        _, params = load_pretrained(path, num_heads=HEADS)
        assert_same_tree(params, wanted)


def test_parameters_in_the_dtype_asked_for(save):
    path = save(weights())
    _, params = load_pretrained(path, num_heads=HEADS, dtype=jnp.bfloat16)
    wanted = jax.tree.map(lambda p: p.astype(jnp.bfloat16), load_pretrained(path, num_heads=HEADS)[1])
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_tree(params, wanted)


def test_number_of_heads(save):
    assert load_pretrained(save(weights(), {"num_heads": "4"}))[0].num_heads == 4
    assert load_pretrained(save(weights(), {"num_heads": "4"}), num_heads=8)[0].num_heads == 8
    small = weights(width=384, depth=12, hidden=16)
    assert load_pretrained(save(small))[0].num_heads == 6
    assert load_pretrained(save(small), variant="DiT-S/2")[0].num_heads == 6
    refused(save(weights()), "num_heads=", num_heads=None)
    refused(save(weights()), "num_heads=3", "16", num_heads=3)
    refused(save(weights(), {"num_heads": "many"}), "num_heads=many", num_heads=None)


def test_to_safetensors(save, tmp_path, capsys):
    w = weights()
    source, target = save(w), tmp_path / "out" / "small.safetensors"
    options = ["--dtype=bfloat16", "--num-heads=2", "--origin=a test", "--licence=Apache-2.0"]
    assert to_safetensors([str(source), str(target), *options]) == 0
    assert open_checkpoint(target).metadata == {"num_heads": "2", "origin": "a test", "licence": "Apache-2.0"}
    assert target.stat().st_size < 0.55 * source.stat().st_size
    model, params = load_pretrained(target)
    wanted = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), load_pretrained(source, num_heads=2)[1])
    assert model.num_heads == 2
    assert_same_tree(params, wanted)

    w["pos_embed"][0, 0, 0] = 70000
    assert to_safetensors([str(save(w)), str(tmp_path / "b.safetensors"), "--num-heads=2"]) == 2
    message = capsys.readouterr().err
    assert "pos_embed" in message and "7e+04" in message and "float16" in message and message.count("\n") == 1
    assert not list(tmp_path.glob("*b.safetensors*"))


def test_the_shipped_model_loads_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from convert.load import load_pretrained\n"
        f"model, params = load_pretrained({str(asset('dit_cifar10.safetensors'))!r})\n"
        "print(model.hidden_size, model.depth, model.num_heads, model.patch_size, model.input_size, model.num_classes)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["192", "8", "6", "4", "32", "10"], run.stderr


# ---- What is refused: files


def test_no_such_file(tmp_path):
    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(torch, save_torch, save, tmp_path, suffix, zipped):
    if suffix == ".pt":
        state = {name: torch.from_numpy(tensor) for name, tensor in weights().items()}
        whole = save_torch(state, _use_new_zipfile_serialization=zipped).read_bytes()
    else:
        whole = save(weights()).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "not a whole")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), magic=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"]))
def test_garbage(torch, tmp_path, content, magic):
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"garbage{suffix}"
        path.write_bytes(magic + content)
        with pytest.raises(InputError, match="garbage"):
            load_pretrained(path)


class Evil:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(torch, save_torch, tmp_path):
    marker = tmp_path / "marker"
    for zipped in (True, False):
        path = save_torch({"model": {"a": Evil(marker)}}, _use_new_zipfile_serialization=zipped)
        refused(path, f"{os.system.__module__}.system", "import")
    for protocol in (0, 2, 4):
        path = tmp_path / "bare.pt"
        path.write_bytes(pickle.dumps({"a": Evil(marker)}, protocol=protocol))
        refused(path, f"{os.system.__module__}.system", "import")
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the file does what it is made for
    assert marker.exists()


def test_torch_is_named_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"torch.*vq4dit-jax\[convert\]"):
        load_pretrained(tmp_path / "model.pt")


def test_what_is_not_a_state_dict(torch, save_torch):
    refused(save_torch(torch.ones(3)), "Tensor", "dictionary")
    refused(save_torch({"epoch": 3}), "'epoch'", "int")
    refused(save_torch({"model": {"step": torch.tensor(3)}}), "step", "int64")
    refused(save_torch({"model": {"conv.weight": torch.ones(3)}}), "not a DiT", "under 'model'", "conv.weight")
    refused(save_torch({"model": {}}), "no parameters")


# ---- What is refused: weights that do not fit


def test_missing_and_unexpected_parameters(save):
    w = weights()
    del w["blocks.1.mlp.fc1.bias"]
    refused(save(w), "lacks", "blocks.1.mlp.fc1.bias")
    refused(save({name: tensor for name, tensor in weights().items() if "blocks.1." not in name}), "block 1", "block 2")
    refused(save(weights() | {"blocks.0.attn.rel_pos": np.zeros(3, np.float32)}), "unexpected", "blocks.0.attn.rel_pos")
    refused(save(weights() | {"blocks.999999999999.x": np.zeros(3, np.float32)}), "block 3")


@pytest.mark.parametrize(
    "name, shape, wanted",
    [
        ("blocks.2.attn.qkv.weight", (3 * WIDTH, WIDTH + 1), (3 * WIDTH, WIDTH)),
        ("blocks.1.mlp.fc1.bias", (4 * WIDTH - 1,), (4 * WIDTH,)),
        ("t_embedder.mlp.0.weight", (WIDTH, 255), (WIDTH, 256)),
        ("final_layer.adaLN_modulation.1.weight", (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)),
        ("pos_embed", (1, GRID**2, WIDTH - 1), (1, GRID**2, WIDTH)),
    ],
)
def test_wrong_shapes_are_named_with_both_shapes(save, name, shape, wanted):
    refused(save(weights() | {name: np.zeros(shape, np.float32)}), name, str(shape), str(wanted))


def test_sizes_that_make_no_network(save):
    refused(
        save(weights() | {"x_embedder.proj.weight": np.zeros((WIDTH, 16), np.float32)}),
        "x_embedder.proj.weight",
        "4 axes",
    )
    refused(
        save(weights() | {"x_embedder.proj.weight": np.zeros((WIDTH, 4, 0, 0), np.float32)}), "x_embedder.proj.weight"
    )
    refused(save(weights() | {"pos_embed": np.zeros((1, 15, WIDTH), np.float32)}), "pos_embed", "15", "square")
    refused(
        save(weights() | {"x_embedder.proj.weight": np.zeros((WIDTH, 4, 3, 2), np.float32)}),
        "x_embedder.proj.weight",
        "3 x 2",
    )
    refused(save(weights(out=3)), "final_layer.linear.bias", "(12,)", "(16,)")


def test_numbers_that_are_none(save):
    for bad in (np.nan, np.inf, -np.inf):
        w = weights()
        w["blocks.1.attn.qkv.weight"][3, 5] = bad
        refused(save(w), "blocks.1.attn.qkv.weight", "NaN", "1")
    w = weights()
    w["final_layer.linear.bias"][0] = 1e5
    refused(save(w), "final_layer.linear.bias", "float16", "1e+05", dtype=jnp.float16)
    refused(save(weights() | {"pos_embed": np.zeros((1, 16, WIDTH), np.int32)}), "pos_embed", "I32")


def test_what_the_caller_says_must_agree(save):
    path = save(weights())
    refused(path, "depth=3", "depth=28", "DiT-XL/2", variant="DiT-XL/2")
    for wrong in (4, 7, 0):
        refused(path, "y_embedder.embedding_table.weight", "6 rows", f"num_classes={wrong}", num_classes=wrong)
    refused(path, "input_size=8", "16", input_size=16)
    with pytest.raises(InputError, match="DiT-XL/3.*known.*DiT-XL/2"):
        load_pretrained(path, variant="DiT-XL/3")


# ---- diffusers


@pytest.fixture
def module(torch):
    diffusers = pytest.importorskip("diffusers", reason="the layout is written by diffusers itself")
    torch.manual_seed(0)
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=3e-5,
    )
    for block in module.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
    return module


@pytest.fixture
def folder(module, tmp_path):
    module.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_every_form_of_a_diffusers_model_is_read_alike(module, folder, tmp_path):
    model, params = load_pretrained(folder)
    assert (model.num_heads, model.freq_shift, model.norm2_eps, model.num_classes) == (2, 1, 3e-5, 5)
    forms = {"sharded": dict(max_shard_size="20KB"), "bin": dict(safe_serialization=False)}
    forms["bin_sharded"] = forms["sharded"] | forms["bin"]
    for name, options in forms.items():
        module.save_pretrained(tmp_path / name, **options)
        assert (len(list((tmp_path / name).glob("*-of-*"))) > 2) == ("sharded" in name)
        same, tree = load_pretrained(tmp_path / name)
        assert same == model
        assert_same_tree(tree, params)
    module.save_pretrained(tmp_path / "pipeline" / "transformer")
    for path in (tmp_path / "pipeline", folder / "diffusion_pytorch_model.safetensors"):
        same, tree = load_pretrained(path)
        assert same == model
        assert_same_tree(tree, params)


def test_diffusers_weights_without_their_config(folder, tmp_path):
    (folder / "diffusion_pytorch_model.safetensors").rename(tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "config.json", "input_size=")
    model, _ = load_pretrained(tmp_path / "alone.safetensors", num_heads=2, input_size=8)
    assert (model.input_size, model.norm2_eps, model.freq_shift) == (8, 1e-5, 1)


def test_copies_of_the_embedders_must_be_equal(torch, module, tmp_path):
    with torch.no_grad():
        module.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    module.save_pretrained(tmp_path / "model")
    refused(
        tmp_path / "model", "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias", "transformer_blocks.0"
    )


def test_diffusers_models_of_another_make(folder, tmp_path):
    for key, value in {
        "activation_fn": "geglu",
        "norm_type": "ada_norm_single",
        "sample_size": 9,
        "num_attention_heads": 3,
    }.items():
        original = (folder / "config.json").read_text()
        edit_config(folder, **{key: value})
        refused(folder, str(value), num_heads=None)
        (folder / "config.json").write_text(original)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not readable as JSON"):
        load_pretrained(folder)


def test_broken_shard_indexes(module, tmp_path):
    path = tmp_path / "model"
    module.save_pretrained(path, max_shard_size="20KB")
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    original = json.loads(index.read_text())
    first, *_, last = sorted(set(original["weight_map"].values()))
    name = next(n for n, file in original["weight_map"].items() if file == first)

    def with_map(**changes):
        index.write_text(json.dumps({"weight_map": original["weight_map"] | changes}))

    for map_, words in (
        ({name: "../outside.safetensors"}, ("../outside.safetensors", "own folder")),
        ({name: "none.safetensors"}, ("none.safetensors", "no such file")),
        ({name: last}, (last, name)),
    ):
        with_map(**map_)
        with pytest.raises(InputError) as caught:
            load_pretrained(path)
        assert all(word in str(caught.value) for word in words)
    index.write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        load_pretrained(path)


# ---- Where the weights lie in a training checkpoint


def tensors(torch, w=None, shift=0.0) -> dict:
    return {name: torch.from_numpy(tensor) + shift for name, tensor in (w or weights()).items()}


@pytest.mark.parametrize(
    "key",
    [
        "ema",
        "model_ema",
        "ema_model",
        "ema_state_dict",
        "params_ema",
        "state_dict_ema",
        "modelEma",
        "EMA",
        "model_ema1",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_ema_weights_are_preferred_by_any_name(torch, save_torch, save, capsys, key, first):
    ema, raw = (
        {key: tensors(torch)},
        {"model": tensors(torch, shift=1.0), "optimizer_ema": {"state": {0: torch.ones(3)}}},
    )
    path = save_torch(
        (ema | raw if first else raw | ema) | {"rng_state": torch.zeros(8, dtype=torch.uint8), "epoch": 3}
    )
    _, params = load_pretrained(path, num_heads=HEADS)
    said = capsys.readouterr().err
    assert repr(key) in said and str(path) in said and said.count("\n") == 1
    assert open_checkpoint(path).wrapper == key
    assert_same_tree(params, load_pretrained(save(weights()), num_heads=HEADS)[1])


@pytest.mark.parametrize(
    "wrap, wrapper",
    [
        (lambda raw, ema: {"state_dict": raw, "callbacks": {"EMA": {"ema_weights": raw}}}, "state_dict"),
        (lambda raw, ema: {"module": raw, "optimizer": {"ema": raw}}, "module"),
        (lambda raw, ema: {"model_ema": {}, "model": raw}, "model"),
        (lambda raw, ema: {"ema": None, "model_state_dict": raw}, "model_state_dict"),
        (lambda raw, ema: {"ema": {"decay": 0.9999}, "my_network": raw}, "my_network"),
        (lambda raw, ema: {"model": {"raw": raw, "ema": ema}}, "model.ema"),
        (lambda raw, ema: {"ema": {"decay": 0.9, "shadow": ema}, "model": raw}, "ema.shadow"),
        (lambda raw, ema: {"non_ema": ema, "model": raw}, "model"),
    ],
)
def test_other_places(torch, save_torch, wrap, wrapper):
    raw, ema = tensors(torch), tensors(torch, shift=1.0)
    path = save_torch(wrap(raw, ema))
    assert open_checkpoint(path).wrapper == wrapper
    _, params = load_pretrained(path, num_heads=HEADS)
    wanted = ema if "ema" in wrapper else raw
    np.testing.assert_array_equal(params["final_layer"]["linear"]["bias"], wanted["final_layer.linear.bias"])


@pytest.mark.parametrize(
    "ema, raw",
    [
        ("ema.", ""),
        ("model_ema.", "model."),
        ("ema_model.module.", "model.module."),
        ("ema.ema_model.", "ema.online_model."),
        ("module.ema_net.", "module.net."),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_ema_weights_by_a_prefix(torch, save_torch, save, capsys, ema, raw, first):
    parts = [
        {f"{ema}{n}": t for n, t in tensors(torch).items()},
        {f"{raw}{n}": t + 1 for n, t in tensors(torch).items()},
    ]
    counters = {"ema.initted": torch.tensor(True), "ema.step": torch.tensor(7), "model_ema.decay": torch.tensor(0.99)}
    state = (parts[0] | parts[1] if first else parts[1] | parts[0]) | counters
    path = save_torch({"state_dict": state, "global_step": 3})
    wanted = load_pretrained(save(weights()), num_heads=HEADS)[1]
    assert not capsys.readouterr().err
    assert_same_tree(load_pretrained(path, num_heads=HEADS)[1], wanted)
    assert repr(f"state_dict.{ema[:-1]}") in capsys.readouterr().err


def test_the_ema_of_latent_diffusion_has_names_without_dots(torch, save_torch, save):
    raw = {f"model.diffusion_model.{name}": tensor + 1 for name, tensor in tensors(torch).items()}
    fixed = "model.diffusion_model.pos_embed"  # not trained, so without an average
    raw[fixed] -= 1
    ema = {f"model_ema.{n[6:].replace('.', '')}": t - 1 for n, t in raw.items() if n != fixed}
    vae = {"first_stage_model.decoder.conv_in.weight": torch.ones(3, 3)}
    path = save_torch({"state_dict": raw | ema | vae | {"model_ema.decay": torch.tensor(0.9999)}})
    wanted = load_pretrained(save({n: (t + 1) - 1 for n, t in weights().items()}), num_heads=HEADS)[1]
    wanted["pos_embed"] = load_pretrained(path, num_heads=HEADS)[1]["pos_embed"]
    assert_same_tree(load_pretrained(path, num_heads=HEADS)[1], wanted)
    assert "ema of model" in open_checkpoint(path, ["blocks.0."]).wrapper


def test_ema_weights_without_names_are_not_passed_over(torch, save_torch):
    ema = {"decay": 0.999, "shadow_params": list(tensors(torch).values())}
    refused(save_torch({"model": tensors(torch), "ema": ema}), "'ema'", "without names")
    refused(save_torch({"model": tensors(torch), "ema_params": ema["shadow_params"]}), "'ema_params'", "without names")


def test_a_refusal_is_one_line_also_where_weights_were_chosen(torch, save_torch, capsys):
    w = tensors(torch)
    for bad in (torch.ones(3), torch.full((8 * PATCH**2,), float("nan"))):
        refused(save_torch({"ema": w | {"final_layer.linear.bias": bad}, "args": {"num_classes": 7}}), "final_layer")
    assert not capsys.readouterr().err


def test_several_models_and_no_ema(torch, save_torch):
    refused(
        save_torch({"teacher": tensors(torch), "student": tensors(torch)}), "'teacher', 'student'", "save one of them"
    )
    two = {f"{p}.{n}": t for p in ("teacher", "student") for n, t in tensors(torch).items()}
    refused(save_torch(two), "teacher.*, student.*", "save one of them")


def test_a_checkpoint_that_contains_itself(torch, save_torch):
    itself = {"epoch": 3}
    itself["model"] = itself
    refused(save_torch(itself), "contains itself")
    first, second = {"weight": torch.ones(3)}, {}
    first["state_dict"], second["model"] = second, first
    refused(save_torch(first), "contains itself")
    nested = {}
    for _ in range(100):
        nested = {"model": nested}
    refused(save_torch(nested), "more than 8 dictionaries")
    harmless = {"model": tensors(torch), "epoch": 3}
    harmless["trainer"] = harmless
    assert load_pretrained(save_torch(harmless), num_heads=HEADS)[0].depth == DEPTH


# ---- Prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "_forward_module.",
        "module._orig_mod.",
        "_forward_module.model.",
        "dit.core.",
    ],
)
@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_one_common_prefix_is_taken_off(torch, save_torch, save, capsys, prefix, kind):
    wanted = load_pretrained(save(weights()), num_heads=HEADS)[1]
    w = {f"{prefix}{name}": tensor for name, tensor in weights().items()}
    path = (
        save(w) if kind == ".safetensors" else save_torch({"model": tensors(torch, w), "n_averaged": torch.tensor(3)})
    )
    assert_same_tree(load_pretrained(path, num_heads=HEADS)[1], wanted)
    if left := prefix.replace("_orig_mod.", "").replace("_forward_module.", ""):
        assert left[:-1] in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_wrapped_blocks(save, inside):
    w = weights()
    wanted = load_pretrained(save(w), num_heads=HEADS)[1]
    wrapped = {re.sub(r"^(blocks\.\d+)\.", rf"\1.{inside}.", name): tensor for name, tensor in w.items()}
    assert_same_tree(load_pretrained(save(wrapped), num_heads=HEADS)[1], wanted)
    name = f"blocks.0.{inside}.attn.qkv.bias"
    refused(save(wrapped | {"blocks.0.attn.qkv.bias": w["blocks.0.attn.qkv.bias"]}), name, "without their wrappers")


def test_a_prefix_of_diffusers_names(module, folder, tmp_path, torch):
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    model, params = load_pretrained(tmp_path / "a.pt", num_heads=2, input_size=8)
    assert_same_tree(params, load_pretrained(folder)[1])


def test_what_is_no_common_prefix(save):
    w = {f"net.{name}": tensor for name, tensor in weights().items()}
    refused(save(w | {"scale": np.ones(3, np.float32)}), "unexpected", "scale", "'net'")
    refused(save(w | {"net.blocks.0.extra": np.ones(3, np.float32)}), "unexpected", "blocks.0.extra")
    del w["net.blocks.1.mlp.fc1.bias"]
    refused(save(w), "lacks", "blocks.1.mlp.fc1.bias")
    refused(save({f"module.{n}": np.ones(3, np.float32) for n in ("a", "b")}), "not a DiT", "module.a")


# ---- Classes, and the null label


def table(rows: int) -> dict[str, np.ndarray]:
    return weights(classes=rows - 1)


def classes(path, **options) -> tuple[int, bool]:
    model, params = load_pretrained(path, num_heads=HEADS, **options)
    assert params["y_embedder"]["embedding_table"]["embedding"].shape[0] == model.num_classes + model.null_label
    return model.num_classes, model.null_label


def test_classes_as_the_caller_says(save):
    assert classes(save(table(6)), num_classes=6) == (6, False)
    assert classes(save(table(6)), num_classes=5) == (5, True)
    assert classes(save(table(1000)), num_classes=999) == (999, True)
    assert classes(save(table(6), {"num_classes": "6"}), num_classes=5) == (5, True)


@pytest.mark.parametrize(
    "rows, facts, wanted",
    [
        (10, {"num_classes": 10}, (10, False)),
        (11, {"num_classes": 10}, (10, True)),
        (10, {"class_dropout_prob": 0.0}, (10, False)),
        (10, {"class_dropout_prob": 0.1}, (9, True)),
        (10, {"num_classes": 10, "class_dropout_prob": 0}, (10, False)),
        (1000, {"class_dropout_prob": 0.1}, (999, True)),
        (1000, {"num_classes": 999}, (999, True)),
        (10, {"cfg_prob": 0.0}, (10, False)),
        (10, {"num_classes": 1000}, (9, True)),
    ],
)
def test_classes_as_the_file_says(torch, save_torch, save, rows, facts, wanted):
    for args in (argparse.Namespace(**facts), facts, argparse.Namespace(**facts, lr=1e-4, data_path=None)):
        path = save_torch({"ema": tensors(torch, table(rows)), "args": args})
        assert classes(path) == wanted
    assert classes(save(table(rows), {key: str(value) for key, value in facts.items()})) == wanted
    path = save_torch({"state_dict": tensors(torch, table(rows)), "hyper_parameters": facts | {"betas": [0.9, 0.99]}})
    assert classes(path) == wanted


def test_a_disagreement_between_file_and_table_is_said(torch, save_torch, capsys):
    classes(save_torch({"ema": tensors(torch, table(6)), "args": argparse.Namespace(num_classes=1000)}))
    assert "1000 classes" in (said := capsys.readouterr().err) and "6 rows" in said


def test_classes_without_any_fact(save):
    assert classes(save(table(1000))) == (1000, False)
    for rows in (2, 6, 11, 101, 999, 1001):
        assert classes(save(table(rows))) == (rows - 1, True)
    assert classes(save(table(1))) == (1, False)
    refused(save(table(1)), "1 rows", "num_classes=2", num_classes=2)


def test_a_model_without_a_null_row_is_rewritten_as_one(save, tmp_path):
    assert (
        to_safetensors([str(save(table(6))), str(tmp_path / "b.safetensors"), "--num-heads=2", "--num-classes=6"]) == 0
    )
    assert classes(tmp_path / "b.safetensors") == (6, False)


# ---- 8 bits


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8_weights_are_read_exactly(torch, save_torch, save, name):
    w = {n: t.astype(getattr(ml_dtypes, name)) for n, t in weights().items()}
    _, wanted = load_pretrained(save({n: t.astype(np.float32) for n, t in w.items()}), num_heads=HEADS)
    path = save_torch({n: t.to(getattr(torch, name)) for n, t in tensors(torch).items()})
    assert_same_tree(load_pretrained(path, num_heads=HEADS)[1], wanted)
    if name in ("float8_e4m3fn", "float8_e5m2"):
        from safetensors.torch import save_file as save_file_torch

        save_file_torch(
            {n: t.to(getattr(torch, name)) for n, t in tensors(torch).items()}, path.with_suffix(".safetensors")
        )
        assert_same_tree(load_pretrained(path.with_suffix(".safetensors"), num_heads=HEADS)[1], wanted)


def test_other_types_are_refused_in_one_line(torch, save_torch):
    bits = torch.zeros(4 * WIDTH, dtype=torch.uint8)
    for dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int8):
        refused(
            save_torch(tensors(torch) | {"blocks.1.mlp.fc1.bias": bits.view(dtype)}), "blocks.1.mlp.fc1.bias", "type"
        )
    nan = tensors(torch) | {"blocks.1.mlp.fc1.bias": (bits + 127).view(torch.float8_e4m3fn)}
    refused(save_torch(nan), "blocks.1.mlp.fc1.bias", "64 NaN")


def test_a_tensor_larger_than_its_numbers_in_the_file(torch, save_torch):
    for tensor in (
        torch.zeros(1).expand(10**9),
        torch.zeros(3, device="meta"),
        torch.zeros(5).as_strided((4, 4), (1, 0)),
    ):
        refused(save_torch(tensors(torch) | {"pos_embed": tensor}), "pos_embed", str(tuple(tensor.shape)))


# ---- What a file is


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 2700611775\n"


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.ckpt"])
@pytest.mark.parametrize(
    "content, words",
    [
        (POINTER, ("Git LFS pointer", "git lfs pull")),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", ("web page", "download")),
        (b"\n <HTML lang=en>", ("web page",)),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ("web page", "download")),
        (b"Entry not found", ("'Entry not found'", "download")),
        (b'{"error": "Repository not found"}', ("Repository not found", "download")),
        (b'{"_class_name": "DiTTransformer2DModel"}', ("config", "folder")),
        (b"\x1f\x8b\x08\x00" + bytes(20), ("gzip", "unpack")),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), ("HDF5",)),
        (b"GGUF\x03" + bytes(20), ("GGUF",)),
        (bytes(257) + b"ustar" + bytes(300), ("tar archive", "unpack")),
    ],
)
def test_what_is_no_checkpoint_is_named(torch, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *words)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_zip_archives_of_other_things(torch, tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path, "TorchScript", "torch.jit.load")
    with open(path, "wb") as file:
        np.savez(file, mu=np.zeros(3))
    refused(path, "numpy archive")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("DiT-XL-2/model.safetensors", b"")
    refused(path, "zip archive", "DiT-XL-2/model.safetensors", "unpack")


class Config:
    pass


def test_torchs_advice_to_switch_the_protection_off_is_not_passed_on(torch, save_torch, tmp_path):
    whole = save_torch({"model": torch.nn.Linear(2, 2)})
    values = (
        {"args": Config()},
        {"lr": np.float64(3)},
        torch.nn.Linear(2, 2),
        {"path": tmp_path},
        {1, frozenset((2,))},
    )
    for value in values:
        for path in (save_torch(value), save_torch(value, _use_new_zipfile_serialization=False), whole):
            with pytest.raises(InputError) as caught:
                load_pretrained(path, num_heads=HEADS)
            assert not re.search("weights[ _]only|safe_globals|trust", str(caught.value), re.IGNORECASE)
    for content in (
        pickle.dumps({1, 2}),
        pickle.dumps(3, 0),
        b"\x80\x02}q\x00\x8a",
        b"\x80\x04\x95\xff" * 9,
        b"(dp0\n",
    ):
        for name in ("bare.pt", "bare.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError) as caught:
                load_pretrained(tmp_path / name, num_heads=HEADS)
            assert not re.search("weights[ _]only|safe_globals|trust", str(caught.value), re.IGNORECASE)


def test_files_are_opened_as_what_they_are(torch, save_torch, save, tmp_path):
    wanted = load_pretrained(save(weights()), num_heads=HEADS)[1]
    for name in ("renamed.pt", "renamed.bin", "renamed"):
        (tmp_path / name).write_bytes(save(weights()).read_bytes())
        assert_same_tree(load_pretrained(tmp_path / name, num_heads=HEADS)[1], wanted)
    for zipped in (True, False):
        renamed = save_torch(tensors(torch), _use_new_zipfile_serialization=zipped).rename(
            tmp_path / "renamed.safetensors"
        )
        assert_same_tree(load_pretrained(renamed, num_heads=HEADS)[1], wanted)


def test_an_index_given_as_the_file(module, folder, tmp_path):
    module.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    index = tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json"
    model, params = load_pretrained(index)
    same, wanted = load_pretrained(folder)
    assert model == same
    assert_same_tree(params, wanted)
    refused(tmp_path / "sharded" / "config.json", "config", "folder")
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    refused(index, "not weights")


# ---- Folders by other names


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_variants_of_diffusers_folders(module, folder, tmp_path, options):
    wanted = load_pretrained(folder)
    module.save_pretrained(tmp_path / "fp16", variant="fp16", **options)
    model, params = load_pretrained(tmp_path / "fp16")
    assert model == wanted[0]
    assert_same_tree(params, wanted[1])


def test_the_best_of_several_variants_is_read(module, folder, torch):
    wanted = load_pretrained(folder)[1]
    with torch.no_grad():
        module.proj_out_2.bias += 1
    for variant in ("fp16", "bf16", "non_ema"):
        module.save_pretrained(folder, variant=variant)
        assert_same_tree(load_pretrained(folder)[1], wanted)
    module.save_pretrained(folder, variant="ema")
    bias = load_pretrained(folder)[1]["final_layer"]["linear"]["bias"]
    np.testing.assert_array_equal(bias, wanted["final_layer"]["linear"]["bias"] + 1)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "checkpoint.pt", "dit.ckpt"])
def test_folders_of_accelerate(torch, save, tmp_path, name):
    wanted = load_pretrained(save(weights()), num_heads=HEADS)[1]
    state = tmp_path / "checkpoint-1000"
    state.mkdir()
    torch.save({"state": {}}, state / "optimizer.bin")
    torch.save({}, state / "scheduler.bin")
    (state / "random_states_0.pkl").write_bytes(b"")
    if name.endswith(".safetensors"):
        save_file(weights(), state / name)
    else:
        torch.save(tensors(torch), state / name)
    assert_same_tree(load_pretrained(state, num_heads=HEADS)[1], wanted)


def test_pipelines(module, folder, tmp_path):
    wanted = load_pretrained(folder)[1]
    pipeline = tmp_path / "pipeline"
    module.save_pretrained(pipeline / "transformer", variant="fp16")
    (pipeline / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "DiTTransformer2DModel"]}))
    (pipeline / "vae").mkdir()
    save_file({"a": np.zeros(3, np.float32)}, pipeline / "model.safetensors")  # all in one file, not diffusers'
    assert_same_tree(load_pretrained(pipeline)[1], wanted)
    (pipeline / "transformer" / "config.json").unlink()
    assert_same_tree(load_pretrained(pipeline, num_heads=2, input_size=8)[1], wanted)


def test_folders_without_an_answer(tmp_path):
    refused(tmp_path, "no config.json and no weights")
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "a.pt, b.pt", "give one file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    refused(tmp_path / "other", "no weights", "model.safetensors")


def test_a_module_saved_by_huggingface_hub(save, tmp_path):
    """`PyTorchModelHubMixin` writes the module's arguments as config.json, without a class."""
    config = {
        "depth": DEPTH,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "num_classes": CLASSES + 1,
        "class_dropout_prob": 0.0,
    }
    path = save(weights())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (path, tmp_path):
        model, _ = load_pretrained(source)
        assert (model.num_heads, model.num_classes, model.null_label) == (4, CLASSES + 1, False)


@pytest.mark.parametrize(
    "config",
    [
        '{"num_attention_heads": 12, "architectures": ["BertModel"], "num_classes": 6}',
        '{"_class_name": "AutoencoderKL", "norm_eps": -1}',
        '{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 3, "num_embeds_ada_norm": 6, "activation_fn": "geglu"}',
        '{"depth": 40, "num_heads": 3, "num_classes": 6}',
        "{",
        "[" * 100_000,
        "[]",
        "",
    ],
)
def test_an_unrelated_config_beside_a_file(torch, save_torch, save, tmp_path, config):
    wanted = load_pretrained(save(weights()), num_heads=HEADS)
    (tmp_path / "config.json").write_text(config)
    for path in (save_torch(tensors(torch)), save(weights(), {"num_heads": "2"})):
        model, params = load_pretrained(path, num_heads=None if path.suffix == ".safetensors" else HEADS)
        assert model == wanted[0]
        assert_same_tree(params, wanted[1])


def test_configs_with_impossible_numbers(folder):
    for key, value in {
        "norm_eps": -0.5,
        "sample_size": 2147483648,
        "num_attention_heads": "two",
        "_class_name": "PixArtTransformer2DModel",
    }.items():
        original = (folder / "config.json").read_text()
        edit_config(folder, **{key: value})
        refused(folder, str(value), num_heads=None)
        (folder / "config.json").write_text(original)
    edit_config(folder, norm_eps=float("inf"))
    refused(folder, "norm_eps=inf")
