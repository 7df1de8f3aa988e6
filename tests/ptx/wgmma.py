"""The warpgroup matrix multiply-accumulate: D (64, N) = A (64, K) @ B (K, N) + D, K of 32 bytes.

It is done when its group is waited for, as late as a GPU may: whoever touches D, A or shared memory before gets it wrong.

Layouts of registers and of shared memory: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
"""

import functools
import re

import numpy as np

from ptx.machine import Machine, instruction
from ptx.numbers import TYPES
from ptx.parser import Immediate, PtxError, Register, Vector
from ptx.registers import Blocked, InFlight, Strand
from ptx.tma import swizzle

_ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # by the descriptor's swizzle mode


def _places(n: int) -> np.ndarray:
    """(n / 2 registers, 32 threads): where a warp's (16, n) rows of D hold the element of a thread's register."""
    lane, register = np.arange(32), np.arange(n // 2)[:, None]
    row = lane // 4 + 8 * (register // 2 % 2)
    return row * n + 8 * (register // 4) + 2 * (lane % 4) + register % 2


def _warpgroups(machine: Machine, strand: Strand) -> list[tuple[Strand, InFlight]]:
    """The warpgroups of a strand, each with what it has in flight; Blocked until all four warps of each are here."""
    rows = strand.warps[: len(strand.warps) // 4 * 4].reshape(-1, 4)
    if len(strand.warps) % 4 or (rows != rows[:, :1] // 4 * 4 + np.arange(4)).any():
        raise Blocked
    return [(Strand(row, strand.pc), machine.in_flight.setdefault(("wgmma", int(row[0])), InFlight())) for row in rows]


@instruction("wgmma")
def _wgmma(machine, code, modifiers):
    step = modifiers.choose("fence", "commit_group", "wait_group", "mma_async")
    if not (step and modifiers.flag("sync") and modifiers.flag("aligned")):
        raise PtxError("this instruction is not emulated")
    if step == "mma_async":
        return _multiply(machine, code, modifiers)
    modifiers.done()
    if step == "fence":
        return lambda strand, active: None
    if step == "commit_group":
        return lambda strand, active: [work.commit() for _, work in _warpgroups(machine, strand)]
    keep = code.operands[0].value
    return lambda strand, active: [work.wait(keep) for _, work in _warpgroups(machine, strand)]


def _multiply(machine, code, modifiers):
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", modifiers.parts.pop(0))
    names = [modifiers.parts.pop(0) for _ in range(3)]
    modifiers.done()
    if " ".join(names) not in ("f32 bf16 bf16", "f32 f16 f16", "f32 e4m3 e4m3", "s32 s8 s8"):
        raise PtxError(f"{' '.join(names)} is not emulated")
    n, k = int(shape[1]), int(shape[2])
    a_type = b_type = TYPES[names[1]]
    item = a_type.dtype.itemsize
    if k * item != 32 or n % 8 or not 8 <= n <= 256:
        raise PtxError(f"no instruction has the shape {shape[0]}")
    d, a, b, keep, *flags = code.operands
    if not isinstance(d, Vector) or len(d.items) != n // 2:
        raise PtxError(f"{n // 2} accumulator registers are wanted")
    if any(not isinstance(flag, Immediate) for flag in flags):
        raise PtxError("flags have to be constants")
    # Signs of A and B (floats); whether they lie transposed (16 bits; of A only where it is in memory).
    signs, transposes = ([], []) if names[0] == "s32" else ([flag.value for flag in flags[:2]], flags[2:])
    wanted = 0 if item == 1 else 1 if isinstance(a, Vector) else 2
    if signs not in ([], [1, 1]) or len(flags) != len(signs) + wanted:
        raise PtxError("these flags are not emulated")
    b_transposed = wanted > 0 and bool(transposes[-1].value)
    a_transposed = wanted == 2 and bool(transposes[0].value)
    reads = [machine.reader(register, names[0]) for register in d.items]
    writes = [machine.writer(register, names[0]) for register in d.items]
    keeps = machine.reader(keep, "pred")
    if isinstance(a, Vector):
        if len(a.items) != 4:
            raise PtxError("4 registers of A are wanted")
        a_reads = [machine.reader(register, "b32") for register in a.items]
    elif isinstance(a, Register):
        a_reads = [machine.reader(a, "u64")]
    else:
        raise PtxError("A is neither registers nor a descriptor")
    b_read = machine.reader(b, "u64")
    places = _places(n)

    def multiply(strand: Strand, a_descriptor: int, b_descriptor: int, keeps_sum: bool) -> None:
        """Of one warpgroup."""
        if isinstance(a, Vector):
            fragments = np.stack([np.broadcast_to(read(strand), (128,)) for read in a_reads], -1)
            rows = _from_registers(fragments, a_type)
        else:
            rows = _operand(machine.memory, a_descriptor, 64, a_type, a_transposed)
        columns = _operand(machine.memory, b_descriptor, n, b_type, b_transposed)
        # float64 holds products and sums of every type here exactly, or nearly: a GPU keeps fewer bits.
        product = (rows.astype(np.float64) @ columns.astype(np.float64).T).reshape(4, 16 * n)
        for read, write, total in zip(reads, writes, product[:, places].swapaxes(0, 1).reshape(n // 2, 128)):
            if keeps_sum:
                total = total + read(strand).astype(np.float64)
            whole = names[0] == "s32"
            write(strand, total.astype(np.int64).astype(np.int32) if whole else total.astype(np.float32), None)

    def run(strand: Strand, active):
        if active is not None:
            raise PtxError("some threads are off")
        for group, work in _warpgroups(machine, strand):
            # Descriptors are read at once, registers and memory when somebody waits.
            a_descriptor = 0 if isinstance(a, Vector) else _one(a_reads[0](group), "A's descriptor")
            b_descriptor = _one(b_read(group), "B's descriptor")
            keeps_sum = bool(_one(keeps(group), "whether D is kept"))
            work.add(functools.partial(multiply, group, a_descriptor, b_descriptor, keeps_sum))

    return run


def _one(values: np.ndarray, what: str) -> int:
    """What all threads of a warpgroup have to agree on."""
    values = np.atleast_1d(values)
    if (values != values[0]).any():
        raise PtxError(f"{what} differs within a warpgroup")
    return int(values[0])


def _from_registers(fragments: np.ndarray, kind) -> np.ndarray:
    """(128 threads, 4) registers -> (64, K). Register r: rows of half r % 2, columns of half r // 2."""
    item = kind.dtype.itemsize
    values = np.ascontiguousarray(fragments).view(kind.dtype).reshape(-1, 8, 4, 2, 2, 4 // item)
    # warp, row in 8, lane % 4, column half, row half, element -> warp, row half, row in 8, column half, lane % 4, element
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(64, 32 // item)


def _operand(memory, descriptor: int, rows: int, kind, transposed: bool) -> np.ndarray:
    """Reads (rows, K) from shared memory by a matrix descriptor; `transposed`: rows are the contiguous dimension."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise PtxError("a matrix descriptor with a base offset is not emulated")
    width, item = _ROW_BYTES[mode], kind.dtype.itemsize
    row = np.arange(rows)[:, None]
    if transposed:
        if item != 2:
            raise PtxError("8-bit operands have to be K-major")
        k = np.arange(16)[None, :]
        per_row = width // 2
        across, down = (stride, leading) if mode == 0 else (leading, stride)
        address = start + row % per_row * 2 + row // per_row * across + k % 8 * width + k // 8 * down
        address = swizzle(address, width)[..., None] + np.arange(2)
    else:
        byte = np.arange(32)[None, :]
        address = (
            start + row // 8 * stride + row % 8 * width + (byte % 16 + byte // 16 * leading if mode == 0 else byte)
        )
        address = swizzle(address, width)
    data = memory.shared_bytes(address.reshape(rows, 32))
    return data.view(kind.dtype)
