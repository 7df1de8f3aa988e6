"""The tensor memory accelerator: descriptors, boxes, swizzles, bulk copies between global and shared memory."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ptx.control import mbarrier
from ptx.machine import instruction
from ptx.numbers import TYPES, UNSIGNED
from ptx.parser import Address, PtxError
from ptx.registers import InFlight

# The codes that Mosaic's runtime takes (jaxlib/mosaic/gpu/runtime.cc): unsigned 8 to 64 bits, floats, signed 32 and 64 bits.
ELEMENT_TYPES = {1: "u8", 2: "u16", 3: "u32", 4: "u64", 5: "f16", 6: "f32", 7: "bf16", 9: "s32", 10: "s64"}
_SWIZZLE_BITS = {16: 0, 32: 1, 64: 2, 128: 3}


def swizzle(addresses: np.ndarray, width: int) -> np.ndarray:
    """Where the 16-byte chunks of rows of `width` bytes lie: address bits 4.. are xor-ed with bits 7.. (1, 2 or 3 bits)."""
    mask = (1 << _SWIZZLE_BITS[width]) - 1
    return addresses ^ (((addresses >> 7) & mask) << 4)


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor. Sizes, strides (of elements) and box are row-major: the last dimension is contiguous.

    address: of element 0 in global memory. element: a type's name. swizzle: bytes; 16 is none.
    """

    address: int
    element: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self):
        """What the driver refuses when it encodes a descriptor."""
        bytes_ = self.element_bytes
        if not 1 <= len(self.sizes) <= 5 or not len(self.sizes) == len(self.strides) == len(self.box):
            raise PtxError(f"a tensor map of rank {len(self.sizes)}")
        if self.strides[-1] != 1:
            raise PtxError("a tensor map whose last dimension is not contiguous")
        if any(not 0 < side <= 256 for side in self.box):
            raise PtxError(f"a tensor map with a box of {self.box}; a side has at most 256 elements")
        if self.address % 16 or any(stride * bytes_ % 16 for stride in self.strides[:-1]):
            raise PtxError(f"a tensor map with strides {self.strides} of {bytes_} bytes: not multiples of 16 bytes")
        inner = self.box[-1] * bytes_
        if inner % 16 or (self.swizzle != 16 and inner > self.swizzle):
            raise PtxError(f"a tensor map with rows of {inner} bytes and a swizzle of {self.swizzle}")
        if self.swizzle not in _SWIZZLE_BITS or (self.swizzle != 16 and inner != self.swizzle):
            raise PtxError(f"rows of {inner} bytes with a swizzle of {self.swizzle} are not emulated")

    @property
    def element_bytes(self) -> int:
        return int(self.element.lstrip("bsuf")) // 8

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_bytes

    def place(self, corner: list[int], shared: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Global address, shared address and whether it is inside the tensor, for every element of the box at `corner`."""
        if shared % 128:
            raise PtxError(f"a tensor copy at shared address {shared:#x}, no multiple of 128")
        axes = np.meshgrid(*[start + np.arange(side) for start, side in zip(corner, self.box)], indexing="ij")
        inside = np.ones(self.box, bool)
        offset = np.zeros(self.box, np.int64)
        for axis, size, stride in zip(axes, self.sizes, self.strides):
            inside &= (axis >= 0) & (axis < size)
            offset += axis * stride
        local = shared + np.arange(offset.size) * self.element_bytes
        return self.address + offset.reshape(-1) * self.element_bytes, swizzle(local, self.swizzle), inside.reshape(-1)


def _one_thread(strand, active):
    """TMA instructions are issued by single threads: the indices of those that are on."""
    threads = np.arange(strand.size) if active is None else np.flatnonzero(active)
    if len(np.unique(strand.threads[threads] // 32)) != len(threads):
        raise PtxError("a copy is issued by more than one thread of a warp")
    return threads


@instruction("cp")
def _copy(machine, code, modifiers):
    reduces = modifiers.flag("reduce")
    if modifiers.parts[:2] != ["async", "bulk"]:
        raise PtxError("only bulk copies are emulated")
    del modifiers.parts[:2]
    if group := modifiers.choose("commit_group", "wait_group"):
        modifiers.flag("read")
        modifiers.done()
        return _group(machine, group, code.operands)
    prefetches = modifiers.flag("prefetch")
    tensor = modifiers.flag("tensor")
    rank = modifiers.choose("1d", "2d", "3d", "4d", "5d")
    modifiers.flag("tile")
    places = [part for part in modifiers.parts if part.startswith(("shared", "global"))]
    loads = bool(places) and places[0].startswith("shared")
    modifiers.flag("shared::cluster", "shared::cta")
    modifiers.flag("global")
    by_mbarrier = modifiers.flag("mbarrier::complete_tx::bytes")
    modifiers.flag("bulk_group")
    adds = reduces and modifiers.flag("add")
    modifiers.done()
    if prefetches:
        return lambda strand, active: None
    if loads != by_mbarrier or tensor != bool(rank) or reduces != adds or (reduces and (loads or not tensor)):
        raise PtxError("this copy is not emulated")
    if tensor:
        return _tensor_copy(machine, code, int(rank[0]), loads, adds)
    return _flat_copy(machine, code, loads)


def _tensor_copy(machine, code, rank, loads, adds):
    tensor, shared = (code.operands[1], code.operands[0]) if loads else code.operands[:2]
    if not isinstance(tensor, Address) or tensor.coordinates is None or len(tensor.coordinates) != rank:
        raise PtxError(f"expected {rank} coordinates")
    if len(code.operands) != (3 if loads else 2):
        raise PtxError("copies with further operands (multicast, cache hints) are not emulated")
    read_map = machine.reader(tensor.base, "u64")
    read_corner = [machine.reader(item, "s32") for item in reversed(tensor.coordinates)]
    read_shared = machine.addresses(shared, "shared")
    read_barrier = machine.addresses(code.operands[2], "shared") if loads else None

    def run(strand, active):
        memory = machine.memory
        for thread in _one_thread(strand, active):
            pick = lambda read: int(np.broadcast_to(read(strand), (strand.size,))[thread])
            tensor_map = memory.tensor_maps.get(pick(read_map))
            if tensor_map is None:
                raise PtxError(f"no tensor map lies at {pick(read_map):#x}")
            if len(tensor_map.box) != rank:
                raise PtxError(f"a copy of rank {rank} by a tensor map of rank {len(tensor_map.box)}")
            far, near, inside = tensor_map.place([pick(read) for read in read_corner], pick(read_shared))
            memory.check_shared(near)
            memory.check_shared(near + tensor_map.element_bytes - 1)
            outside, near = near[~inside], near[inside]
            far = far[inside].astype(np.uint64)
            memory.buffers.check(far, tensor_map.element_bytes)
            if loads:
                work = functools.partial(_fill, memory, tensor_map, far, near, outside)
                _on_barrier(machine, pick(read_barrier), work, tensor_map.box_bytes)
            else:
                work = functools.partial(_drain, memory, tensor_map, far, near, adds)
                machine.in_flight.setdefault(("copy", int(strand.threads[thread])), InFlight()).add(work)

    return run


def _flat_copy(machine, code, loads):
    target, source, size = code.operands[:3]
    read_target = machine.addresses(target, "shared" if loads else "global")
    read_source = machine.addresses(source, "global" if loads else "shared")
    read_size = machine.reader(size, "u32")
    read_barrier = machine.addresses(code.operands[3], "shared") if loads else None

    def run(strand, active):
        for thread in _one_thread(strand, active):
            pick = lambda read: int(np.broadcast_to(read(strand), (strand.size,))[thread])
            count = pick(read_size)
            if count % 16 or pick(read_target) % 16 or pick(read_source) % 16:
                raise PtxError("a bulk copy whose size or addresses are no multiples of 16")
            work = functools.partial(_move, machine.memory, pick(read_source), pick(read_target), count, loads)
            if loads:
                _on_barrier(machine, pick(read_barrier), work, count)
            else:
                machine.in_flight.setdefault(("copy", int(strand.threads[thread])), InFlight()).add(work)

    return run


_NO_THREAD = np.zeros(1, np.int64)


def _words(memory, kind) -> np.ndarray:
    return memory.shared.view(UNSIGNED[8 * kind.element_bytes])


def _fill(memory, tensor_map: TensorMap, far: np.ndarray, near: np.ndarray, outside: np.ndarray) -> None:
    """Elements from global to shared memory, and zeros where the box leaves the tensor."""
    size = tensor_map.element_bytes
    (values,) = memory.load("global", far, size, 1, _NO_THREAD)
    _words(memory, tensor_map)[near // size] = values
    _words(memory, tensor_map)[outside // size] = 0


def _drain(memory, tensor_map: TensorMap, far: np.ndarray, near: np.ndarray, adds: bool) -> None:
    """Elements from shared to global memory, or added to what is there."""
    values = _words(memory, tensor_map)[near // tensor_map.element_bytes]
    if adds:
        (before,) = memory.load("global", far, tensor_map.element_bytes, 1, _NO_THREAD)
        kind = TYPES[tensor_map.element].dtype
        values = (before.view(kind) + values.view(kind)).view(values.dtype)
    memory.store("global", far, [values], _NO_THREAD)


def _move(memory, source: int, target: int, count: int, loads: bool) -> None:
    """Consecutive bytes."""
    steps = np.arange(0, count, 8, dtype=np.uint64)
    spaces = ("global", "shared") if loads else ("shared", "global")
    words = memory.load(spaces[0], np.uint64(source) + steps, 8, 1, _NO_THREAD)
    memory.store(spaces[1], np.uint64(target) + steps, words, _NO_THREAD)


def _on_barrier(machine, address: int, work: Callable[[], None], count: int) -> None:
    """`work` is done when somebody waits for the mbarrier, and then completes `count` bytes."""
    barrier = mbarrier(machine, address)

    def complete() -> None:
        work()
        barrier.bytes -= count

    barrier.copies.append(complete)


def _group(machine, what: str, operands: tuple):
    keep = operands[0].value if operands else 0

    def run(strand, active):
        for thread in strand.threads[slice(None) if active is None else active]:
            work = machine.in_flight.get(("copy", int(thread)))
            if work and what == "commit_group":
                work.commit()
            elif work:
                work.wait(keep)

    return run
