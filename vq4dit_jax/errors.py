"""Errors that a user can correct. Commands print them in one line and exit with code 2."""

import errno


class InputError(ValueError):
    """Bad input: names the parameter or file, what was found, what was wanted, and the remedy.

    The message is one line; everything the user needs stands in it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class MissingExtraError(ImportError):
    """An optional dependency is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}: install it with `pip install 'vq4dit-jax[{extra}]'`"
        )


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error or its cause says that the disk is full. Orbax says it only in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        text = str(error).lower()
        if any(words in text for words in ("no space left", "disk quota exceeded", "file too large")):
            return True
        error = error.__cause__ or error.__context__
    return False
