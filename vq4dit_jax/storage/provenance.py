"""What a figure was made with: devices, versions, and checksums of models."""

import hashlib
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from vq4dit_jax import __version__
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
