"""SiT and REPA: known by what their files say, loaded as flows in one convention, and never as a DDPM model."""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.load import load_pretrained
from convert.sit import SIT_VARIANTS, reversed_time
from convert.to_safetensors import main as to_safetensors
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DIT_VARIANTS

torch = pytest.importorskip("torch", reason="SiT's checkpoints and the reference module are PyTorch's")
functional = torch.nn.functional

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIZE, CLASSES = 48, 2, 4, 2, 4, 8, 6
SIT = {"model": "SiT-XL/2", "prediction": "velocity", "path_type": "Linear", "num_classes": CLASSES}
REPA = {"model": "SiT-XL/2", "prediction": "v", "path_type": "linear", "num_classes": CLASSES, "cfg_prob": 0.1}


class Attention(torch.nn.Module):
    def __init__(self, qk_norm):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        if qk_norm:
            self.q_norm, self.k_norm = torch.nn.LayerNorm(WIDTH // HEADS), torch.nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulated(x, shift, scale):
    return functional.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def module(**parts):
    return torch.nn.ModuleDict(parts)


class SiT(torch.nn.Module):
    """The network of the paper and of its code, written from their description; with `heads`, REPA's."""

    def __init__(self, learn_sigma=True, heads=0, null_label=True, qk_norm=False):
        super().__init__()
        self.learn_sigma = learn_sigma
        out = PATCH**2 * CHANNELS * (1 + learn_sigma)
        linear, adaln = (
            torch.nn.Linear,
            lambda chunks: torch.nn.ModuleList([torch.nn.SiLU(), linear(WIDTH, chunks * WIDTH)]),
        )
        self.x_embedder = module(proj=torch.nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH))
        self.t_embedder = module(mlp=torch.nn.Sequential(linear(256, WIDTH), torch.nn.SiLU(), linear(WIDTH, WIDTH)))
        self.y_embedder = module(embedding_table=torch.nn.Embedding(CLASSES + null_label, WIDTH))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = torch.nn.ModuleList(
            module(
                attn=Attention(qk_norm),
                mlp=module(fc1=linear(WIDTH, 4 * WIDTH), fc2=linear(4 * WIDTH, WIDTH)),
                adaLN_modulation=adaln(6),
            )
            for _ in range(DEPTH)
        )
        self.final_layer = module(linear=linear(WIDTH, out), adaLN_modulation=adaln(2))
        if heads:
            self.projectors = torch.nn.ModuleList(torch.nn.Sequential(linear(WIDTH, 32)) for _ in range(heads))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.2)

    def forward(self, x, t, y):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder["embedding_table"](y)
        c = functional.silu(c)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block["adaLN_modulation"][1](c).chunk(6, 1)
            x = x + gate1[:, None] * block["attn"](modulated(x, shift1, scale1))
            hidden = functional.gelu(block["mlp"]["fc1"](modulated(x, shift2, scale2)), approximate="tanh")
            x = x + gate2[:, None] * block["mlp"]["fc2"](hidden)
        shift, scale = self.final_layer["adaLN_modulation"][1](c).chunk(2, 1)
        x = self.final_layer["linear"](modulated(x, shift, scale))
        grid = SIZE // PATCH
        x = torch.einsum("nhwpqc->nchpwq", x.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (grid, grid)))
        return x.flatten(2, 3).flatten(3, 4)[:, :CHANNELS]


@pytest.fixture
def save(tmp_path):
    def save(network, arguments=None, name="0400000.pt", **more):
        state = network.state_dict()
        raw = {key: tensor + 1 for key, tensor in state.items()}
        training = {"model": raw, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(**(arguments or {}))}
        torch.save(state if arguments is None else training | more, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SiT()


def inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, CHANNELS, SIZE, SIZE), np.float32)
    return x, np.array([0.0, 0.03, 0.5, 0.97, 1.0], np.float32), np.array([0, 3, 5, 6, 2])


def ours(path, x, t, y, **options):
    model, params = load_pretrained(path, num_heads=HEADS, **options)
    out = model.apply(
        {"params": params}, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t), jnp.asarray(y, jnp.int32)
    )
    return model, np.asarray(out[..., :CHANNELS]).transpose(0, 3, 1, 2)


def theirs(network, x, t, y) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y)).numpy()


def refused(path, *words, **options) -> None:
    with pytest.raises(InputError) as caught:
        load_pretrained(path, **{"num_heads": HEADS, **options})
    assert "\n" not in str(caught.value)
    for word in (path.name, *words):
        assert word in str(caught.value)


# ---- The same function


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_sit_computes_the_velocity_that_its_own_code_computes(save, learn_sigma):
    torch.manual_seed(1)
    network = SiT(learn_sigma)
    x, t, y = inputs()
    model, out = ours(save(network, SIT), x, t, y)
    assert (model.predicts, model.learn_sigma, model.num_classes, model.null_label) == (
        "flow",
        learn_sigma,
        CLASSES,
        True,
    )
    wanted = theirs(network, x, t, y)
    assert wanted.std() > 0.3 and np.abs(wanted - theirs(network, x, 1000 * t, y)).max() > 0.1
    np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_repa_computes_its_velocity_at_the_reversed_time(save, capsys):
    """REPA has noise at t = 1 and predicts noise - data; loaded, it has SiT's convention."""
    torch.manual_seed(2)
    network = SiT(learn_sigma=False, heads=2)
    x, t, y = inputs()
    model, out = ours(save(network, REPA), x, t, y)
    assert (model.predicts, model.learn_sigma) == ("flow", False)
    wanted = -theirs(network, x, 1 - t, y)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())
    assert "4 parameters of projectors.*" in capsys.readouterr().err
    bare, again = ours(save(network, name="last.pt"), x, t, y)  # the released file has no arguments, but projectors
    assert bare == model
    np.testing.assert_array_equal(again, out)


def test_the_reversed_time_is_an_involution():
    kernel = np.random.default_rng(0).standard_normal((7, 256), np.float32)
    assert np.abs(reversed_time(kernel) - kernel).max() > 1
    np.testing.assert_allclose(reversed_time(reversed_time(kernel)), kernel, atol=1e-6)


def test_recorded_outputs_of_sit(shared):
    """What the original code computed, recorded beside its weights."""
    folder = shared / "data" / "reference_io" / "trajectories" / "sit"
    if not folder.is_dir():
        pytest.skip("needs the recorded outputs of the original SiT")
    model, params = load_pretrained(folder / "model.pt")  # its class and its heads stand in the config beside it
    with np.load(folder / "io.npz") as io:
        x, t, y, wanted = (io[name] for name in ("x", "t", "y", "out"))
    out = model.apply(
        {"params": params}, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t), jnp.asarray(y, jnp.int32)
    )
    assert (model.predicts, model.num_heads) == ("flow", 4) and wanted.std() > 0.3
    np.testing.assert_allclose(np.asarray(out[..., :CHANNELS]).transpose(0, 3, 1, 2), wanted, atol=1e-5)


# ---- What tells a SiT


@pytest.mark.parametrize(
    "arguments",
    [
        SIT,
        {"model": "SiT-B/4"},
        {"prediction": "velocity", "path_type": "Linear"},
        {"path_type": "linear", "prediction": "v"},
        {"path_type": "Linear"},
    ],
)
def test_arguments_tell(save, network, arguments):
    path = save(network, arguments, name="dit.pt")
    assert load_pretrained(path, num_heads=HEADS)[0].predicts == "flow"
    refused(path, "flow", *(f"{k}={v}" for k, v in arguments.items() if k != "num_classes"), predicts="eps")
    refused(path, "flow", variant="DiT")


def test_arguments_in_a_dictionary_and_in_metadata(save, network, tmp_path):
    path = save(network, SIT, args=dict(SIT))
    assert load_pretrained(path, num_heads=HEADS)[0].predicts == "flow"
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    for metadata in ({"model": "SiT-XL/2"}, {"prediction": "velocity"}):
        save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
        assert load_pretrained(tmp_path / "a.safetensors", num_heads=HEADS)[0].predicts == "flow"
    save_file(tensors, tmp_path / "a.safetensors", metadata={"model": "DiT-XL/2"})
    assert load_pretrained(tmp_path / "a.safetensors", num_heads=HEADS)[0].predicts == "eps"
    refused(tmp_path / "a.safetensors", "DiT-XL/2", predicts="flow")


def test_the_caller_tells(save, network):
    path = save(network)
    assert load_pretrained(path, num_heads=HEADS)[0].predicts == "eps"
    for options in ({"variant": "SiT"}, {"predicts": "flow"}, {"variant": "SiT", "predicts": "flow"}):
        assert load_pretrained(path, num_heads=HEADS, **options)[0].predicts == "flow"
    refused(save(network, name="SiT-XL-2.pt"), "SiT-XL/2", "depth=28", variant="SiT-XL/2")
    for options, word in (
        ({"variant": "SiT", "predicts": "eps"}, "predicts='eps'"),
        ({"predicts": "velocity"}, "known: eps, flow"),
        ({"variant": "SiT-XL/3"}, "SiT-XL/2"),
    ):
        with pytest.raises(InputError, match=word):
            load_pretrained(path, num_heads=HEADS, **options)


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "sit_b.pt", "my.SiT.safetensors"])
def test_a_name_that_says_sit_asks(save, network, name):
    path = save(network, name=name)
    refused(path, 'variant="SiT-XL/2"', 'variant="DiT-XL/2"')
    assert load_pretrained(path, "SiT", num_heads=HEADS)[0].predicts == "flow"
    assert load_pretrained(path, "DiT", num_heads=HEADS)[0].predicts == "eps"


def test_names_that_only_contain_the_letters(save, network):
    for name in ("website.pt", "transit-2.pt", "sitting.pt", "DiT-XL-2-256x256.pt"):
        assert load_pretrained(save(network, name=name), num_heads=HEADS)[0].predicts == "eps"


@pytest.mark.parametrize(
    "arguments",
    [
        SIT | {"prediction": "score"},
        SIT | {"prediction": "noise", "path_type": "VP"},
        SIT | {"path_type": "GVP"},
        REPA | {"path_type": "cosine"},
        {"prediction": "x0"},
    ],
)
def test_other_flows_are_refused_as_what_they_are(save, network, arguments):
    found = [f"{key}={arguments[key]}" for key in ("prediction", "path_type") if key in arguments]
    refused(save(network, arguments), *found, "velocity")
    refused(save(network, arguments), variant="DiT")


def test_normalised_queries_and_keys_are_refused(save):
    refused(save(SiT(qk_norm=True), REPA), "qk_norm=True", "k_norm")


def test_a_sit_without_a_null_row(save):
    network = SiT(null_label=False)
    for arguments in (SIT, {"model": "SiT", "class_dropout_prob": 0}, {"model": "SiT", "cfg_prob": 0.0}):
        model, params = load_pretrained(save(network, arguments), num_heads=HEADS)
        assert (model.num_classes, model.null_label) == (CLASSES, False)
        assert params["y_embedder"]["embedding_table"]["embedding"].shape == (CLASSES, WIDTH)


def test_variants_have_dits_sizes():
    assert len(SIT_VARIANTS) == 12 and SIT_VARIANTS["SiT-XL/2"] == DIT_VARIANTS["DiT-XL/2"]


def test_a_rewritten_sit_stays_one(save, tmp_path):
    """Also of a REPA, whose convention does not need to be told any more."""
    x, t, y = inputs()
    for network, arguments in ((SiT(null_label=False), SIT), (SiT(heads=1), REPA)):
        y = np.minimum(y, CLASSES - 1)
        source, target = save(network, arguments), tmp_path / "rewritten.safetensors"
        assert to_safetensors([str(source), str(target), "--num-heads=4", "--dtype=bfloat16"]) == 0
        (model, wanted), (same, out) = ours(source, x, t, y), ours(target, x, t, y)
        assert same == model
        assert np.abs(out - wanted).max() < 0.1 * np.abs(wanted).max()
    with jax.default_device(jax.devices("cpu")[0]):
        assert to_safetensors([str(save(network, name="sit.pt")), str(target), "--num-heads=4"]) == 0  # has projectors
    bare = save(SiT(), name="sit.pt")
    assert to_safetensors([str(bare), str(target), "--num-heads=4"]) == 2
    assert to_safetensors([str(bare), str(target), "--num-heads=4", "--variant=SiT"]) == 0
