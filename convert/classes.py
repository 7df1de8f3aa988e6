"""How many classes a label table has, and whether its last row is the null label of guidance.

A table trained with label dropout has one row more than classes; one trained with class_dropout_prob=0 has none. Shapes
do not distinguish them. These facts do: the caller's num_classes, the training arguments, a config or the metadata; a table
of exactly 1000 rows is ImageNet's without a null row. Without any fact the last row is the null label.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from convert.checkpoint import Checkpoint
from vq4dit_jax.errors import InputError

_PUBLISHED = 1000  # ImageNet's
_COUNTS = ("num_classes", "num_embeds_ada_norm")
_DROPOUTS = ("class_dropout_prob", "cfg_prob")  # DiT's and SiT's name, and REPA's


class Classes(NamedTuple):
    """A table's classes; `note` says where the file's own facts were overruled."""

    num_classes: int
    null_label: bool
    note: str = ""


def count_classes(checkpoint: Checkpoint, name: str, rows: int, num_classes: int | None) -> Classes:
    """The classes of a table called `name` with this many rows; `num_classes` is the caller's, or None.

    Raises:
      InputError: `num_classes` fits neither with nor without a null row.
    """
    possible = [Classes(rows - 1, True), Classes(rows, False)] if rows > 1 else [Classes(1, False)]
    if num_classes is not None:
        agreeing = [c for c in possible if c.num_classes == num_classes]
        if not agreeing:
            raise InputError(
                f"{checkpoint.path}: {name} has {rows} rows; num_classes={num_classes} wants {num_classes + 1}, one for "
                f"each class and one for the null label, or {num_classes} without a null label"
            )
        return agreeing[0]
    told = _number(checkpoint.facts, _COUNTS)
    if told is not None:
        agreeing = [c for c in possible if c.num_classes == told]
        if agreeing:
            return agreeing[0]
        note = f"its arguments say {told:g} classes, but {name} has {rows} rows; the table is believed"
        possible = [c._replace(note=note) for c in possible]
    dropout = _number(checkpoint.facts, _DROPOUTS)
    if dropout is not None or rows == _PUBLISHED:
        null_label = dropout is not None and dropout > 0
        return next((c for c in possible if c.null_label == null_label), possible[0])
    return possible[0]


def _number(facts: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    """The first of `names` that is a number; metadata are strings."""
    for name in names:
        try:
            return float(facts[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return None
