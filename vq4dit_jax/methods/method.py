"""A method: the models that a run makes one after the other, each by passes over the one before it.

    METHODS["vq4dit"]    full precision -> k-means -> VQ4DiT
    METHODS["rules"]     full precision -> what the rules say, and no calibration

A new method is a function in `METHODS` that returns its models; config, pipeline, metrics, table and report take any number.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import vq4dit
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.methods.passes import Pass

FULL_PRECISION = "fp"
TITLES = {FULL_PRECISION: "full precision", "kmeans": "k-means", "vq4dit": "VQ4DiT", "quantized": "quantized"}
"""Name of a model, in file names and metrics -> what people read."""


class Model(NamedTuple):
    """`name` as in metrics.json and of files; the passes that make it of the model before it."""

    name: str
    passes: tuple[Pass, ...]


def _vq4dit(kmeans: KMeans, settings: Mapping[str, Any]) -> tuple[Model, ...]:
    return Model("kmeans", (kmeans,)), Model("vq4dit", vq4dit.passes(settings))


def _rules(kmeans: KMeans, settings: Mapping[str, Any]) -> tuple[Model, ...]:
    return (Model("quantized", (kmeans,)),)


METHODS: dict[str, Callable[[KMeans, Mapping[str, Any]], tuple[Model, ...]]] = {"vq4dit": _vq4dit, "rules": _rules}


def models(method: str, kmeans: KMeans, settings: Mapping[str, Any]) -> tuple[Model, ...]:
    """The models of a run in the order in which they are made, full precision left out.

    Args:
      method: a key of METHODS.
      kmeans: the first pass, with the rules.
      settings: of the passes after it, see `vq4dit.passes`.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    return METHODS[method](kmeans, settings)
