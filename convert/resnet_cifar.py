"""CIFAR ResNet checkpoints of github akamaster/pytorch_resnet_cifar10 (`.th`) -> parameters of `CifarResNet`.

    python -m convert.resnet_cifar resnet56-4bfd9763.th assets/cifar10_resnet56.safetensors

wrote the shipped asset.
"""

import argparse
import os
import sys

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from convert.readers import open_checkpoint
from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.files import atomic_path

_BATCH_NORM_EPS = 1e-5
# One entry: safetensors writes several in no fixed order, and the same weights should give the same bytes.
_METADATA = {"license": "BSD-2-Clause, Copyright (c) 2018, Yerlan Idelbayev, github akamaster/pytorch_resnet_cifar10"}


def fold_batch_norm(
    kernel: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (h, w, I, O) and the batch norm (O,) behind it -> kernel and bias of one convolution, float64.

    scale * (conv(x) - mean) / sqrt(variance + eps) + bias = conv'(x) + bias'.
    """
    factor = scale / np.sqrt(variance + _BATCH_NORM_EPS)
    return kernel * factor, bias - mean * factor


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a `.th` file -> nested float32 parameters. InputError names a parameter that is missing or left over."""
    checkpoint = open_checkpoint(path)
    left = set(checkpoint.shapes)
    prefix = "module." if all(name.startswith("module.") for name in left) else ""

    def take(name: str, ndim: int = 1) -> np.ndarray:
        name = prefix + name
        if name not in left:
            raise InputError(f"{path}: no parameter {name!r}; a checkpoint of pytorch_resnet_cifar10 is wanted")
        if len(checkpoint.shapes[name]) != ndim:
            raise InputError(f"{path}: {name} has shape {checkpoint.shapes[name]}; {ndim} dimensions are wanted")
        left.remove(name)
        return np.asarray(checkpoint.read(name), np.float64)

    flat = {}
    for weight in [name for name in checkpoint.shapes if "conv" in name and name.endswith(".weight")]:
        conv = weight.removeprefix(prefix).removesuffix(".weight")
        norm = conv.replace("conv", "bn")
        kernel = take(f"{conv}.weight", ndim=4).transpose(2, 3, 1, 0)
        statistics = [take(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        block, _, leaf = conv.rpartition(".")
        module = f"{block.replace('.', '_')}/{leaf}" if block else leaf  # layer2.0.conv1 -> layer2_0/conv1
        flat[f"{module}/kernel"], flat[f"{module}/bias"] = fold_batch_norm(kernel, *statistics)
    flat["linear/kernel"], flat["linear/bias"] = take("linear.weight", ndim=2).T, take("linear.bias")
    if left:
        raise InputError(f"{path}: {min(left)} is no parameter of a CIFAR ResNet with option-A shortcuts")
    flat = {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.resnet_cifar", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="IN.th", help="PyTorch checkpoint, for example resnet56-4bfd9763.th")
    parser.add_argument("output", metavar="OUT.safetensors", help="float32 parameters, names joined by '/'")
    flags = parser.parse_args(arguments)
    try:
        params = traverse_util.flatten_dict(load_checkpoint(flags.checkpoint), sep="/")
        with atomic_path(flags.output) as partial:
            save_file(params, partial, metadata=_METADATA)
            partial.chmod(0o644)  # safetensors writes files that only their owner can read
    except (InputError, MissingExtraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{flags.output}: {len(params)} arrays, {sum(v.size for v in params.values()):,} parameters")


if __name__ == "__main__":
    main()
