"""`load_pretrained`: a checkpoint of any known layout to a `DiT` and its parameters, sizes read off the shapes."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert import comfy_quant, diffusers, sit
from convert.checkpoint import Checkpoint
from convert.classes import count_classes
from convert.diffusers import DIFFUSERS
from convert.facebook import FACEBOOK
from convert.layout import LINEAR, Layout, Shape
from convert.readers import open_checkpoint
from convert.sit import FAMILIES, VARIANTS
from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.layers import sincos_positions

_LAYOUTS = (FACEBOOK, DIFFUSERS)
_MAX_INPUT_SIZE = 4096  # a config with a larger position table is a mistake


def load_pretrained(
    path: str | os.PathLike,
    variant: str | None = None,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    predicts: str | None = None,
    dtype: Any = jnp.float32,
) -> tuple[DiT, dict[str, Any]]:
    """Opens a pretrained DiT, or a SiT, which has DiT's modules and was trained as a flow (see `convert.sit`).

    Args:
      path: a facebookresearch/DiT, SiT or REPA checkpoint (`.pt`; of a training checkpoint the EMA weights are taken),
        the same names in a `.safetensors` file, or a diffusers model: its folder, a pipeline's, or its weights' file.
        Int8 Linears of a `.safetensors` file with ComfyUI's marks (ConvRot, see `convert.convrot`) stay packed.
        `asset:NAME` is a model that ships with this package: `asset:dit_cifar10.safetensors`.
      variant: "DiT-XL/2", "SiT-XL/2" and so on, or "DiT" or "SiT" of any size. Where given, the checkpoint must agree
        with it. Needed only for a SiT whose file holds no arguments that tell.
      num_heads: the one size that shapes do not tell. Found, in this order, in this argument, in the config, in
        the training arguments or the safetensors metadata (`num_heads`), in the variant, and in the published
        variant of that depth and width.
      num_classes: without the null label of guidance. Where given, the checkpoint must agree with it. Needed only for a
        table without a null row that nothing in the file tells of (see `convert.classes`).
      input_size: side of the image or latent in model space. Needed only for diffusers weights without their config.
      predicts: "eps" or "flow"; has the same meaning as the family of `variant`.
      dtype: of the parameters; the module computes in float32 unless it is cloned with another `dtype`.

    Returns:
      The module and its parameters, jax arrays on the default device, blocks stacked on a leading axis; int8 Linears are
      `OperandArray` leaves. While loading, at most one leaf is in memory twice. Lines on stderr say which of several
      weights were taken, and which int8 weights were decoded.

    Raises:
      InputError: whatever is wrong with the file or does not fit, in one line with the parameter's name.
      MissingExtraError: the file is PyTorch's and torch is not installed.
    """
    checkpoint, layout, model, notes = describe(
        files.resolve(os.fspath(path)),
        variant,
        num_heads=num_heads,
        num_classes=num_classes,
        input_size=input_size,
        predicts=predicts,
    )
    leaves = {}
    for leaf_path, leaf in layout.leaves(checkpoint, model.depth, np.dtype(dtype)):
        leaves[leaf_path] = jax.block_until_ready(jax.device_put(leaf))  # jnp.asarray would copy twice
        del leaf  # before the next one is read
    leaves.setdefault("pos_embed", jnp.asarray(sincos_positions(model.grid, model.hidden_size), dtype))
    for note in notes:  # only after all checks, because a refusal is one line
        print(f"{checkpoint.path}: {note}", file=sys.stderr)
    return model, unflatten_dict(leaves, sep="/")


class Described(NamedTuple):
    """A checkpoint whose every name and shape has been checked: the weights to read, their layout, and the module that
    they fit; each of the `notes` is a line on a choice or on parameters that were left out.
    """

    checkpoint: Checkpoint
    layout: Layout
    model: DiT
    notes: list[str]


def describe(
    path: str | os.PathLike,
    variant: str | None = None,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    predicts: str | None = None,
) -> Described:
    """Opens a checkpoint and checks it; arguments and errors are `load_pretrained`'s."""
    if variant is not None and variant not in VARIANTS and variant not in FAMILIES:
        raise InputError(f"no variant {variant!r}; known: {', '.join(VARIANTS)}")
    starts = [f"{layout.block_prefix}0." for layout in _LAYOUTS]
    checkpoint = comfy_quant.split(open_checkpoint(path, starts, diffusers.CLASSES))
    layout = _recognise(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, config=_own_config(checkpoint, layout))
    trained = sit.training(checkpoint, variant, predicts)
    notes = [f"taking the weights under {checkpoint.wrapper!r}"] if checkpoint.wrapper else []
    if trained.predicts == "flow":
        checkpoint, said = sit.without_heads(checkpoint)
        notes += said
    sit.check_attention(checkpoint)
    depth = layout.depth(checkpoint)
    layout.check_names(checkpoint, depth)
    checkpoint, said = comfy_quant.keep(checkpoint, _kept_packed(layout, depth, trained))
    notes += said

    name, (width, channels, patch, across) = layout.first(checkpoint, "x_embedder/proj/kernel")
    if patch != across:
        raise InputError(f"{checkpoint.path}: {name} has patches of {patch} x {across}; square ones are wanted")
    sizes = {"depth": depth, "hidden_size": width, "patch_size": patch}
    if variant in VARIANTS:
        wanted = {size: VARIANTS[variant][size] for size in sizes}
        if sizes != wanted:
            raise InputError(f"{checkpoint.path}: has {_spell(sizes)}, but {variant} has {_spell(wanted)}")
    name, (rows, _) = layout.first(checkpoint, "y_embedder/embedding_table/embedding")
    classes = count_classes(checkpoint, name, rows, num_classes)
    notes += [classes.note] if classes.note else []
    model = DiT(
        **sizes,
        in_channels=channels,
        input_size=_input_size(checkpoint, layout, patch, input_size),
        num_heads=_num_heads(checkpoint, sizes, num_heads),
        num_classes=classes.num_classes,
        null_label=classes.null_label,
        mlp_ratio=_mlp_ratio(checkpoint, layout, width),
        learn_sigma=_learn_sigma(checkpoint, layout, channels, patch),
        predicts=trained.predicts,
    )
    if layout is DIFFUSERS:
        norm_eps = diffusers.check_config(checkpoint.path, checkpoint.config)
        model = model.clone(freq_shift=diffusers.FREQ_SHIFT, norm2_eps=norm_eps)
    layout.check_shapes(checkpoint, depth, _leaf_shapes(model))
    return Described(sit.forwards(checkpoint) if trained.backwards else checkpoint, layout, model, notes)


def _kept_packed(layout: Layout, depth: int, trained: sit.Training) -> set[str]:
    """Weights that stay quantized where the file has them so: Linears, but those that are joined or turned on reading."""
    if layout is not FACEBOOK:
        return set()
    linears = {name for rule in layout.rules if rule.kind is LINEAR for name in rule.names(depth)}
    return linears.difference(sit.TURNED) if trained.backwards else linears


def _recognise(checkpoint: Checkpoint) -> Layout:
    for layout in _LAYOUTS:
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


@functools.lru_cache(maxsize=8)  # tracing takes longer than reading a small model
def _leaf_shapes(model: DiT) -> dict[str, Shape]:
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    label = jnp.zeros((1,), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), x, label, label)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _own_config(checkpoint: Checkpoint, layout: Layout) -> Mapping[str, Any]:
    """The config where it is this model's: diffusers', or the module's arguments as huggingface_hub's mixin writes them."""
    config = checkpoint.config
    if layout is DIFFUSERS:
        return config
    own = "depth" in config and config["depth"] == layout.depth(checkpoint)
    return config if own else {}


def _num_heads(checkpoint: Checkpoint, sizes: dict[str, int], num_heads: int | None) -> int:
    heads = num_heads
    if heads is None:
        heads = checkpoint.config.get("num_attention_heads", checkpoint.facts.get("num_heads"))
    if heads is None:
        published = (v for v in VARIANTS.values() if all(v[s] == sizes[s] for s in ("depth", "hidden_size")))
        heads = next(published, {}).get("num_heads")
    if heads is None:
        raise InputError(
            f"{checkpoint.path}: {_spell(sizes)} is no published variant and the number of attention heads stands "
            "nowhere in the file; pass num_heads="
        )
    width = sizes["hidden_size"]
    if not str(heads).isdecimal() or int(heads) == 0 or width % int(heads):
        raise InputError(f"{checkpoint.path}: num_heads={heads} does not divide the width {width}; pass num_heads=")
    return int(heads)


def _input_size(checkpoint: Checkpoint, layout: Layout, patch: int, input_size: int | None) -> int:
    if layout is DIFFUSERS:  # its position table is computed
        size = checkpoint.config.get("sample_size") if input_size is None else input_size
        if size is None:
            raise InputError(
                f"{checkpoint.path}: these weights do not tell the image size; keep diffusers' config.json beside them "
                "or pass input_size="
            )
        if type(size) is not int or not patch <= size <= _MAX_INPUT_SIZE or size % patch:
            raise InputError(
                f"{checkpoint.path}: an image size of {size} is no multiple of the patch size {patch} up to {_MAX_INPUT_SIZE}"
            )
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
