"""Sets of images that are read some at a time: an `.npz` of uint8 images, a folder, or an array."""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from vq4dit_jax import npz
from vq4dit_jax.errors import InputError

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WebP", ".bmp": "BMP"}
# The name that numpy gives to the first unnamed array; ADM's files and those made like them have their images there.
ARRAY = "arr_0"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size, in a fixed order.

    Attributes:
      shape: (N, H, W, 3), N >= 1.
      batches: batches(n) yields them in their order as uint8 (n, H, W, 3), the last batch with fewer than n. An image that
        cannot be read raises an InputError then.
      description: for people: "10,000 test images (JPEG)".
      path: the file or folder; None for an array.
    """

    shape: tuple[int, int, int, int]
    batches: Callable[[int], Iterator[np.ndarray]]
    description: str
    path: pathlib.Path | None = None

    def __len__(self) -> int:
        return self.shape[0]


def open_images(source: str | os.PathLike | np.ndarray, limit: int | None = None) -> ImageSet:
    """Images in an `.npz` (uint8 NHWC `arr_0`), in a folder and all below it, or an array; not read before they are used.

    Those of a folder are sorted by path. InputError where the source is missing, empty, of another type or shape, or
    has fewer than `limit` images; the first `limit` are taken.
    """
    if isinstance(source, np.ndarray):
        found = _from_array(source)
    elif os.path.isdir(source):
        found = _from_folder(pathlib.Path(source))
    else:
        found = _from_npz(pathlib.Path(source))
    if limit is None:
        return found
    if not 1 <= limit <= len(found):
        raise InputError(f"{source}: {limit} images were asked for, and it has {len(found)}")
    return dataclasses.replace(
        found, shape=(limit, *found.shape[1:]), batches=lambda n: _first(found.batches(n), limit)
    )


def image_batches(source: str | os.PathLike | np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The images of `open_images(source)`, `batch_size` at a time."""
    return open_images(source).batches(batch_size)


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 (hexadecimal) of a file, as `sha256sum` prints it; of a folder's images, that of the lines that
    `sha256sum` prints for their sorted paths inside it.
    """
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for image in find_images(path):
        digest.update(f"{checksum(image)}  {image.relative_to(path).as_posix()}\n".encode())
    return digest.hexdigest()


def find_images(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Image files (JPEG, PNG, WebP, BMP) in a folder and all below it, sorted by path. InputError if there are none."""
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in FORMATS)
    if not paths:
        raise InputError(f"{folder}: no images in it; files named {', '.join(sorted(FORMATS))} are read")
    return paths


def _first(batches: Iterator[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    for batch in batches:
        yield batch[:limit]
        limit -= len(batch)
        if limit <= 0:
            return


def _from_array(images: np.ndarray) -> ImageSet:
    _check("images", images.shape, images.dtype)
    return ImageSet(
        images.shape,
        lambda n: (images[start : start + n] for start in range(0, len(images), n)),
        f"{len(images):,} images",
    )


def _from_npz(path: pathlib.Path) -> ImageSet:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder of images")
    stored = npz.stored_array(path, ARRAY)
    _check(f"{path}: {ARRAY}", stored.shape, stored.dtype)
    return ImageSet(
        stored.shape,
        lambda n: stored.rows(n, stored.shape[0]),
        f"{stored.shape[0]:,} images of {path.name}",
        path,
    )


def _check(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) == 4 and shape[-1] == 3 and dtype == np.uint8 and all(shape):
        return
    raise InputError(
        f"{name} is {dtype} {shape}; uint8 (N, H, W, 3) with N >= 1 is wanted, red, green and blue from 0 to 255"
    )


def _from_folder(folder: pathlib.Path) -> ImageSet:
    paths = find_images(folder)
    formats = "/".join(sorted({FORMATS[path.suffix.lower()] for path in paths}))
    first = _read(paths[0])

    def read(path: pathlib.Path) -> np.ndarray:
        image = _read(path)
        if image.shape != first.shape:
            raise InputError(f"{path}: {_size(image)} pixels, but {paths[0]} has {_size(first)}; resize them alike")
        return image

    def batches(n: int) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            for start in range(0, len(paths), n):
                yield np.stack(list(threads.map(read, paths[start : start + n])))

    description = f"{len(paths):,} {folder.resolve().name} images ({formats})"
    return ImageSet((len(paths), *first.shape), batches, description, folder)


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not readable as an image: {error}") from None


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
