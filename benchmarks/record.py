"""Which commit a figure was made at."""

import os
import pathlib
import subprocess


def commit() -> str | None:
    """BENCHMARK_COMMIT from the environment, or `git describe`; None where the folder is a plain copy."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    except FileNotFoundError:
        done = None
    return os.environ.get("BENCHMARK_COMMIT") or (done.stdout.strip() if done else "") or None
