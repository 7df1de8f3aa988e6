"""Labelled images for training: read once from a folder or a tar file, kept as arrays."""

import dataclasses
import hashlib
import io
import json
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.progress import progress

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_TRAIN = "train"
"""Where there are folders of this name beside others, these alone are read."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with the number of their class.

    Attributes:
      images: uint8 (N, S, S, 3), sorted by path; mapped from the disk.
      labels: int32 (N,), indices into `classes`.
      classes: names of the class folders, sorted.
      sha256: of images and labels, hexadecimal.
    """

    images: UInt8[np.ndarray, "N S S 3"]
    labels: Int32[np.ndarray, " N"]
    classes: tuple[str, ...]
    sha256: str


def open_dataset(source: pathlib.Path, cache: pathlib.Path) -> Dataset:
    """The images of `source`, through the arrays in the folder `cache`, which are made where they are of another source.

    Args:
      source: a folder of class folders of images, or one with train/CLASS in it, or a tar file (plain, gz, bz2, xz) of either.
    """
    if not source.exists():
        raise InputError(f"--data={source}: no such file or folder of images")
    facts = {"source": str(source.resolve()), "bytes": source.stat().st_size if source.is_file() else None}
    if not _is_cache_of(cache, facts):
        images, labels, classes = _read(source)
        digest = hashlib.sha256(images.data)
        digest.update(labels.data)
        if (cache / "data.json").exists():  # arrays of another source
            files.remove(cache)
        with files.atomic_path(cache, "folder") as partial:
            partial.mkdir()
            np.save(partial / "images.npy", images)
            np.save(partial / "labels.npy", labels)
            files.write_json(partial / "data.json", {**facts, "classes": classes, "sha256": digest.hexdigest()})
    about = json.loads((cache / "data.json").read_text(encoding="utf-8"))
    load = lambda name: np.load(cache / name, mmap_mode="r", allow_pickle=False)
    return Dataset(load("images.npy"), load("labels.npy"), tuple(about["classes"]), about["sha256"])


def _is_cache_of(cache: pathlib.Path, facts: dict) -> bool:
    file = cache / "data.json"
    return file.exists() and facts.items() <= json.loads(file.read_text(encoding="utf-8")).items()


def _read(source: pathlib.Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(images, labels, classes) of a folder or a tar file, sorted by path."""
    found: dict[tuple[str, ...], np.ndarray] = {}
    members = _folder(source) if source.is_dir() else _tar(source)
    for path, data in progress(members, "read images", "image"):
        try:
            with Image.open(io.BytesIO(data)) as image:
                found[path] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"--data={source}: {'/'.join(path)} is not readable as an image: {error}") from None
    if any(_TRAIN in path[:-2] for path in found):
        found = {path: image for path, image in found.items() if _TRAIN in path[:-2]}
    if not found:
        raise InputError(
            f"--data={source}: no images in folders of classes; CLASS/x.jpg or train/CLASS/x.jpg are wanted"
        )
    paths = sorted(found)
    classes = sorted({path[-2] for path in paths})
    size = found[paths[0]].shape
    if size[0] != size[1]:
        raise InputError(
            f"--data={source}: {'/'.join(paths[0])} has {size[1]}x{size[0]} pixels; square images are wanted"
        )
    for path in paths:
        if found[path].shape != size:
            shape = found[path].shape
            raise InputError(
                f"--data={source}: {'/'.join(path)} has {shape[1]}x{shape[0]} pixels, but {'/'.join(paths[0])} has "
                f"{size[1]}x{size[0]}; resize them alike"
            )
    images = np.stack([found[path] for path in paths])
    return images, np.asarray([classes.index(path[-2]) for path in paths], np.int32), classes


def _wanted(path: pathlib.PurePath) -> bool:
    return path.suffix.lower() in _SUFFIXES and len(path.parts) >= 2


def _folder(folder: pathlib.Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if _wanted(path):
            yield path.parts, file.read_bytes()


def _tar(file: pathlib.Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Members of a tar file in their order; nothing is unpacked to the disk."""
    try:
        with tarfile.open(file, "r:*") as archive:
            for member in archive:
                path = pathlib.PurePosixPath(member.name)
                if member.isfile() and _wanted(path):
                    yield path.parts, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"--data={file}: neither a folder nor a whole tar file: {error}") from None
