"""Feature networks by name. To add one, write a `Classifier` and an entry in `_LOADERS`."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float
from safetensors.numpy import load_file
from tqdm import tqdm

from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.networks.inception import Inception
from vq4dit_jax.evaluation.networks.resnet import CifarResNet
from vq4dit_jax.files import asset
from vq4dit_jax.storage import provenance

_INCEPTION = "inception:"
# Images in a compiled batch of Inception. On a CPU few, so that activations stay in its cache: on two Zen 3 cores an image
# takes 135 ms of CPU time in batches of 4 or 8, 160 in batches of 16 and 175 in batches of 32.
_INCEPTION_BATCH = {"cpu": 8}
_INCEPTION_BATCH_ELSEWHERE = 128


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A feature network; called with uint8 images (N, H, W, 3) it gives its outputs, as `extract_features` does.

    Attributes:
      name: the network and its last layer; reference statistics store it too, and must match.
      apply: uint8 images (B, H, W, 3) -> dict of float32 arrays (B, D), a pure function that may be jitted. It has
        `features` and "spatial" among its keys, and "logits" where the network has them.
      title: the network's name for people, as reports print it.
      features: the output that the Frechet distance, precision and recall are computed on.
      checksum: SHA-256 (hexadecimal) of the weights, the same from whatever file they were read; "" if unknown.
      batch_size: B that `apply` is fastest at.
    """

    name: str
    apply: Callable[..., dict]
    title: str
    features: str = "pool"
    checksum: str = ""
    batch_size: int = 200

    def __call__(self, images: np.ndarray) -> dict[str, Float[np.ndarray, "N _"]]:
        return extract_features(self, images)


def load_inception(source: str | os.PathLike) -> Classifier:
    """The FID network with weights from `source`: a file (pytorch-fid's `.pth`, the frozen graph `.pb`, a folded `.npz`), a
    SavedModel's folder, or the https:// handle of TF-GAN's TF-Hub module; `convert.inception` and docs/inception.md.

    Outputs: mixed_7 (768), spatial (2023), and where the weights are complete pool_3 (2048) and logits (1008).
    InputError where the weights cannot be read or are not this network's.
    """
    from convert.inception import is_complete
    from convert.inception import load_inception as load_weights

    params = load_weights(source)
    complete = is_complete(params)
    # The weights are an argument of the jitted function: as constants they would be compiled in.
    apply = functools.partial(jax.jit(Inception(complete).apply), {"params": jax.device_put(params)})
    return Classifier(
        name="inception-2015-12-05" if complete else "inception-2015-12-05-to-mixed_7",
        apply=apply,
        title="Inception-v3 (2015-12-05)" if complete else "Inception-v3 (2015-12-05) up to mixed_7",
        features="pool_3" if complete else "mixed_7",
        checksum=provenance.digest(params),
        batch_size=_INCEPTION_BATCH.get(jax.default_backend(), _INCEPTION_BATCH_ELSEWHERE),
    )


def _cifar10_resnet56() -> Classifier:
    params = traverse_util.unflatten_dict(load_file(asset("cifar10_resnet56.safetensors")), sep="/")
    apply = functools.partial(jax.jit(CifarResNet(depth=56).apply), {"params": jax.device_put(params)})
    return Classifier("cifar10_resnet56", apply, title="CIFAR-10 ResNet-56", checksum=provenance.digest(params))


_LOADERS: dict[str, Callable[[], Classifier]] = {"cifar10_resnet56": _cifar10_resnet56}


@functools.cache
def load_classifier(name: str) -> Classifier:
    """The feature network called `name`, compiled once in a process. InputError lists the names there are.

    Args:
      name: "cifar10_resnet56"; or "inception:SOURCE", or SOURCE alone where it is a path or a handle (`load_inception`).
    """
    if name in _LOADERS:
        return _LOADERS[name]()
    if name.startswith(_INCEPTION):
        return load_inception(name.removeprefix(_INCEPTION))
    if os.path.exists(name) or "://" in name:
        return load_inception(name)
    raise InputError(
        f"classifier={name!r}: no such feature network, and no such file; there are:"
        f" {', '.join(sorted(_LOADERS))}, {_INCEPTION}FILE"
    )


def iterate_features(
    classifier: Classifier, batches: Iterable[np.ndarray], batch_size: int | None = None
) -> Iterator[dict[str, Float[np.ndarray, "n _"]]]:
    """Outputs of the classifier for a stream of images, in their order, n <= `batch_size` images at a time.

    The stream is cut anew into batches of `batch_size`, the last one filled up with black. The network therefore compiles once,
    and an image's features do not depend on the given batches. Several batches are computed at a time, while the next ones
    are read.

    Args:
      batches: uint8 (any number, H, W, 3), all of one height and width; anything else is an InputError.
      batch_size: the classifier's own if not given.
    """
    size = batch_size or classifier.batch_size

    def compute(batch: np.ndarray) -> dict[str, np.ndarray]:
        padding = np.zeros((size - len(batch), *batch.shape[1:]), np.uint8)
        outputs = classifier.apply(np.concatenate([batch, padding]))
        return {name: np.asarray(value)[: len(batch)] for name, value in outputs.items()}

    at_a_time = _batches_at_a_time()
    running: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        for number, batch in enumerate(_rebatch(batches, size)):
            running.append(pool.submit(compute, batch))
            if number == 0 or len(running) > at_a_time:  # the first one compiles, which is done once
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _batches_at_a_time() -> int:
    """Number of batches at a time. Two hide the reading of the next one. XLA's CPU backend runs many operations on one core, so
    there each core has its own batch: on two, 12 images/s of Inception instead of 8 (`benchmarks/inception_speed.py`)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(2, cores), 8) if jax.default_backend() == "cpu" else 2


def extract_features(
    classifier: Classifier, images: np.ndarray, batch_size: int | None = None
) -> dict[str, Float[np.ndarray, "N _"]]:
    """Outputs of the classifier for all images, in their order; memory is that of a few batches and of the features.

    Args:
      images: uint8 (N, H, W, 3), N >= 1; anything else is an InputError.
      batch_size: as in `iterate_features`.
    """
    _check(images)
    if not len(images):
        raise InputError("no images: uint8 (N, H, W, 3) with N >= 1 is wanted")
    batches = []
    with tqdm(total=len(images), desc="features", unit=" image", disable=None, leave=False) as bar:
        for outputs in iterate_features(classifier, [images], batch_size):
            batches.append(outputs)
            bar.update(len(outputs[classifier.features]))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`; the last may have fewer."""
    waiting: list[np.ndarray] = []
    count = 0
    for batch in batches:
        _check(batch)
        if waiting and batch.shape[1:] != waiting[0].shape[1:]:
            raise InputError(
                f"images of {batch.shape[1:3]} follow images of {waiting[0].shape[1:3]}; resize them alike"
            )
        waiting.append(batch)
        count += len(batch)
        if count < size:
            continue
        images = np.concatenate(waiting) if len(waiting) > 1 else batch
        whole = count - count % size
        yield from (images[start : start + size] for start in range(0, whole, size))
        waiting, count = [images[whole:]], count - whole
    if count:
        yield np.concatenate(waiting)


def _check(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise InputError(f"images are {images.dtype} {images.shape}; uint8 (N, H, W, 3) is wanted")
