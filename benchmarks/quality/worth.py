"""What single choices are worth: rows labelled "FORM: change" beside the row labelled FORM, seed by seed.

A seed is the same noise, classes, k-means start and trajectories in both, so differences of a seed scatter less than the figures.
"""

import statistics
from typing import Any

_FIGURES = {"psnr_to_fp_db": "PSNR, dB", "l_d": "L_d", "noise_error": "Noise error"}
"""The first in differences, the others in per cent."""


def compared(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """Head and cells of a table, mean ± standard deviation over seeds; None where no row changes another."""
    cells = []
    for row in rows:
        if form := form_of(row, rows):
            change = row["label"].removeprefix(f"{form['label']}: ")
            cells.append([form["label"], change, *(_change(row, form, name) for name in _FIGURES)])
    return (["Form", "Changed", *_FIGURES.values()], cells) if cells else None


def form_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that `row` changes one choice of, if it is there."""
    form, colon, _ = row["label"].partition(": ")
    return next((other for other in rows if colon and other["label"] == form), None)


def _change(row: dict[str, Any], form: dict[str, Any], name: str) -> str:
    pairs = [(one[name], other[name]) for one, other in zip(row["seeds"], form["seeds"], strict=True)]
    if name == "psnr_to_fp_db":
        return _mean([one - other for one, other in pairs], "")
    return _mean([100 * (one / other - 1) for one, other in pairs], " %")


def _mean(values: list[float], unit: str) -> str:
    digits = 1 if unit else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{spread}{unit}"
