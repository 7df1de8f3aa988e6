"""PTX's types as numpy's, and the roundings that numpy does not have."""

import dataclasses

import ml_dtypes
import numpy as np

from ptx.parser import PtxError


@dataclasses.dataclass(frozen=True)
class Type:
    """`lanes` is 2 for packed pairs (bf16x2), whose values have a second axis of length 2, low half first."""

    name: str
    dtype: np.dtype
    lanes: int = 1

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize * self.lanes if self.name != "pred" else 1

    @property
    def raw(self) -> np.dtype:
        """The unsigned integer as wide as the whole value."""
        return UNSIGNED[self.bits]

    @property
    def is_float(self) -> bool:
        return self.name.startswith(("f", "bf", "e4", "e5"))

    @property
    def is_signed(self) -> bool:
        return self.name.startswith("s")


UNSIGNED = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)} | {1: np.dtype(bool)}
_FLOATS = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
TYPES = {name: Type(name, np.dtype(dtype)) for name, dtype in _FLOATS.items()}
TYPES |= {f"{name}x2": Type(f"{name}x2", np.dtype(_FLOATS[name]), 2) for name in ("f16", "bf16", "e4m3", "e5m2")}
for _bits in (8, 16, 32, 64):
    TYPES |= {f"{letter}{_bits}": Type(f"{letter}{_bits}", UNSIGNED[_bits]) for letter in "bu"}
    TYPES[f"s{_bits}"] = Type(f"s{_bits}", np.dtype(f"i{_bits // 8}"))
TYPES |= {name: Type(name, np.dtype(np.int16 if name[0] == "s" else np.uint16), 2) for name in ("s16x2", "u16x2")}
TYPES["pred"] = Type("pred", np.dtype(bool))


def type_named(name: str) -> Type:
    if name not in TYPES:
        raise PtxError(f"type .{name} is not emulated")
    return TYPES[name]


def round_to_odd(exact: np.ndarray, error: np.ndarray) -> np.ndarray:
    """float64 `exact` + a tiny `error`, rounded to odd: rounding that to a narrower type again gives the right result.

    Boldo and Melquiond, Emulation of FMA and correctly rounded sums (2008).
    """
    even = (exact.view(np.uint64) & np.uint64(1)) == 0
    inexact = (error != 0) & np.isfinite(exact) & even
    return np.where(inexact, np.nextafter(exact, np.where(error > 0, np.inf, -np.inf)), exact)


def add_exactly(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd (Knuth's TwoSum gives the error)."""
    total = a + b
    part = total - a
    return round_to_odd(np.asarray(total), np.asarray((a - (total - part)) + (b - part)))


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 to a narrower float, rounded once, to nearest even. NaN becomes the canonical NaN of PTX, 0x7fff...f."""
    values = np.asarray(values, np.float64)
    if dtype == np.float64:
        return values
    single = values.astype(np.float32)
    if dtype != np.float32:
        # Through float32 rounded to odd: 24 bits are enough to round again to 11 or fewer.
        lost = (single != values) & np.isfinite(values) & np.isfinite(single)
        even = (single.view(np.uint32) & np.uint32(1)) == 0
        single = np.where(
            lost & even, np.nextafter(single, np.where(values > single, np.float32("inf"), np.float32("-inf"))), single
        )
        single = single.astype(dtype)
    nan = np.array(0x7FFFFFFF if dtype == np.float32 else 0x7FFF if dtype.itemsize == 2 else 0x7F)
    return np.where(np.isnan(values), nan.astype(UNSIGNED[8 * dtype.itemsize]).view(dtype), single)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once, for floats of 32 bits or fewer (float64: rounded twice, as PTX code of ours has none)."""
    if a.dtype == np.float64:
        raise PtxError("fma of f64 is not emulated")
    a64, b64, c64 = (np.asarray(value, np.float64) for value in (a, b, c))
    return narrow(add_exactly(a64 * b64, c64), a.dtype)


def flush(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 to zero of the same sign."""
    if values.dtype != np.float32:
        raise PtxError(f".ftz on {values.dtype} is not emulated")
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def to_integer(values: np.ndarray, rounding: str, dtype: np.dtype) -> np.ndarray:
    """A float to an integer as cvt does it: rounded (rni, rzi, rmi, rpi), saturated; NaN becomes 0."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](
        np.asarray(values, np.float64)
    )
    limits = np.iinfo(dtype)
    inside = np.clip(np.where(np.isnan(rounded), 0.0, rounded), float(limits.min), float(limits.max))
    # float(2**63 - 1) is 2**63, which no int64 holds.
    high = inside >= float(limits.max)
    return np.where(high, np.array(limits.max, dtype), np.where(high, 0.0, inside).astype(dtype))
