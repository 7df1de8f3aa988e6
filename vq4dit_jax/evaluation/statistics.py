"""`ReferenceStatistics`: the statistics of a set of real images under one feature network, in one `.npz` file."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from vq4dit_jax import npz
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.streaming import Moments, StreamingMoments
from vq4dit_jax.files import atomic_path

FORMAT = 2
# Format 1, that of the shipped CIFAR-10 file, had all arrays, the features of all images, and no checksum of the weights.
_READ = (1, FORMAT)


def moments(features: Float[np.ndarray, "N D"]) -> Moments:
    """Mean and unbiased covariance of N >= 2 feature vectors, in float64; the bits are those of `StreamingMoments`."""
    return StreamingMoments().update(np.asarray(features)).finalize()


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """The statistics of real images for the metrics. A part that is not known is None, and `missing` says why.

    Attributes:
      mu, sigma: moments of the features, float64 (D,), (D, D).
      mu_s, sigma_s: moments of the spatial features, float64 (E,), (E, E). Files hold sigma_s in float32.
      features: (M, D) of M of the images, for precision, recall, Monge and kernel distance; float16, or float32 where
        float16 would overflow.
      classifier: name of the feature network, as in `load_classifier`.
      source: a description of the images for people: "10,000 test images (JPEG)".
      count: number of images behind mu and sigma; None where a file with moments alone does not say it.
      weights: checksum of the network's weights; "" where it is not known.
      missing: reasons, by the name of the part: "features", "mu" or "mu_s". Not kept in files.
    """

    mu: Any
    sigma: Any
    mu_s: Any
    sigma_s: Any
    features: Any
    classifier: str
    source: str
    count: int | None
    weights: str = ""
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def moments(self) -> Moments | None:
        return None if self.mu is None else Moments(self.mu, self.sigma)

    @property
    def spatial_moments(self) -> Moments | None:
        return None if self.mu_s is None else Moments(self.mu_s, self.sigma_s)

    @property
    def checksum(self) -> str:
        """SHA-256 (hexadecimal) of the contents of a file of these statistics."""
        return _checksum(_to_arrays(self))


_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features")


def _to_arrays(reference: ReferenceStatistics) -> dict[str, np.ndarray]:
    arrays = {name: getattr(reference, name) for name in _ARRAYS if getattr(reference, name) is not None}
    if "sigma_s" in arrays:
        arrays["sigma_s"] = arrays["sigma_s"].astype(np.float32)
    facts = {
        "classifier": reference.classifier,
        "source": reference.source,
        "weights": reference.weights,
        "count": -1 if reference.count is None else reference.count,
        "format": FORMAT,
    }
    return arrays | {name: np.asarray(value) for name, value in facts.items()}


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
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
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file of reference statistics")
    arrays = npz.read_arrays(path)
    version = next((v for v in _READ if is_reference(arrays) and np.array_equal(arrays["format"], v)), None)
    if version is None:
        raise InputError(
            f"{path}: not reference statistics of format {FORMAT} or {_READ[0]};"
            " make them with `python -m vq4dit_jax.evaluation.reference`"
        )
    if _checksum({name: value for name, value in arrays.items() if name != "checksum"}) != arrays["checksum"]:
        raise InputError(f"{path}: its checksum does not match its contents; the file is damaged, make it again")
    values = {name: arrays.get(name) for name in _ARRAYS}
    if values["sigma_s"] is not None:
        values["sigma_s"] = values["sigma_s"].astype(np.float64)
    count = int(arrays["count"]) if version == FORMAT else len(values["features"])
    return ReferenceStatistics(
        **values,
        classifier=str(arrays["classifier"]),
        source=str(arrays["source"]),
        count=None if count < 0 else count,
        weights=str(arrays["weights"]) if version == FORMAT else "",
        missing={name: f"the reference file {path} was made without it" for name in _ARRAYS if values[name] is None},
    )


def is_reference(names: Any) -> bool:
    """Whether an `.npz` with arrays of these names was written by `save_reference`."""
    return {"format", "checksum", "classifier", "source"} <= set(names)
