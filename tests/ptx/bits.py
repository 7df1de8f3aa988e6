"""Instructions on bits: logic, shifts, fields, bytes, counts, and the dot product of bytes."""

import numpy as np

from ptx.arithmetic import elementwise
from ptx.machine import instruction


@instruction("and", "or", "xor", "not")
def _logic(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[code.opcode]
    return elementwise(machine, code, function, *[kind.name] * len(code.operands))


@instruction("lop3")
def _lop3(machine, code, modifiers):
    modifiers.type()
    modifiers.done()
    table = int(code.operands[4].value)
    reads = [machine.reader(operand, "b32") for operand in code.operands[1:4]]
    write = machine.writer(code.operands[0], "b32")

    def run(strand, active):
        a, b, c = (read(strand) for read in reads)
        result = np.zeros(strand.size, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        write(strand, result, active)

    return run


def shift_left(a, n):
    """Bits shifted out are lost, also all of them."""
    bits = 8 * a.dtype.itemsize
    n = np.asarray(n)
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, bits - 1).astype(a.dtype))


def shift_right(a, n):
    """Fills with the sign where `a` is signed."""
    bits = 8 * a.dtype.itemsize
    n = np.asarray(n)
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), shifted)


@instruction("shl", "shr")
def _shift(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()
    return elementwise(machine, code, shift_left if code.opcode == "shl" else shift_right, kind.name, kind.name, "u32")


@instruction("shf")
def _funnel(machine, code, modifiers):
    modifiers.type()
    left, wrap = modifiers.choose("l", "r") == "l", modifiers.choose("wrap", "clamp") == "wrap"
    modifiers.done()

    def funnel(low, high, n):
        pair = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        return ((pair << n) >> np.uint64(32) if left else pair >> n).astype(np.uint32)

    return elementwise(machine, code, funnel, "b32", "b32", "b32", "u32")


def _field(position, length, bits):
    return np.minimum(position & np.uint32(0xFF), bits), np.minimum(length & np.uint32(0xFF), bits)


def _ones(length, dtype):
    return ~shift_left(np.full(np.shape(length), ~dtype.type(0)), length)


@instruction("bfe")
def _extract(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()

    def extract(a, position, length):
        position, length = _field(position, length, kind.bits)
        # Bits above the last of a signed number are copies of it, which the arithmetic shift brings in.
        field = shift_right(a, position).view(kind.raw) & _ones(length, kind.raw)
        if kind.is_signed:
            last = np.minimum(np.maximum(position + length, 1) - 1, kind.bits - 1)
            negative = (shift_right(a.view(kind.raw), last) & kind.raw.type(1)).astype(bool) & (length > 0)
            field = np.where(negative, field | ~_ones(length, kind.raw), field)
        return field.view(kind.dtype)

    return elementwise(machine, code, extract, kind.name, kind.name, "u32", "u32")


@instruction("bfi")
def _insert(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()

    def insert(a, b, position, length):
        position, length = _field(position, length, kind.bits)
        field = shift_left(_ones(length, kind.raw), position)
        return (b & ~field) | (shift_left(a, position) & field)

    return elementwise(machine, code, insert, kind.name, kind.name, kind.name, "u32", "u32")


@instruction("prmt")
def _permute(machine, code, modifiers):
    modifiers.type()
    modifiers.done()

    def permute(a, b, selector):
        pair = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        result = np.zeros(np.broadcast_shapes(pair.shape, selector.shape), np.uint32)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (pair >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result |= np.where(choice & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
        return result

    return elementwise(machine, code, permute, "b32", "b32", "b32", "b32")


@instruction("popc", "clz", "brev")
def _count(machine, code, modifiers):
    kind = modifiers.type()
    modifiers.done()
    result = kind.name if code.opcode == "brev" else "u32"

    def count(a):
        ones = np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1, bitorder="little")
        if code.opcode == "popc":
            return ones.sum(-1).astype(np.uint32)
        if code.opcode == "brev":
            return np.packbits(ones[..., ::-1], axis=-1, bitorder="little").view(kind.raw)[..., 0]
        leading = np.argmax(ones[..., ::-1], axis=-1)
        return np.where(ones.any(-1), leading, kind.bits).astype(np.uint32)

    return elementwise(machine, code, count, result, kind.name)


@instruction("dp4a")
def _dot(machine, code, modifiers):
    b_type, a_type = modifiers.type(), modifiers.type()
    modifiers.done()
    result = "s32" if a_type.is_signed or b_type.is_signed else "u32"

    def dot(a, b, c):
        split = lambda value, kind: np.ascontiguousarray(value)[..., None].view(f"{kind.name[0].replace('s', 'i')}1")
        return (split(a, a_type).astype(np.int64) * split(b, b_type)).sum(-1).astype(c.dtype) + c

    return elementwise(machine, code, dot, result, "b32", "b32", result)
