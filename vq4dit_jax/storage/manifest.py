"""The manifest of a stored model: what a reader needs beside the arrays, written in one order and read with distrust.

format      "vq4dit-jax"
version     2; version 1 has no "kind" in `quantized`, and means "vq"
model       class and fields, or the metadata of a network that is not ours (`networks.registry`)
quantized   name of a leaf -> {"kind": ..., and the facts of that kind}
mixed       path of a leaf in parts -> how many
extra       any JSON value of the caller
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.registry import Model, describe
from vq4dit_jax.qarray import integer, operand, vq  # noqa: F401  (they register their kinds)
from vq4dit_jax.qarray.base import KINDS

FORMAT, VERSION = files.MODEL_FORMAT, 2
_LARGEST, _MOST_PARTS = 1 << 26, 1 << 16
"""Characters of a manifest, and parts of a leaf."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest whose structure has been checked; what a kind's facts and a model's fields say is checked by those."""

    model: Mapping[str, Any]
    quantized: Mapping[str, Mapping[str, Any]]
    mixed: Mapping[str, int]


def make(model: Model, quantized: dict[str, Any], mixed: dict[str, int], extra: Any) -> dict[str, Any]:
    """The manifest with its keys in order, so that the same model gives the same bytes. Raises InputError for an `extra`
    that is no JSON."""
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "model": describe(model),
        "quantized": quantized,
        "mixed": mixed,
        "extra": extra or {},
    }
    try:
        return json.loads(json.dumps(whole, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"what is to be kept in the manifest is no JSON ({error}); wanted text, numbers, lists"
        ) from None


def parse(text: str, source: str) -> Any:
    """The JSON value of a manifest, for `read`; InputError where it is none."""
    if len(text) > _LARGEST:
        raise InputError(f"{source}: its manifest has {len(text)} characters; wanted at most {_LARGEST}")
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: its manifest is no JSON ({str(error)[:80]}); the file is damaged") from None
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def read(found: Any, source: str) -> Manifest:
    """Checks what `parse` (or orbax) gave. Raises InputError, in one line that names `source`."""
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        says = found.get("format") if isinstance(found, Mapping) else type(found).__name__
        raise InputError(f"{source} is no vq4dit-jax model (its manifest says format={str(says)[:40]!r})")
    version = found.get("version")
    if type(version) is not int or version < 1:
        raise InputError(
            f"{source}: its manifest says version={str(version)[:40]!r}; wanted 1 or {VERSION}; it is damaged"
        )
    if version > VERSION:
        raise InputError(f"{source} has manifest version {version}; this vq4dit-jax reads {VERSION}; update it")
    keys = {"format", "version", "model", "quantized", "mixed", "extra"}
    if set(found) != keys:
        name = min(set(found) ^ keys, key=str)
        raise InputError(
            f"{source}: its manifest {'lacks' if name in keys else 'has an unknown'} {str(name)[:40]!r}; it is damaged"
        )
    for key in ("model", "quantized", "mixed"):
        if not isinstance(found[key], Mapping):
            raise InputError(f"{source}: {key} of its manifest is a {type(found[key]).__name__}; wanted an object")
    quantized = {name: _facts(name, facts, version, source) for name, facts in found["quantized"].items()}
    for path, count in found["mixed"].items():
        if type(count) is not int or not 1 <= count <= _MOST_PARTS:
            raise InputError(
                f"{source}: its manifest gives {path[:80]} {str(count)[:40]!r} parts; wanted 1 to {_MOST_PARTS}"
            )
    return Manifest(found["model"], quantized, found["mixed"])


def _facts(name: str, facts: Any, version: int, source: str) -> dict[str, Any]:
    if not isinstance(facts, Mapping):
        raise InputError(f"{source}: the facts of {name[:80]} are a {type(facts).__name__}; wanted an object")
    kind = "vq" if version == 1 else facts.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"{source}: {name[:80]} is of kind {str(kind)[:40]!r}; known are {', '.join(KINDS)}; import what registers it, or "
            "update vq4dit-jax"
        )
    return {**facts, "kind": kind}
