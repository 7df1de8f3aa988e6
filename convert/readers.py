"""Opens checkpoint files without running anything in them, and gives their tensors one by one as numpy arrays.

Read are `.safetensors` files (without torch), `.pt`, `.pth` and `.bin` files of PyTorch, and folders as diffusers
writes them (`config.json` beside the weights, whole or in shards). Every failure is an `InputError` in one line.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from vq4dit_jax.errors import InputError, MissingExtraError

_WRAPPERS = ("ema", "model", "state_dict")  # outermost keys of training checkpoints, the best weights first
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_ZIP_MAGIC = b"PK\x03\x04"
_SAFETENSORS_FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Names and shapes of a checkpoint's tensors, and a function that reads one of them.

    Attributes:
      path: the file or folder, as it is named in errors.
      shapes: name -> shape.
      read: name -> array in the stored floating type. Files are mapped into memory: nothing is kept after the call.
      config: contents of the `config.json` beside the weights; empty if there is none.
      metadata: of a safetensors file; empty for other files.
      wrapper: the keys that the weights lay under, "ema" for example; empty if they lay at the top.
    """

    path: pathlib.Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wrapper: str = ""


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a file or a diffusers folder (also a pipeline's, which has it as `transformer/`)."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    checkpoint = _open_file(path)
    if (path.parent / "config.json").is_file():
        return dataclasses.replace(checkpoint, config=_read_json(path.parent / "config.json"))
    return checkpoint


def require_torch() -> Any:
    """The torch module; `MissingExtraError` where it is not installed."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "convert", "reading a PyTorch checkpoint") from None
    return torch


def _open_file(path: pathlib.Path) -> Checkpoint:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_folder(path: pathlib.Path) -> Checkpoint:
    folder = path if (path / "config.json").is_file() else path / "transformer"
    if not (folder / "config.json").is_file():
        raise InputError(f"{path}: no config.json in it or in its transformer/: a diffusers model's folder is wanted")
    config = _read_json(folder / "config.json")
    for kind in ("safetensors", "bin"):
        index = folder / f"{_DIFFUSERS_STEM}.{kind}.index.json"
        if index.is_file():
            return dataclasses.replace(_open_shards(index), path=path, config=config)
        file = folder / f"{_DIFFUSERS_STEM}.{kind}"
        if file.is_file():
            return dataclasses.replace(_open_file(file), config=config)
    raise InputError(f"{folder}: no {_DIFFUSERS_STEM}.safetensors or .bin (or .index.json of either) in it")


def _open_shards(index: pathlib.Path) -> Checkpoint:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: no weight_map from parameters' names to files in it")
    shards = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if pathlib.PurePath(name).name != name:
            raise InputError(f"{index}: names the file {name!r}; only files in its own folder are read")
        if not file.is_file():
            raise InputError(f"{file}: no such file; {index.name} wants it")
        shards[name] = _open_file(file)
    for parameter, file in weight_map.items():
        if parameter not in shards[file].shapes:
            raise InputError(f"{index.parent / file}: no parameter {parameter}, which {index.name} places there")
    return Checkpoint(
        index.parent,
        {parameter: shards[file].shapes[parameter] for parameter, file in weight_map.items()},
        lambda parameter: shards[weight_map[parameter]].read(parameter),
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is wanted, found {type(value).__name__}")
    return value


def _open_safetensors(path: pathlib.Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    for name, s in slices.items():
        if s.get_dtype() not in _SAFETENSORS_FLOATS:
            raise InputError(f"{path}: {name} is of type {s.get_dtype()}; floating-point weights are wanted")
    return Checkpoint(path, shapes, file.get_tensor, metadata=file.metadata() or {})


def _open_torch(path: pathlib.Path) -> Checkpoint:
    torch = require_torch()
    try:
        with open(path, "rb") as file:
            mappable = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # facebookresearch's training checkpoints hold the command line as a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", mmap=mappable, weights_only=True)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # what an unpickler raises on a broken file is not limited to any few types
        raise InputError(_why_unreadable(path, error)) from None
    tensors, wrapper = _unwrap(path, loaded)
    # Counters that torch's batch norms keep beside their statistics; they are no weights.
    tensors = {n: t for n, t in tensors.items() if not str(n).endswith(".num_batches_tracked")}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}; only named tensors are wanted")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is of type {tensor.dtype}; dense floating-point weights are wanted")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Checkpoint(path, {name: tuple(t.shape) for name, t in tensors.items()}, read, wrapper=wrapper)


def _unwrap(path: pathlib.Path, loaded: Any) -> tuple[Mapping[str, Any], str]:
    keys = []
    while isinstance(loaded, Mapping):
        key = next((k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if key is None:
            break
        keys.append(key)
        loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: holds a {type(loaded).__name__}; a dictionary from names to tensors is wanted")
    wrapper = ".".join(keys)
    if wrapper:
        logging.info("%s: taking the weights under %r", path, wrapper)
    return loaded, wrapper


def _why_unreadable(path: pathlib.Path, error: Exception) -> str:
    wanted = re.findall(r"GLOBAL ([\w.]+)", str(error)) or _imports_of_pickle(path)
    if wanted:
        return (
            f"{path}: refused, nothing in it was run: it wants to import {', '.join(wanted)}, which plain weights do "
            "not need. Save the state dict alone: torch.save(model.state_dict(), FILE)"
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{path}: not a whole PyTorch checkpoint (truncated, corrupt, or of another format): {reason[:200]}"


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
    except Exception:  # not a pickle, or a broken one: what stands before the break still counts
        pass
    return names
