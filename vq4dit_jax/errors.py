"""Errors a user can mend. `main` prints them in one line and exits with code 2."""


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
