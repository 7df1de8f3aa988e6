"""A stacked leaf in parts, and how a network runs over a stack that has such leaves.

A leaf of a stacked tree has a leading axis over blocks. Where rules give the blocks of one role different specs, the leaf
is `Parts`: leaves over consecutive blocks, in order.

  scan         runs a block function over the whole stack as one loop: in block i a leaf in parts is `Chosen`, which branches
               to the part that has block i. A block is compiled once, and one block at a time is decoded.
  split_runs   cuts the whole tree at every border between parts, so that each run is a tree of equal blocks again. For what
               must know the form of a run, such as the kernels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vq4dit_jax.qarray.base import Kernel, is_quantized


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


def stack_blocks(blocks: Sequence[Any]) -> Any:
    """A stacked leaf of its blocks' matrices (leaves without stack axes): consecutive ones of one form are a part."""
    form = lambda leaf: (jax.tree.structure(leaf), [(a.shape, np.dtype(a.dtype)) for a in jax.tree.leaves(leaf)])
    parts: list[list[Any]] = []
    for leaf in blocks:
        if parts and form(parts[-1][0]) == form(leaf):
            parts[-1].append(leaf)
        else:
            parts.append([leaf])
    stack = lambda *arrays: jax.device_put(np.stack([np.asarray(a) for a in arrays]))
    return from_parts([jax.tree.map(stack, *part) for part in parts])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen(Kernel):
    """The matrix of block `index` of a leaf in parts."""

    parts: Parts
    index: Int[Array, ""]

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        # Without the checkpoint a backward pass would keep what every branch needs, for every block.
        return jax.checkpoint(_chosen_matmul)(self.parts, self.index, x)


def _chosen_matmul(parts: Parts, index: Int[Array, ""], x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    starts = [start for start, _ in parts_of(parts)]

    def branch(start: int, part: Any) -> Callable[[Any], jax.Array]:
        def run(x: jax.Array) -> jax.Array:
            own = jax.tree.map(lambda a: jnp.asarray(a)[index - start], part)
            return own.matmul(x) if is_quantized(own) else jnp.matmul(x, own.astype(x.dtype))

        return run

    which = (index >= jnp.asarray(starts)).sum() - 1
    return jax.lax.switch(which, [branch(*part) for part in parts_of(parts)], x)


def scan(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, blocks: Any, per_block: Any = None
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step(carry, block, own) -> (carry, output)` over the blocks of a stacked tree.

    `per_block`: arrays with a leading axis over blocks, of which `step` gets each block's own. Kernels of `block` are arrays,
    quantized leaves or `Chosen`, all of which `linear` takes.
    """
    leaves, treedef = jax.tree.flatten(blocks, is_leaf=is_parts)
    if not any(map(is_parts, leaves)):
        return jax.lax.scan(lambda carry, own: step(carry, *own), carry, (blocks, per_block))
    whole = [None if is_parts(leaf) else leaf for leaf in leaves]
    length = next(sum(map(stack_length, leaf)) for leaf in leaves if is_parts(leaf))

    def one(carry: Any, own: tuple[Any, list[Any], Any]) -> tuple[Any, Any]:
        index, here, extra = own
        block = [Chosen(leaf, index) if is_parts(leaf) else a for leaf, a in zip(leaves, here, strict=True)]
        return step(carry, treedef.unflatten(block), extra)

    return jax.lax.scan(one, carry, (jnp.arange(length), whole, per_block))


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
