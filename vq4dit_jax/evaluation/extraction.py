"""One pass over images that computes the statistics of their features for the metrics, in bounded memory."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool
from tqdm import tqdm

from vq4dit_jax.evaluation.classifiers import Classifier, iterate_features
from vq4dit_jax.evaluation.images import ImageSet
from vq4dit_jax.evaluation.streaming import StreamingMoments
from vq4dit_jax.evaluation.tfgan import StreamingInceptionScore


@dataclasses.dataclass(frozen=True, eq=False)
class Extracted:
    """The results of a pass over N images.

    Attributes:
      moments, spatial: of the classifier's features (N, D) and its spatial features (N, E).
      kept: float32 (M, D), the features of the images in `keep`.
      inception_score: None where it was not asked for, or the network has no logits.
      has_logits: whether the network has logits.
      width, spatial_width: D and E.
      finite: whether all features and logits are finite numbers. If not, the pass ended at once and
        the other fields mean nothing.
    """

    moments: StreamingMoments
    spatial: StreamingMoments
    kept: Any
    inception_score: float | None
    has_logits: bool
    width: int
    spatial_width: int
    finite: bool


def extract(
    classifier: Classifier,
    images: ImageSet,
    keep: Bool[np.ndarray, " N"],
    score: bool,
    batch_size: int | None = None,
    title: str = "features",
) -> Extracted:
    """Runs the feature network once over all images.

    Args:
      keep: indices of the images whose features are kept, in their order.
      score: whether to compute the Inception score, which needs the extra `tfgan`.
      batch_size: images that are read and computed at once; the classifier's own if not given.
    """
    size = batch_size or classifier.batch_size
    pooled, spatial, kept, inception = StreamingMoments(), StreamingMoments(), None, StreamingInceptionScore()
    with tqdm(total=len(images), desc=title, unit=" image", disable=None, leave=False) as bar:
        for outputs in iterate_features(classifier, images.batches(size), size):
            features, regions = outputs[classifier.features], outputs["spatial"]
            logits = outputs.get("logits")
            widths = features.shape[1], regions.shape[1]
            if not all(np.isfinite(values).all() for values in (features, regions, logits) if values is not None):
                return Extracted(pooled, spatial, None, None, logits is not None, *widths, finite=False)
            if kept is None:
                kept = np.empty((np.count_nonzero(keep), features.shape[1]), np.float32)
            chosen = keep[pooled.count : pooled.count + len(features)]
            before = np.count_nonzero(keep[: pooled.count])
            kept[before : before + np.count_nonzero(chosen)] = features[chosen]
            pooled, spatial = pooled.update(features), spatial.update(regions)
            if score and logits is not None:
                inception.update(logits)
            bar.update(len(features))
    found = inception.result() if score and logits is not None else None
    return Extracted(pooled, spatial, kept, found, logits is not None, *widths, finite=True)
