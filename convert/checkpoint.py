"""`Checkpoint`, the result of every reader of weights."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.base import QuantizedArray

_MAX_JSON = 1 << 26  # bytes; the largest published index has about a million


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Names and shapes of a checkpoint's tensors, and a function that reads one of them.

    Attributes:
      path: the file or folder, named in errors.
      shapes: name -> shape.
      read: name -> array in the stored floating type. Files are mapped into memory: nothing is kept after the call.
      config: contents of the `config.json` beside the weights; empty if there is none.
      metadata: of a safetensors file; empty for other files.
      wrapper: the keys and prefixes that the weights lay under, "ema" for example; empty if they lay at the top.
      arguments: of the training script, as training checkpoints keep them; plain values only.
      packed: weights that the file holds quantized: name -> function that reads the leaf (O, I). `read` decodes them.
    """

    path: pathlib.Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wrapper: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    packed: Mapping[str, Callable[[], QuantizedArray]] = dataclasses.field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """The file's facts about its model besides shapes: training arguments, above them the config, then the metadata."""
        return {**self.arguments, **self.config, **self.metadata}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; InputError for anything else."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes; a JSON file of at most {_MAX_JSON:,} is wanted")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path}: not readable as JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is wanted, found {type(value).__name__}")
    return value
