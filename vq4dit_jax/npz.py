"""`.npz` files: read from anybody, only the arrays that are wanted or one array some rows at a time, and written in parts.

No pickles are loaded. A header alone allocates nothing: a member has to be as long as its header says, and may inflate in memory
to at most `_MAX_INFLATED` times its size in the file.
"""

import contextlib
import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped

from vq4dit_jax import files
from vq4dit_jax.errors import InputError

# Exceptions of zipfile, zlib and numpy for files that are damaged, encrypted, or of another kind.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


_SMALL, _MAX_INFLATED = 1 << 26, 64
"""Bytes that are always allowed, and the most that a larger member may inflate. Deflate reaches 1000 (zeros); real arrays, 10."""


@contextlib.contextmanager
def _one_line(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except _UNREADABLE as error:
        raise InputError(f"{path}: not readable as .npz: {error or type(error).__name__}") from None


def array_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays in the file. InputError where it is missing or no `.npz`."""
    with _one_line(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_arrays(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names, or all. InputError where one is missing or the file is damaged."""
    return {name: _read(path, name) for name in (array_names(path) if names is None else names)}


def _read(path: str | os.PathLike, name: str) -> np.ndarray:
    with _open_member(path, name) as (file, info):
        shape, fortran_order, dtype = _checked_header(path, name, file, info)
        wanted = _size(shape, dtype)
        _check_inflation(path, name, wanted, info)
        with _one_line(path):
            data = file.read(wanted)
    if len(data) < wanted:
        raise InputError(f"{path}: {name} should hold {wanted} bytes and holds {len(data)}; the file is damaged")
    with _one_line(path):
        return np.ndarray(shape, dtype, data, order="F" if fortran_order else "C")


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=object))


def _check_inflation(path: str | os.PathLike, name: str, wanted: int, info: zipfile.ZipInfo) -> None:
    """Refuses `wanted` bytes at once of a member that is far smaller in the file."""
    held = min(info.compress_size, os.path.getsize(path))
    if wanted > _SMALL and wanted > _MAX_INFLATED * held:
        raise InputError(
            f"{path}: {name} would take {wanted} bytes of memory and is {held} in the file; it is no "
            "measurement, or it is damaged; save it uncompressed (np.savez) if you trust it"
        )


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file that has not been read.

    Attributes:
      shape, dtype: from its header.
      rows: rows(n, stop) yields the array up to row `stop`, n rows at a time (the last time fewer).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], Iterator[np.ndarray]]


def stored_array(path: str | os.PathLike, name: str) -> StoredArray:
    """The array `name` of a compressed or uncompressed `.npz`; memory: the rows that are read at once.

    InputError where it is missing, holds Python objects, is in Fortran's order, or is shorter than its header says.
    """
    with _open_member(path, name) as (file, info):
        shape, fortran_order, dtype = _checked_header(path, name, file, info)
    if fortran_order and len(shape) > 1:
        raise InputError(f"{path}: {name} is in Fortran's order; save np.ascontiguousarray of it")
    row_bytes = _size(shape[1:], dtype)
    _check_inflation(path, f"a row of {name}", row_bytes, info)

    def rows(n: int, stop: int) -> Iterator[np.ndarray]:
        with _open_member(path, name) as (file, _):
            _read_header(path, name, file)
            for start in range(0, stop, n):
                count = min(n, stop - start)
                with _one_line(path):
                    data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise InputError(f"{path}: {name} ends after row {start + len(data) // row_bytes}; it is damaged")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    return StoredArray(shape, dtype, rows)


@contextlib.contextmanager
def _open_member(path: str | os.PathLike, name: str) -> Iterator[tuple[io.BufferedIOBase, zipfile.ZipInfo]]:
    """(the file of one array, its entry in the archive)."""
    with contextlib.ExitStack() as stack:
        with _one_line(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            if f"{name}.npy" not in archive.namelist():
                held = ", ".join(array_names(path)) or "no arrays"
                raise InputError(f"{path}: no array {name} in it; it holds {held}")
            info = archive.getinfo(f"{name}.npy")
            file = stack.enter_context(archive.open(info))
        yield file, info


def _read_header(path: str | os.PathLike, name: str, file: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether it is in Fortran's order, dtype)."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with _one_line(path):
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise InputError(f"{path}: {name} is in version {version} of the .npy format; write it with a plain dtype")
        shape, fortran_order, dtype = readers[version](file)
    if dtype.hasobject:
        raise InputError(f"{path}: {name} holds pickled Python objects, which are never loaded; save a plain array")
    if not all(0 <= length < 1 << 63 for length in shape):
        raise InputError(f"{path}: {name} has the shape {shape}, which no array has; the file is damaged")
    return shape, fortran_order, dtype


def _checked_header(
    path: str | os.PathLike, name: str, file: io.BufferedIOBase, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """`_read_header` of a member that is as long as its header says."""
    shape, fortran_order, dtype = _read_header(path, name, file)
    held, wanted = info.file_size - file.tell(), _size(shape, dtype)
    if held != wanted:
        raise InputError(f"{path}: {name} should hold {wanted} bytes and holds {held}; the file is damaged")
    return shape, fortran_order, dtype


def read_head(path: str | os.PathLike, count: int, name: str = "arr_0") -> Shaped[np.ndarray, "N ..."]:
    """The first `count` rows of an array, or all where it has fewer, without reading the rest."""
    stored = stored_array(path, name)
    if not stored.shape:
        raise InputError(f"{path}: {name} is a single number; wanted an array with rows")
    count = min(count, stored.shape[0])
    with _one_line(path):
        return next(stored.rows(max(1, count), count), np.empty((0, *stored.shape[1:]), stored.dtype))


def write_npz(target: str | os.PathLike, shape: tuple[int, ...], dtype: Any, parts: Iterable[np.ndarray]) -> None:
    """Writes `arr_0` of this shape from its parts along the first axis, one at a time, as `np.savez` would in one go.

    The same array gives the same bytes however it was cut. A file of 10 GB takes the memory of a part.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with files.atomic_path(target) as partial:
        files.reserve(partial, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        entry.external_attr = 0o644 << 16
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                written = 0
                for part in parts:
                    if part.shape[1:] != shape[1:] or part.dtype != dtype:
                        raise InputError(
                            f"{target}: a part is {part.dtype}{part.shape}; wanted {np.dtype(dtype)}(..., {shape[1:]})"
                        )
                    member.write(part.tobytes())
                    written += len(part)
        if written != shape[0]:
            raise InputError(f"{target}: its parts hold {written} rows; wanted {shape[0]}")
