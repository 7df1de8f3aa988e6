"""`ReferenceStatistics` of real images, from the images or from published moments."""

import dataclasses
import os
import pathlib

import numpy as np

from vq4dit_jax import npz
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.classifiers import Classifier
from vq4dit_jax.evaluation.extraction import extract
from vq4dit_jax.evaluation.images import ARRAY, ImageSet, open_images
from vq4dit_jax.evaluation.metrics import check_same_network
from vq4dit_jax.evaluation.statistics import ReferenceStatistics, is_reference, load_reference
from vq4dit_jax.evaluation.streaming import Moments

# The number of images in ADM's reference files for precision and recall.
KEPT_FEATURES = 10_000
# Files of moments do not name their network. The published ones are of Inception, and their width tells the
# layer: 2048 and 768 features, and the spatial features of sFID.
_INCEPTION_WIDTHS = {"pool_3": 2048, "mixed_7": 768}
_SPATIAL_WIDTH = 2023


def open_reference(
    path: str | os.PathLike, classifier: Classifier, source: str | None = None, batch_size: int | None = None
) -> ReferenceStatistics:
    """The statistics of real images that a path gives under a feature network.

    Args:
      path: one of
        a folder of images, or an `.npz` of uint8 images `arr_0`: they are run through the network;
        a file of `save_reference`, made with the same network and weights;
        ADM's `.npz`: `mu`, `sigma`, `mu_s`, `sigma_s` of Inception's pool_3 and spatial features, and often `arr_0`, of which
        come the features for precision, recall, Monge and kernel distance;
        pytorch-fid's `.npz`: `mu`, `sigma`.
      source: a description of the images for people; by default from the path.

    Moments are used only where they can be of the same features: the network is Inception and the widths agree. Parts that
    a file lacks are computed from its `arr_0`; without one they are None, with the reason in `missing`. InputError where
    nothing can be used, or the path is none of these.
    """
    if os.path.isdir(path):
        return compute_reference(open_images(path), classifier, source, batch_size)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such reference file or folder")
    names = npz.array_names(path)
    if is_reference(names):
        reference = load_reference(path)
        check_same_network(classifier, reference)
        return reference if source is None else dataclasses.replace(reference, source=source)
    if "mu" in names or "mu_s" in names:
        return _from_moments(pathlib.Path(path), names, classifier, source, batch_size)
    if ARRAY in names:
        return compute_reference(open_images(path), classifier, source, batch_size)
    raise InputError(
        f"{path}: no reference: images {ARRAY}, or moments mu and sigma are wanted, and it holds {', '.join(names) or 'nothing'}"
    )


def compute_reference(
    images: ImageSet | np.ndarray, classifier: Classifier, source: str | None = None, batch_size: int | None = None
) -> ReferenceStatistics:
    """Statistics of N >= 2 images. Features are kept of 10,000 of them at most, drawn without repetition by a fixed seed.

    Args:
      images: uint8 (N, H, W, 3), or an `ImageSet`, which is read once.
      source: see `ReferenceStatistics`; by default the set's description.
    """
    images = images if isinstance(images, ImageSet) else open_images(images)
    source, count = source or images.description, len(images)
    if count < 2:
        raise InputError(f"{source}: {count} images; at least 2 are wanted for a covariance")
    keep = np.zeros(count, bool)
    keep[np.random.default_rng(0).permutation(count)[:KEPT_FEATURES]] = True
    found = extract(classifier, images, keep, score=False, batch_size=batch_size, title="reference")
    if not found.finite:
        raise InputError(f"{source}: {classifier.title} gives features that are not finite numbers")
    spatial = found.spatial.finalize()
    fits = np.abs(found.kept).max() <= np.finfo(np.float16).max
    return ReferenceStatistics(
        *found.moments.finalize(),
        spatial.mu,
        spatial.sigma.astype(np.float32).astype(np.float64),  # so that a saved and loaded copy is the same
        found.kept.astype(np.float16 if fits else np.float32),
        classifier.name,
        source,
        count,
        classifier.checksum,
    )


def _from_moments(
    path: pathlib.Path, names: list[str], classifier: Classifier, source: str | None, batch_size: int | None
) -> ReferenceStatistics:
    widths = {"mu": _INCEPTION_WIDTHS.get(classifier.features), "mu_s": _SPATIAL_WIDTH}
    published = {name: _read_moments(path, names, name) for name in widths}
    missing = {}
    for name, width in widths.items():
        moments, problem = published[name], None
        if moments is None:
            problem = f"{path.name} has no {name}"
        elif widths["mu"] is None:
            problem = f"{name} of {path.name} is of Inception features, not of {classifier.title}'s"
        elif len(moments.mu) != width:
            features = classifier.features if name == "mu" else "spatial features"
            problem = f"{name} of {path.name} has {len(moments.mu)} features, {classifier.title} {features} {width}"
        if problem:
            published[name], missing[name] = None, problem
    used = [name for name, moments in published.items() if moments is not None]
    if ARRAY in names:
        images = open_images(path)
        computed = compute_reference(images, classifier, source, batch_size)
        origin = [f"{', '.join(used)} as in {path.name}"] if used else []
        origin += [f"{'the rest ' if used else ''}of its {len(images):,} images" if used else images.description]
        count = computed.count if published["mu"] is None else None
        result = dataclasses.replace(computed, source=source or "; ".join(origin), count=count)
    elif used:
        missing["features"] = f"{path.name} has moments and no images: features of real images are needed"
        result = ReferenceStatistics(
            None, None, None, None, None, classifier.name, source or path.name, None, classifier.checksum, missing
        )
    else:
        raise InputError(
            f"{path}: its moments cannot be used: {'; '.join(missing.values())}; make a reference of the images themselves"
            " with `python -m vq4dit_jax.evaluation.reference`, or choose the network and layer that it was made with"
        )
    for name, sigma in ("mu", "sigma"), ("mu_s", "sigma_s"):
        if published[name] is not None:
            result = dataclasses.replace(result, **{name: published[name].mu, sigma: published[name].sigma})
    return result


def _read_moments(path: pathlib.Path, names: list[str], name: str) -> Moments | None:
    """`mu` and `sigma`, or `mu_s` and `sigma_s`, in float64; None where the file has no such mean."""
    sigma_name = name.replace("mu", "sigma")
    if name not in names:
        return None
    if sigma_name not in names:
        raise InputError(f"{path}: it has {name} and no {sigma_name}")
    mu, sigma = npz.read_arrays(path, (name, sigma_name)).values()
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise InputError(
            f"{path}: {name} is {mu.dtype} {mu.shape} and {sigma_name} {sigma.dtype} {sigma.shape}; floats (D,) and (D, D)"
            " are wanted"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: {name} or {sigma_name} has values that are not finite numbers")
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max():
        raise InputError(f"{path}: {sigma_name} is no covariance: it is not symmetric")
    return Moments(mu, sigma)
