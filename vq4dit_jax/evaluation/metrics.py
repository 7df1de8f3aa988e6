"""The quality entries of metrics.json: one set of images against one reference."""

import math
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float64

from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.evaluation.classifiers import Classifier, extract_features
from vq4dit_jax.evaluation.precision_recall import NEIGHBOURS, precision_and_recall
from vq4dit_jax.evaluation.statistics import Moments, ReferenceStatistics
from vq4dit_jax.evaluation.tfgan import frechet_distance, inception_score

# Equal images have an infinite PSNR, which strict JSON cannot say; one value stands for all above it.
PSNR_CAP_DB = 99.0


def psnr_db(images: np.ndarray, originals: np.ndarray) -> Float64[np.ndarray, " N"]:
    """Peak signal-to-noise ratio of each image, 10 log10(255^2 / mean squared difference) dB, at most PSNR_CAP_DB.

    Args:
      images, originals: uint8 (N, H, W, 3), of equal shapes.
    """
    if images.shape != originals.shape or images.dtype != np.uint8 or originals.dtype != np.uint8:
        raise InputError(
            f"images are {images.dtype} {images.shape} and the full-precision ones {originals.dtype} {originals.shape};"
            " uint8 of equal shapes is wanted"
        )
    # One image at a time: float copies of all of them could be eight times their size.
    mse = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(images, originals, strict=True)]
    floor = 255.0**2 / 10 ** (PSNR_CAP_DB / 10)
    return 10 * np.log10(255.0**2 / np.maximum(np.array(mse, np.float64), floor))


def evaluate(
    images: np.ndarray,
    classifier: Classifier | None,
    reference: ReferenceStatistics | None,
    full_precision_images: np.ndarray | None = None,
) -> dict[str, Any]:
    """Quality of generated images. None stands for a figure that cannot be computed: never NaN, always strict JSON.

    Args:
      images: uint8 (N, H, W, 3), N >= 1.
      classifier: the feature network; None where there is none, and then only the PSNR is computed.
      reference: of the real images, made with the same classifier; InputError otherwise.
      full_precision_images: what the full-precision model made of the same seeds and labels, as `images`.

    Returns: dict with the keys
      fd, sfd: Frechet distance on the classifier's features, and on its spatial features; N >= 2.
      is: Inception score's formula on the classifier's logits, over all images at once; N >= 2.
      precision, recall: k = 3 nearest neighbours, on the features; N >= 4.
      psnr_to_fp_db: median over the images of their PSNR to the full-precision ones, dB, at most 99.
      num_images: N.
      features: which network, layer and real images these figures belong to. They compare with no other's.
    fd, sfd and is come from TF-GAN; where the extra `tfgan` is not installed they are None, and the log says so.
    """
    figures: dict[str, Any] = dict.fromkeys(("fd", "sfd", "is", "precision", "recall", "psnr_to_fp_db"))
    described = "none"
    if classifier is not None:
        against_real, described = _against_reference(images, classifier, reference)
        figures.update(against_real)
    if full_precision_images is not None:
        figures["psnr_to_fp_db"] = float(np.median(psnr_db(images, full_precision_images)))
    return {
        **{name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()},
        "num_images": len(images),
        "features": described,
    }


def _against_reference(
    images: np.ndarray, classifier: Classifier, reference: ReferenceStatistics
) -> tuple[dict[str, float], str]:
    """(the figures that compare with real images, what they were computed on)."""
    if reference.classifier != classifier.name:
        raise InputError(
            f"the reference statistics were made with the classifier {reference.classifier!r}, not with"
            f" {classifier.name!r}; make them with `python -m vq4dit_jax.evaluation.reference`"
        )
    outputs = extract_features(classifier, images)
    features, figures = outputs[classifier.features], {}
    finite = all(np.isfinite(value).all() for value in outputs.values())
    if finite and len(images) >= 2:
        try:
            figures["fd"] = frechet_distance(features, Moments(reference.mu, reference.sigma))
            figures["sfd"] = frechet_distance(outputs["spatial"], Moments(reference.mu_s, reference.sigma_s))
            if "logits" in outputs:
                figures["is"] = inception_score(outputs["logits"])
        except MissingExtraError as error:
            logging.warning("no Frechet distances and no Inception score: %s", error)
    if finite and min(len(images), reference.count) > NEIGHBOURS:
        figures["precision"], figures["recall"] = precision_and_recall(reference.features, features)
    described = f"{classifier.title} {classifier.features} ({features.shape[1]}) against {reference.source}"
    return figures, described
