"""The kind of a file, by its first bytes and not by its name."""

import pathlib
import re
import zipfile

from vq4dit_jax.errors import InputError

TORCH, SAFETENSORS, JSON, UNKNOWN = "torch", "safetensors", "json", "unknown"

_UNPACK = "unpack it and give the file inside"
_DOWNLOAD_AGAIN = "download the file itself again; a gated or private file needs a login"
_POINTER = "fetch the content with `git lfs pull`, or download the file from the hub"
# First bytes -> kind of the file, and remedy.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/",
        "a Git LFS pointer, which names the weights and does not hold them",
        _POINTER,
    ),
    (b"# xet version", "a Git Xet pointer, which names the weights and does not hold them", _POINTER),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "take the model's PyTorch or safetensors file"),
    (b"GGUF", "a GGUF file of quantized weights", "take the model's full-precision PyTorch or safetensors file"),
    (b"\x93NUMPY", "one numpy array", "take the model's PyTorch or safetensors file"),
)
_WEB_PAGE = re.compile(rb"\s*<(!doctype|!--|\?xml|[a-z]+[\s>])", re.IGNORECASE)
_REFUSAL = re.compile(
    rb"\s*(40[134]\b|(entry|file|repository)? ?not found|access |invalid |unauthorized|forbidden)", re.I
)
_TAR_MAGIC = slice(257, 262)


def sniff(path: pathlib.Path) -> str:
    """TORCH, SAFETENSORS, JSON, or UNKNOWN, for its reader to accept or refuse.

    Raises:
      InputError: the file is of another known kind; the message names it and the remedy.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    text = head.removeprefix(b"\xef\xbb\xbf")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS
    for magic, what, remedy in _OTHERS:
        if text.startswith(magic):
            raise _refused(path, what, remedy)
    if head[_TAR_MAGIC] == b"ustar":
        raise _refused(path, "a tar archive", _UNPACK)
    if _WEB_PAGE.match(text):
        raise _refused(path, "a web page (HTML or XML)", _DOWNLOAD_AGAIN)
    if _REFUSAL.match(text):
        line = text.decode("ascii", "replace").split("\n")[0].strip()[:80]
        raise _refused(path, f"a server's message, {line!r}", _DOWNLOAD_AGAIN)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return TORCH
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return TORCH
    return JSON if text.lstrip()[:1] == b"{" else UNKNOWN


def _check_zip(path: pathlib.Path) -> None:
    """PyTorch's files are zip archives, and so are others. torch's own check refuses broken archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises more than BadZipFile on damaged directories
        return
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise _refused(
            path,
            "a TorchScript program, code and weights together",
            "save its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW)",
        )
    if names and all(name.endswith(".npy") for name in names):
        raise _refused(path, "a numpy archive (.npz)", "take the model's PyTorch or safetensors file")
    if names and not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise _refused(path, f"a zip archive that holds {names[0][:80]!r}", _UNPACK)


def _refused(path: pathlib.Path, what: str, remedy: str) -> InputError:
    wanted = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    return InputError(f"{path}: not a whole {wanted} but {what}; {remedy}")
