"""Models as JSON and back: what a manifest says of the network whose parameters it holds."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT, parameter_shapes
from vq4dit_jax.qarray.tree import dense_shapes, flatten

Model = Any
"""A `DiT`, or a dict of JSON values that describes a network that is not ours; `describe` refuses others."""

_FOREIGN = "foreign"
_CLASSES = {"DiT": DiT}
_NOT_THE_MODELS = {"parent", "name", "remat"}  # remat is no property of the model
_LARGEST_SIZE, _LARGEST_TABLE = 1 << 20, 1 << 26
"""Of one field, and of a model's position table: larger ones are damage."""


def is_ours(model: Any) -> bool:
    """Whether `describe` tells class and fields of it."""
    return isinstance(model, _CLASSES.get(type(model).__name__, ()))


def describe(model: Model) -> dict[str, Any]:
    """The manifest's `model`: class and fields of a network of ours, or the metadata of another. Raises InputError."""
    if is_ours(model):
        values = {name: getattr(model, name) for name in _fields(type(model))}
        return {"class": type(model).__name__, "fields": {**values, "dtype": jnp.dtype(model.dtype).name}}
    if not isinstance(model, Mapping):
        raise InputError(
            f"model is a {type(model).__name__}; wanted a vq4dit_jax.DiT, or for a network of your own a dict that "
            "describes it, such as {'name': ..., 'depth': ...}"
        )
    try:
        return {"class": _FOREIGN, "metadata": json.loads(json.dumps(dict(model), allow_nan=False))}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the dict that describes your network is no JSON ({error}); wanted text, numbers, lists"
        ) from None


def restore(described: Any, source: str = "the manifest") -> Model:
    """What `describe` was given; InputError that names `source` where it is damaged."""
    name = described.get("class") if isinstance(described, Mapping) else None
    if name == _FOREIGN:
        if not isinstance(described.get("metadata"), Mapping):
            raise InputError(f"{source}: the manifest's model has no metadata; the file is damaged")
        return described["metadata"]
    if not isinstance(name, str) or name not in _CLASSES:
        raise InputError(
            f"{source}: the manifest's model is {str(name)[:40]!r}; this vq4dit-jax knows {', '.join(_CLASSES)}; update it"
        )
    fields = described.get("fields")
    if not isinstance(fields, Mapping):
        raise InputError(f"{source}: the manifest's model has no fields; the file is damaged")
    model = _CLASSES[name](**_checked(_CLASSES[name], fields, source))
    try:
        model.network()  # checks what its fields say of the process
    except InputError as error:
        raise InputError(f"{source}: the manifest's {name} is none ({error}); the file is damaged") from None
    return model


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.name not in _NOT_THE_MODELS}


def _checked(cls: type, fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields, of the types and within the bounds that a model can have."""
    known = _fields(cls)
    if unknown := sorted(set(fields) - set(known)):
        raise InputError(
            f"{source}: the manifest's {cls.__name__} has {unknown[0][:40]!r}; this vq4dit-jax does not know it"
        )
    for name, value in fields.items():
        default = known[name].default
        if name == "dtype":
            good, wanted = value in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"
        elif isinstance(default, str):
            good, wanted = isinstance(value, str), "text"
        elif isinstance(default, bool):
            good, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, float):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good, wanted = number and 0 <= value < _LARGEST_SIZE, "a number, not negative"
        else:
            good, wanted = type(value) is int and 0 <= value <= _LARGEST_SIZE, f"a whole number up to {_LARGEST_SIZE}"
        if not good:
            raise InputError(f"{source}: the manifest's {cls.__name__} has {name}={str(value)[:40]}; wanted {wanted}")
    return {**fields, **({"dtype": jnp.dtype(fields["dtype"])} if "dtype" in fields else {})}


def check_fits(model: Model, params: Any, source: str) -> None:
    """InputError where the names and shapes of `params` are not those of `model`; a network that is not ours has none to
    compare with."""
    if not isinstance(model, DiT):
        return
    wanted, found = _shapes(model, source), dense_shapes(params)
    for path in sorted(set(wanted) | set(found)):
        if wanted.get(path) != found.get(path):
            here = f"has shape {found[path]}" if path in found else "is missing"
            there = f"wanted {wanted[path]}" if path in wanted else "its model has no such parameter"
            raise InputError(f"{source}: {path[:80]} {here}; {there}; the file is damaged")


def _shapes(model: DiT, source: str) -> dict[str, tuple[int, ...]]:
    """Of the model's own parameters."""
    sizes = (model.input_size, model.patch_size, model.hidden_size, model.depth, model.num_heads, model.in_channels)
    fits = min(sizes) > 0 and model.input_size % model.patch_size == 0 and model.hidden_size % model.num_heads == 0
    if not fits or (model.input_size // model.patch_size) ** 2 * model.hidden_size > _LARGEST_TABLE:
        raise InputError(
            f"{source}: the manifest has a DiT of input_size={model.input_size}, patch_size={model.patch_size}, "
            f"hidden_size={model.hidden_size}, depth={model.depth}, num_heads={model.num_heads}; there is no such model"
        )
    return {path: tuple(leaf.shape) for path, leaf in flatten(parameter_shapes(model)).items()}
