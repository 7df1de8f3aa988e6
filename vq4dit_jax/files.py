"""Files: written beside and renamed, locked, found in the repository or in the wheel, kept in one cache folder."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

from absl import logging

from vq4dit_jax.errors import InputError

MODEL_FORMAT, STATE_FORMAT = "vq4dit-jax", "vq4dit-jax state"
"""Mark what we wrote: `format` in the metadata of an orbax folder."""
_PACKAGE = pathlib.Path(__file__).resolve().parent
_MAX_JSON_BYTES = 1 << 28
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES}
Kind = Literal["file", "folder"]


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike, kind: Kind = "file") -> Iterator[pathlib.Path]:
    """Yields a path beside `target` to write a file or a folder to; renames it on success, removes it on failure.

    A reader sees the old content or the new, never half of it, also after SIGKILL or a power failure: the data are
    on the disk before the rename. The rest of a killed writer is named `.<name>.partial`; the next writer removes
    it. A folder cannot be renamed over another: the old one is first renamed to `.<name>.replaced`, and `recover`
    renames it back where the new one did not take its place. A symbolic link stays, and its target is written.

    Raises:
      InputError: `target` is something that may not be replaced, see `check_target`.
    """
    check_target(target, kind)
    target = pathlib.Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)
    try:
        yield partial
        _sync_tree(partial)
        if kind == "folder":
            _swap(partial, target)
        else:
            os.replace(partial, target)
            _sync(target.parent)
    except BaseException:
        remove(partial)
        recover(target)
        raise


def check_target(target: str | os.PathLike, kind: Kind) -> None:
    """Raises the InputError that `atomic_path` would raise; to be called before hours of work as well.

    A file may replace a regular file. A folder may replace an empty folder or a checkpoint of ours (`is_checkpoint`).
    """
    path = pathlib.Path(target)
    if kind == "file":
        if path.is_dir():
            raise InputError(f"{target} is a folder; name the file to write")
        if path.exists() and not path.is_file():
            raise InputError(f"{target} is no regular file; name another file to write")
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"{target} is a file; name the folder to write")
    if path.is_dir() and not is_checkpoint(path) and (held := sorted(os.listdir(path))):
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise InputError(
            f"{target} holds files that are no checkpoint of ours ({shown}); name a new or an empty folder"
        )


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a folder is an orbax checkpoint that this package wrote, with nothing else in it."""
    try:
        described = read_json(folder / "_CHECKPOINT_METADATA")
        metadata, items = described["custom_metadata"], set(described["item_handlers"])
        # 0.1.0 marked the states of a calibration by these two keys alone.
        ours = metadata.get("format") in (MODEL_FORMAT, STATE_FORMAT) or set(metadata) == {"step", "recipe"}
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False
    return ours and set(os.listdir(folder)) <= items | {
        "_CHECKPOINT_METADATA",
        "orbax.checkpoint",
        "commit_success.txt",
    }


def recover(target: str | os.PathLike) -> None:
    """Finishes or undoes the replacement of a folder whose writer was killed. Readers of such folders call it first."""
    target = pathlib.Path(os.path.realpath(target))
    old = _aside(target)
    if not os.path.lexists(old):
        return
    if os.path.lexists(target):
        remove(old)
    else:
        with contextlib.suppress(OSError):  # another process was faster, or the file system is read-only
            os.rename(old, target)


def _aside(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.replaced")


def _swap(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a new folder in the place of the old one, if there is one."""
    while True:
        if target.is_dir():
            os.rename(target, _aside(target))
        try:
            os.rename(partial, target)
            break
        except OSError as error:
            # A reader came between the two renames and has put the old folder back.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _sync(target.parent)
    remove(_aside(target))


def _sync_tree(path: pathlib.Path) -> None:
    """Writes a file, or a folder with all that is in it, through to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(pathlib.Path(folder, name))
        _sync(pathlib.Path(folder))
    if not path.is_dir():
        _sync(path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:  # some file systems cannot; a failed write is no such case
            raise


def remove(path: pathlib.Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reserve(path: pathlib.Path, size: int) -> None:
    """Raises the OSError of a full disk now, rather than in the middle of a library's writer: `size` bytes are
    allocated at `path` and given back. Where the system cannot allocate (macOS), the free space is compared.
    """
    try:
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if shutil.disk_usage(path.parent).free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
    finally:
        remove(path)


@contextlib.contextmanager
def exclusive(lock: str | os.PathLike, busy: str | None = None) -> Iterator[None]:
    """Holds a lock file while the body runs. Where another process holds it: InputError(`busy`), or, without one, waits.

    On a file system without locks (Lustre, some NFS) a warning is logged, and the body runs unlocked.
    """
    with open(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logging.warning(
                "%s: this file system has no locks (%s); start no second run of the same folder", lock, error
            )
        yield


def write_text(target: str | os.PathLike, text: str) -> None:
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: str | os.PathLike, value: Any) -> None:
    """Writes strict JSON: a NaN or an infinity is an error here, not in the reader."""
    write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(file: str | os.PathLike, kind: type = dict) -> Any:
    """Reads strict JSON whose outermost value is a `kind`. InputError, naming the file, for anything else."""
    path = pathlib.Path(file)
    if not path.exists():
        raise InputError(f"{file}: no such file")
    if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(
            f"{file} is no JSON file of ours; wanted a regular file of at most {_MAX_JSON_BYTES >> 20} MiB"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no readable JSON ({error}); it is damaged, or of another program") from None
    if not isinstance(value, kind):
        raise InputError(f"{file} holds a JSON {type(value).__name__}; wanted a {kind.__name__}; it is damaged")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


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
    """`asset:NAME` to the shipped asset of that name; any other path as it is, `~` expanded."""
    return asset(path.removeprefix("asset:")) if path.startswith("asset:") else pathlib.Path(path).expanduser()


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
