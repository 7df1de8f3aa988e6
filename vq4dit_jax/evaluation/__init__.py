"""Quality of images under a pluggable feature network: Frechet distance, Inception-score analogue, precision, recall.

TensorFlow is imported only when a figure of TF-GAN's is computed. Reference statistics are made by
`python -m vq4dit_jax.evaluation.reference`.
"""

from vq4dit_jax.evaluation.classifiers import Classifier, extract_features, load_classifier
from vq4dit_jax.evaluation.metrics import evaluate
from vq4dit_jax.evaluation.precision_recall import precision_and_recall
from vq4dit_jax.evaluation.statistics import Moments, ReferenceStatistics, load_reference, moments, save_reference
from vq4dit_jax.evaluation.tfgan import frechet_distance, inception_score

__all__ = [
    "Classifier",
    "Moments",
    "ReferenceStatistics",
    "evaluate",
    "extract_features",
    "frechet_distance",
    "inception_score",
    "load_classifier",
    "load_reference",
    "moments",
    "precision_and_recall",
    "save_reference",
]
