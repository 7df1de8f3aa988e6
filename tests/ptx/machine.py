"""Runs a program: registers, warps that go together, branches and barriers between them.

The threads of a CTA are one numpy axis. Warps that stand at the same instruction go through it together, as a strand, until
something makes them wait or part. Asynchronous work (TMA, wgmma) is done as late as it may be, when somebody waits for it,
so that a missing wait shows. What is not modelled: fences between memory accesses, and time.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from ptx.memory import SHARED_START, Memory
from ptx.numbers import UNSIGNED, Type, type_named
from ptx.parser import Address, Immediate, Instruction, Name, Program, PtxError, Register
from ptx.registers import Action, Blocked, File, Part, Reader, Strand, Writer, constant


@dataclasses.dataclass
class Modifiers:
    """The dotted parts of an opcode. Handlers take what they know; `done` refuses the rest."""

    parts: list[str]

    def type(self) -> Type:
        return type_named(self.parts.pop()) if self.parts else type_named("(none)")

    def flag(self, *names: str) -> bool:
        """Whether one of `names` is there; takes it."""
        return self.choose(*names) is not None

    def choose(self, *names: str) -> str | None:
        for name in names:
            if name in self.parts:
                self.parts.remove(name)
                return name
        return None

    def done(self) -> None:
        if self.parts:
            raise PtxError(f"modifier .{self.parts[0]} is not emulated here")


# Decoders by opcode. One is called with the machine, the instruction and its modifiers, and returns what it does.
HANDLERS: dict[str, Callable[["Machine", Instruction, Modifiers], Action]] = {}


def instruction(*opcodes: str) -> Callable:
    """Registers the decoder of some opcodes."""

    def register(decoder: Callable) -> Callable:
        HANDLERS.update(dict.fromkeys(opcodes, decoder))
        return decoder

    return register


class Machine:
    """Decodes a program once; runs it for one CTA after another.

    Attributes:
        memory, threads, grid, cta: of the running CTA.
        executed: how many instructions have been run, each once for all warps that took it together.
    """

    def __init__(self, program: Program, memory: Memory, block: tuple[int, int, int], grid: tuple[int, int, int]):
        self.program, self.memory, self.block, self.grid = program, memory, block, grid
        self.threads = block[0] * block[1] * block[2]
        if self.threads % 32:
            raise PtxError(f"a CTA of {self.threads} threads is not whole warps")
        self.cta = (0, 0, 0)
        self.registers: dict[str, File] = {}
        self.symbols = layout(program)
        self.barriers: dict = {}  # by number: bar.sync's; by ("mbarrier", address): mbarriers
        self.in_flight: dict = {}  # ("wgmma", first warp) or ("copy", thread) to InFlight
        self.executed = self.last = 0
        self.actions = [self._decode(instruction) for instruction in program.instructions]

    # Decoding

    def _decode(self, instruction: Instruction) -> Callable[[Strand], None]:
        try:
            if instruction.opcode not in HANDLERS:
                raise PtxError("this instruction is not emulated")
            action = HANDLERS[instruction.opcode](self, instruction, Modifiers(list(instruction.modifiers)))
        except PtxError as error:
            raise PtxError(f"{instruction.text[:120]}: {error}") from None
        if instruction.guard is None:
            return lambda strand: action(strand, None)
        guard = self.reader(instruction.guard, "pred")

        def guarded(strand: Strand) -> None:
            active = guard(strand)
            if active.all():
                action(strand, None)
            elif active.any() or instruction.opcode in ("bra", "ret", "exit"):
                action(strand, active)

        return guarded

    def file(self, register: Register) -> File:
        if register.name not in self.registers:
            self.registers[register.name] = File(register.name, type_named(register.type).bits, self.threads)
        return self.registers[register.name]

    def reader(self, operand, type_name: str) -> Reader:
        """A function that reads `operand` as a type; a register wider than the type lends its low bits."""
        kind = type_named(type_name)
        if isinstance(operand, Immediate):
            fixed = constant(operand, kind)
            return lambda strand: fixed
        if isinstance(operand, Name):
            return self._special(operand.name, kind)
        if not isinstance(operand, Register):
            raise PtxError(f"operand {operand} where a value of type .{type_name} is wanted")
        file, width = self.file(operand), type_named(operand.type).bits
        if kind.name == "pred":
            if width != 1:
                raise PtxError(f"{operand.name} is not a predicate")
            return (lambda strand: ~file.read(strand)) if operand.negated else file.read
        if width < kind.bits or width == 1:
            raise PtxError(f"{operand.name} of {width} bits read as .{type_name}")
        narrower = width > kind.bits

        def read(strand: Strand) -> np.ndarray:
            values = file.read(strand)
            if narrower:
                values = values.astype(kind.raw)
            return values.view(kind.dtype) if kind.lanes == 1 else values.view(kind.dtype).reshape(-1, kind.lanes)

        return read

    def writer(self, operand, type_name: str) -> Writer:
        """A function that writes values of a type; a wider register gets them extended as the type says."""
        kind = type_named(type_name)
        if operand == Name("_"):
            return lambda strand, values, active: None
        if not isinstance(operand, Register):
            raise PtxError(f"cannot write to {operand}")
        file, width = self.file(operand), type_named(operand.type).bits
        if (kind.name == "pred") != (width == 1) or width < kind.bits:
            raise PtxError(f".{type_name} written to {operand.name} of {width} bits")
        extended = np.dtype(f"i{width // 8}") if kind.is_signed else UNSIGNED[width]
        if kind.name == "pred":
            return file.write

        def write(strand: Strand, values: np.ndarray, active: np.ndarray | None) -> None:
            values = np.ascontiguousarray(values, kind.dtype)
            values = values.view(kind.raw).reshape(-1) if kind.lanes > 1 else values
            if width != kind.bits:
                values = values.astype(extended)
            file.write(strand, values.view(UNSIGNED[width]), active)

        return write

    def addresses(self, operand: Address, space: str) -> Reader:
        """A function that reads base + offset as uint64. Shared addresses live in 32 bits."""
        if not isinstance(operand, Address):
            raise PtxError(f"operand {operand} where an address is wanted")
        base = operand.base
        width = type_named(base.type).bits if isinstance(base, Register) else 64
        read = self.reader(base, f"u{width}")
        wrap = np.uint64(0xFFFFFFFF if width == 32 else 0xFFFFFFFFFFFFFFFF)
        offset = np.uint64(operand.offset & 0xFFFFFFFFFFFFFFFF)
        return lambda strand: np.broadcast_to((read(strand).astype(np.uint64) + offset) & wrap, (strand.size,))

    def _special(self, name: str, kind: Type) -> Reader:
        if name in self.symbols:
            address = np.array(self.symbols[name]).astype(kind.dtype)
            return lambda strand: address
        x, y, _ = self.block
        by_thread = {
            "%tid.x": lambda thread: thread % x,
            "%tid.y": lambda thread: thread // x % y,
            "%tid.z": lambda thread: thread // (x * y),
            "%laneid": lambda thread: thread % 32,
            "%warpid": lambda thread: thread // 32,
        }
        if name in by_thread:
            return lambda strand: by_thread[name](strand.threads).astype(kind.dtype)
        # A cluster is one CTA here.
        of_cta = {"%nwarpid": lambda: self.threads // 32, "%cluster_ctarank": lambda: 0, "%cluster_nctarank": lambda: 1}
        for i, axis in enumerate("xyz"):
            of_cta[f"%ntid.{axis}"] = lambda i=i: self.block[i]
            of_cta[f"%nctaid.{axis}"] = of_cta[f"%nclusterid.{axis}"] = lambda i=i: self.grid[i]
            of_cta[f"%ctaid.{axis}"] = of_cta[f"%clusterid.{axis}"] = lambda i=i: self.cta[i]
            of_cta[f"%cluster_ctaid.{axis}"], of_cta[f"%cluster_nctaid.{axis}"] = lambda: 0, lambda: 1
        if name not in of_cta:
            raise PtxError(f"{name!r} is not emulated")
        return lambda strand: np.array(of_cta[name]()).astype(kind.dtype)

    # Running

    def run(self, cta: tuple[int, int, int], limit: int = 10_000_000) -> None:
        """One CTA, from its first instruction to the last warp's end. PtxError says where it went wrong.

        `limit` bounds the number of instructions (of a strand, not of a warp).
        """
        self.cta = cta
        self.last = self.executed + limit
        self.barriers = {}
        self.in_flight = {}
        for file in self.registers.values():
            file.defined = 0
        self.memory.begin(self.threads)
        strands = [Strand(np.arange(self.threads // 32), 0)]
        while strands:
            done = self.executed
            strands = [left for strand in _join(strands) for left in self._advance(strand)]
            if strands and self.executed == done:
                raise PtxError(f"CTA {cta}: deadlock; " + "; ".join(self._where(strand) for strand in strands))
        # Stores that nobody waited for happen in the end; products that nobody waited for are lost.
        for (kind, _), work in self.in_flight.items():
            if kind == "copy":
                work.commit()
                work.wait(0)

    def _advance(self, strand: Strand) -> list[Strand]:
        """Runs a strand until it ends, waits or parts. What is left of it."""
        actions = self.actions
        while True:
            try:
                if strand.waiting is not None:
                    barrier, generation = strand.waiting
                    if barrier.generation == generation:
                        return [strand]
                    strand.waiting = None
                if strand.pc >= len(actions):
                    raise PtxError("ran over the end of the program")
                if self.executed >= self.last:
                    raise PtxError("still running after as many instructions as are allowed")
                at = strand.pc
                strand.pc += 1
                actions[at](strand)
                self.executed += 1
                if strand.pc < 0:
                    return []
            except Blocked:
                strand.pc = at
                return [strand]
            except Part as parting:
                parts = [Strand(strand.warps[parting.keys == key], at) for key in np.unique(parting.keys)]
                return [left for part in parts for left in self._advance(part)]
            except PtxError as error:
                strand.pc = at
                raise PtxError(f"CTA {self.cta}, {self._where(strand)}: {error}") from None

    def _where(self, strand: Strand) -> str:
        at = strand.pc - 1 if strand.waiting else strand.pc
        text = self.program.instructions[at].text if at < len(self.actions) else "the end"
        return f"warps {strand.warps[0]} to {strand.warps[-1]} at `{text[:100]}`"


def _join(strands: list[Strand]) -> list[Strand]:
    """Strands at the same place go on together."""
    groups: dict = {}
    for strand in strands:
        groups.setdefault((strand.pc, strand.waiting), []).append(strand)
    return [
        group[0] if len(group) == 1 else Strand(np.sort(np.concatenate([strand.warps for strand in group])), *place)
        for place, group in groups.items()
    ]


def layout(program: Program) -> dict[str, int]:
    """Addresses of variables and parameters, each in its own space; extern shared memory lies behind the rest."""
    symbols = {}
    at = {"shared": SHARED_START, "local": 0, "param": 0}
    sized = sorted(program.variables, key=lambda variable: variable.bytes is None)
    for variable in (*sized, *program.parameters):
        space = getattr(variable, "space", "param")
        symbols[variable.name] = at[space] = -(-at[space] // variable.align) * variable.align
        at[space] += variable.bytes or 0
    return symbols


def sizes(program: Program) -> dict[str, int]:
    """Bytes that the variables and parameters take, by space."""
    symbols = layout(program)
    ends = {"shared": 0, "local": 0, "param": 0}
    for variable in (*program.variables, *program.parameters):
        space = getattr(variable, "space", "param")
        start = symbols[variable.name] - (SHARED_START if space == "shared" else 0)
        ends[space] = max(ends[space], start + (variable.bytes or 0))
    return ends
