"""cvt: between floats and integers of every width, and pairs of them packed into a register."""

import ml_dtypes
import numpy as np

from ptx.arithmetic import elementwise
from ptx.machine import instruction
from ptx.numbers import flush, narrow, to_integer
from ptx.parser import PtxError


@instruction("cvt")
def _convert(machine, code, modifiers):
    if modifiers.parts[:1] == ["pack"]:
        return _convert_pack(machine, code, modifiers)
    source, target = modifiers.type(), modifiers.type()
    rounding = modifiers.choose("rn", "rz", "rni", "rzi", "rmi", "rpi")
    satfinite, saturate = modifiers.flag("satfinite"), modifiers.flag("sat")
    ftz, relu = modifiers.flag("ftz"), modifiers.flag("relu")
    modifiers.done()
    if rounding == "rz" or (relu and not target.is_float):
        raise PtxError(f"rounding .{rounding} is not emulated")

    def convert(values):
        values = flush(values) if ftz and source.name == "f32" else values
        if target.is_float:
            values = np.asarray(values, np.float64)
            values = np.where(values < 0, 0.0, values) if relu else values
            if saturate:
                values = np.where(np.isnan(values), 0.0, np.clip(values, 0.0, 1.0))
            if satfinite:
                largest = 448.0 if target.name.startswith("e4m3") else float(ml_dtypes.finfo(target.dtype).max)
                values = np.clip(values, -largest, largest)
            if rounding in ("rni", "rzi", "rmi", "rpi"):  # float to float of the same size, an integer's value
                values = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](values)
            return narrow(values, target.dtype)
        if source.is_float:
            return to_integer(values, rounding, target.dtype)
        if saturate:
            limits = np.iinfo(target.dtype)
            low, high = max(limits.min, np.iinfo(source.dtype).min), min(limits.max, np.iinfo(source.dtype).max)
            values = np.clip(values, low, high)
        return values.astype(target.dtype)

    if target.lanes == 2 and source.lanes == 1:
        # Two sources: the first becomes the upper half.
        pair = lambda high, low: np.stack(np.broadcast_arrays(convert(low), convert(high)), -1)
        return elementwise(machine, code, pair, target.name, source.name, source.name)
    if target.lanes != source.lanes:
        raise PtxError(f"from .{source.name} to .{target.name} is not emulated")
    return elementwise(machine, code, convert, target.name, source.name)


def _convert_pack(machine, code, modifiers):
    """cvt.pack.sat.T.s32.b32 d, a, b, c: b below a, and c's low half above both (T of 8 bits); T of 16 bits has no c."""
    modifiers.flag("pack")
    if len(code.operands) == 4:
        modifiers.type()
    modifiers.type()
    target = modifiers.type()
    if not modifiers.flag("sat"):
        raise PtxError("cvt.pack without .sat")
    modifiers.done()
    limits = np.iinfo(target.dtype)

    def part(value):
        return np.clip(value, limits.min, limits.max).astype(target.dtype).view(target.raw).astype(np.uint32)

    def pack(a, b, *c):
        low = part(a) << np.uint32(target.bits) | part(b)
        return low | c[0] << np.uint32(2 * target.bits) if c else low

    return elementwise(machine, code, pack, "b32", "s32", "s32", *["b32"] * (len(code.operands) - 3))
