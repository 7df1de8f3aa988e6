"""Branches, barriers and mbarriers, and the instructions that order work that is here done at once."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ptx.machine import instruction
from ptx.parser import Name, PtxError
from ptx.registers import Blocked, Strand


@instruction("bra")
def _branch(machine, code, modifiers):
    modifiers.flag("uni")
    modifiers.done()
    (target,) = code.operands
    if not isinstance(target, Name):
        raise PtxError("a branch to no label")
    found = [
        name
        for block in reversed(code.scope)
        if (name := f"{target.name}@{block}" if block else target.name) in machine.program.labels
    ]
    if not found:
        raise PtxError(f"label {target.name} is nowhere")
    destination = machine.program.labels[found[0]]

    def run(strand: Strand, active):
        if active is None or strand.uniform(active, "divergent branch: the condition"):
            strand.pc = destination

    return run


@instruction("ret", "exit")
def _end(machine, code, modifiers):
    modifiers.done()

    def run(strand, active):
        if active is None or strand.uniform(active, "divergent end: the condition"):
            strand.pc = -1

    return run


@instruction("trap")
def _trap(machine, code, modifiers):
    def run(strand, active):
        raise PtxError("the kernel trapped")

    return run


@instruction("fence", "membar", "setmaxnreg", "griddepcontrol", "nanosleep", "prefetch", "pmevent")
def _order(machine, code, modifiers):
    return lambda strand, active: None


@dataclasses.dataclass(eq=False)
class Barrier:
    """bar.sync's barrier: warps that have arrived in this generation, and how many threads it waits for."""

    arrived: int = 0
    expected: int = 0
    generation: int = 0


@instruction("bar", "barrier")
def _barrier(machine, code, modifiers):
    for name in ("cta", "aligned"):
        modifiers.flag(name)
    warp_only = modifiers.flag("warp")
    how = modifiers.choose("sync", "arrive")
    modifiers.done()
    if warp_only:
        return lambda strand, active: None
    if how is None:
        raise PtxError("this barrier is not emulated")
    read_id = machine.reader(code.operands[0], "u32")
    read_count = machine.reader(code.operands[1], "u32") if len(code.operands) > 1 else None

    def run(strand: Strand, active):
        number = int(strand.uniform(read_id(strand), "the barrier's number", active))
        count = int(strand.uniform(read_count(strand), "the barrier's count")) if read_count else machine.threads
        barrier = machine.barriers.setdefault(number, Barrier())
        if barrier.arrived and barrier.expected != count:
            raise PtxError(f"barrier {number} is waited for with {count} and with {barrier.expected} threads")
        if barrier.arrived & strand.mask:
            raise PtxError(f"a warp arrives twice at barrier {number}")
        barrier.expected = count
        barrier.arrived |= strand.mask
        threads = 32 * barrier.arrived.bit_count()
        if threads > count:
            raise PtxError(f"{threads} threads arrive at barrier {number}, which waits for {count}")
        if how == "sync":
            strand.waiting = (barrier, barrier.generation)
        if threads == count:
            barrier.arrived, barrier.generation = 0, barrier.generation + 1

    return run


@dataclasses.dataclass
class MBarrier:
    """An mbarrier object: it goes to the next phase when nothing is pending, neither arrivals nor bytes.

    `copies` are those that will complete on it. They are done when somebody waits.
    """

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def arrive(self, threads: int) -> None:
        self.pending -= threads
        if self.pending < 0:
            raise PtxError(f"more than {self.count} arrivals at an mbarrier in one phase")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def mbarrier(machine, address: int) -> MBarrier:
    """The mbarrier at an address of shared memory."""
    if (key := ("mbarrier", int(address))) not in machine.barriers:
        raise PtxError(f"no mbarrier was initialized at {int(address):#x}")
    return machine.barriers[key]


def _threads_at(strand: Strand, addresses: np.ndarray, active: np.ndarray | None):
    """(address, indices of threads) for each warp and each address in it."""
    on = np.ones(strand.size, bool) if active is None else active
    for warp in range(len(strand.warps)):
        threads = np.flatnonzero(on[32 * warp : 32 * warp + 32]) + 32 * warp
        here = addresses[threads]
        if len(here) and (here == here[0]).all():
            yield int(here[0]), threads
        else:
            for address in np.unique(here):
                yield int(address), threads[here == address]


@instruction("mbarrier")
def _mbarrier(machine, code, modifiers):
    if not modifiers.flag("shared", "shared::cta"):
        raise PtxError("only mbarriers in the CTA's shared memory are emulated")
    modifiers.flag("b64")
    for name in ("release", "relaxed", "acquire", "cta"):
        modifiers.flag(name)
    operation = modifiers.choose("init", "inval", "arrive", "try_wait", "expect_tx")
    arrives_expecting = operation == "arrive" and modifiers.flag("expect_tx")
    parity = modifiers.flag("parity")
    modifiers.done()
    operands = list(code.operands)
    if operation == "init":
        addresses, count = machine.addresses(operands[0], "shared"), machine.reader(operands[1], "u32")

        def init(strand, active):
            where, counts = addresses(strand), np.broadcast_to(count(strand), (strand.size,))
            for address, threads in _threads_at(strand, where, active):
                machine.memory.check_shared(np.array([address, address + 7]))
                n = int(counts[threads[0]])
                machine.barriers["mbarrier", address] = MBarrier(n, n)

        return init
    if operation == "inval":
        addresses = machine.addresses(operands[0], "shared")

        def invalidate(strand, active):
            for address, _ in _threads_at(strand, addresses(strand), active):
                mbarrier(machine, address)
                del machine.barriers["mbarrier", address]

        return invalidate
    if operation == "try_wait":
        if not parity:
            raise PtxError("try_wait without .parity")
        write, addresses = machine.writer(operands[0], "pred"), machine.addresses(operands[1], "shared")
        read_parity = machine.reader(operands[2], "u32")

        def wait(strand, active):
            address = int(strand.uniform(addresses(strand), "the mbarrier", active))
            wanted = int(strand.uniform(read_parity(strand), "the parity", active))
            # Waits for the end of the phase of this parity, however long: the timeout is only a hint.
            barrier = mbarrier(machine, address)
            while barrier.phase & 1 == wanted and barrier.copies:
                barrier.copies.pop(0)()
                barrier.settle()
            if barrier.phase & 1 == wanted:
                raise Blocked
            write(strand, np.True_, None)

        return wait
    if operation not in ("arrive", "expect_tx"):
        raise PtxError("this mbarrier operation is not emulated")
    state = operands.pop(0) if operation == "arrive" else Name("_")
    # The state is only good for waiting by state, which is not emulated: it reads as an arbitrary number.
    write = machine.writer(state, "b64")
    addresses = machine.addresses(operands[0], "shared")
    amount = machine.reader(operands[1], "u32") if len(operands) > 1 else None

    def arrive(strand, active):
        where = addresses(strand)
        amounts = np.broadcast_to(amount(strand) if amount else np.uint32(1), (strand.size,)).astype(np.int64)
        for address, threads in _threads_at(strand, where, active):
            barrier = mbarrier(machine, address)
            total = int(amounts[threads].sum())
            if operation == "expect_tx":
                barrier.bytes += total
            else:
                barrier.bytes += total if arrives_expecting else 0
                barrier.arrive(len(threads) if arrives_expecting else total)
        write(strand, np.uint64(0xDEADBEEF), active)

    return arrive
