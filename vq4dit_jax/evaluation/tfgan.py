"""TF-GAN's metrics on versions of TensorFlow with which `import tensorflow_gan` fails.

`import tensorflow_gan` (2.1.0, the last release) fails since TensorFlow 2.16, which removed `tf.estimator`. Its metrics
do not need the parts that fail: with empty modules in place of the two packages above, `tensorflow_gan.python.eval`
imports and runs unchanged.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from vq4dit_jax.errors import MissingExtraError
from vq4dit_jax.evaluation.classifiers import Classifier
from vq4dit_jax.evaluation.statistics import moments
from vq4dit_jax.evaluation.streaming import Moments

IS_SPLIT = 5000
KID_BLOCK = 1024


def frechet_distance(features: Float[np.ndarray, "N D"] | Moments, other: Float[np.ndarray, "M D"] | Moments) -> float:
    """Squared Frechet distance of two Gaussians with the moments of the features; N, M >= 2 (Heusel et al. 2017).

    |mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2)), in float64, with unbiased covariances. Each side is
    features, or their moments where only these are known. Two singular value decompositions of (D, D): 15 s for
    D = 2048 on a CPU core.
    """
    metrics = classifier_metrics()
    with _quiet():
        if not isinstance(features, Moments) and not isinstance(other, Moments):
            sides = np.asarray(features, np.float64), np.asarray(other, np.float64)
            return float(metrics.frechet_classifier_distance_from_activations(*sides).numpy())
        # TF-GAN's function takes features on both sides; this is its computation from their moments.
        a, b = (side if isinstance(side, Moments) else moments(side) for side in (features, other))
        trace = np.trace(a.sigma + b.sigma) - 2.0 * metrics.trace_sqrt_product(a.sigma, b.sigma).numpy()
        return float(trace + np.square(a.mu - b.mu).sum())


def kernel_distance(features: Float[np.ndarray, "N D"], other: Float[np.ndarray, "M D"]) -> float:
    """Kernel Inception distance (Binkowski et al. 2018, arXiv 1801.01401), not multiplied by 1000, in float64.

    The unbiased squared maximum mean discrepancy under k(x, y) = (x^T y / D + 1)^3, averaged over ceil(max(N, M) / 1024)
    pairs of blocks; each block needs 2 vectors. TF-GAN takes the blocks from the features in their order and asks for a
    random one (a folder of images is sorted by class): each side is permuted first, always in the same way.
    """
    metrics = classifier_metrics()
    a, b = (side[np.random.default_rng(0).permutation(len(side))].astype(np.float64) for side in (features, other))
    with _quiet():
        convert = importlib.import_module("tensorflow").convert_to_tensor
        return float(metrics.kernel_classifier_distance_from_activations(convert(a), convert(b), KID_BLOCK).numpy())


def kernel_distance_is_defined(n: int, m: int) -> bool:
    """Whether `kernel_distance` has at least 2 vectors of both sides for each block."""
    return min(n, m) // -(-max(n, m, 1) // KID_BLOCK) >= 2


def inception_score(logits: Float[np.ndarray, "N classes"]) -> float:
    """exp(E[KL(p(y|x) || p(y))]) over all images at once, in float64 (Salimans et al. 2016, arXiv 1606.03498)."""
    metrics = classifier_metrics()
    with _quiet():
        return float(metrics.classifier_score_from_logits(np.asarray(logits, np.float64)).numpy())


class StreamingInceptionScore:
    """Mean of `inception_score` over consecutive splits of 5,000 images, the last one with the rest.

    ADM's evaluator computes the same, so the published figures of ADM, DiT and their followers are of this kind. Up to
    5,000 images it is the score of all at once. No more than a split's logits are held.
    """

    def __init__(self):
        self._scores, self._waiting = [], None

    def update(self, logits: Float[np.ndarray, "n classes"]) -> None:
        self._waiting = logits if self._waiting is None else np.concatenate([self._waiting, logits])
        while len(self._waiting) >= IS_SPLIT:
            self._scores.append(inception_score(self._waiting[:IS_SPLIT]))
            self._waiting = self._waiting[IS_SPLIT:]

    def result(self) -> float:
        rest = [] if self._waiting is None or not len(self._waiting) else [inception_score(self._waiting)]
        return float(np.mean(self._scores + rest))


def classifier_fn(classifier: Classifier, output: str) -> Callable[[Any], Any]:
    """One output of a feature network as TF-GAN's `classifier_fn`: a tensor of images 0..255 (B, H, W, 3) to (B, D).

    For TF-GAN's functions of images, called eagerly; these want images and features of one dtype, so the images are given as
    float32.
    """
    tensorflow = importlib.import_module("tensorflow")

    def run(images: Any) -> Any:
        return tensorflow.convert_to_tensor(classifier(images.numpy().astype(np.uint8))[output])

    return run


@functools.cache
def classifier_metrics() -> types.ModuleType:
    """`tensorflow_gan.python.eval.classifier_metrics`, unchanged. Takes some seconds the first time.

    MissingExtraError where it is not installed.
    """
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
        purpose = "computing FID, KID and the Inception score"
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
def _quiet() -> Iterator[None]:
    """Suppresses TensorFlow's deprecation warnings about TF-GAN."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _stderr_only_on_failure() -> Iterator[None]:
    """Holds output to stderr back, and writes it only if an exception is raised.

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
