"""Instructions that move values: between registers, and between registers and memory, atomics among them."""

import numpy as np

from ptx.machine import instruction
from ptx.memory import WINDOWS
from ptx.numbers import UNSIGNED
from ptx.parser import Address, PtxError, Vector

_SPACES = {
    "global": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "local": "local",
    "param": "param",
    "param::entry": "param",
}
# Orders, scopes and caches, which a machine that does one thing after another has none of.
_HINTS = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "cta", "cluster", "gpu", "sys", "noftz")
_HINTS += ("nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "L2::128B", "L2::256B")
_HINTS += tuple(f"L1::{how}" for how in ("no_allocate", "evict_first", "evict_last", "evict_normal"))


def _space(modifiers) -> str:
    while modifiers.flag(*_HINTS):
        pass
    return _SPACES.get(modifiers.choose(*_SPACES), "")


@instruction("mov")
def _move(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()
    target, source = code.operands
    if isinstance(target, Vector) == isinstance(source, Vector):
        read, write = machine.reader(source, kind.name), machine.writer(target, kind.name)
        return lambda strand, active: write(strand, read(strand), active)
    vector = target if isinstance(target, Vector) else source
    part = f"b{kind.bits // len(vector.items)}"
    if isinstance(source, Vector):
        reads, write = [machine.reader(item, part) for item in source.items], machine.writer(target, kind.name)

        def pack(strand, active):
            parts = np.stack([np.broadcast_to(read(strand), (strand.size,)) for read in reads], -1)
            write(strand, parts.view(kind.raw).reshape(-1).view(kind.dtype), active)

        return pack
    read, writes = machine.reader(source, kind.name), [machine.writer(item, part) for item in target.items]

    def unpack(strand, active):
        values = np.ascontiguousarray(np.broadcast_to(read(strand), (strand.size,)))
        parts = values.view(UNSIGNED[kind.bits // len(vector.items)]).reshape(strand.size, -1)
        for write, value in zip(writes, parts.T):
            write(strand, value, active)

    return unpack


@instruction("cvta")
def _to_generic(machine, code, modifiers):
    kind = modifiers.type()
    back = modifiers.flag("to")
    window = WINDOWS.get(_space(modifiers), 0)
    modifiers.done()
    read, write = machine.reader(code.operands[1], kind.name), machine.writer(code.operands[0], kind.name)
    shift = np.uint64((-window if back else window) & 0xFFFFFFFFFFFFFFFF)
    return lambda strand, active: write(strand, read(strand) + shift, active)


def _elements(operand) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _vector(modifiers, operand) -> tuple:
    count = {None: 1, "v2": 2, "v4": 4, "v8": 8}[modifiers.choose("v2", "v4", "v8")]
    items = _elements(operand)
    if len(items) != count:
        raise PtxError(f"{len(items)} registers, not {count}")
    return items


@instruction("ld")
def _load(machine, code, modifiers):
    kind = modifiers.type()
    space = _space(modifiers)
    writes = [machine.writer(item, kind.name) for item in _vector(modifiers, code.operands[0])]
    modifiers.done()
    addresses = machine.addresses(code.operands[1], space)
    size = kind.bits // 8

    def run(strand, active):
        where = addresses(strand)
        if active is None:
            values = machine.memory.load(space, where, size, len(writes), strand.threads)
        else:
            some = machine.memory.load(space, where[active], size, len(writes), strand.threads[active])
            values = [np.zeros(strand.size, kind.raw) for _ in writes]
            for value, loaded in zip(values, some):
                value[active] = loaded
        for write, value in zip(writes, values):
            write(strand, value.view(kind.dtype), active)

    return run


@instruction("st")
def _store(machine, code, modifiers):
    kind = modifiers.type()
    space = _space(modifiers)
    reads = [machine.reader(item, kind.raw.name.replace("uint", "b")) for item in _vector(modifiers, code.operands[1])]
    modifiers.done()
    addresses = machine.addresses(code.operands[0], space)

    def run(strand, active):
        select = slice(None) if active is None else active
        values = [np.broadcast_to(read(strand), (strand.size,))[select] for read in reads]
        machine.memory.store(space, addresses(strand)[select], values, strand.threads[select])

    return run


_ATOMICS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


@instruction("atom", "red")
def _atomic(machine, code, modifiers):
    """One thread after another, in their order. A float sum depends on the order; a GPU's is another one."""
    kind = modifiers.type()
    space = _space(modifiers)
    name = modifiers.choose(*_ATOMICS, "cas")
    returns = code.opcode == "atom"
    target, *sources = code.operands[1:] if returns else code.operands
    items = _vector(modifiers, sources[0])
    modifiers.done()
    if name is None or not isinstance(target, Address):
        raise PtxError("this atomic operation is not emulated")
    if kind.is_signed is False and kind.name.startswith("b") and name in ("add", "min", "max"):
        raise PtxError(f"{name} of .{kind.name}")
    addresses = machine.addresses(target, space)
    reads = [machine.reader(item, kind.name) for item in items]
    swap = machine.reader(sources[1], kind.name) if name == "cas" else None
    writes = [machine.writer(item, kind.name) for item in _elements(code.operands[0])] if returns else []

    def run(strand, active):
        threads = np.flatnonzero(np.ones(strand.size, bool) if active is None else active)
        where = addresses(strand)
        shape = (strand.size, kind.lanes) if kind.lanes > 1 else (strand.size,)
        values = [np.broadcast_to(read(strand), shape) for read in reads]
        swaps = np.broadcast_to(swap(strand), shape) if swap else None
        before = [np.zeros(shape, kind.dtype) for _ in reads]
        step = np.uint64(kind.bits // 8)
        for thread in threads:
            owner = strand.threads[thread : thread + 1]
            for i, value in enumerate(values):
                at = where[thread : thread + 1] + step * np.uint64(i)
                (raw,) = machine.memory.load(space, at, int(step), 1, owner)
                old = raw.view(kind.dtype)
                new = value[thread].reshape(-1)
                new = np.where(old == new, swaps[thread], old) if swap else np.asarray(_ATOMICS[name](old, new))
                before[i][thread] = old if kind.lanes > 1 else old[0]
                machine.memory.store(space, at, [np.ascontiguousarray(new.astype(kind.dtype)).view(kind.raw)], owner)
        for write, value in zip(writes, before):
            write(strand, value, active)

    return run
