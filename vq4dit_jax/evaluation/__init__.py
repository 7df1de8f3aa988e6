"""Quality of images: under a feature network Frechet, Monge and kernel distance, Inception score, precision, recall; PSNR, SSIM.

TensorFlow is imported only when a figure of TF-GAN's is computed. Commands: `python -m vq4dit_jax.evaluate` evaluates
samples, `python -m vq4dit_jax.evaluation.reference` makes reference statistics.
"""

from vq4dit_jax.evaluation.classifiers import (
    Classifier,
    extract_features,
    iterate_features,
    load_classifier,
    load_inception,
)
from vq4dit_jax.evaluation.images import ImageSet, image_batches, open_images
from vq4dit_jax.evaluation.metrics import Measurement, evaluate, evaluate_with_reasons, measure
from vq4dit_jax.evaluation.monge import monge_distance
from vq4dit_jax.evaluation.precision_recall import precision_and_recall
from vq4dit_jax.evaluation.real_images import compute_reference, open_reference
from vq4dit_jax.evaluation.similarity import TO_FULL_PRECISION, ms_ssim, psnr_db, ssim
from vq4dit_jax.evaluation.statistics import ReferenceStatistics, load_reference, moments, save_reference
from vq4dit_jax.evaluation.streaming import Moments, StreamingMoments
from vq4dit_jax.evaluation.tfgan import classifier_fn, frechet_distance, inception_score, kernel_distance

__all__ = [
    "Classifier",
    "ImageSet",
    "Measurement",
    "Moments",
    "ReferenceStatistics",
    "StreamingMoments",
    "TO_FULL_PRECISION",
    "classifier_fn",
    "compute_reference",
    "evaluate",
    "evaluate_with_reasons",
    "extract_features",
    "frechet_distance",
    "image_batches",
    "inception_score",
    "iterate_features",
    "kernel_distance",
    "load_classifier",
    "load_inception",
    "load_reference",
    "measure",
    "moments",
    "monge_distance",
    "ms_ssim",
    "open_images",
    "open_reference",
    "precision_and_recall",
    "psnr_db",
    "save_reference",
    "ssim",
]
