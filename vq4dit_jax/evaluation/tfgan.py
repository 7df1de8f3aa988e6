"""TF-GAN's metrics, on a TensorFlow that TF-GAN's own `__init__` no longer runs on.

`import tensorflow_gan` (2.1.0, the last release) fails since TensorFlow 2.16, where `tf.estimator` went. Its metrics
do not need the parts that fail: with empty modules standing for the two packages above, `tensorflow_gan.python.eval`
imports and runs unchanged.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from vq4dit_jax.errors import MissingExtraError
from vq4dit_jax.evaluation.statistics import Moments, moments


def frechet_distance(features: Float[np.ndarray, "N D"], other: Float[np.ndarray, "M D"] | Moments) -> float:
    """Squared Frechet distance of two Gaussians with the moments of the features; N, M >= 2 (Heusel et al. 2017).

    |mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2)), in float64, with unbiased covariances.

    Args:
      other: features again, or their moments where only these are known.
    """
    metrics = _classifier_metrics()
    features = np.asarray(features, np.float64)
    with warnings.catch_warnings(action="ignore"):
        if not isinstance(other, Moments):
            distance = metrics.frechet_classifier_distance_from_activations(features, np.asarray(other, np.float64))
            return float(distance.numpy())
        # TF-GAN's function takes features on both sides; this is what it does once it has their moments.
        mu, sigma = moments(features)
        trace = np.trace(sigma + other.sigma) - 2.0 * metrics.trace_sqrt_product(sigma, other.sigma).numpy()
        return float(trace + np.square(mu - other.mu).sum())


def inception_score(logits: Float[np.ndarray, "N classes"]) -> float:
    """exp(E[KL(p(y|x) || p(y))]) over all images at once, in float64 (Salimans et al. 2016, arXiv 1606.03498)."""
    metrics = _classifier_metrics()
    with warnings.catch_warnings(action="ignore"):
        return float(metrics.classifier_score_from_logits(np.asarray(logits, np.float64)).numpy())


@functools.cache
def _classifier_metrics() -> types.ModuleType:
    """tensorflow_gan.python.eval.classifier_metrics. Takes some seconds the first time."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with warnings.catch_warnings(action="ignore"), _stderr_only_on_failure():
            tensorflow = importlib.import_module("tensorflow")
            # The accelerators are JAX's. RuntimeError: whoever called has set TensorFlow up already.
            with contextlib.suppress(RuntimeError):
                tensorflow.config.set_visible_devices([], "GPU")
            _register_empty_packages()
            return importlib.import_module("tensorflow_gan.python.eval.classifier_metrics")
    except ImportError as error:
        missing = (error.name or "tensorflow-gan").split(".")[0].replace("_", "-")
        purpose = "computing the Frechet distance and the Inception score"
        raise MissingExtraError(missing, "tfgan", purpose) from error


def _register_empty_packages() -> None:
    """Puts packages without contents, but with the right search path, where TF-GAN's own would be imported."""
    if "tensorflow_gan" in sys.modules:
        return
    spec = importlib.util.find_spec("tensorflow_gan")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(name="tensorflow_gan")
    root = list(spec.submodule_search_locations)
    for name, path in ("tensorflow_gan", root), ("tensorflow_gan.python", [os.path.join(p, "python") for p in root]):
        empty = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        empty.submodule_search_locations = path
        sys.modules[name] = importlib.util.module_from_spec(empty)


@contextlib.contextmanager
def _stderr_only_on_failure() -> Iterator[None]:
    """Keeps back what is written to stderr, and writes it only if an exception passes.

    TensorFlow's C++ reports missing CUDA drivers there while it is imported, before it has read TF_CPP_MIN_LOG_LEVEL.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(saved, kept.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
