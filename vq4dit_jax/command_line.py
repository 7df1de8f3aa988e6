"""What all commands share: one line and exit code 2 for what the user can mend, no traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from vq4dit_jax.errors import InputError, MissingExtraError, is_disk_full


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors: one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


def exit_code(work: Callable[[], None]) -> int:
    """Runs a command: 0 on success, 2 for bad input or a full disk, with one line on stderr, 130 for Ctrl-C."""
    try:
        work()
        return 0
    except (InputError, MissingExtraError) as error:
        message = str(error)
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        message = f"{error}; choose a file or folder that this user may use"
    except KeyboardInterrupt:
        print("vq4dit: stopped; nothing is half-written, run the same command again", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = f"the disk is full, or a file may grow no larger: {error}; make room and run the same command again"
    print("vq4dit: " + " ".join(message.split()), file=sys.stderr)
    return 2
