"""Weights of the FID network, Inception-v3 of 2015-12-05, in all common forms -> parameters of `Inception`.

| form | content |
|---|---|
| `.pth`, `.pt`, `.safetensors` | pytorch-fid's port, torchvision's names (`Mixed_5b.branch1x1.conv.weight`) |
| `.pb` | the frozen TensorFlow graph (`classify_image_graph_def.pb`, also ADM's copy); parsed, not run |
| a folder, or https://... | TF-GAN's TF-Hub module, a SavedModel; parsed, not run |
| `.npz` | batch norm folded: `<layer>/kernel_hwio`, `<layer>/bias`, `softmax/kernel`, `softmax/bias`; may end after mixed_7 |

Batch norm is folded into the convolutions in float64.
"""

import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convert import inception_graph
from convert.checkpoint import Checkpoint
from convert.download import check_address
from convert.readers import open_checkpoint
from vq4dit_jax import npz
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.networks.inception import Inception

# The value of the training; a graph with another value overrules it.
_BATCH_NORM_EPS = 1e-3
_TORCH_STEM = dict(
    conv="Conv2d_1a_3x3", conv_1="Conv2d_2a_3x3", conv_2="Conv2d_2b_3x3", conv_3="Conv2d_3b_1x1", conv_4="Conv2d_4a_3x3"
)
_BLOCK35 = dict(conv="branch1x1", tower_conv="branch5x5", tower_1_conv="branch3x3dbl", tower_2_conv="branch_pool")
_BLOCK17 = dict(conv="branch1x1", tower_conv="branch7x7", tower_1_conv="branch7x7dbl", tower_2_conv="branch_pool")
_BLOCK8 = dict(
    conv="branch1x1",
    tower_conv="branch3x3",
    tower_mixed_conv="branch3x3_2",
    tower_1_conv="branch3x3dbl",
    tower_1_mixed_conv="branch3x3dbl_3",
    tower_2_conv="branch_pool",
)
# Our block -> torchvision's, and the first layer of each branch -> torchvision's branch.
_TORCH_BLOCKS = {
    "mixed": ("Mixed_5b", _BLOCK35),
    "mixed_1": ("Mixed_5c", _BLOCK35),
    "mixed_2": ("Mixed_5d", _BLOCK35),
    "mixed_3": ("Mixed_6a", dict(conv="branch3x3", tower_conv="branch3x3dbl")),
    "mixed_4": ("Mixed_6b", _BLOCK17),
    "mixed_5": ("Mixed_6c", _BLOCK17),
    "mixed_6": ("Mixed_6d", _BLOCK17),
    "mixed_7": ("Mixed_6e", _BLOCK17),
    "mixed_8": ("Mixed_7a", dict(tower_conv="branch3x3", tower_1_conv="branch7x7x3")),
    "mixed_9": ("Mixed_7b", _BLOCK8),
    "mixed_10": ("Mixed_7c", _BLOCK8),
}


def load_inception(source: str | os.PathLike) -> dict:
    """Reads weights -> nested float32 parameters of `Inception(complete)`; `is_complete` says which.

    Args:
      source: a file or folder in one of the forms above, or the https:// handle of a TF-Hub module.

    Raises:
      InputError: names the file and the parameter that is missing, left over, of a wrong shape or not finite; or a
        handle over plain http.
      MissingExtraError: torch or TensorFlow is wanted for this form and not installed.
    """
    if str(source).startswith(("https://", "http://")):
        check_address(str(source))
        return _from_graph(inception_graph.open_module(str(source)))
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _from_graph(inception_graph.open_saved_model(path))
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder with weights of the Inception network; see docs/inception.md")
    if path.suffix == ".npz":
        return _from_folded(_open_npz(path))
    if path.suffix == ".pb":
        return _from_graph(inception_graph.open_frozen_graph(path))
    return _from_torch(open_checkpoint(path))


def is_complete(params: Mapping) -> bool:
    """Whether the parameters reach to the logits; else they end after mixed_7."""
    return "softmax" in params


@functools.cache
def expected_shapes(complete: bool) -> dict[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Layer, as a path in the parameter tree -> shapes of its kernel (h, w, I, O) and bias (O,)."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    params = jax.eval_shape(Inception(complete).init, jax.random.key(0), images)["params"]
    layers: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        layers.setdefault(path[:-1], {})[path[-1]] = leaf.shape
    return layers


def torch_name(layer: tuple[str, ...]) -> str:
    """("mixed_4", "tower_conv_1") -> "Mixed_6b.branch7x7_2"."""
    if len(layer) == 1:
        return _TORCH_STEM[layer[0]]
    block, branches = _TORCH_BLOCKS[layer[0]]
    first, number = re.fullmatch(r"(.*conv)(?:_(\d))?", layer[1]).groups()
    branch, position = branches[first], int(number or 0)
    if "mixed" in first:
        return f"{block}.{branch}{'ab'[position]}"
    alone = first == "conv" or first == "tower_2_conv"
    return f"{block}.{branch}" if alone else f"{block}.{branch}_{position + 1}"


def graph_name(layer: tuple[str, ...]) -> str:
    """("mixed_9", "tower_1_mixed_conv_1") -> "mixed_9/tower_1/mixed/conv_1"."""
    return "/".join((*layer[:-1], re.sub(r"(tower(?:_\d)?|mixed)_(?=mixed|conv)", r"\1/", layer[-1])))


def fold_batch_norm(
    kernel: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (h, w, I, O) and the batch norm (O,) behind it -> kernel and bias of one convolution.

    scale * (conv(x) - mean) / sqrt(variance + eps) + bias = conv'(x) + bias'.
    """
    factor = scale / np.sqrt(variance + eps)
    return kernel * factor, bias - mean * factor


class _Reader:
    """Takes parameters out of a checkpoint by name, and reports those that are left in the end."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.left = checkpoint, set(checkpoint.shapes)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """float64; InputError where it is missing, of another shape, or not finite."""
        path, found = self.checkpoint.path, self.checkpoint.shapes.get(name)
        if found is None:
            raise InputError(
                f"{path}: no parameter {name!r}; weights of the Inception network of 2015-12-05 are wanted"
            )
        if tuple(found) != shape:
            raise InputError(f"{path}: {name} has shape {tuple(found)}; {shape} is wanted")
        self.left.discard(name)
        value = np.asarray(self.checkpoint.read(name), np.float64)
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {name} has values that are not finite; the file is damaged")
        return value

    def finish(self, layers: Iterable[tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray]]]) -> dict:
        """Layers and their (kernel, bias) -> parameter tree; InputError where anything is left."""
        flat = {}
        for layer, values in layers:
            for leaf, value in zip(("kernel", "bias"), values, strict=True):
                flat[*layer, leaf] = np.ascontiguousarray(value, np.float32)
                if not np.isfinite(flat[*layer, leaf]).all():
                    raise InputError(
                        f"{self.checkpoint.path}: {graph_name(layer)} is not finite with batch norm folded in"
                    )
        if self.left:
            raise InputError(f"{self.checkpoint.path}: {min(self.left)!r} is no parameter of the Inception network")
        return traverse_util.unflatten_dict(flat)


def _from_folded(checkpoint: Checkpoint) -> dict:
    def key(layer: tuple[str, ...], leaf: str) -> str:
        return f"{'_'.join(layer)}/{'kernel_hwio' if leaf == 'kernel' and layer != ('softmax',) else leaf}"

    reader = _Reader(checkpoint)
    whole = {key(layer, leaf) for layer, leaves in expected_shapes(True).items() for leaf in leaves}
    complete = whole <= reader.left
    if not complete:  # layers behind mixed_7 are of no use without the rest
        part = {key(layer, leaf) for layer, leaves in expected_shapes(False).items() for leaf in leaves}
        reader.left -= whole - part
    return reader.finish(
        (layer, tuple(reader.take(key(layer, leaf), shapes[leaf]) for leaf in ("kernel", "bias")))
        for layer, shapes in expected_shapes(complete).items()
    )


def _from_torch(checkpoint: Checkpoint) -> dict:
    reader = _Reader(checkpoint)

    def read(layer: tuple[str, ...], kernel: tuple[int, ...], bias: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        if layer == ("softmax",):
            return reader.take("fc.weight", kernel[::-1]).T, reader.take("fc.bias", bias)
        name, (height, width, inputs, outputs) = torch_name(layer), kernel
        weight = reader.take(f"{name}.conv.weight", (outputs, inputs, height, width)).transpose(2, 3, 1, 0)
        norm = [reader.take(f"{name}.bn.{part}", bias) for part in ("weight", "bias", "running_mean", "running_var")]
        return fold_batch_norm(weight, *norm, _BATCH_NORM_EPS)

    return reader.finish((layer, read(layer, **shapes)) for layer, shapes in expected_shapes(True).items())


def _from_graph(graph: inception_graph.Graph) -> dict:
    reader = _Reader(graph.checkpoint)

    def read(layer: tuple[str, ...], kernel: tuple[int, ...], bias: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        if layer == ("softmax",):
            return reader.take("softmax/weights", kernel), reader.take("softmax/biases", bias)
        name = graph_name(layer)
        parts = [f"{name}/batchnorm/{part}" for part in ("gamma", "beta", "moving_mean", "moving_variance")]
        gamma, *norm = [reader.take(part, bias) for part in parts]
        attributes = graph.batch_norm.get(f"{name}/batchnorm", {})
        if not attributes.get("scale_after_normalization", True):
            gamma = np.ones_like(gamma)
        eps = attributes.get("variance_epsilon", _BATCH_NORM_EPS)
        return fold_batch_norm(reader.take(f"{name}/conv2d_params", kernel), gamma, *norm, eps)

    return reader.finish((layer, read(layer, **shapes)) for layer, shapes in expected_shapes(True).items())


def _open_npz(path: pathlib.Path) -> Checkpoint:
    arrays = npz.read_arrays(path)
    for name, value in arrays.items():
        if not np.issubdtype(value.dtype, np.floating):
            raise InputError(f"{path}: {name} is of type {value.dtype}; floating-point weights are wanted")
    return Checkpoint(path, {name: value.shape for name, value in arrays.items()}, arrays.__getitem__)
