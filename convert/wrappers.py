"""Finds the weights in the dictionaries that training scripts save; EMA weights come first.

An exponential moving average (EMA) of the weights samples better than the weights of the last step, and has many names.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from vq4dit_jax.errors import InputError

_AVERAGES = {"ema", "emamodel", "modelema", "emanet", "netema", "shadow"}
_NO_AVERAGES = {"non", "no", "online"}  # `non_ema`; `online_model` is the raw model inside ema_pytorch's state
# Names of the model in a training checkpoint, the most telling first.
_MODELS = ("model", "state_dict", "model_state_dict", "module", "params", "net", "network", "weights", "transformer")
# First letters of other keys in training checkpoints.
_OTHERS = (
    "opt",
    "sched",
    "lr",
    "scaler",
    "rng",
    "arg",
    "config",
    "cfg",
    "hyper",
    "callback",
    "loop",
    "disc",
    "loss",
    "vae",
)
_MAX_DEPTH = 8  # of dictionaries in dictionaries; more are no training checkpoint
_ARGUMENTS = ("args", "arguments", "hyper_parameters", "hparams", "config", "cfg")


def is_ema(name: str) -> bool:
    """Whether a key or a part of a parameter's name is one of an EMA: `ema`, `model_ema`, `emaModel`, `params_ema1`, ..."""
    words = _words(name)
    return not _AVERAGES.isdisjoint(words) and _NO_AVERAGES.isdisjoint(words)


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def unwrap(
    path: pathlib.Path, loaded: Any, is_tensor: Callable[[Any], bool]
) -> tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]:
    """(names to values, the keys that they lay under, the training script's arguments) of a loaded checkpoint.

    Raises:
      InputError: no dictionary, one that contains itself, EMA weights without names, or several models without an EMA.
    """
    keys: list[str] = []
    seen: set[int] = set()
    arguments: dict[str, Any] = {}
    while True:
        if not isinstance(loaded, Mapping):
            raise InputError(f"{path}: holds a {type(loaded).__name__}; a dictionary from names to tensors is wanted")
        if id(loaded) in seen:
            raise InputError(f"{path}: its dictionary contains itself, under {'.'.join(keys)!r}; no weights to take")
        if len(keys) > _MAX_DEPTH:
            raise InputError(f"{path}: more than {_MAX_DEPTH} dictionaries in one another; no weights to take")
        seen.add(id(loaded))
        arguments = _arguments(loaded) | arguments
        key = _key(path, loaded, is_tensor)
        if key is None:
            return dict(loaded), tuple(keys), arguments
        keys.append(key)
        loaded = loaded[key]


def _arguments(loaded: Mapping) -> dict[str, Any]:
    for key in _ARGUMENTS:
        found = loaded.get(key)
        found = vars(found) if isinstance(found, argparse.Namespace) else found
        if isinstance(found, Mapping):
            return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, str | int | float | None)}
    return {}


def _key(path: pathlib.Path, loaded: Mapping, is_tensor: Callable[[Any], bool]) -> str | None:
    """The key to follow from here; None where these are the weights."""
    inner = {k: v for k, v in loaded.items() if isinstance(k, str) and not _is_beside(k)}
    for key, value in inner.items():
        if is_ema(key) and _nameless(value, is_tensor):
            raise InputError(
                f"{path}: the EMA weights under {key!r} are a list without names; save them as a state dict, or save "
                "the model's own state dict alone: torch.save(model.state_dict(), FILE)"
            )
    models = [k for k, v in inner.items() if isinstance(v, Mapping) and _holds_tensors(v, is_tensor)]
    averages = sorted((k for k in models if is_ema(k)), key=lambda k: k != "ema")
    known = [k for k in _MODELS if k in models]
    if averages or known:
        return (averages + known)[0]
    if any(map(is_tensor, loaded.values())):
        return None
    if len(models) > 1:
        raise InputError(
            f"{path}: holds several models ({', '.join(map(repr, models[:5]))}) and nothing says which is wanted; save "
            "one of them alone: torch.save(model.state_dict(), FILE)"
        )
    # Without any tensor inside, a known key is still followed, so that the error names its content.
    return next(iter(models), next((k for k in _MODELS if isinstance(inner.get(k), Mapping)), None))


def _is_beside(key: str) -> bool:
    return any(word.startswith(_OTHERS) for word in _words(key))


def _holds_tensors(value: Mapping, is_tensor: Callable[[Any], bool]) -> bool:
    """Whether a tensor lies in a dictionary or in one of those in it, down to `_MAX_DEPTH`."""
    level, seen = [value], set()
    for _ in range(_MAX_DEPTH):
        seen.update(map(id, level))
        values = [inner for mapping in level for inner in mapping.values()]
        if any(map(is_tensor, values)):
            return True
        level = list({id(v): v for v in values if isinstance(v, Mapping) and id(v) not in seen}.values())
    return False


def _nameless(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    """Whether tensors lie in a list, as torch_ema keeps its `shadow_params`, and none has a name."""
    if isinstance(value, list | tuple):
        return any(map(is_tensor, value))
    return (
        isinstance(value, Mapping)
        and not _holds_tensors(value, is_tensor)
        and any(isinstance(v, list | tuple) and any(map(is_tensor, v)) for v in value.values())
    )
