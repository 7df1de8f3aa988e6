"""What a figure was made with: devices, versions, checksums of models, and what decides what a network or a pass does."""

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import math
import platform
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vq4dit_jax import __version__
from vq4dit_jax.networks import registry
from vq4dit_jax.storage import checkpoint

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "faiss-cpu", "tensorflow", "tensorflow-gan")


def devices() -> str:
    """All devices of the job: "8 x NVIDIA H200"."""
    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind}"


def versions() -> dict[str, str]:
    """Of Python, of this package, and of what it computes with, as far as it is installed."""
    out = {"python": platform.python_version(), "vq4dit-jax": __version__}
    for package in _PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def digest(params: Any) -> str:
    """SHA-256 (hexadecimal) of a tree's names, dtypes, shapes and values: the same for a model in any file format."""
    out = hashlib.sha256()
    for name, value in sorted(checkpoint.flatten(params).items()):
        out.update(f"{name} {value.dtype} {value.shape} ".encode())
        out.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return out.hexdigest()


def facts_of(value: Any) -> Any:
    """What decides what a value does, JSON-ready and the same in every process.

    | value | facts |
    |---|---|
    | a module of this library | as in a manifest (`networks.registry.describe`) |
    | another module, a dataclass | its class, and its fields but for those with compare=False |
    | a dict, a tuple, a list | the facts of what is in it |
    | an array | its digest |
    | a function | its name: what it does, and what it closes over, is not seen |
    | a partial function, a bound method | its name, and what is bound |
    | any other object | its class |
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return f"{value.dtype}{value.shape} sha256 {digest({'array': value})}"
    if registry.is_ours(value):
        return registry.describe(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): facts_of(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [facts_of(item) for item in value]
    if isinstance(value, functools.partial):
        return {"function": facts_of(value.func), "args": facts_of(value.args), "keywords": facts_of(value.keywords)}
    if inspect.ismethod(value):
        return {"function": _name(value), "self": facts_of(value.__self__)}
    if hasattr(value, "__wrapped__"):  # jax.jit and its like
        return facts_of(value.__wrapped__)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        place = ("parent", "name") if isinstance(value, nn.Module) else ()
        fields = [field.name for field in dataclasses.fields(value) if field.compare and field.name not in place]
        return {"class": _name(type(value)), **{name: facts_of(getattr(value, name)) for name in fields}}
    return _name(value if hasattr(value, "__name__") else type(value))


def _name(of: Any) -> str:
    return f"{of.__module__}.{getattr(of, '__qualname__', of.__name__)}"
