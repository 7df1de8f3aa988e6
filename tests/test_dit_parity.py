"""Our DiT computes what diffusers' `DiTTransformer2DModel` computes at the same weights, in float32.

facebookresearch/DiT is the same network but for two constants; with these set, diffusers' module stands for it.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert.load import load_pretrained
from vq4dit_jax.files import asset

torch = pytest.importorskip("torch", reason="the reference modules are PyTorch's")
diffusers = pytest.importorskip("diffusers", reason="the reference module is diffusers'")

HEADS, WIDTH, DEPTH, CLASSES = 4, 64, 3, 10


def reference(patch: int, channels: int, norm_eps: float = 1e-5):
    torch.manual_seed(patch)
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=DEPTH,
        sample_size=4 * patch,
        patch_size=patch,
        num_embeds_ada_norm=CLASSES,
        norm_eps=norm_eps,
    ).eval()
    for block in module.transformer_blocks[1:]:  # as in every converted checkpoint
        block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
    return module


def facebook_reference(patch: int, channels: int):
    module = reference(patch, channels, norm_eps=1e-6)
    for block in module.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return module


def facebook_state_dict(module) -> dict:
    emb = module.transformer_blocks[0].norm1.emb
    modules = {
        "x_embedder.proj": module.pos_embed.proj,
        "t_embedder.mlp.0": emb.timestep_embedder.linear_1,
        "t_embedder.mlp.2": emb.timestep_embedder.linear_2,
        "y_embedder.embedding_table": emb.class_embedder.embedding_table,
        "final_layer.linear": module.proj_out_2,
        "final_layer.adaLN_modulation.1": module.proj_out_1,
    }
    state = {"pos_embed": module.pos_embed.pos_embed}
    for i, block in enumerate(module.transformer_blocks):
        modules |= {
            f"blocks.{i}.attn.proj": block.attn1.to_out[0],
            f"blocks.{i}.mlp.fc1": block.ff.net[0].proj,
            f"blocks.{i}.mlp.fc2": block.ff.net[2],
            f"blocks.{i}.adaLN_modulation.1": block.norm1.linear,
        }
        for kind in ("weight", "bias"):
            parts = [getattr(linear, kind) for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts).detach()
    for name, part in modules.items():
        state |= {f"{name}.{kind}": tensor for kind, tensor in part.state_dict().items()}
    return state


def inputs(module, batch: int = 6):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, module.config.in_channels, *(module.config.sample_size,) * 2), np.float32)
    t = np.array([0, 1, 20, 500, 998, 999][:batch], np.int32)
    y = np.array([0, 3, CLASSES - 1, CLASSES, CLASSES, 5][:batch], np.int32)
    return x, t, y


def run(module, x, t, y) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y)).sample.numpy()


def run_with_cfg(module, x, t, y, scale: float, guided_channels: int) -> np.ndarray:
    half = x[: len(x) // 2]
    out = run(module, np.concatenate([half, half]), t, y)
    eps, rest = out[:, :guided_channels], out[:, guided_channels:]
    label, null = np.split(eps, 2)
    guided = null + np.float32(scale) * (label - null)
    return np.concatenate([np.concatenate([guided, guided]), rest], axis=1)


def relative_error(ours, reference: np.ndarray) -> float:
    ours = np.asarray(ours).transpose(0, 3, 1, 2)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def nhwc(x: np.ndarray):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("layout", ["facebook", "diffusers"])
def test_forward_and_guidance_agree_with_torch(tmp_path, layout, channels, patch):
    if layout == "diffusers":
        module, path = reference(patch, channels), tmp_path / "model"
        module.save_pretrained(path)
        model, params = load_pretrained(path)
    else:
        module, path = facebook_reference(patch, channels), tmp_path / "model.pt"
        torch.save(facebook_state_dict(module), path)
        model, params = load_pretrained(path, num_heads=HEADS)
    x, t, y = inputs(module)

    out = model.apply({"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(y))
    assert relative_error(out, run(module, x, t, y)) < 1e-5

    y = np.array([1, 2, 3, CLASSES, CLASSES, CLASSES], np.int32)
    out = model.apply({"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(y), 1.5, method="forward_with_cfg")
    # Three of four channels are guided: the published figures were made that way.
    assert relative_error(out, run_with_cfg(module, x, t, y, 1.5, guided_channels=3)) < 1e-5


def test_the_two_layouts_are_different_functions_of_the_same_weights(tmp_path):
    """Read with the other layout's constants, the output is off by far more than rounding."""
    module = reference(2, 4)
    torch.save(facebook_state_dict(module), tmp_path / "model.pt")
    model, params = load_pretrained(tmp_path / "model.pt", num_heads=HEADS)
    x, t, y = inputs(module)
    out = model.apply({"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(y))
    assert relative_error(out, run(module, x, t, y)) > 1e-3


def test_learn_sigma_false(tmp_path):
    module = facebook_reference(2, 4)
    module.out_channels = 4
    module.proj_out_2 = torch.nn.Linear(WIDTH, 2 * 2 * 4)
    torch.save(facebook_state_dict(module), tmp_path / "model.pt")
    model, params = load_pretrained(tmp_path / "model.pt", num_heads=HEADS)
    assert not model.learn_sigma
    x, t, y = inputs(module)
    out = model.apply({"params": params}, nhwc(x), jnp.asarray(t), jnp.asarray(y))
    assert relative_error(out, run(module, x, t, y)) < 1e-5


def test_the_shipped_model_is_the_original_in_16_bits(shared):
    original, params = load_pretrained(shared / "data/dit_cifar10/dit_cifar10.pt", num_heads=6)
    shipped, rounded = load_pretrained(asset("dit_cifar10.safetensors"))
    assert shipped == original
    rounded = flatten_dict(rounded, sep="/")
    as_16_bits = {
        path: np.asarray(leaf).astype(np.float16).astype(np.float32)
        for path, leaf in flatten_dict(params, sep="/").items()
    }
    assert rounded.keys() == as_16_bits.keys()
    for path, leaf in rounded.items():
        np.testing.assert_array_equal(np.asarray(leaf), as_16_bits[path], err_msg=path)
