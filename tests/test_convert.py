"""Foreign checkpoints become our parameter trees exactly, or are refused in one line that says what is wrong."""

import argparse
import json
import os
import pickle
import subprocess
import sys

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
    refused(path, "y_embedder.embedding_table.weight", "6 rows", "num_classes=6", num_classes=6)
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
