"""The official DiT-XL/2 checkpoints and the VAEs that go with them: found in the cache folder, or downloaded there,
resumably and checked.

Most of them have no published checksum, so a checksum is trusted on first use: a download is complete when it has the
length that the server announced and opens as a file of its kind; its SHA-256 is then printed and stored beside it in
`<name>.sha256`, and every later use compares. That catches a file that changes, not one that was wrong from the start.
So a file without a known checksum comes over https, redirects included, or from this machine.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from absl import logging
from tqdm import tqdm

from convert.readers import open_checkpoint
from convert.safetensors_files import open_safetensors
from convert.torch_files import require_torch
from vq4dit_jax import files
from vq4dit_jax.errors import InputError

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models"
# SHA-256 of each file, None where it is not known and the first use decides.
OFFICIAL_CHECKPOINTS: dict[str, str | None] = {"DiT-XL-2-256x256.pt": None, "DiT-XL-2-512x512.pt": None}
HUB_URL = "https://huggingface.co"
# Repository and commit of each VAE, and its files with their SHA-256. The one that is known is in many public records.
OFFICIAL_VAES: dict[str, tuple[str, dict[str, str | None]]] = {
    "sd-vae-ft-ema": (
        "stabilityai/sd-vae-ft-ema/resolve/f04b2c4b98319346dad8c65879f680b1997b204a",
        {"config.json": None, "diffusion_pytorch_model.safetensors": None},
    ),
    "sd-vae-ft-mse": (
        "stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493",
        {
            "config.json": None,
            "diffusion_pytorch_model.safetensors": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        },
    ),
}
# Feature network and reference statistics: address, file name, SHA-256. The network's stands in many public records.
OFFICIAL_EVALUATION: dict[str, tuple[str, str, str | None]] = {
    "inception-2015-12-05": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "imagenet256": (
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256",
        "VIRTUAL_imagenet256_labeled.npz",
        None,
    ),
    "imagenet512": (
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/512",
        "VIRTUAL_imagenet512.npz",
        None,
    ),
}
_CHUNK = 1 << 20  # bytes
_TIMEOUT = 60  # seconds without a byte
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
_ATTEMPTS = 5  # in a row without a new byte
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def official_checkpoint(
    name: str,
    folder: str | os.PathLike | None = None,
    *,
    base_url: str = BASE_URL,
    pause: float = 1.0,
) -> pathlib.Path:
    """Path of an official checkpoint, downloaded if it is not in `folder` yet.

    Args:
      name: a key of `OFFICIAL_CHECKPOINTS`.
      folder: where to look and to download to; by default `vq4dit_jax.files.cache_folder()`.
      base_url: of a mirror with files of the same names.
      pause: seconds before the second attempt after a broken connection; doubled for each further one.

    Raises:
      InputError: no network, a broken or changed file, no room on the disk; says what to do.
      MissingExtraError: torch is not installed; said before anything is downloaded.
    """
    if name not in OFFICIAL_CHECKPOINTS:
        raise InputError(f"no official checkpoint {name!r}; there are {', '.join(OFFICIAL_CHECKPOINTS)}")
    require_torch()
    folder = files.cache_folder() if folder is None else pathlib.Path(folder).expanduser()
    return _fetch(f"{base_url}/{name}", folder / name, OFFICIAL_CHECKPOINTS[name], open_checkpoint, pause)


def official_vae(
    name: str,
    folder: str | os.PathLike | None = None,
    *,
    base_url: str = HUB_URL,
    pause: float = 1.0,
) -> pathlib.Path:
    """Folder of an official VAE in diffusers' layout, `folder`/`name`; missing files are downloaded.

    Arguments and errors are `official_checkpoint`'s, with `name` a key of `OFFICIAL_VAES`; torch is not needed.
    """
    if name not in OFFICIAL_VAES:
        raise InputError(f"no official VAE {name!r}; there are {', '.join(OFFICIAL_VAES)}")
    folder = (files.cache_folder() if folder is None else pathlib.Path(folder).expanduser()) / name
    commit, checksums = OFFICIAL_VAES[name]
    for file, checksum in checksums.items():
        opens = _open_json if file.endswith(".json") else open_safetensors
        _fetch(f"{base_url}/{commit}/{file}", folder / file, checksum, opens, pause)
    return folder


def official_evaluation(
    name: str,
    folder: str | os.PathLike | None = None,
    *,
    base_url: str | None = None,
    pause: float = 1.0,
) -> pathlib.Path:
    """Path of the FID network's weights (`inception-2015-12-05`, 96 MB) or of ADM's ImageNet statistics (`imagenet256`, 2 GB).

    Arguments and errors are `official_checkpoint`'s, with `name` a key of `OFFICIAL_EVALUATION`.
    """
    if name not in OFFICIAL_EVALUATION:
        raise InputError(f"no official evaluation file {name!r}; there are {', '.join(OFFICIAL_EVALUATION)}")
    url, file, checksum = OFFICIAL_EVALUATION[name]
    if file.endswith(".pth"):
        require_torch()
    folder = files.cache_folder() if folder is None else pathlib.Path(folder).expanduser()
    opens = open_checkpoint if file.endswith(".pth") else _open_npz
    return _fetch(f"{base_url or url}/{file}", folder / file, checksum, opens, pause)


def official(name: str, download: bool = True) -> pathlib.Path:
    """Path of an official file or folder of any kind: a checkpoint, a VAE, or a file of the evaluation.

    Without `download` only the cache folder is looked into. InputError lists the names there are.
    """
    kinds = (
        (OFFICIAL_CHECKPOINTS, official_checkpoint),
        (OFFICIAL_VAES, official_vae),
        (OFFICIAL_EVALUATION, official_evaluation),
    )
    for names, fetch in kinds:
        if name in names:
            file = OFFICIAL_EVALUATION[name][1] if name in OFFICIAL_EVALUATION else name
            if not download and not (files.cache_folder() / file).exists():
                raise InputError(f"{file} is not in {files.cache_folder()}, and nothing is downloaded for this run")
            return fetch(name)
    raise InputError(
        f"nothing official is called {name!r}; there are {', '.join(n for names, _ in kinds for n in names)}"
    )


def _open_npz(path: pathlib.Path) -> None:
    if not zipfile.is_zipfile(path):  # the directory is at its end, so a truncated one has none
        raise InputError(f"{path}: not a whole .npz file")


def _open_json(path: pathlib.Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def _fetch(
    url: str, target: pathlib.Path, known: str | None, opens: Callable[[pathlib.Path], object], pause: float
) -> pathlib.Path:
    """`target`, downloaded from `url` if it is not there yet, and checked.

    `known` is its SHA-256, None where the first use decides; `opens(path)` then has to raise InputError if it is broken.
    """
    folder, name = target.parent, target.name
    if target.is_file():
        _check_sum(target, target, known, opens)
        return target
    opener = urllib.request.build_opener(*(() if known else (_GuardedRedirects,)))
    if known is None:
        check_address(url)
    partial = folder / f"{name}.partial"
    by_hand = f"download {url} by other means and put it into {folder} as {name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(partial) as file:
            if target.is_file():  # another process has just finished it
                _check_sum(target, target, known, opens)
                return target
            _download(opener, url, file, partial, pause)
            try:
                _check_sum(partial, target, known, opens)
            except InputError:
                partial.unlink()  # complete and wrong: there is nothing to resume
                raise
            os.replace(partial, target)
    except _BROKEN as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        kept = f" (the {_size(partial):,} bytes that came are kept)" if _size(partial) else ""
        raise InputError(f"cannot download {url}: {reason}{kept}; {by_hand}, or run again with a network") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"no room left in {folder} for {name}; free some or set VQ4DIT_CACHE") from None
        raise InputError(f"cannot write {partial}: {error}; {by_hand}") from None
    finally:
        if not _size(partial):
            partial.unlink(missing_ok=True)
            _etag_file(partial).unlink(missing_ok=True)
    return target


def check_address(url: str) -> None:
    """Refuses addresses where others could change the data on the way: all but https and this machine."""
    address = urllib.parse.urlsplit(url)
    if address.scheme == "https" or (address.scheme == "http" and address.hostname in _THIS_MACHINE):
        return
    raise InputError(
        f"{url}: refused, because {address.scheme}:// does not protect what is sent and no checksum of the file is known; "
        "use an https:// address"
    )


class _GuardedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to addresses that `check_address` lets pass."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(
    opener: urllib.request.OpenerDirector, url: str, file: BinaryIO, partial: pathlib.Path, pause: float
) -> None:
    """Fills `file`, beginning where it ends; broken connections are resumed while bytes keep coming."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            if _append(opener, url, file, partial):
                return
            error: Exception = ConnectionError("the connection closed before the end of the file")
        except urllib.error.HTTPError:
            raise
        except _BROKEN as broken:
            error = broken
        failures = 1 if _size(partial) > before else failures + 1
        if failures == _ATTEMPTS or (failures > 1 and before == 0):  # nothing ever came: there is no network
            raise error
        if _size(partial):
            logging.warning("%s: %s; resuming at byte %d", url, error, _size(partial))
        time.sleep(pause * 2 ** (failures - 1))


def _append(opener: urllib.request.OpenerDirector, url: str, file: BinaryIO, partial: pathlib.Path) -> bool:
    """One connection. Whether the file now is as long as the server says it is."""
    start = _size(partial)
    etag = _etag_file(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "vq4dit-jax"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if etag.is_file():  # the server sends the whole file again if it is another one by now
            request.add_header("If-Range", etag.read_text())
    try:
        response = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return True
        _restart(file, etag)  # longer than the server's file, so of another file
        return False
    with response:
        if response.status == http.client.PARTIAL_CONTENT:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise http.client.HTTPException("the server sent another range than asked for")
            total = int(match[2])
        else:
            _restart(file, etag)
            start, total = 0, int(response.headers.get("Content-Length") or 0)
            if response.headers.get("ETag", "").startswith('"'):  # weak ones are no use for ranges
                etag.write_text(response.headers["ETag"])
        free = shutil.disk_usage(partial.parent).free
        if total - start > free:
            raise InputError(
                f"{url} needs {total - start:,} bytes, but {partial.parent} has room for {free:,}; free some, or set "
                "VQ4DIT_CACHE to another folder"
            )
        with tqdm(desc=partial.stem, initial=start, total=total or None, unit="B", unit_scale=True) as bar:
            while chunk := _read(response):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
    return not total or _size(partial) == total


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except OSError as error:  # an error of the network, not of the disk
        raise ConnectionError(str(error)) from None


def _restart(file: BinaryIO, etag: pathlib.Path) -> None:
    file.truncate(0)
    etag.unlink(missing_ok=True)


def _check_sum(
    path: pathlib.Path, target: pathlib.Path, known: str | None, opens: Callable[[pathlib.Path], object]
) -> None:
    """Compares the checksum of `path` with the known one or that of the first use; a first use is recorded.

    `path` is `target`, or the partial file that will be renamed to it.
    """
    found = sha256(path)
    if known is not None and found != known:
        raise InputError(f"{path}: its SHA-256 is {found}, the official one {known}; delete it to download it again")
    record = target.with_name(f"{target.name}.sha256")
    recorded = record.read_text().split()[:1] if record.is_file() else []
    if recorded and recorded != [found]:
        raise InputError(
            f"{path}: its SHA-256 is {found}, but {recorded[0]} was recorded at its first use; delete it to download "
            f"it again, or delete {record} if you trust it as it is"
        )
    if not recorded:
        opens(path)
        files.write_text(record, f"{found}  {target.name}\n")
        trusted = "" if known else " (trusted on first use: the publisher gives none)"
        print(f"{target.name}: SHA-256 {found}{trusted}")


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _etag_file(partial: pathlib.Path) -> pathlib.Path:
    return partial.with_name(f"{partial.name}.etag")


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for appending, locked against other processes."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is downloading it; wait for it") from None
        yield file
