"""Opens checkpoints without running anything in them, and gives their tensors one by one as numpy arrays.

Read are `.safetensors` files (without torch), files of PyTorch, and folders (see `folders`). The first bytes of a file
tell what it is, not its name. Every failure is an `InputError` in one line.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Sequence

from convert.checkpoint import Checkpoint, read_json
from convert.folders import open_folder
from convert.prefixes import strip_prefix
from convert.weight_files import open_weights
from vq4dit_jax.errors import InputError


def open_checkpoint(path: str | os.PathLike, starts: Sequence[str] = (), classes: Collection[str] = ()) -> Checkpoint:
    """Opens a file or a folder. Where weights were chosen among several, `wrapper` says which.

    Args:
      path: a file of weights, an `.index.json` of shards, a model's folder, or a pipeline's.
      starts: the beginnings of the names of a known layout's first block; a prefix before them is removed.
      classes: names of diffusers' classes whose `config.json` beside a single file counts; every class where empty. A folder's
        config always counts.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        checkpoint = open_folder(path)
    elif path.is_file():
        checkpoint = dataclasses.replace(open_weights(path), config=_config_beside(path, classes))
    else:
        raise InputError(f"{path}: no such file or folder")
    return strip_prefix(checkpoint, starts) if starts else checkpoint


def _config_beside(path: pathlib.Path, classes: Collection[str]) -> dict:
    """A single file's config: diffusers', or the arguments of a module with a depth. Any other `config.json` that
    happens to lie there is not the file's own.
    """
    try:
        config = read_json(path.parent / "config.json")
    except InputError:
        return {}
    name = config.get("_class_name")
    ours = name in classes if classes else name is not None
    return config if ours or "depth" in config else {}
