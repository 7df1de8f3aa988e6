"""Reads PyTorch's files without running anything in them."""

import argparse
import pathlib
import pickletools
import re
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import Checkpoint
from convert.wrappers import unwrap
from vq4dit_jax.errors import InputError, MissingExtraError

# Types that numpy lacks, by torch's names, and integers of the same size.
_BITS = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": ("uint8", ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": ("uint8", ml_dtypes.float8_e5m2fnuz),
}
_READABLE = {"float16", "float32", "float64", *_BITS}
_STATE_DICT = "save the state dict alone: torch.save(model.state_dict(), FILE)"


def require_torch() -> Any:
    """The torch module; `MissingExtraError` where it is not installed."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "convert", "reading a PyTorch checkpoint") from None
    return torch


def open_torch(path: pathlib.Path) -> Checkpoint:
    """Opens a file of torch.save: a state dict, or a training checkpoint that has one in it (see `wrappers`).

    Scalars beside tensors with axes are counters (of batch norms, of an EMA) and are left out.
    """
    torch = require_torch()
    loaded = _load(torch, path)
    tensors, keys, arguments = unwrap(path, loaded, lambda value: isinstance(value, torch.Tensor))
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}; only named tensors are wanted")
    if any(tensor.ndim for tensor in tensors.values()):
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _READABLE or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is of type {dtype}; dense floating-point weights are wanted")
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: {name} of shape {tuple(tensor.shape)} has not as many numbers in the file")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        carrier, dtype = _BITS.get(str(tensor.dtype).removeprefix("torch."), (None, None))
        if carrier is None:
            return tensor.numpy()
        return tensor.contiguous().view(getattr(torch, carrier)).numpy().view(dtype)

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(path, shapes, read, wrapper=".".join(keys), arguments=arguments)


def _load(torch: Any, path: pathlib.Path) -> Any:
    try:
        # facebookresearch's training checkpoints hold the command line as a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            if path.suffix == ".safetensors":  # torch decides by that name, whatever the content
                return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # an unpickler can raise any exception on a broken file
        raise InputError(_why_unreadable(path, error)) from None


def _why_unreadable(path: pathlib.Path, error: Exception) -> str:
    wanted = re.findall(r"GLOBAL ([\w.]+)", str(error)) or _imports_of_pickle(path)
    if wanted:
        return (
            f"{path}: refused, nothing in it was run: it wants to import {', '.join(wanted[:5])}, which plain weights do "
            f"not need; where the file was made, {_STATE_DICT}"
        )
    return f"{path}: not a whole PyTorch checkpoint (truncated, corrupt, or of another format): {_reason(error)}"


def _reason(error: Exception) -> str:
    """torch's reason without its advice to switch the protection off."""
    text = str(error).strip()
    if found := re.search(r"WeightsUnpickler error: ([^\n]*)", text):
        text = re.split(r"[.,;] (?:Please|Re-running|To allow)|`?torch\.", found[1])[0]
    text = text.split("\n")[0][:200]
    advises = re.search(r"weights[ _]only|add_safe_globals", text, re.IGNORECASE)
    return "its contents are no tensors" if advises else text or type(error).__name__


def _imports_of_pickle(path: pathlib.Path) -> list[str]:
    """Names that a bare pickle would import, found by reading its opcodes; nothing is run."""
    names, strings = [], []
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a pickle, or a broken one: opcodes before the break still count
        pass
    return names
