"""`load_vae`: diffusers' AutoencoderKL to ours and its parameters, sizes read off the shapes.

Our tree has the checkpoint's own names, so the layout follows from the tree. Only the attention differs between
versions of diffusers: `query`, `key`, `value` and `proj_attn` (the published files) are `to_q`, `to_k`, `to_v` and
`to_out.0` since 0.15, and all of them are 1 x 1 convolutions in some files that came from the original repository.
"""

import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.checkpoint import Checkpoint
from convert.download import official_vae
from convert.layout import BIAS, CONV, LINEAR, Kind, Layout, Rule, Shape
from convert.readers import open_checkpoint
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.vae import AutoencoderKL

_NAME = "diffusers' AutoencoderKL"
_LEVEL = "decoder.up_blocks."
_LAYER = "decoder.up_blocks.0.resnets."
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# (O, I, 1, 1) -> (I, O)
_CONV_1X1 = Kind(4, lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None], lambda s: (s[1], s[0], 1, 1))
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Values of a config, besides sizes, with which our module computes the same.
_WANTED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def load_vae(path: str | os.PathLike, dtype: Any = "float32") -> tuple[AutoencoderKL, dict[str, Any]]:
    """Opens a VAE of Stable Diffusion.

    Args:
      path: a diffusers folder (or a pipeline's, which has it as `vae/`), one file of its weights (`.safetensors`, which
        needs no torch, or `.bin`, `.pt`, `.ckpt`), or "official:sd-vae-ft-ema" or "official:sd-vae-ft-mse", which are
        looked for in the cache folder and else downloaded. A file may hold the decoder alone, with
        `post_quant_conv`; its parameters then serve `decode` alone.
      dtype: of the computation, "float32" or "bfloat16".

    Returns:
      The module and its parameters, float32 jax arrays on the default device. Sizes come from the shapes. Two values come
      from the `config.json` beside them: the number of norm groups (without one, 32) and the scaling
      factor (0.18215).

    Raises:
      InputError: whatever is wrong with a file or does not fit, in one line with the parameter's name.
      MissingExtraError: the file is PyTorch's and torch is not installed.
    """
    if os.fspath(path).startswith("official:"):
        path = official_vae(os.fspath(path).removeprefix("official:"))
    checkpoint = open_checkpoint(_locate(pathlib.Path(path).expanduser()))
    vae = _describe(checkpoint).clone(dtype=_computing(dtype))
    layout, levels = _layout(checkpoint, vae), len(vae.block_out_channels)
    leaves = {}
    for leaf_path, leaf in layout.leaves(checkpoint, levels, np.dtype("float32")):
        leaves[leaf_path] = jax.block_until_ready(jax.device_put(leaf))  # before the next one is read
        del leaf
    return vae, unflatten_dict(leaves, sep="/")


def _computing(dtype: Any) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"dtype={dtype!r}: the VAE computes in float32 or bfloat16")
    return found


def _locate(path: pathlib.Path) -> pathlib.Path:
    """The folder with a config, or the file, that a path means."""
    if not path.is_dir() or (path / "config.json").is_file():
        return path
    if (path / "vae").is_dir():
        return _locate(path / "vae")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: none of config.json, {', '.join(_WEIGHTS)} and vae/ in it: a VAE's folder is wanted")


def _describe(checkpoint: Checkpoint) -> AutoencoderKL:
    """The module that the shapes and the config describe."""
    numbered = Layout(_NAME, _LEVEL, ())
    if not numbered.fits(checkpoint):
        found = ", ".join(sorted(checkpoint.shapes)[:3]) or "no parameters"
        raise InputError(
            f"{checkpoint.path}: not a VAE in diffusers' layout ({_LEVEL}0...); found {found}. The original "
            "repository's names (decoder.up.0...) are not read; take the diffusers folder of the same model"
        )
    levels = range(numbered.depth(checkpoint))
    widths = tuple(_size(checkpoint, f"{_LEVEL}{i}.resnets.0.conv1.weight", 0) for i in reversed(levels))
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=Layout(_NAME, _LAYER, ()).depth(checkpoint) - 1,
        latent_channels=_size(checkpoint, "decoder.conv_in.weight", 1),
        image_channels=_size(checkpoint, "decoder.conv_out.weight", 0),
        norm_num_groups=_groups(checkpoint, widths),
        scaling_factor=_scaling_factor(checkpoint),
    )
    _check_config(checkpoint, vae)
    return vae


def _size(checkpoint: Checkpoint, name: str, axis: int) -> int:
    shape = checkpoint.shapes.get(name)
    if shape is None:
        raise InputError(f"{checkpoint.path}: lacks parameter {name} (read as {_NAME} layout)")
    if len(shape) != 4 or 0 in shape:
        raise InputError(f"{checkpoint.path}: {name} has shape {shape}; 4 axes, none of them empty, are wanted")
    return shape[axis]


def _groups(checkpoint: Checkpoint, widths: tuple[int, ...]) -> int:
    groups = checkpoint.config.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1 or any(width % groups for width in widths):
        raise InputError(
            f"{checkpoint.path}: norm_num_groups={groups!r} does not divide the widths {', '.join(map(str, widths))}; "
            "it is read from the config.json beside the weights, and is 32 without one"
        )
    return groups


def _scaling_factor(checkpoint: Checkpoint) -> float:
    factor = checkpoint.config.get("scaling_factor", 0.18215)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise InputError(f"{checkpoint.path}: config.json has scaling_factor={factor!r}; a positive number is wanted")
    return float(factor)


def _check_config(checkpoint: Checkpoint, vae: AutoencoderKL) -> None:
    """Refuses a `config.json` of another architecture or of other sizes than the weights."""
    levels = len(vae.block_out_channels)
    sizes = {
        "block_out_channels": list(vae.block_out_channels),
        "layers_per_block": vae.layers_per_block,
        "latent_channels": vae.latent_channels,
        "in_channels": vae.image_channels,
        "out_channels": vae.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for told_by, facts in (("Stable Diffusion's VAE has", _WANTED), ("the weights tell", sizes)):
        for key, wanted in facts.items():
            found = checkpoint.config.get(key, wanted)
            if found != wanted:
                raise InputError(f"{checkpoint.path}: config.json has {key}={found!r}, but {told_by} {wanted!r}")


def _layout(checkpoint: Checkpoint, vae: AutoencoderKL) -> Layout:
    """The layout of the module's tree, after every name and shape has been checked."""
    with_encoder = any(name.startswith(("encoder.", "quant_conv.")) for name in checkpoint.shapes)
    leaves = _leaf_shapes(vae, with_encoder)
    levels = len(vae.block_out_channels)
    layout = Layout(_NAME, _LEVEL, tuple(_rules(checkpoint, leaves)))
    layout.check_names(checkpoint, levels)
    layout.check_shapes(checkpoint, levels, leaves)
    return layout


def _leaf_shapes(vae: AutoencoderKL, with_encoder: bool) -> dict[str, Shape]:
    side = vae.downsampling if with_encoder else 1
    channels = vae.image_channels if with_encoder else vae.latent_channels
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    method = "__call__" if with_encoder else "decode"
    tree = jax.eval_shape(lambda x: vae.init(jax.random.key(0), x, method=method), x)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _rules(checkpoint: Checkpoint, leaves: dict[str, Shape]) -> Iterator[Rule]:
    for path, shape in leaves.items():
        module, _, leaf = path.rpartition("/")
        module = re.sub(r"_(\d+)(?=/|$)", r".\1", module).replace("/", ".")  # up_blocks_0/norm1 -> up_blocks.0.norm1
        prefix, attention, role = module.partition(".attentions.0.")
        old = f"{prefix}{attention}{_OLD_ATTENTION.get(role, role)}"
        name = f"{old if f'{old}.weight' in checkpoint.shapes else module}.{'bias' if leaf == 'bias' else 'weight'}"
        linear = _CONV_1X1 if len(checkpoint.shapes.get(name, ())) == 4 else LINEAR
        yield Rule(path, {1: BIAS, 2: linear, 4: CONV}[len(shape)], (name,))
