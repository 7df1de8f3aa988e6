"""`load_pretrained`: a checkpoint of any known layout to a `DiT` and its parameters, sizes read off the shapes."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert import diffusers
from convert.diffusers import DIFFUSERS
from convert.facebook import FACEBOOK
from convert.layout import Layout, Shape
from convert.readers import Checkpoint, open_checkpoint
from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DIT_VARIANTS, DiT, sincos_positions


def load_pretrained(
    path: str | os.PathLike,
    variant: str | None = None,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    dtype: Any = jnp.float32,
) -> tuple[DiT, dict[str, Any]]:
    """Opens a pretrained DiT.

    Args:
      path: a facebookresearch/DiT checkpoint (`.pt`, also with the weights under `ema`, `model` or `state_dict`), the
        same names in a `.safetensors` file, or a diffusers model: its folder, or its weights' file. `asset:NAME` is a
        model that ships with this package: `asset:dit_cifar10.safetensors`.
      variant: "DiT-XL/2" and so on. Not needed; where given, the checkpoint must agree with it.
      num_heads: the one size that shapes do not tell. Found, in this order, in this argument, in the diffusers config
        or the safetensors metadata (`num_heads`), in the variant, and in the published variant of that depth and width.
      num_classes: without the null label of guidance. Not needed; where given, the checkpoint must agree with it.
      input_size: side of the image or latent in model space. Needed only for diffusers weights without their config.
      dtype: of the parameters; the module computes in float32 unless it is cloned with another `dtype`.

    Returns:
      The module and its parameters, jax arrays on the default device, blocks stacked on a leading axis. While
      loading, at most one leaf is in memory twice.

    Raises:
      InputError: whatever is wrong with the file or does not fit, in one line with the parameter's name.
      MissingExtraError: the file is PyTorch's and torch is not installed.
    """
    checkpoint = open_checkpoint(files.resolve(os.fspath(path)))
    layout, model = describe(checkpoint, variant, num_heads=num_heads, num_classes=num_classes, input_size=input_size)
    leaves = {}
    for leaf_path, leaf in layout.leaves(checkpoint, model.depth, np.dtype(dtype)):
        leaves[leaf_path] = jax.block_until_ready(jax.device_put(leaf))  # jnp.asarray would copy twice
        del leaf  # before the next one is read
    leaves.setdefault("pos_embed", jnp.asarray(sincos_positions(model.grid, model.hidden_size), dtype))
    return model, unflatten_dict(leaves, sep="/")


def describe(
    checkpoint: Checkpoint,
    variant: str | None = None,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> tuple[Layout, DiT]:
    """The layout of a checkpoint and the module that it fits, once every name and shape has been checked."""
    if variant is not None and variant not in DIT_VARIANTS:
        raise InputError(f"no variant {variant!r}; known: {', '.join(DIT_VARIANTS)}")
    layout = _recognise(checkpoint)
    depth = layout.depth(checkpoint)
    layout.check_names(checkpoint, depth)

    name, (width, channels, patch, across) = layout.first(checkpoint, "x_embedder/proj/kernel")
    if patch != across:
        raise InputError(f"{checkpoint.path}: {name} has patches of {patch} x {across}; square ones are wanted")
    sizes = {"depth": depth, "hidden_size": width, "patch_size": patch}
    if variant is not None:
        wanted = {size: DIT_VARIANTS[variant][size] for size in sizes}
        if sizes != wanted:
            raise InputError(f"{checkpoint.path}: has {_spell(sizes)}, but {variant} has {_spell(wanted)}")
    model = DiT(
        **sizes,
        in_channels=channels,
        input_size=_input_size(checkpoint, layout, patch, input_size),
        num_heads=_num_heads(checkpoint, sizes, variant, num_heads),
        num_classes=_num_classes(checkpoint, layout, num_classes),
        mlp_ratio=_mlp_ratio(checkpoint, layout, width),
        learn_sigma=_learn_sigma(checkpoint, layout, channels, patch),
    )
    if layout is DIFFUSERS:
        diffusers.check_config(checkpoint.path, checkpoint.config)
        norm_eps = checkpoint.config.get("norm_eps", diffusers.DEFAULT_NORM_EPS)
        model = model.clone(freq_shift=diffusers.FREQ_SHIFT, norm2_eps=norm_eps)
    layout.check_shapes(checkpoint, depth, _leaf_shapes(model))
    return layout, model


def _recognise(checkpoint: Checkpoint) -> Layout:
    for layout in (FACEBOOK, DIFFUSERS):
        if layout.fits(checkpoint):
            return layout
    under = f" under {checkpoint.wrapper!r}" if checkpoint.wrapper else ""
    found = ", ".join(sorted(checkpoint.shapes)[:3]) or "no parameters"
    raise InputError(
        f"{checkpoint.path}: not a DiT in facebookresearch's layout (blocks.0...) nor in diffusers' "
        f"(transformer_blocks.0...); found{under}: {found}"
    )


def _spell(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size}={value}" for size, value in sizes.items())


def _leaf_shapes(model: DiT) -> dict[str, Shape]:
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    label = jnp.zeros((1,), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), x, label, label)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _num_heads(checkpoint: Checkpoint, sizes: dict[str, int], variant: str | None, num_heads: int | None) -> int:
    heads = num_heads
    if heads is None:
        heads = checkpoint.config.get("num_attention_heads", checkpoint.metadata.get("num_heads"))
    if heads is None:
        published = (v for v in DIT_VARIANTS.values() if all(v[s] == sizes[s] for s in ("depth", "hidden_size")))
        known = DIT_VARIANTS[variant] if variant is not None else next(published, {})
        heads = known.get("num_heads")
    if heads is None:
        raise InputError(
            f"{checkpoint.path}: {_spell(sizes)} is no published variant and the number of attention heads stands "
            "nowhere in the file; pass num_heads="
        )
    width = sizes["hidden_size"]
    if not str(heads).isdecimal() or int(heads) == 0 or width % int(heads):
        raise InputError(f"{checkpoint.path}: num_heads={heads} does not divide the width {width}; pass num_heads=")
    return int(heads)


def _num_classes(checkpoint: Checkpoint, layout: Layout, num_classes: int | None) -> int:
    name, (rows, _) = layout.first(checkpoint, "y_embedder/embedding_table/embedding")
    if num_classes is not None and rows != num_classes + 1:
        raise InputError(
            f"{checkpoint.path}: {name} has {rows} rows; num_classes={num_classes} wants {num_classes + 1}, "
            "one for each class and one for the null label"
        )
    return rows - 1


def _input_size(checkpoint: Checkpoint, layout: Layout, patch: int, input_size: int | None) -> int:
    if layout is DIFFUSERS:  # its position table is computed
        size = checkpoint.config.get("sample_size") if input_size is None else input_size
        if size is None:
            raise InputError(
                f"{checkpoint.path}: these weights do not tell the image size; keep diffusers' config.json beside them "
                "or pass input_size="
            )
        if not isinstance(size, int) or size < patch or size % patch:
            raise InputError(f"{checkpoint.path}: an image size of {size} is no multiple of the patch size {patch}")
        return size
    name, (_, tokens, _) = layout.first(checkpoint, "pos_embed")
    grid = math.isqrt(tokens)
    if grid**2 != tokens:
        raise InputError(f"{checkpoint.path}: {name} has {tokens} positions; a square number is wanted")
    if input_size not in (None, grid * patch):
        raise InputError(
            f"{checkpoint.path}: {name} has {tokens} positions of {patch} x {patch} pixels, which makes "
            f"input_size={grid * patch}, not {input_size}"
        )
    return grid * patch


def _learn_sigma(checkpoint: Checkpoint, layout: Layout, channels: int, patch: int) -> bool:
    name, (features,) = layout.first(checkpoint, "final_layer/linear/bias")
    if features not in (patch**2 * channels, 2 * patch**2 * channels):
        raise InputError(
            f"{checkpoint.path}: {name} has shape ({features},); {channels} channels in patches of {patch} x {patch} "
            f"want ({patch**2 * channels},), or twice that with a learned variance"
        )
    return features == 2 * patch**2 * channels


def _mlp_ratio(checkpoint: Checkpoint, layout: Layout, width: int) -> float:
    """Such that int(ratio * width) is the hidden width in floating point too."""
    _, (hidden,) = layout.first(checkpoint, "blocks/mlp/fc1/bias")
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
