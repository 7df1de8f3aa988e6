"""The worth of single choices: rows labelled "FORM: change" beside the row labelled FORM, seed by seed.

A seed is the same noise, classes and keys in both, so differences of a seed scatter less than the figures.
"""

import statistics
from collections.abc import Callable
from typing import Any

from vq4dit_jax.reporting.markup import DASH

_DIFFERENCES = {"psnr_to_fp_db": "PSNR, dB"}
_PER_CENT = {"l_d": "L_d", "noise_error": "Noise error"}


def compared(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """Head and cells of a table, mean ± standard deviation over seeds; None where no row changes another."""
    cells = []
    for row in rows:
        if form := form_of(row, rows):
            change = row["label"].removeprefix(f"{form['label']}: ")
            differences = [_spread(row, form, name, lambda a, b: a - b, ".2f", "") for name in _DIFFERENCES]
            per_cent = [_spread(row, form, name, lambda a, b: 100 * (a / b - 1), ".1f", " %") for name in _PER_CENT]
            cells.append([form["label"], change, *differences, *per_cent])
    return (["Form", "Changed", *_DIFFERENCES.values(), *_PER_CENT.values()], cells) if cells else None


def form_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that `row` changes one choice of, if it is there."""
    form, colon, _ = row["label"].partition(": ")
    return next((other for other in rows if colon and other["label"] == form), None)


def _spread(
    row: dict[str, Any],
    form: dict[str, Any],
    name: str,
    change: Callable[[float, float], float],
    digits: str,
    unit: str,
) -> str:
    """A dash where a seed has no such figure: PSNR without full precision's images."""
    pairs = [(one.get(name), other.get(name)) for one, other in zip(row["seeds"], form["seeds"], strict=True)]
    if any(figure is None for pair in pairs for figure in pair):
        return DASH
    changes = [change(one, other) for one, other in pairs]
    spread = f" ± {statistics.stdev(changes):{digits}}" if len(changes) > 1 else ""
    return f"{statistics.fmean(changes):+{digits}}{spread}{unit}"
