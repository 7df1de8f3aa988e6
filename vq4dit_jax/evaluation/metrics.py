"""Figures of one set of images against one reference; a figure that cannot be computed has a reason instead."""

import dataclasses
import math
import os
from typing import Any

import numpy as np
from absl import logging

from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.evaluation import tfgan
from vq4dit_jax.evaluation.classifiers import Classifier
from vq4dit_jax.evaluation.extraction import Extracted, extract
from vq4dit_jax.evaluation.images import ImageSet, open_images
from vq4dit_jax.evaluation.monge import monge_distance
from vq4dit_jax.evaluation.precision_recall import NEIGHBOURS, precision_and_recall
from vq4dit_jax.evaluation.similarity import TO_FULL_PRECISION, compare
from vq4dit_jax.evaluation.statistics import ReferenceStatistics

FIGURES = ("fd", "sfd", "mind", "is", "kd", "precision", "recall")
_FROM_TFGAN = ("fd", "sfd", "is", "kd")
_IN_METRICS = tuple(name for name in FIGURES if name != "kd")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Figures by name, and for each that is None the reason, in words.

    Attributes:
      figures: fd, sfd: Frechet distance on the classifier's features, and on its spatial features; mind: Monge
        distance on the features; is: Inception score's formula on its logits, the mean over consecutive splits of 5,000
        images, as ADM's evaluator has it; kd: kernel distance on the features; precision, recall: k = 3 nearest
        neighbours, on the features.
      reasons: why a figure is None.
      width: number of features.
    """

    figures: dict[str, float | None]
    reasons: dict[str, str]
    width: int


def measure(
    images: ImageSet, classifier: Classifier, reference: ReferenceStatistics, batch_size: int | None = None
) -> Measurement:
    """All figures of the images against the reference, made with the same classifier; InputError otherwise.

    Images are read once, `batch_size` at a time (the classifier's own if not given); features are held, in float32, only
    where the reference has features too.
    """
    check_same_network(classifier, reference)
    no_tfgan = _why_no_tfgan()
    compare_features = reference.features is not None
    found = extract(
        classifier, images, np.full(len(images), compare_features), no_tfgan is None and len(images) > 1, batch_size
    )
    _check_widths(found, classifier, reference)
    reasons = _obstacles(found, len(images), classifier, reference, no_tfgan)
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    if "fd" not in reasons:
        figures["fd"] = tfgan.frechet_distance(found.moments.finalize(), reference.moments)
    if "sfd" not in reasons:
        figures["sfd"] = tfgan.frechet_distance(found.spatial.finalize(), reference.spatial_moments)
    if "mind" not in reasons:
        figures["mind"] = monge_distance(found.kept, reference.features)
    if "is" not in reasons:
        figures["is"] = found.inception_score
    if "kd" not in reasons:
        figures["kd"] = tfgan.kernel_distance(found.kept, reference.features)
    if "precision" not in reasons:
        figures["precision"], figures["recall"] = precision_and_recall(reference.features, found.kept)
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            figures[name], reasons[name] = None, f"it came out as {value}"
    return Measurement(figures, {name: reasons[name] for name in FIGURES if name in reasons}, found.width)


def check_same_network(classifier: Classifier, reference: ReferenceStatistics) -> None:
    """InputError unless the reference was made with this network and its weights."""
    remedy = "make them with `python -m vq4dit_jax.evaluation.reference`"
    if reference.classifier != classifier.name:
        raise InputError(
            f"the reference statistics were made with the classifier {reference.classifier!r}, not with"
            f" {classifier.name!r}; {remedy}"
        )
    if reference.weights and classifier.checksum and reference.weights != classifier.checksum:
        raise InputError(
            f"the reference statistics were made with other weights of {classifier.name!r} (checksum"
            f" {reference.weights[:12]}..., here {classifier.checksum[:12]}...); {remedy}"
        )


def _why_no_tfgan() -> str | None:
    try:
        tfgan.classifier_metrics()
        return None
    except MissingExtraError as error:
        return str(error)


def _obstacles(
    found: Extracted, count: int, classifier: Classifier, reference: ReferenceStatistics, no_tfgan: str | None
) -> dict[str, str]:
    """Why figures cannot be computed, by their names."""
    if not found.finite:
        return dict.fromkeys(FIGURES, f"{classifier.title} gives features that are not finite numbers")
    reasons = dict.fromkeys(_FROM_TFGAN, no_tfgan) if no_tfgan else {}

    def add(names: tuple[str, ...], obstacle: bool, reason: str) -> None:
        if obstacle:
            reasons.update({name: reason for name in names if name not in reasons})

    of_features = ("mind", "kd", "precision", "recall")
    for names, part in (("fd",), "mu"), (("sfd",), "mu_s"), (of_features, "features"):
        absent = getattr(reference, part) is None
        add(names, absent, reference.missing.get(part, f"the reference has no {part}"))
    add(("is",), not found.has_logits, f"{classifier.title} has no logits here: weights of its last layers are needed")
    add(("fd", "sfd", "is"), count < 2, f"2 images are needed, and there is {count}")
    if reference.features is not None:
        real = len(reference.features)
        few = f"{count} images and {real} real ones are too few"
        add(("precision", "recall"), min(count, real) <= NEIGHBOURS, f"{few} for {NEIGHBOURS} nearest neighbours")
        add(("kd",), not tfgan.kernel_distance_is_defined(count, real), f"{few} for two in each block of the estimator")
    return reasons


def _check_widths(found: Extracted, classifier: Classifier, reference: ReferenceStatistics) -> None:
    for part, width in ("mu", found.width), ("mu_s", found.spatial_width):
        theirs = getattr(reference, part)
        if theirs is not None and len(theirs) != width:
            raise InputError(f"the reference's {part} has {len(theirs)} features, and {classifier.title} has {width}")


def evaluate(
    images: np.ndarray | str | os.PathLike,
    classifier: Classifier | None,
    reference: ReferenceStatistics | None,
    full_precision_images: np.ndarray | str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Quality of generated images. None stands for a figure that cannot be computed: never NaN, always strict JSON.

    Args:
      images: uint8 (N, H, W, 3), N >= 1; or a file or folder of them, as in `open_images`, which is then not held in memory.
      classifier: the feature network; None where there is none, and then only the figures of pairs are computed.
      reference: of the real images, made with the same classifier; InputError otherwise.
      full_precision_images: the full-precision model's images of the same seeds and labels, in the form of `images`.

    Returns: dict with the keys
      fd, sfd, mind, is, precision, recall: see `Measurement`; `evaluate_with_reasons` and the log say why one is None.
      psnr_to_fp_db: median over the images of their PSNR to the full-precision ones, dB, at most 99.
      ssim_to_fp, ms_ssim_to_fp: means over the images of their SSIM and MS-SSIM to the full-precision ones, at most 1.
      num_images: N.
      features: the network, layer and real images that these figures belong to. Figures of others do not compare.
    """
    return evaluate_with_reasons(images, classifier, reference, full_precision_images)[0]


def evaluate_with_reasons(
    images: np.ndarray | str | os.PathLike,
    classifier: Classifier | None,
    reference: ReferenceStatistics | None,
    full_precision_images: np.ndarray | str | os.PathLike | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the result of `evaluate`, the reasons of its figures that are None, by their names)."""
    found = open_images(images)
    figures: dict[str, Any] = dict.fromkeys((*_IN_METRICS, *TO_FULL_PRECISION))
    described, reasons = "none", {}
    if classifier is None:
        reasons = dict.fromkeys(_IN_METRICS, "there is no feature network")
    else:
        measured = measure(found, classifier, reference)
        figures |= {name: measured.figures[name] for name in _IN_METRICS}
        reasons = {name: reason for name, reason in measured.reasons.items() if name in figures}
        for reason in dict.fromkeys(reasons.values()):
            names = ", ".join(name for name in reasons if reasons[name] == reason)
            logging.warning("%s of %s not computed: %s", names, found.description, reason)
        described = f"{classifier.title} {classifier.features} ({measured.width}) against {reference.source}"
    if full_precision_images is not None:
        of_pairs, obstacles = compare(found, open_images(full_precision_images))
        figures, reasons = figures | of_pairs, reasons | obstacles
    else:
        reasons |= dict.fromkeys(TO_FULL_PRECISION, "there are no images to compare with")
    return {**figures, "num_images": len(found), "features": described}, reasons
