"""Instructions in which the threads of a warp exchange values: shuffles, votes, reductions, 8x8 matrices."""

import numpy as np

from ptx.machine import instruction
from ptx.parser import Address, PtxError, Vector
from ptx.registers import Strand


def _everyone(machine, operand):
    """A member mask that has to name all 32 threads; with all of them active."""
    read = machine.reader(operand, "b32")

    def check(strand: Strand, active: np.ndarray | None) -> None:
        if active is not None or (np.asarray(read(strand)) != 0xFFFFFFFF).any():
            raise PtxError("not all threads of the warp take part")

    return check


@instruction("shfl")
def _shuffle(machine, code, modifiers):
    modifiers.type()
    how = modifiers.choose("idx", "bfly", "up", "down")
    modifiers.flag("sync")
    modifiers.done()
    targets = code.operands[0].items if isinstance(code.operands[0], Vector) else (code.operands[0],)
    write = machine.writer(targets[0], "b32")
    write_valid = machine.writer(targets[1], "pred") if len(targets) > 1 else None
    read, read_b, read_c = (machine.reader(operand, "b32") for operand in code.operands[1:4])
    check = _everyone(machine, code.operands[4])
    lane = np.arange(32)

    def run(strand, active):
        check(strand, active)
        values, b, c = (strand.by_warp(r(strand)).astype(np.int64) for r in (read, read_b, read_c))
        segments = c >> 8 & 31
        b, low, high = b & 31, lane & segments, (lane & segments) | (c & 31 & ~segments)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segments)}[how]
        valid = source >= high if how == "up" else source <= high
        source = np.where(valid, source, lane)
        write(strand, np.take_along_axis(values, source, 1).reshape(-1).astype(np.uint32), None)
        if write_valid:
            write_valid(strand, valid.reshape(-1), None)

    return run


@instruction("elect")
def _elect(machine, code, modifiers):
    """Elects thread 0 of each warp."""
    modifiers.flag("sync")
    modifiers.done()
    leader, elected = code.operands[0].items
    write, write_elected = machine.writer(leader, "b32"), machine.writer(elected, "pred")
    check = _everyone(machine, code.operands[1])

    def run(strand, active):
        check(strand, active)
        write(strand, np.uint32(0), None)
        write_elected(strand, strand.threads % 32 == 0, None)

    return run


@instruction("vote")
def _vote(machine, code, modifiers):
    modifiers.type()
    modifiers.flag("sync")
    how = modifiers.choose("all", "any", "uni", "ballot")
    modifiers.done()
    write = machine.writer(code.operands[0], "b32" if how == "ballot" else "pred")
    read, check = machine.reader(code.operands[1], "pred"), _everyone(machine, code.operands[2])

    def run(strand, active):
        check(strand, active)
        votes = strand.by_warp(read(strand))
        result = {
            "all": lambda: votes.all(1),
            "any": lambda: votes.any(1),
            "uni": lambda: votes.all(1) | ~votes.any(1),
            "ballot": lambda: (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32),
        }[how]()
        write(strand, np.repeat(result, 32), None)

    return run


@instruction("redux")
def _reduce(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.flag("sync")
    how = modifiers.choose("add", "min", "max", "and", "or", "xor")
    modifiers.done()
    if kind.is_float:
        raise PtxError("redux of floats is not emulated")
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(how) or getattr(np, f"bitwise_{how}")
    write, read = machine.writer(code.operands[0], kind.name), machine.reader(code.operands[1], kind.name)
    check = _everyone(machine, code.operands[2])

    def run(strand, active):
        check(strand, active)
        result = function.reduce(strand.by_warp(read(strand)), axis=1, dtype=kind.dtype)
        write(strand, np.repeat(result, 32), None)

    return run


@instruction("match")
def _match(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.flag("sync")
    if modifiers.choose("any", "all") != "any":
        raise PtxError("match.all is not emulated")
    modifiers.done()
    write, read = machine.writer(code.operands[0], "b32"), machine.reader(code.operands[1], kind.name)
    check = _everyone(machine, code.operands[2])

    def run(strand, active):
        check(strand, active)
        values = strand.by_warp(read(strand))
        same = (values[:, :, None] == values[:, None, :]).astype(np.uint64)
        write(strand, (same << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).reshape(-1), None)

    return run


@instruction("activemask")
def _active(machine, code, modifiers):
    modifiers.type()
    modifiers.done()
    write = machine.writer(code.operands[0], "b32")
    return lambda strand, active: write(strand, np.uint32(0xFFFFFFFF), active)


@instruction("ldmatrix", "stmatrix")
def _matrix(machine, code, modifiers):
    """1, 2 or 4 matrices of 8x8 halves. Thread t holds elements (t/4, 2(t%4)) and the next; thread 8i+r has the address
    of row r of matrix i."""
    kind = modifiers.type()
    modifiers.flag("sync")
    modifiers.flag("aligned")
    count = {"x1": 1, "x2": 2, "x4": 4}.get(modifiers.choose("x1", "x2", "x4"))
    transposed = modifiers.flag("trans")
    shared = modifiers.flag("shared", "shared::cta")
    if not modifiers.flag("m8n8") or kind.bits != 16 or not count or not shared:
        raise PtxError("only m8n8 of 16-bit elements in shared memory is emulated")
    modifiers.done()
    loads = code.opcode == "ldmatrix"
    registers, address = code.operands if loads else code.operands[::-1]
    if not isinstance(registers, Vector) or len(registers.items) != count or not isinstance(address, Address):
        raise PtxError(f"expected {count} registers and an address")
    read_address = machine.addresses(address, "shared")
    access = [(machine.writer if loads else machine.reader)(item, "b32") for item in registers.items]

    def run(strand, active):
        if active is not None:
            raise PtxError("some threads are off")
        rows = strand.by_warp(read_address(strand))[:, : 8 * count].reshape(-1, count, 8)
        if (rows % np.uint64(16)).any():
            raise PtxError("a row's address is no multiple of 16")
        bytes_ = (rows[..., None] + np.arange(16, dtype=np.uint64)).astype(np.int64)
        if loads:
            matrices = machine.memory.shared_bytes(bytes_).view(np.uint16)
            matrices = matrices.swapaxes(-1, -2) if transposed else matrices
            for i, write in enumerate(access):
                fragment = np.ascontiguousarray(matrices[:, i]).reshape(-1, 8, 4, 2).reshape(-1, 2)
                write(strand, np.ascontiguousarray(fragment).view(np.uint32).reshape(-1), None)
        else:
            machine.memory.check_shared(bytes_)
            for i, read in enumerate(access):
                values = np.ascontiguousarray(np.broadcast_to(read(strand), (strand.size,)))
                matrix = values.view(np.uint16).reshape(-1, 8, 8)
                matrix = np.ascontiguousarray(matrix.swapaxes(-1, -2) if transposed else matrix)
                machine.memory.shared[bytes_[:, i]] = matrix.view(np.uint8)

    return run
