"""The commit and the machine of a figure."""

import os
import pathlib
import re
import subprocess

import jax

from vq4dit_jax.storage import provenance

_VECTORS = ("avx512f", "avx2", "asimd")
"""What decides the speed of float32 products on a CPU, widest first, as Linux names them."""


def commit() -> str | None:
    """BENCHMARK_COMMIT from the environment, or `git describe`; None where the folder is a plain copy."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    except FileNotFoundError:
        done = None
    return os.environ.get("BENCHMARK_COMMIT") or (done.stdout.strip() if done else "") or None


def devices() -> str:
    """`provenance.devices`, and of a CPU its name and vector instructions: "1 x cpu (AMD EPYC, avx2)"."""
    named = provenance.devices()
    if jax.devices()[0].platform != "cpu":
        return named
    about = pathlib.Path("/proc/cpuinfo")
    processor = describe_processor(about.read_text() if about.exists() else "")
    return f"{named} ({processor})" if processor else named


def describe_processor(cpuinfo: str) -> str:
    """ "AMD EPYC, avx2" from the text of /proc/cpuinfo; missing parts are left out."""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    there = set(flags[1].split()) if flags else set()
    widest = next((vector for vector in _VECTORS if vector in there), None)
    return ", ".join(part for part in (name and name[1].strip(), widest) if part)
