"""Reads PTX text into instructions. Knows the syntax; what an opcode means stands in the other modules.

The language: https://docs.nvidia.com/cuda/parallel-thread-execution (version 9). What Mosaic never writes is refused:
function calls, global variables, textures.
"""

import dataclasses
import re


class PtxError(RuntimeError):
    """The text asks for something that the emulator does not know, or that no GPU would do."""


@dataclasses.dataclass(frozen=True)
class Register:
    name: str
    type: str  # as declared: b32, f32, pred, ...
    negated: bool = False  # a predicate read as !p


@dataclasses.dataclass(frozen=True)
class Immediate:
    value: int
    float_bits: int = 0  # 32 or 64: `value` is the bit pattern of a float of this width; 0: an integer


@dataclasses.dataclass(frozen=True)
class Name:
    """A special register (%tid.x), a variable, a parameter, a label, or the sink `_`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor copy."""

    base: "Register | Name | Immediate"
    offset: int = 0
    coordinates: "tuple | None" = None


@dataclasses.dataclass(frozen=True)
class Vector:
    """{a, b, ...}, or the pair a|b of two destinations."""

    items: tuple


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str  # up to the first dot
    modifiers: tuple[str, ...]  # the rest, cut at dots
    operands: tuple
    guard: Register | None
    text: str
    scope: tuple[int, ...] = (0,)  # the blocks that it stands in, outermost first, for names of labels


@dataclasses.dataclass(frozen=True)
class Variable:
    """A declaration in shared or local memory. `bytes` is None for extern shared memory, sized at launch."""

    name: str
    space: str
    align: int
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class Parameter:
    name: str
    bytes: int
    align: int


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # a label's name (with its block's number where it is local) to an index
    parameters: tuple[Parameter, ...]
    variables: tuple[Variable, ...]


_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>-?(?:0[xX][0-9a-fA-F]+|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+)U?\b)
    |(?P<word>[%$A-Za-z_.][\w$%.]*(?:::[\w.]+)*)
    |(?P<string>"[^"]*")
    |(?P<mark>[{}\[\]();:,|+@!<>=-])
    )""",
    re.VERBOSE,
)


def parse(text: str) -> Program:
    """The one kernel of a PTX module."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    if len(entries := re.findall(r"\.entry\s+([\w$]+)\s*\(", text)) != 1:
        raise PtxError(f"expected a module with one kernel, found {len(entries)}")
    header, rest = re.split(r"\.entry\s+[\w$]+\s*\(", text, maxsplit=1)
    parameters, rest = rest.split(")", 1)
    body = rest[rest.index("{") + 1 : re.search(r"\}\s*(?=\.section|\Z)", rest).start()]
    if re.search(r"\.(?:global|const|func)\b", header):
        raise PtxError("global variables and functions are not emulated")
    reader = _Reader(body)
    reader.variables += [_variable(line) for line in re.findall(r"\.shared\s[^;]*", header)]
    reader.statements()
    return Program(
        entries[0],
        tuple(reader.instructions),
        reader.labels,
        tuple(_parameter(line) for line in parameters.split(",") if line.strip()),
        tuple(reader.variables),
    )


def _parameter(line: str) -> Parameter:
    match = re.fullmatch(
        r"\s*\.param\s+(?:\.align (\d+) )?\.[a-z](\d+)\s*(?:\.ptr\S*\s+)?(?:\.\w+\s+)*?(?:\.align \d+\s+)?"
        r"([\w$]+)(?:\[(\d+)\])?\s*",
        line,
    )
    if not match:
        raise PtxError(f"parameter of unknown form: {line.strip()}")
    size = _BYTES[match[2]] * int(match[4] or 1)
    return Parameter(match[3], size, int(match[1] or _BYTES[match[2]]))


def _variable(line: str) -> Variable:
    match = re.fullmatch(r"\s*\.(shared|local)\s+(?:\.align (\d+)\s+)?\.[a-z](\d+)\s+([\w$]+)(\[(\d*)\])?\s*", line)
    if not match:
        raise PtxError(f"declaration of unknown form: {line.strip()}")
    width = _BYTES[match[3]]
    extern = match[5] is not None and not match[6]
    return Variable(match[4], match[1], int(match[2] or width), None if extern else width * int(match[6] or 1))


class _Reader:
    """Recursive descent over the tokens of a kernel's body."""

    def __init__(self, body: str):
        self.tokens: list[tuple[str, str]] = []
        position = 0
        body = body.rstrip()
        while position < len(body):
            if not (match := _TOKEN.match(body, position)):
                raise PtxError(f"cannot read PTX at: {body[position : position + 60].strip()!r}")
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()
        self.at = 0
        self.blocks = [0]
        self.count = 0
        self.registers: dict[str, str] = {}  # full name, or prefix of a numbered family, to type
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.variables: list[Variable] = []

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        value = self.peek()
        if not value or (wanted is not None and value != wanted):
            raise PtxError(f"expected {wanted or 'more'} and found {value or 'the end'!r}")
        self.at += 1
        return value

    def statements(self) -> None:
        while self.at < len(self.tokens):
            token = self.peek()
            if token == "{":
                self.take()
                self.count += 1
                self.blocks.append(self.count)
            elif token == "}":
                self.take()
                self.blocks.pop()
            elif token == ";":
                self.take()
            elif token.startswith("."):
                self.directive()
            elif self.peek(1) == ":":
                self.labels[self.scoped(self.take())] = len(self.instructions)
                self.take(":")
            else:
                self.instruction()

    def scoped(self, name: str, block: int | None = None) -> str:
        block = self.blocks[-1] if block is None else block
        return f"{name}@{block}" if block else name

    def directive(self) -> None:
        start = self.at
        while self.take() != ";":
            pass
        words = [value for _, value in self.tokens[start : self.at - 1]]
        if words[0] == ".reg":
            for name in (word for word in words[2:] if word not in "<>,"):
                if not name.isdigit():
                    self.registers[self.scoped(name)] = words[1][1:]
        elif words[0] in (".shared", ".local"):
            self.variables.append(
                _variable(" ".join(words).replace(" [ ", "[").replace(" ]", "]").replace("[ ]", "[]"))
            )
        elif words[0] != ".pragma":
            raise PtxError(f"unknown directive: {' '.join(words)}")

    def instruction(self) -> None:
        start = self.at
        guard = None
        if self.peek() == "@":
            self.take()
            negated = self.peek() == "!" and bool(self.take())
            guard = dataclasses.replace(self.register(self.take()), negated=negated)
        opcode, *modifiers = self.take().split(".")
        operands = []
        while self.peek() != ";":
            operands.append(self.operand())
            if self.peek() != ";":
                self.take(",")
        self.take(";")
        text = " ".join(value for _, value in self.tokens[start : self.at - 1])
        self.instructions.append(
            Instruction(opcode, tuple(modifiers), tuple(operands), guard, text, tuple(self.blocks))
        )

    def operand(self):
        if self.peek() == "{":
            items = self.list("{", "}")
            return Vector(tuple(items))
        if self.peek() == "[":
            self.take()
            base = self.operand()
            if self.peek() == ",":
                self.take()
                coordinates = tuple(self.list("{", "}"))
                self.take("]")
                return Address(base, 0, coordinates)
            offset = 0
            if self.peek() == "+":
                self.take()
                offset = self.operand().value
            elif self.tokens[self.at][0] == "number":
                offset = self.operand().value
            self.take("]")
            return Address(base, offset)
        if self.peek() == "!":
            self.take()
            return dataclasses.replace(self.register(self.take()), negated=True)
        kind, value = self.tokens[self.at]
        self.take()
        if kind == "number":
            value = value.removesuffix("U")
            if value[:2] in ("0f", "0F", "0d", "0D"):
                return Immediate(int(value[2:], 16), 32 if value[1] in "fF" else 64)
            return Immediate(int(value, 0))
        if kind != "word":
            raise PtxError(f"operand of unknown form: {value!r}")
        operand = self.register(value, Name(value))
        if self.peek() == "|":
            self.take()
            return Vector((operand, self.operand()))
        return operand

    def list(self, opening: str, closing: str) -> list:
        self.take(opening)
        items = []
        while self.peek() != closing:
            items.append(self.operand())
            if self.peek() != closing:
                self.take(",")
        self.take(closing)
        return items

    def register(self, name: str, otherwise=None):
        """The register that `name` means here: of the innermost block that declares it, or of a numbered family."""
        for block in reversed(self.blocks):
            if (scoped := self.scoped(name, block)) in self.registers:
                return Register(scoped, self.registers[scoped])
        if family := re.fullmatch(r"(\D+)\d+", name):
            for block in reversed(self.blocks):
                if (prefix := self.scoped(family[1], block)) in self.registers:
                    return Register(self.scoped(name, block), self.registers[prefix])
        if name.startswith("%") and name in ("%SP", "%SPL"):
            return Register(name, self.registers.get(name, "b64"))
        if otherwise is None:
            raise PtxError(f"{name!r} is not declared")
        return otherwise
