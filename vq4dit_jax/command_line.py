"""Shared by all commands: bad input ends in one line and exit code 2, without a traceback."""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from vq4dit_jax.errors import InputError, MissingExtraError, is_disk_full

_LONGEST = 1200
"""Characters of a message; longer ones lose their middle."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors: one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


class _Terminated(BaseException):
    """SIGTERM has come."""


def exit_code(work: Callable[[], None]) -> int:
    """Runs a command: 0 on success, 2 for bad input or a full disk, 130 for Ctrl-C, 143 for SIGTERM, with one line on
    stderr. Errors of the program itself are raised.
    """
    try:
        with _sigterm_raises():
            work()
        return 0
    except (InputError, MissingExtraError) as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("stopped; nothing is half-written, run the same command again", 130)
    except _Terminated:
        return _say("ended by SIGTERM; nothing is half-written, the same command goes on from here", 143)
    except Exception as error:
        if is_disk_full(error):
            return _say(
                f"the disk is full, or a file may grow no larger: {error}; make room and run the same command again", 2
            )
        if isinstance(error, OSError) and error.filename is not None:
            return _say(f"{error}; choose a file or folder that this user may use", 2)
        raise


def _say(message: str, code: int) -> int:
    """Prints one line of printable characters, so that no file's content can send codes to the terminal."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 300]} ... {line[-300:]}"
    print(f"vq4dit: {line}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """While the body runs, SIGTERM raises `_Terminated`, so that files are cleaned up. Python allows it in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that is not Python's
