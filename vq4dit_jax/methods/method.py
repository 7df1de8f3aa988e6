"""A method: the models that a run makes one after the other, each by passes over the one before it.

    METHODS["vq4dit"]    full precision -> k-means -> VQ4DiT
    METHODS["viditq"]    full precision -> rounded to nearest -> ViDiT-Q, named by its bits: "w4a8"
    METHODS["rules"]     full precision -> what the rules say, and no calibration

A new method is a function in `METHODS` that returns its models; config, pipeline, metrics, table and report take any number.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import viditq, vq4dit
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.methods.passes import Pass
from vq4dit_jax.networks.network import Network

FULL_PRECISION = "fp"
_TITLES = {
    FULL_PRECISION: "full precision",
    "kmeans": "k-means",
    "rtn": "rounded to nearest",
    "vq4dit": "VQ4DiT",
    "quantized": "quantized",
}


def title(name: str) -> str:
    """Name of a model, in file names and metrics -> what people read."""
    bits = re.fullmatch(r"(w[\d.]+a[\d.]+)(-mp)?", name)
    if bits:
        return f"ViDiT-Q {bits[1].upper()}{', mixed' if bits[2] else ''}"
    return _TITLES.get(name, name)


class Model(NamedTuple):
    """`name` as in metrics.json and of files; the passes that make it of the model before it.

    source: (network, full-precision parameters) -> parameters of the same function that are quantized in their place.
    """

    name: str
    passes: tuple[Pass, ...]
    source: Callable[[Network, Any], Any] = lambda network, teacher: teacher


class Recipe(NamedTuple):
    """What a config says.

    Attributes:
      first: the first pass, with the rules.
      calibration: settings of `vq4dit.passes`.
      viditq: settings of `viditq.passes`.
    """

    first: KMeans
    calibration: Mapping[str, Any]
    viditq: Mapping[str, Any]


def _vq4dit(recipe: Recipe) -> tuple[Model, ...]:
    return Model("kmeans", (recipe.first,)), Model("vq4dit", vq4dit.passes(recipe.calibration))


def _viditq(recipe: Recipe) -> tuple[Model, ...]:
    first = "kmeans" if recipe.viditq["weights"] == "codebooks" else "rtn"
    passes = viditq.passes(recipe.viditq, recipe.calibration)
    source = functools.partial(viditq.source, recipe.viditq)
    return Model(first, (recipe.first,), source), Model(viditq.name(recipe.viditq), passes, source)


def _rules(recipe: Recipe) -> tuple[Model, ...]:
    return (Model("quantized", (recipe.first,)),)


METHODS: dict[str, Callable[[Recipe], tuple[Model, ...]]] = {"vq4dit": _vq4dit, "viditq": _viditq, "rules": _rules}


def models(method: str, recipe: Recipe) -> tuple[Model, ...]:
    """The models of a run in the order in which they are made, full precision left out. `method`: a key of METHODS."""
    if method not in METHODS:
        raise InputError(f"--config.quantize.method={method}: wanted one of {', '.join(METHODS)}")
    return METHODS[method](recipe)
