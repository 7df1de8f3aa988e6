"""A stacked leaf in parts, and the division of a stack into runs of equal blocks.

A leaf of a stacked tree has a leading axis over blocks. Where rules give the blocks of one role different specs, the leaf
is `Parts`: leaves over consecutive blocks, in order. `split_runs` cuts the whole tree at every border between parts, so
that each run is again a tree of equal blocks that `lax.scan` can run over.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Leaves (arrays or quantized) over consecutive blocks of one stack; each has a leading axis over its blocks."""

    parts: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Any:
        return self.parts[index]


def is_parts(node: Any) -> bool:
    return isinstance(node, Parts)


def stack_length(leaf: Any) -> int:
    """Blocks in a leaf: the leading axis of its arrays."""
    return jax.tree.leaves(leaf)[0].shape[0]


def parts_of(leaf: Any) -> list[tuple[int | None, Any]]:
    """(first block, part) of each part in order; of a leaf that is whole, (None, the leaf)."""
    if not is_parts(leaf):
        return [(None, leaf)]
    out, start = [], 0
    for part in leaf:
        out.append((start, part))
        start += stack_length(part)
    return out


def from_parts(parts: Sequence[Any]) -> Any:
    """Inverse of `parts_of`: one leaf as it is, several as `Parts`."""
    return parts[0] if len(parts) == 1 else Parts(tuple(parts))


def split_runs(blocks: Any) -> list[Any]:
    """Cuts a stacked tree into runs, in order. One run (the tree itself) unless a leaf is in parts."""
    leaves, treedef = jax.tree.flatten(blocks, is_leaf=is_parts)
    if not any(map(is_parts, leaves)):
        return [blocks]
    borders = {0}
    for leaf in leaves:
        end = 0
        for part in leaf if is_parts(leaf) else (leaf,):
            end += stack_length(part)
            borders.add(end)
    ordered = sorted(borders)
    return [
        treedef.unflatten([_cut(leaf, start, stop) for leaf in leaves])
        for start, stop in zip(ordered[:-1], ordered[1:], strict=True)
    ]


def _cut(leaf: Any, start: int, stop: int) -> Any:
    """Blocks [start, stop) of a leaf; they lie within one part, since its borders are cuts."""
    for offset, part in parts_of(leaf):
        offset, length = offset or 0, stack_length(part)
        if offset <= start < offset + length:
            if length == stop - start:
                return part
            return jax.tree.map(lambda a, offset=offset: a[start - offset : stop - offset], part)
    raise IndexError(f"blocks {start} to {stop} of {offset + length}")
