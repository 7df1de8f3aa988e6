"""Registers, and the strands of warps that read and write them together."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ptx.numbers import UNSIGNED, Type
from ptx.parser import Immediate, PtxError

_UNDEFINED = {bits: np.array(0xDEADBEEFDEADBEEF, np.uint64).astype(dtype) for bits, dtype in UNSIGNED.items()}

# Reads an operand for the threads of a strand; writes one, for those of them that are active (None: all).
Reader = Callable[["Strand"], np.ndarray]
Writer = Callable[["Strand", np.ndarray, "np.ndarray | None"], None]
# What a decoded instruction does.
Action = Callable[["Strand", "np.ndarray | None"], None]


class Blocked(Exception):
    """The strand cannot go on now; its instruction is tried again later."""


class Part(Exception):
    """Warps of the strand have to go apart. `keys` holds one value a warp; those with equal values stay together."""

    def __init__(self, keys: np.ndarray):
        super().__init__("warps part")
        self.keys = keys


@dataclasses.dataclass
class Strand:
    """Warps of a CTA at one instruction."""

    warps: np.ndarray  # ascending
    pc: int
    waiting: tuple | None = None  # (barrier, its generation): has arrived, and waits for the next generation

    def __post_init__(self):
        first, count = int(self.warps[0]), len(self.warps)
        self.threads = (self.warps[:, None] * 32 + np.arange(32)).reshape(-1)
        contiguous = int(self.warps[-1]) - first + 1 == count
        self.index = slice(32 * first, 32 * (first + count)) if contiguous else self.threads
        self.mask = sum(1 << int(warp) for warp in self.warps)
        self.size = 32 * count

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, (self.size,)).reshape(-1, 32)

    def uniform(self, values: np.ndarray, what: str, active: np.ndarray | None = None) -> int:
        """The one value of all threads; parts the warps where they differ; PtxError where threads of a warp differ."""
        rows = self.by_warp(values)
        if active is not None and not active.all():
            raise PtxError(f"{what} with some threads off")
        if (rows != rows[:, :1]).any():
            raise PtxError(f"{what} differs within a warp")
        if (rows[:, 0] != rows[0, 0]).any():
            raise Part(rows[:, 0])
        return rows[0, 0]


@dataclasses.dataclass
class InFlight:
    """Work that was issued and need not be done yet, in groups as commit_group closes them."""

    open: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    groups: list[list[Callable[[], None]]] = dataclasses.field(default_factory=list)

    def add(self, work: Callable[[], None]) -> None:
        self.open.append(work)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, keep: int) -> None:
        """Does what has to be done when no more than `keep` groups may be in flight."""
        while len(self.groups) > keep:
            for work in self.groups.pop(0):
                work()


class File:
    """One register of all threads of a CTA."""

    def __init__(self, name: str, bits: int, threads: int):
        self.name = name
        self.array = np.full(threads, _UNDEFINED[bits])
        self.defined = 0  # bit w: warp w has written it

    def read(self, strand: Strand) -> np.ndarray:
        if strand.mask & ~self.defined:
            raise PtxError(f"{self.name.split('@')[0]} is read before it is written")
        return self.array[strand.index]

    def write(self, strand: Strand, values: np.ndarray, active: np.ndarray | None) -> None:
        self.defined |= strand.mask
        if active is None:
            self.array[strand.index] = values
        else:
            self.array[strand.threads[active]] = np.broadcast_to(values, (strand.size,))[active]


def constant(operand: Immediate, kind: Type) -> np.ndarray:
    if operand.float_bits:
        width = UNSIGNED[operand.float_bits]
        if kind.bits != operand.float_bits:
            raise PtxError(f"a {operand.float_bits}-bit float constant as .{kind.name}")
        return np.array(operand.value, width).view(kind.dtype)
    if kind.name == "pred":
        return np.array(bool(operand.value))
    raw = np.array(operand.value & ((1 << kind.bits) - 1), kind.raw)
    return raw.view(kind.dtype) if kind.lanes == 1 else raw.reshape(1).view(kind.dtype).reshape(1, -1)
