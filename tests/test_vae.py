"""The VAE computes what diffusers' AutoencoderKL computes, opens its files, and decodes in slices of bounded memory."""

import functools
import json
import math
import pathlib
import re

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from convert.vae import load_vae
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks import latents
from vq4dit_jax.networks import vae as vae_module
from vq4dit_jax.networks.vae import AutoencoderKL, attention

WIDTHS, LAYERS, GROUPS = (8, 16, 24), 1, 4
SMALL = AutoencoderKL(block_out_channels=WIDTHS, layers_per_block=LAYERS, norm_num_groups=GROUPS)
REAL_WIDTHS = (128, 256, 512, 512)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(WIDTHS),
    "down_block_types": ["DownEncoderBlock2D"] * len(WIDTHS),
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": LAYERS,
    "norm_num_groups": GROUPS,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * len(WIDTHS),
}


def checkpoint_names(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our tree under diffusers' names and axes, written down once more and differently than in convert/vae.py."""
    out = {}
    for path, value in flat.items():
        *modules, leaf = path.split("/")
        for i, module in enumerate(modules):
            stem, _, number = module.rpartition("_")
            modules[i] = f"{stem}.{number}" if number.isdecimal() else module
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim]
        name = ".".join([*modules, "bias" if leaf == "bias" else "weight"])
        out[name] = np.ascontiguousarray(value.transpose(axes))
    return out


@functools.cache
def shapes_of(vae: AutoencoderKL) -> dict[str, tuple[int, ...]]:
    x = jax.ShapeDtypeStruct((1, 8, 8, vae.image_channels), jnp.float32)
    tree = jax.eval_shape(lambda x: vae.init(jax.random.key(0), x), x)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def random_tree(vae: AutoencoderKL) -> dict[str, np.ndarray]:
    """Flat parameters at random, norms and biases too; scaled so that activations neither vanish nor grow."""
    rng = np.random.default_rng(0)

    def one(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            return noise / np.sqrt(np.prod(shape[:-1], dtype=np.float32))
        return 1 + 0.3 * noise if path.endswith("scale") else 0.3 * noise

    return {path: one(path, shape) for path, shape in shapes_of(vae).items()}


def weights() -> dict[str, np.ndarray]:
    """A checkpoint with the newer names."""
    return checkpoint_names(random_tree(SMALL))


def old_names(tensors: dict[str, np.ndarray], conv: bool = False) -> dict[str, np.ndarray]:
    out = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        for new, old in OLD_NAMES.items():
            if module.endswith(f"attentions.0.{new}"):
                name = f"{module.removesuffix(new)}{old}.{leaf}"
                value = value[:, :, None, None] if conv and leaf == "weight" else value
        out[name] = value
    return out


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict | None = CONFIG) -> pathlib.Path:
    """A diffusers folder, or where there is no config, one file."""
    folder.mkdir()
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, file)
    if config is None:
        return file
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def save(tmp_path):
    return lambda *args, **options: write(tmp_path / f"vae{len(list(tmp_path.iterdir()))}", *args, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[AutoencoderKL, dict]:
    return load_vae(write(tmp_path_factory.mktemp("small") / "vae", weights()))


@functools.partial(jax.jit, static_argnames="vae")
def decode(vae: AutoencoderKL, params: dict, z: np.ndarray) -> jax.Array:
    return vae.apply({"params": params}, z, method="decode")


@functools.partial(jax.jit, static_argnames="vae")
def encode(vae: AutoencoderKL, params: dict, x: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return vae.apply({"params": params}, x, method="encode")


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def images_of_noise(*shape: int) -> np.ndarray:
    return np.tanh(noise(*shape))


def assert_same_tree(params, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, other)


def refused(path, *words: str) -> None:
    """`path` is refused in one line that has all of `words`."""
    with pytest.raises(InputError) as caught:
        load_vae(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message


# ---- Against diffusers, a module that nobody here wrote


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="diffusers' module runs in torch")
    pytest.importorskip("diffusers", reason="parity is with diffusers' AutoencoderKL")
    return torch


def peer(torch, widths=WIDTHS, layers=LAYERS, groups=GROUPS):
    """diffusers' own module with every parameter random: fresh norms would hide a scale or a bias that is not used."""
    import diffusers

    module = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1.0)
    return module


def nchw(torch, x: np.ndarray):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """To 1e-4, as for images in [-1, 1]: the last norm keeps what these random weights make near that range."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert found.shape == wanted.shape and 0.1 < wanted.std() < 10


def compare(torch, module, folder, z: np.ndarray, x: np.ndarray) -> AutoencoderKL:
    vae, params = load_vae(folder)
    with torch.no_grad():
        posterior = module.encode(nchw(torch, x)).latent_dist
        wanted = nhwc(module.decode(nchw(torch, z)).sample)
    assert_close(decode(vae, params, z), wanted)
    mean, log_variance = encode(vae, params, x)
    assert_close(mean, nhwc(posterior.mean))
    assert_close(log_variance, nhwc(posterior.logvar))
    return vae


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_small_vae_agrees_with_diffusers(torch, tmp_path, safe):
    module = peer(torch)
    module.save_pretrained(tmp_path, safe_serialization=safe)
    vae = compare(torch, module, tmp_path, noise(2, 6, 10, 4), images_of_noise(2, 24, 40, 3))
    assert vae == SMALL and vae.downsampling == 4


def test_published_sizes_agree_with_diffusers(torch, tmp_path):
    module = peer(torch, REAL_WIDTHS, layers=2, groups=32)
    module.save_pretrained(tmp_path)
    vae = compare(torch, module, tmp_path, noise(1, 8, 8, 4), images_of_noise(1, 64, 64, 3))
    assert vae == AutoencoderKL()
    assert sum(p.numel() for p in module.parameters()) == 83_653_863  # those of sd-vae-ft-ema


def test_large_latents_agree_with_diffusers(torch, tmp_path):
    module = peer(torch)
    module.save_pretrained(tmp_path)
    compare(torch, module, tmp_path, 1e4 * noise(2, 6, 10, 4), 1e4 * noise(2, 24, 40, 3))


def test_log_variance_is_clipped_as_there(torch, tmp_path):
    module = peer(torch)
    with torch.no_grad():
        module.quant_conv.bias += 100.0 * (torch.arange(8) % 2 * 2 - 1)
    module.save_pretrained(tmp_path)
    vae, params = load_vae(tmp_path)
    x = images_of_noise(1, 16, 16, 3)
    log_variance = np.asarray(encode(vae, params, x)[1])
    assert set(np.unique(log_variance)) == {-30.0, 20.0}
    with torch.no_grad():
        np.testing.assert_array_equal(log_variance, nhwc(module.encode(nchw(torch, x)).latent_dist.logvar))


def test_diffusers_reads_the_names_that_these_tests_write(torch, save):
    """So the tests below, which need no torch, are about real checkpoints."""
    import diffusers

    for tensors in (weights(), old_names(weights())):
        folder = save(tensors)
        compare(torch, diffusers.AutoencoderKL.from_pretrained(folder), folder, noise(1, 4, 4, 4), noise(1, 16, 16, 3))


# ---- Numbers


@pytest.mark.parametrize("tokens", [4, 1, 5, 64])
def test_attention_in_chunks_is_attention(monkeypatch, tokens):
    q, k, v = (jnp.asarray(noise(2, tokens, 8, seed=s)) for s in range(3))
    whole = attention(q, k, v)
    monkeypatch.setattr(vae_module, "_QUERIES", 4)
    np.testing.assert_allclose(attention(q, k, v), whole, rtol=0, atol=1e-6)
    scores = np.einsum("bqc,bkc->bqk", *(np.float64(a) for a in (q, k))) / np.sqrt(8)
    ratios = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(whole, ratios @ np.float64(v), rtol=0, atol=1e-5)


def test_attention_never_holds_all_scores():
    """At 64x64 latents: no array of the program has 4096 x 4096 numbers, nor half as many."""
    x = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float32)
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(attention)(x, x, x)))
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == 1024 * 4096


def test_attention_in_bfloat16_has_float32_scores():
    """Scores of some 100, which bfloat16 would round to halves."""
    q, k, v = (jnp.asarray(size * noise(1, 64, 64, seed=size), jnp.bfloat16) for size in (6, 7, 1))
    scores = np.einsum("bqc,bkc->bqk", *(np.float64(a) for a in (q, k))) / np.sqrt(64)
    ratios = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = ratios / ratios.sum(-1, keepdims=True) @ np.float64(v)
    np.testing.assert_allclose(np.float64(attention(q, k, v)), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e15])
def test_bfloat16_is_close_to_float32_and_always_finite(small, scale):
    vae, params = small
    z, x = scale * noise(2, 6, 10, 4), scale * noise(2, 24, 40, 3)
    low = vae.clone(dtype=jnp.bfloat16)

    def outputs(vae: AutoencoderKL) -> list[np.ndarray]:
        out = [decode(vae, params, z), *encode(vae, params, x)]
        assert all(o.dtype == jnp.float32 and jnp.isfinite(o).all() for o in out)
        return [np.asarray(o) for o in out]

    for found, wanted in zip(outputs(low), outputs(vae)):
        assert 0 < np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


def test_constant_input_is_no_division_by_zero(small):
    vae, params = small
    params = jax.tree.map(jnp.zeros_like, params)
    assert jnp.isfinite(decode(vae, params, np.zeros((1, 4, 4, 4), np.float32))).all()


def test_sizes_that_do_not_fit_are_refused(small):
    vae, params = small
    with pytest.raises(InputError, match="24 x 42 pixels.*multiples of 4"):
        vae.apply({"params": params}, jnp.zeros((1, 24, 42, 3)), method="encode")
    with pytest.raises(InputError, match="float16.*float32 or bfloat16"):
        vae.clone(dtype=jnp.float16).apply({"params": params}, jnp.zeros((1, 4, 4, 4)), method="decode")
    with pytest.raises(InputError, match="norm_num_groups=5.*width 8"):
        vae.clone(norm_num_groups=5).apply({"params": params}, jnp.zeros((1, 4, 4, 4)), method="decode")


# ---- Slices


@pytest.fixture(scope="module")
def whole(small) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents and their images, decoded at once."""
    vae, params = small
    z = noise(7, 4, 6, 4) * np.float32(vae.scaling_factor)
    return z, np.asarray(decode(vae, params, z / np.float32(vae.scaling_factor))).clip(-1, 1)


@pytest.mark.parametrize("slice_size", [None, 1, 2, 3, 100])
def test_slices_are_the_whole(small, whole, slice_size):
    z, images = whole
    found = latents.decode_images(*small, z, slice_size=slice_size)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (7, 16, 24, 3)
    np.testing.assert_allclose(found, images, rtol=0, atol=1e-5)
    assert np.abs(images).max() == 1.0 and np.abs(images).min() < 0.1  # some were clipped, not all


def test_an_image_does_not_depend_on_its_neighbours(small, whole):
    z, _ = whole
    found = latents.decode_images(*small, z, slice_size=2)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_array_equal(latents.decode_images(*small, z[order], slice_size=2), found[order])
    np.testing.assert_array_equal(latents.decode_images(*small, z[4:5], slice_size=2), found[4:5])
    z = z.copy()
    z[3] = np.nan
    others = [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(latents.decode_images(*small, z, slice_size=2)[others], found[others])


def test_one_compilation_serves_all_slices(small, whole):
    z, _ = whole
    latents._decode.clear_cache()
    latents.decode_images(*small, z, slice_size=2)
    latents.decode_images(*small, jnp.asarray(z[:6]), slice_size=2)
    assert latents._decode._cache_size() == 1


@pytest.mark.parametrize(("side", "images"), [(64, 64), (256, 4), (512, 1), (1024, 1)])
def test_the_default_slice_has_the_pixels_of_one_large_image(side, images):
    assert latents.default_slice_size(side, side, "gpu") == images
    assert latents.default_slice_size(side, side, "cpu") == 1


def test_memory_does_not_depend_on_the_batch(small, whole, monkeypatch):
    """All that a device gets is `slice_size` images at a time."""
    shapes, decode = [], latents._decode
    monkeypatch.setattr(
        latents, "_decode", lambda vae, p, z: shapes.append(z.sharding.shard_shape(z.shape)) or decode(vae, p, z)
    )
    latents.decode_images(*small, whole[0], slice_size=2)
    assert shapes == [(2, 4, 6, 4)] * 2  # on two devices
    shapes.clear()
    latents.decode_images(*small, whole[0])
    assert shapes == [(1, 4, 6, 4)] * 4


def test_no_images_are_no_images(small):
    assert latents.decode_images(*small, np.zeros((0, 4, 4, 4), np.float32)).shape == (0, 16, 16, 3)


def test_wrong_latents_are_refused(small):
    with pytest.raises(InputError, match=r"\(2, 4, 4, 3\).*\(B, h, w, 4\)"):
        latents.decode_images(*small, np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(InputError, match="slice_size=0"):
        latents.decode_images(*small, np.zeros((2, 4, 4, 4), np.float32), slice_size=0)


# ---- Files


def test_every_tensor_finds_its_leaf(save):
    vae, params = load_vae(save(weights()))
    assert vae == SMALL
    flat = flatten_dict(params, sep="/")
    for path, leaf in random_tree(SMALL).items():
        np.testing.assert_array_equal(flat.pop(path), leaf)
    assert not flat


@pytest.mark.parametrize("conv", [False, True])
def test_old_attention_names(save, conv):
    _, params = load_vae(save(old_names(weights(), conv)))
    assert_same_tree(params, load_vae(save(weights()))[1])


def test_config_gives_the_scaling_factor_and_is_not_needed(save):
    assert load_vae(save(weights(), CONFIG | {"scaling_factor": 0.13025}))[0].scaling_factor == 0.13025
    assert load_vae(save(weights()))[0].scaling_factor == 0.18215
    wide = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=3)
    file = save(checkpoint_names(random_tree(wide)), config=None)
    assert load_vae(file)[0] == load_vae(file.parent)[0] == wide


def test_a_pipeline_has_it_in_a_folder(save, tmp_path):
    folder = save(weights())
    (tmp_path / "pipeline").mkdir()
    folder.rename(tmp_path / "pipeline" / "vae")
    assert load_vae(tmp_path / "pipeline")[0].block_out_channels == WIDTHS


def test_a_decoder_alone_decodes(save):
    decoder = {n: v for n, v in weights().items() if n.startswith(("decoder.", "post_quant_conv."))}
    vae, params = load_vae(save(decoder))
    assert set(params) == {"decoder", "post_quant_conv"}
    z = noise(1, 4, 4, 4)
    whole = load_vae(save(weights()))[1]
    np.testing.assert_array_equal(decode(vae, params, z), decode(vae, whole, z))
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        vae.apply({"params": params}, jnp.zeros((1, 16, 16, 3)), method="encode")


def test_half_precision_files_and_the_type_of_computation(save):
    halves = {n: v.astype(np.float16) for n, v in weights().items()}
    vae, params = load_vae(save(halves), dtype="bfloat16")
    assert vae.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with pytest.raises(InputError, match="dtype='float16': the VAE computes in float32 or bfloat16"):
        load_vae(save(halves), dtype="float16")
    with pytest.raises(InputError, match="dtype='int3'"):
        load_vae(save(halves), dtype="int3")


def test_torch_files(torch, save, tmp_path):
    tensors = {n: torch.from_numpy(v) for n, v in old_names(weights()).items()}
    wanted = load_vae(save(weights()))[1]
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    torch.save({"state_dict": tensors}, tmp_path / "vae.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.bin", tmp_path / "vae.ckpt"):
        assert_same_tree(load_vae(path)[1], wanted)


def test_a_pickle_that_runs_code_is_refused(torch, save, tmp_path):
    class Touch:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    torch.save({"decoder.conv_in.weight": Touch()}, tmp_path / "vae.bin")
    refused(tmp_path / "vae.bin", "nothing in it was run")
    assert not (tmp_path / "ran").exists()


# ---- What is refused, in one line that names the parameter and the file


def without(name: str) -> dict[str, np.ndarray]:
    return {n: v for n, v in weights().items() if n != name}


@pytest.mark.parametrize(
    "name",
    [
        "decoder.conv_in.weight",
        "decoder.conv_out.bias",
        "decoder.up_blocks.1.resnets.0.conv1.weight",
        "decoder.mid_block.attentions.0.to_v.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "encoder.conv_norm_out.weight",
        "quant_conv.bias",
        "post_quant_conv.weight",
    ],
)
def test_a_missing_parameter(save, name):
    refused(save(without(name)), f"lacks parameter {name}")


def test_a_parameter_too_many(save):
    refused(save(weights() | {"decoder.extra": np.zeros(3, np.float32)}), "unexpected parameter decoder.extra")
    name = "decoder.mid_block.attentions.0.query.weight"
    refused(save(weights() | {name: np.zeros((24, 24), np.float32)}), "decoder.mid_block.attentions.0")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.conv_in.weight", (24, 4, 3)),
        ("decoder.conv_in.weight", (24, 0, 3, 3)),
        ("decoder.conv_in.bias", (7,)),
        ("decoder.up_blocks.0.resnets.1.conv2.weight", (24, 24, 5, 5)),
        ("encoder.mid_block.attentions.0.to_k.weight", (24, 24, 3, 3)),
        ("encoder.mid_block.attentions.0.to_k.weight", (16, 24)),
        ("encoder.conv_in.weight", (8, 1, 3, 3)),
        ("quant_conv.weight", (4, 8, 1, 1)),
    ],
)
def test_a_wrong_shape(save, name, shape):
    refused(save(weights() | {name: np.zeros(shape, np.float32)}), name, str(shape), "wanted")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none(save, bad):
    tensors = weights()
    tensors["encoder.conv_out.bias"][2] = bad
    refused(save(tensors), "encoder.conv_out.bias has 1 NaN or infinite")


def test_a_gap_between_levels(save):
    refused(save({n: v for n, v in weights().items() if "up_blocks.1." not in n}), "no parameters of block 1")


def test_what_is_no_vae(save, tmp_path):
    refused(save({"decoder.up.0.block.0.conv1.weight": np.zeros((2, 2), np.float32)}), "not a VAE", "decoder.up.0")
    refused(tmp_path / "nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", "diffusion_pytorch_model.safetensors")
    file = save(weights(), config=None)
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, "not a whole safetensors file")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "AutoencoderDC"),
        ("act_fn", "relu"),
        ("block_out_channels", [8, 16, 16]),
        ("down_block_types", ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"]),
        ("in_channels", 1),
        ("latent_channels", 16),
        ("layers_per_block", 2),
        ("mid_block_add_attention", False),
        ("norm_num_groups", 3),
        ("norm_num_groups", "4"),
        ("norm_num_groups", 0),
        ("scaling_factor", 0),
        ("scaling_factor", "big"),
        ("scaling_factor", None),
        ("shift_factor", 0.1159),
    ],
)
def test_a_config_of_something_else(save, key, value):
    refused(save(weights(), CONFIG | {key: value}), key, repr(value))


def test_without_a_config_32_groups_are_taken(save):
    refused(save(weights(), config=None), "norm_num_groups=32", "8, 16, 24", "config.json")


def test_official_names(save, monkeypatch, tmp_path):
    """Put into the cache by hand, they are found; tests/test_download.py has the downloads."""
    monkeypatch.setenv("VQ4DIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    save(weights()).rename(tmp_path / "cache" / "sd-vae-ft-ema")
    assert_same_tree(load_vae("official:sd-vae-ft-ema")[1], load_vae(save(weights()))[1])
    with pytest.raises(InputError, match="no official VAE 'sdxl'; there are sd-vae-ft-ema, sd-vae-ft-mse"):
        load_vae("official:sdxl")
    with pytest.raises(
        InputError, match="cannot download.*stabilityai/sd-vae-ft-mse.*into .*sd-vae-ft-mse as config.json"
    ):
        load_vae("official:sd-vae-ft-mse")
