"""Progress bars for people, silence for logs."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(iterable_or_total: Iterable | int, description: str, unit: str) -> tqdm:
    """A bar with the time left on stderr where that is a terminal, and nothing at all elsewhere.

    Args:
      iterable_or_total: an iterable, or the number of units: then call `.update(count)` on the result, inside `with`.
      description: of the work, in a word or two, left of the bar.
      unit: name of one unit of work ("step", "image"). "B" counts bytes and writes them as kB, MB, GB.
    """
    counted = not isinstance(iterable_or_total, Iterable)
    return tqdm(
        None if counted else iterable_or_total,
        total=iterable_or_total if counted else None,
        desc=description,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        file=sys.stderr,
        disable=None,  # tqdm's word for "silent unless `file` is a terminal"
        dynamic_ncols=True,
    )
