"""Reads `.safetensors` files without torch."""

import json
import pathlib

import ml_dtypes
import numpy as np

from convert.checkpoint import Checkpoint
from convert.comfy_quant import companions
from vq4dit_jax.errors import InputError

_FLOATS = {"F16", "BF16", "F32", "F64"}
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}  # numpy has neither


def open_safetensors(path: pathlib.Path) -> Checkpoint:
    """Opens a file of weights in 8 to 64 bits. Scalars beside arrays are counters of a trainer and are left out.

    Of quantized weights (`convert.comfy_quant`) all tensors are there, of whatever type.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    quantized = companions(shapes)
    if any(shapes.values()):
        shapes = {name: shape for name, shape in shapes.items() if shape or name in quantized}
    for name in shapes:
        dtype = slices[name].get_dtype()
        if dtype not in _FLOATS and dtype not in _FLOAT8 and name not in quantized:
            raise InputError(
                f"{path}: {name} is of type {dtype}; floating-point weights are wanted, or int8 ones with a comfy_quant each"
            )

    def read(name: str) -> np.ndarray:
        dtype = _FLOAT8.get(slices[name].get_dtype())
        return file.get_tensor(name) if dtype is None else _read_bytes(path, name, shapes[name], dtype)

    return Checkpoint(path, shapes, read, metadata=file.metadata() or {})


def _read_bytes(path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of one-byte numbers; the library has checked the header and its offsets."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(length))[name]["data_offsets"]
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, np.uint8, "r", 8 + length + begin, shape).view(dtype)
