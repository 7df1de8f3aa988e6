"""Instructions that compute each thread's result from its own operands: integers, floats, bits, comparisons, conversions."""

from collections.abc import Callable

import numpy as np

from ptx.machine import Machine, Modifiers, instruction
from ptx.numbers import Type, flush, fma, narrow
from ptx.parser import Instruction, PtxError, Vector
from ptx.registers import Action, Strand


def elementwise(machine: Machine, code: Instruction, function: Callable, result: str, *types: str) -> Action:
    """result type name, then one type name an operand."""
    if len(code.operands) != 1 + len(types):
        raise PtxError(f"{len(code.operands)} operands, not {1 + len(types)}")
    write = machine.writer(code.operands[0], result)
    reads = [machine.reader(operand, name) for operand, name in zip(code.operands[1:], types)]
    return lambda strand, active: write(strand, function(*(read(strand) for read in reads)), active)


def _float(function: Callable, kind: Type, modifiers: Modifiers) -> Callable:
    """A float operation with its .ftz, .sat and .relu. The result is rounded to nearest even."""
    modifiers.flag("rn")
    ftz, saturate, relu = modifiers.flag("ftz"), modifiers.flag("sat"), modifiers.flag("relu")
    modifiers.done()

    def compute(*values):
        values = [flush(value) for value in values] if ftz else values
        result = np.asarray(function(*values)).astype(kind.dtype, copy=False)
        result = flush(result) if ftz else result
        if saturate:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(kind.dtype)
        return np.where(result < 0, 0, result).astype(kind.dtype) if relu else result

    return compute


def _integer(function: Callable, modifiers: Modifiers) -> Callable:
    modifiers.done()
    return function


def _saturating(function: Callable, modifiers: Modifiers, kind: Type) -> Callable:
    if modifiers.flag("sat"):
        if kind.name != "s32":
            raise PtxError(".sat is for .s32 only")
        wide = lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1)
        return _integer(lambda a, b: wide(a, b).astype(np.int32), modifiers)
    return _integer(function, modifiers)


@instruction("add", "sub")
def _add(machine, code, modifiers):
    kind = modifiers.type()
    function = np.add if code.opcode == "add" else np.subtract
    compute = _float(function, kind, modifiers) if kind.is_float else _saturating(function, modifiers, kind)
    return elementwise(machine, code, compute, *[kind.name] * 3)


@instruction("mul", "mad", "fma")
def _multiply(machine, code, modifiers):
    kind = modifiers.type()
    count = 2 if code.opcode == "mul" else 3
    if kind.is_float:
        function = np.multiply if count == 2 else fma
        return elementwise(machine, code, _float(function, kind, modifiers), *[kind.name] * (1 + count))
    part = modifiers.choose("lo", "hi", "wide")
    modifiers.done()
    result = kind.name if part != "wide" else f"{kind.name[0]}{2 * kind.bits}"
    product = {"lo": _low, "hi": _high, "wide": _wide}[part]
    if count == 2:
        return elementwise(machine, code, product, result, kind.name, kind.name)
    return elementwise(machine, code, lambda a, b, c: product(a, b) + c, result, kind.name, kind.name, result)


def _low(a, b):
    return a * b


def _wide(a, b):
    wider = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wider) * b.astype(wider)


def _high(a, b):
    if a.dtype.itemsize < 8:
        return (_wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    return ((a.astype(object) * b.astype(object)) >> 64).astype(a.dtype)


@instruction("div", "rem")
def _divide(machine, code, modifiers):
    kind = modifiers.type()
    if kind.is_float and code.opcode == "div":
        modifiers.flag("full", "approx")
        return elementwise(machine, code, _float(np.divide, kind, modifiers), *[kind.name] * 3)

    def divide(a, b):
        if (np.asarray(b) == 0).any():
            raise PtxError("integer division by zero")
        quotient, rest = np.divmod(a, b)
        # numpy rounds down, PTX towards zero.
        down = (rest != 0) & ((a < 0) != (b < 0))
        return quotient + down.astype(a.dtype) if code.opcode == "div" else np.where(down, rest - b, rest)

    return elementwise(machine, code, _integer(divide, modifiers), *[kind.name] * 3)


@instruction("min", "max")
def _extreme(machine, code, modifiers):
    kind = modifiers.type()
    low = code.opcode == "min"
    if kind.is_float:
        function = (np.minimum, np.maximum) if modifiers.flag("NaN") else (np.fmin, np.fmax)
        return elementwise(machine, code, _float(function[0 if low else 1], kind, modifiers), *[kind.name] * 3)
    return elementwise(machine, code, _integer(np.minimum if low else np.maximum, modifiers), *[kind.name] * 3)


@instruction("abs", "neg", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh", "sin", "cos")
def _unary(machine, code, modifiers):
    """.approx is computed exactly and rounded; a GPU's result may differ in the last bits."""
    kind = modifiers.type()
    functions = {
        "rcp": lambda x: 1.0 / x,
        "rsqrt": lambda x: 1.0 / np.sqrt(x),
        "ex2": np.exp2,
        "lg2": np.log2,
    } | {name: getattr(np, name) for name in ("sqrt", "tanh", "sin", "cos")}
    if code.opcode in functions:
        if not kind.is_float or not modifiers.flag("approx", "rn"):
            raise PtxError("only .approx and .rn are emulated")
        exact = lambda x: narrow(functions[code.opcode](x.astype(np.float64)), kind.dtype)
        return elementwise(machine, code, _float(exact, kind, modifiers), kind.name, kind.name)
    function = np.abs if code.opcode == "abs" else np.negative
    compute = _float(function, kind, modifiers) if kind.is_float else _integer(function, modifiers)
    return elementwise(machine, code, compute, kind.name, kind.name)


@instruction("setp")
def _compare(machine, code, modifiers):
    kind = modifiers.type()
    ftz = modifiers.flag("ftz")
    combine = modifiers.choose("and", "or", "xor")
    comparison = modifiers.choose(*_COMPARISONS)
    modifiers.done()
    if comparison is None or kind.lanes > 1:
        raise PtxError("this comparison is not emulated")
    targets = code.operands[0].items if isinstance(code.operands[0], Vector) else (code.operands[0],)
    writes = [machine.writer(target, "pred") for target in targets]
    reads = [machine.reader(operand, kind.name) for operand in code.operands[1:3]]
    other = machine.reader(code.operands[3], "pred") if combine else None
    both = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(combine)

    def run(strand: Strand, active):
        a, b = (flush(read(strand)) if ftz else read(strand) for read in reads)
        result = np.broadcast_to(_COMPARISONS[comparison](a, b), (strand.size,))
        for write, value in zip(writes, (result, ~result)):
            write(strand, value if both is None else both(value, other(strand)), active)

    return run


_nan = lambda a, b: np.isnan(a) | np.isnan(b)
_COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ~_nan(a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: (a == b) | _nan(a, b),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_nan(a, b),
    "nan": _nan,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


@instruction("selp")
def _select(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()
    choose = lambda a, b, p: np.where(p, a, b)
    return elementwise(
        machine, code, choose, kind.raw.name.replace("uint", "b"), *[kind.raw.name.replace("uint", "b")] * 2, "pred"
    )


@instruction("copysign")
def _copysign(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()
    return elementwise(machine, code, lambda a, b: np.copysign(b, a), *[kind.name] * 3)
