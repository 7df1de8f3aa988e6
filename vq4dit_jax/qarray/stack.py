"""Stacks of equal blocks, and their division into runs where quantization differs from block to block.

A leaf of a stacked tree has a leading axis over blocks. Where rules give the blocks of one role different bits, the
leaf is a tuple of such leaves, each over consecutive blocks; `split_runs` cuts the whole tree at every such border,
so that each run is again a tree of equal blocks that `lax.scan` can run over.
"""

from typing import Any

import jax


def _is_parts(node: Any) -> bool:
    return isinstance(node, tuple)


def stack_length(leaf: Any) -> int:
    """Blocks in a leaf: the leading axis of its arrays."""
    return jax.tree.leaves(leaf)[0].shape[0]


def split_runs(blocks: Any) -> list[Any]:
    """Cuts a stacked tree into runs, in order. One run (the tree itself) unless a leaf is a tuple."""
    leaves, treedef = jax.tree.flatten(blocks, is_leaf=_is_parts)
    if not any(map(_is_parts, leaves)):
        return [blocks]
    borders = {0}
    for leaf in leaves:
        end = 0
        for part in leaf if _is_parts(leaf) else (leaf,):
            end += stack_length(part)
            borders.add(end)
    ordered = sorted(borders)
    return [
        treedef.unflatten([_slice(leaf, start, stop) for leaf in leaves])
        for start, stop in zip(ordered[:-1], ordered[1:], strict=True)
    ]


def _slice(leaf: Any, start: int, stop: int) -> Any:
    """Blocks [start, stop) of a leaf; they lie within one part of a tuple, since its borders are cuts."""
    offset = 0
    for part in leaf if _is_parts(leaf) else (leaf,):
        length = stack_length(part)
        if offset <= start < offset + length:
            if length == stop - start:
                return part
            return jax.tree.map(lambda a: a[start - offset : stop - offset], part)
        offset += length
    raise IndexError(f"blocks {start} to {stop} of {offset}")
