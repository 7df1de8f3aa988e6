"""Int8 weights with ComfyUI's marks (`convert.convrot`) in a checkpoint: found, checked, and read one by one."""

import dataclasses
import json
from collections.abc import Collection, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import Checkpoint
from convert.convrot import FORMAT, GROUPS, MARK, SCALE, Facts, decode
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.operand import OperandArray

_MAX_JSON = 4096  # bytes; what ComfyUI writes has 72
_DEFAULT_GROUP = 256
_UNUSED = (
    "input_scale"  # some writers leave it; every token has a scale of its own, so readers of the format pass it over
)
_SCALES = (np.float32, np.float16, ml_dtypes.bfloat16)


def companions(names: Iterable[str]) -> set[str]:
    """Of a file's names those that make up quantized weights: they may be other than floating."""
    names = list(names)
    layers = {name.removesuffix(MARK) for name in names if name.endswith(f".{MARK}")}
    parts = (name.rpartition(".") for name in names)
    return {f"{a}.{b}" for a, _, b in parts if f"{a}." in layers and (b == MARK or b.startswith("weight"))}


def split(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with one name for each quantized weight, which is in `packed` and which `read` decodes to float32.

    Raises:
      InputError: another format, JSON that is none, a scale that is missing, or shapes and groups that do not fit.
    """
    layers = [name.removesuffix(f".{MARK}") for name in checkpoint.shapes if name.endswith(f".{MARK}")]
    packed = {}
    for layer in layers:
        facts = _facts(checkpoint, layer)
        packed[f"{layer}.weight"] = lambda layer=layer, facts=facts: _read(checkpoint, layer, facts)
    own = {f"{layer}.{part}" for layer in layers for part in (MARK, SCALE, _UNUSED)}
    return dataclasses.replace(
        checkpoint,
        shapes={name: shape for name, shape in checkpoint.shapes.items() if name not in own},
        read=lambda name: np.asarray(packed[name]().decode()) if name in packed else checkpoint.read(name),
        packed=packed,
    )


def keep(checkpoint: Checkpoint, names: Collection[str]) -> tuple[Checkpoint, list[str]]:
    """The checkpoint whose quantized weights are those of `names` alone; others are read as dense ones, which a line says."""
    decoded = sorted(checkpoint.packed.keys() & checkpoint.shapes.keys() - set(names))
    packed = {name: read for name, read in checkpoint.packed.items() if name in names}
    more = ", ..." if len(decoded) > 2 else ""
    said = f"decoding int8 weights that are not kept packed here: {', '.join(decoded[:2])}{more}"
    return dataclasses.replace(checkpoint, packed=packed), [said] if decoded else []


def _facts(checkpoint: Checkpoint, layer: str) -> Facts:
    """Checks all that names, shapes and the JSON of a Linear tell."""
    at, found = f"{checkpoint.path}: {layer}", _json(checkpoint, f"{layer}.{MARK}")
    kind = found.get("format")
    if kind != FORMAT:
        raise InputError(
            f"{at} has the format {kind!r:.40}; only {FORMAT} (int8, with or without ConvRot) is read; take the model's int8 or "
            "full-precision file"
        )
    shape, scale = (checkpoint.shapes.get(f"{layer}.{part}") for part in ("weight", SCALE))
    for part, there in (("weight", shape), (SCALE, scale)):
        if there is None:
            raise InputError(f"{at} has a {MARK} and no {part}; the file is not whole, download or make it again")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{at}.weight has shape {shape}; an int8 matrix (outputs, inputs) is wanted; convert it again")
    rows, columns = shape
    if scale not in ((rows, 1), (rows,), (1,), ()):
        raise InputError(
            f"{at}.{SCALE} has shape {scale}; ({rows}, 1), one for each output, is wanted; convert it again"
        )
    convrot, rounds = _flag(at, found, "convrot"), not _flag(at, found, "full_precision_matrix_mult")
    if not convrot:
        return Facts(0, rounds)
    group = _entry(found, "convrot_groupsize", _DEFAULT_GROUP)
    if type(group) is not int or group not in GROUPS or columns % group:
        raise InputError(
            f"{at}.{MARK} has convrot_groupsize={group!r:.40} for {columns} inputs; a power of 4 up to {GROUPS[0]} that "
            "divides them is wanted; convert it again"
        )
    return Facts(group, rounds)


def _json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    (*_, length), at = (0, *checkpoint.shapes[name]), f"{checkpoint.path}: {name}"
    if len(checkpoint.shapes[name]) != 1 or not 0 < length <= _MAX_JSON:
        raise InputError(f"{at} has shape {checkpoint.shapes[name]}; 1 to {_MAX_JSON} bytes of JSON are wanted")
    stored = checkpoint.read(name)
    if stored.dtype != np.uint8:
        raise InputError(f"{at} is of type {stored.dtype}; bytes of JSON (U8) are wanted; convert it again")
    try:
        found = json.loads(stored.tobytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{at} is no JSON ({str(error)[:80]}); the file is damaged, download or make it again"
        ) from None
    if not isinstance(found, dict):
        raise InputError(
            f"{at} holds a JSON {type(found).__name__}; an object with a format is wanted; convert it again"
        )
    return found


def _entry(found: dict[str, Any], key: str, default: Any) -> Any:
    """An entry of the JSON; some writers put them one level down, under `params`."""
    inner = found.get("params")
    return found.get(key, inner.get(key, default) if isinstance(inner, dict) else default)


def _flag(at: str, found: dict[str, Any], key: str) -> bool:
    value = _entry(found, key, False)
    if not isinstance(value, bool):
        raise InputError(f"{at}.{MARK} has {key}={value!r:.40}; true or false is wanted; convert it again")
    return value


def _read(checkpoint: Checkpoint, layer: str, facts: Facts) -> OperandArray:
    codes, scale = (checkpoint.read(f"{layer}.{part}") for part in ("weight", SCALE))
    at = f"{checkpoint.path}: {layer}"
    if codes.dtype != np.int8:
        raise InputError(f"{at}.weight is of type {codes.dtype}; {FORMAT} has int8 codes (I8); convert it again")
    if scale.dtype not in _SCALES:
        raise InputError(f"{at}.{SCALE} is of type {scale.dtype}; float32 (F32) is wanted; convert it again")
    rows = np.broadcast_to(scale.astype(np.float32).reshape(-1, 1), (len(codes), 1))
    return decode(codes, np.ascontiguousarray(rows), facts, f"{at}.weight")
