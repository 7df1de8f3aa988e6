"""Files: written beside and renamed, found in the repository or in the wheel, kept in one cache folder."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from vq4dit_jax.errors import InputError

_PACKAGE = pathlib.Path(__file__).resolve().parent


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path beside `target` to write a file or a folder to; renames it on success, removes it on failure.

    A reader sees the old content or the new, never half of it, also after SIGKILL (what a killed writer
    leaves is named `.<name>.partial` and is removed by the next one).
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)
    except BaseException:
        remove(partial)
        raise


def remove(path: pathlib.Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reserve(path: pathlib.Path, size: int) -> None:
    """Raises the OSError of a full disk now, rather than in the middle of somebody else's writer: `size` bytes are
    allocated at `path` and given back.
    """
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))
    finally:
        remove(path)


def write_text(target: str | os.PathLike, text: str) -> None:
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: str | os.PathLike, value: Any) -> None:
    """Writes strict JSON: a NaN or an infinity is an error here, not at the reader's."""
    write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")


def bytes_on_disk(path: str | os.PathLike) -> int:
    """Sum of the sizes of the files at or under `path`."""
    path = pathlib.Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _bundled(kind: str, name: str) -> pathlib.Path:
    """A file that ships with the project: at the repository's root, or inside the installed wheel."""
    for folder in (_PACKAGE.parent / kind, _PACKAGE / f"_{kind}"):
        if (folder / name).exists():
            return folder / name
    raise InputError(
        f"{kind}/{name} does not ship with this installation of vq4dit-jax; reinstall it from the repository"
    )


def asset(name: str) -> pathlib.Path:
    """Path of a shipped asset (weights, reference statistics)."""
    return _bundled("assets", name)


def resolve(path: str) -> pathlib.Path:
    """`asset:NAME` to the shipped asset of that name; any other path as it is."""
    return asset(path.removeprefix("asset:")) if path.startswith("asset:") else pathlib.Path(path)


def config_file(path: str) -> pathlib.Path:
    """`path` itself where it is a file, else the shipped config of that name (`configs/x.py` or `x.py`)."""
    if os.path.isfile(path):
        return pathlib.Path(path)
    try:
        return _bundled("configs", path.removeprefix("configs/"))
    except InputError:
        raise InputError(f"--config={path}: no such file, here or among the shipped configs") from None


def cache_folder() -> pathlib.Path:
    """Where downloads are kept: $VQ4DIT_CACHE, else $XDG_CACHE_HOME/vq4dit-jax, else ~/.cache/vq4dit-jax."""
    explicit = os.environ.get("VQ4DIT_CACHE")
    if explicit:
        return pathlib.Path(explicit)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "vq4dit-jax"
