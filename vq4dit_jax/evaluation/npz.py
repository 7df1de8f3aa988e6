"""`.npz` files from anybody: only the arrays that are wanted, or one array some rows at a time. No pickles are loaded."""

import contextlib
import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vq4dit_jax.errors import InputError

# What zipfile, zlib and numpy raise on files that are damaged, encrypted, or something else.
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
    with _one_line(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as npz:
        return {name: npz[name] for name in (npz.files if names is None else names)}


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
    """The array `name` of a compressed or uncompressed `.npz`; memory is that of the rows that are read at once.

    InputError where it is missing, holds Python objects, is in Fortran's order, or is shorter than its header says.
    """
    with _open_member(path, name) as (file, size):
        shape, dtype = _read_header(path, name, file)
        held = size - file.tell()
        wanted = dtype.itemsize * int(np.prod(shape, dtype=object))
        if held != wanted:
            raise InputError(f"{path}: {name} should hold {wanted} bytes and holds {held}; the file is damaged")

    def rows(n: int, stop: int) -> Iterator[np.ndarray]:
        with _open_member(path, name) as (file, _):
            _read_header(path, name, file)
            row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, stop, n):
                count = min(n, stop - start)
                with _one_line(path):
                    data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise InputError(f"{path}: {name} ends after row {start + len(data) // row_bytes}; it is damaged")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    return StoredArray(shape, dtype, rows)


@contextlib.contextmanager
def _open_member(path: str | os.PathLike, name: str) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """(the file of one array, its size in bytes)."""
    with contextlib.ExitStack() as stack:
        with _one_line(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            if f"{name}.npy" not in archive.namelist():
                held = ", ".join(array_names(path)) or "no arrays"
                raise InputError(f"{path}: no array {name} in it; it holds {held}")
            info = archive.getinfo(f"{name}.npy")
            file = stack.enter_context(archive.open(info))
        yield file, info.file_size


def _read_header(path: str | os.PathLike, name: str, file: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with _one_line(path):
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise InputError(f"{path}: {name} is in version {version} of the .npy format; write it with a plain dtype")
        shape, fortran_order, dtype = readers[version](file)
    if dtype.hasobject:
        raise InputError(f"{path}: {name} holds pickled Python objects, which are never loaded; save a plain array")
    if fortran_order and len(shape) > 1:
        raise InputError(f"{path}: {name} is in Fortran's order; save np.ascontiguousarray of it")
    return shape, dtype
