"""Checkpoint layouts as data: which tensors of a checkpoint make up a leaf of our tree, and how they are turned.

A `Layout` is a table of `Rule`s. The names and shapes that a checkpoint must have
follow from it and from the shapes of our own tree.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.parts import stack_blocks

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a tensor is turned into a leaf: `turn` acts on arrays, and `back` undoes it; `origin` gives the shape before from that
    after."""

    ndim: int
    turn: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]
    origin: Callable[[Shape], Shape]


LINEAR = Kind(2, lambda w: w.T, lambda w: w.T, lambda s: (s[1], s[0]))  # (O, I) -> (I, O)
CONV = Kind(  # OIHW -> HWIO
    4, lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1), lambda s: (s[3], s[2], s[0], s[1])
)
BIAS = Kind(1, lambda w: w, lambda w: w, lambda s: s)
TABLE = Kind(2, lambda w: w, lambda w: w, lambda s: s)
POSITIONS = Kind(3, lambda w: w[0], lambda w: w[None], lambda s: (1, *s))  # (1, T, D) -> (T, D)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A leaf of our tree and its sources.

    Attributes:
      path: '/'-joined path in our tree. Leaves under `blocks/` are stacked over the blocks.
      kind: how each source is turned.
      sources: names in the checkpoint, `{}` for the number of the block. Several are joined along the output
        features. A source with `{}` for a leaf outside `blocks/` is a copy held by every block.
    """

    path: str
    kind: Kind
    sources: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks/")

    def names(self, depth: int) -> Iterator[str]:
        for source in self.sources:
            yield from (source.format(i) for i in range(depth)) if "{}" in source else (source,)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A kind of checkpoint.

    Attributes:
      name: in errors.
      block_prefix: the part of a parameter's name before the number of the block.
      rules: one for each leaf; a leaf without a rule is computed, not read.
    """

    name: str
    block_prefix: str
    rules: tuple[Rule, ...]

    def fits(self, checkpoint: Checkpoint) -> bool:
        return any(name.startswith(f"{self.block_prefix}0.") for name in checkpoint.shapes)

    def depth(self, checkpoint: Checkpoint) -> int:
        """Number of blocks; they must be numbered 0, 1, ... without a gap."""
        pattern = re.compile(re.escape(self.block_prefix) + r"(\d+)\.")
        numbers = {int(m[1]) for m in map(pattern.match, checkpoint.shapes) if m}
        gaps = set(range(len(numbers))) - numbers
        if gaps:
            raise InputError(f"{checkpoint.path}: no parameters of block {min(gaps)}, but of block {max(numbers)}")
        return len(numbers)

    def first(self, checkpoint: Checkpoint, path: str) -> tuple[str, Shape]:
        """Name and shape, in the checkpoint, of the first source of a leaf (in block 0)."""
        rule = next(r for r in self.rules if r.path == path)
        name = next(rule.names(1))
        shape = checkpoint.shapes[name]
        if len(shape) != rule.kind.ndim or 0 in shape:
            raise InputError(
                f"{checkpoint.path}: {name} has shape {shape}; {rule.kind.ndim} axes, none of them empty, are wanted"
            )
        return name, shape

    def check_names(self, checkpoint: Checkpoint, depth: int) -> None:
        wanted = {name for rule in self.rules for name in rule.names(depth)}
        found = set(checkpoint.shapes)
        for kind, names in (("lacks", wanted - found), ("has the unexpected", found - wanted)):
            if names:
                first = ", ".join(sorted(names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise InputError(
                    f"{checkpoint.path}: {kind} parameter{'s' * (len(names) > 1)} {first}{more} "
                    f"(read as {self.name} layout with {depth} blocks)"
                )

    def check_shapes(self, checkpoint: Checkpoint, depth: int, leaves: Mapping[str, Shape]) -> None:
        """Compares every tensor with the shapes of our tree's leaves, '/'-joined path -> shape."""
        for rule in self.rules:
            rows, *rest = rule.kind.origin(leaves[rule.path][1:] if rule.stacked else leaves[rule.path])
            wanted = (rows // len(rule.sources), *rest)
            for name in rule.names(depth):
                if checkpoint.shapes[name] != wanted:
                    raise InputError(f"{checkpoint.path}: {name} has shape {checkpoint.shapes[name]}, wanted {wanted}")

    def leaves(self, checkpoint: Checkpoint, depth: int, dtype: Any) -> Iterator[tuple[str, Any]]:
        """Path and array (or quantized leaf) of each leaf in turn: one leaf and one tensor are in memory at a time."""
        for rule in self.rules:
            yield rule.path, self._stack(checkpoint, rule, depth, dtype)
            if not rule.stacked:
                self._check_copies(checkpoint, rule, depth)

    def _stack(self, checkpoint: Checkpoint, rule: Rule, depth: int, dtype: Any) -> Any:
        if not checkpoint.packed.keys().isdisjoint(rule.names(depth)):
            return self._packed(checkpoint, rule, depth, dtype)
        first = self._leaf(checkpoint, rule, 0, dtype)
        if not rule.stacked:
            return np.array(first, order="C")  # a copy, because `read` gives a view of the mapped file
        leaf = np.empty((depth, *first.shape), dtype)
        leaf[0] = first
        for i in range(1, depth):
            leaf[i] = self._leaf(checkpoint, rule, i, dtype)
        return leaf

    def _packed(self, checkpoint: Checkpoint, rule: Rule, depth: int, dtype: Any) -> Any:
        """A leaf that is quantized, in all blocks or in some; where blocks differ it is in parts."""
        blocks = [
            checkpoint.packed[name]() if name in checkpoint.packed else self._leaf(checkpoint, rule, i, dtype)
            for i, name in enumerate(rule.names(depth))
        ]
        return stack_blocks(blocks) if rule.stacked else blocks[0]

    def _leaf(self, checkpoint: Checkpoint, rule: Rule, block: int, dtype: Any) -> np.ndarray:
        parts = [rule.kind.turn(read_finite(checkpoint, source.format(block), dtype)) for source in rule.sources]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def _check_copies(self, checkpoint: Checkpoint, rule: Rule, depth: int) -> None:
        first, *copies = rule.names(depth)
        for name in copies:
            if not np.array_equal(checkpoint.read(first), checkpoint.read(name)):
                raise InputError(
                    f"{checkpoint.path}: {name} differs from {first}; DiT has one for all blocks: they must be equal"
                )


def read_finite(checkpoint: Checkpoint, name: str, dtype: Any) -> np.ndarray:
    """One tensor in `dtype`; refuses NaN, infinities, and numbers that `dtype` cannot hold."""
    stored = checkpoint.read(name)
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(stored, dtype)
    if not np.isfinite(array).all():
        bad = int(stored.size - np.isfinite(stored).sum())
        if bad:
            raise InputError(f"{checkpoint.path}: {name} has {bad} NaN or infinite among its {stored.size} numbers")
        largest = f"{float(np.abs(stored).max()):.4g}"
        raise InputError(f"{checkpoint.path}: {name} holds {largest}, too large for {np.dtype(dtype)}; use bfloat16")
    return array
