"""Moments of features, and what has to be known of a set of real images: `ReferenceStatistics`, in one `.npz` file."""

import dataclasses
import hashlib
import os
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from vq4dit_jax.errors import InputError
from vq4dit_jax.files import atomic_path

FORMAT = 1


class Moments(NamedTuple):
    """Sample mean (D,) and unbiased covariance (D, D), float64."""

    mu: Float64[np.ndarray, " D"]
    sigma: Float64[np.ndarray, "D D"]


def moments(features: Float[np.ndarray, "N D"]) -> Moments:
    """Mean and unbiased covariance of N >= 2 feature vectors, accumulated in float64."""
    features = np.asarray(features, np.float64)
    return Moments(features.mean(axis=0), np.cov(features, rowvar=False).reshape((features.shape[1],) * 2))


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """What the metrics need of the real images, under one feature network.

    Attributes:
      mu, sigma: moments of the features: (D,), (D, D).
      mu_s, sigma_s: moments of the spatial features: (E,), (E, E). sigma_s is stored in float32.
      features: (count, D) float16 for precision and recall (float32 where float16 would overflow).
      classifier: name of the feature network, as in `load_classifier`.
      source: what the images are, for people: "10,000 test images (JPEG)".
    """

    mu: Float64[np.ndarray, " D"]
    sigma: Float64[np.ndarray, "D D"]
    mu_s: Float64[np.ndarray, " E"]
    sigma_s: Float64[np.ndarray, "E E"]
    features: Float[np.ndarray, "N D"]
    classifier: str
    source: str

    @property
    def count(self) -> int:
        """Number of real images."""
        return len(self.features)

    @property
    def checksum(self) -> str:
        """SHA-256 (hexadecimal) of all that a file of these statistics holds."""
        return _checksum(_to_arrays(self))


def _to_arrays(reference: ReferenceStatistics) -> dict[str, np.ndarray]:
    arrays = {field.name: np.asarray(getattr(reference, field.name)) for field in dataclasses.fields(reference)}
    return arrays | {"sigma_s": reference.sigma_s.astype(np.float32), "format": np.asarray(FORMAT)}


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def save_reference(path: str | os.PathLike, reference: ReferenceStatistics) -> None:
    """Writes a compressed `.npz`; the same statistics give the same bytes."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **_to_arrays(reference), checksum=np.asarray(reference.checksum))


def load_reference(path: str | os.PathLike) -> ReferenceStatistics:
    """Reads what `save_reference` wrote. InputError where the file is missing, damaged, or something else."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as npz:
            arrays = dict(npz)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of reference statistics") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not readable as reference statistics (.npz): {error}") from None
    wanted = {field.name for field in dataclasses.fields(ReferenceStatistics)} | {"format", "checksum"}
    if set(arrays) != wanted or arrays["format"] != FORMAT:
        raise InputError(
            f"{path}: not reference statistics of format {FORMAT};"
            " make them with `python -m vq4dit_jax.evaluation.reference`"
        )
    if _checksum({name: value for name, value in arrays.items() if name != "checksum"}) != arrays["checksum"]:
        raise InputError(f"{path}: its checksum does not match its contents; the file is damaged, make it again")
    return ReferenceStatistics(
        arrays["mu"],
        arrays["sigma"],
        arrays["mu_s"],
        arrays["sigma_s"].astype(np.float64),
        arrays["features"],
        str(arrays["classifier"]),
        str(arrays["source"]),
    )
