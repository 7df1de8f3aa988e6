"""Feature networks by name. A new one is a `Classifier` and an entry in `_LOADERS`; nothing else knows which it is."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float
from safetensors.numpy import load_file
from tqdm import tqdm

from vq4dit_jax.errors import InputError
from vq4dit_jax.files import asset
from vq4dit_jax.models.resnet import CifarResNet


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A feature network.

    Attributes:
      name: as in `load_classifier`; reference statistics carry it too, and must match.
      apply: uint8 images (B, H, W, 3) -> dict of float32 arrays (B, D), a pure function that may be jitted. It has
        `features` and "spatial" among its keys, and "logits" where the network has them.
      title: the network's name for people, as reports print it.
      features: which output the Frechet distance, precision and recall are computed on.
    """

    name: str
    apply: Callable[..., dict]
    title: str
    features: str = "pool"


def _cifar10_resnet56() -> Classifier:
    params = traverse_util.unflatten_dict(load_file(asset("cifar10_resnet56.safetensors")), sep="/")
    # The weights are an argument of the jitted function: as constants they would be compiled in.
    apply = functools.partial(jax.jit(CifarResNet(depth=56).apply), {"params": jax.device_put(params)})
    return Classifier("cifar10_resnet56", apply, title="CIFAR-10 ResNet-56")


_LOADERS: dict[str, Callable[[], Classifier]] = {"cifar10_resnet56": _cifar10_resnet56}


@functools.cache
def load_classifier(name: str) -> Classifier:
    """The feature network called `name`, compiled once in a process. InputError lists the names there are."""
    if name not in _LOADERS:
        raise InputError(f"classifier={name!r}: no such feature network; there are: {', '.join(sorted(_LOADERS))}")
    return _LOADERS[name]()


def extract_features(
    classifier: Classifier, images: np.ndarray, batch_size: int = 200
) -> dict[str, Float[np.ndarray, "N _"]]:
    """Outputs of the classifier for all images, in their order.

    Batches all have `batch_size` images, the last one filled up with black, so the network compiles once; memory is
    that of one batch and of the features.

    Args:
      images: uint8 (N, H, W, 3), N >= 1; anything else is an InputError.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise InputError(f"images are {images.dtype} {images.shape}; uint8 (N, H, W, 3) with N >= 1 is wanted")
    batches = []
    with tqdm(total=len(images), desc="features", unit=" image", disable=None, leave=False) as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)
            outputs = classifier.apply(np.concatenate([batch, padding]))
            batches.append({name: np.asarray(value)[: len(batch)] for name, value in outputs.items()})
            bar.update(len(batch))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
