"""Assignments to bytes: a bijection between rows of codes and rows of little-endian bit strings.

The reverse, which a forward pass needs, is `pallas_kernels.unpack_codes`.
"""

import math

import numpy as np
from jaxtyping import Integer, UInt8


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row: whole units of lcm(bits, 8) bits."""
    unit_bits = math.lcm(bits, 8)
    return math.ceil(num_codes * bits / unit_bits) * unit_bits // 8


def pack_codes(codes: Integer[np.ndarray, "*rows S"], bits: int) -> UInt8[np.ndarray, "*rows bytes"]:
    """Packs each row's codes of `bits` bits (1 to 16), code j in bits [j*bits, (j+1)*bits), zero padded.

    Raises ValueError where a code does not fit.
    """
    codes = np.asarray(codes)
    if not 1 <= bits <= 16:
        raise ValueError(f"bits={bits}: wanted 1 to 16")
    if codes.size and (codes.min() < 0 or codes.max() >> bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit in {bits} bits")
    if bits == 8:
        return codes.astype(np.uint8)
    *rows, length = codes.shape
    unit_bits = math.lcm(bits, 8)
    per_unit = unit_bits // bits
    units = math.ceil(length / per_unit)
    padded = np.zeros((*rows, units * per_unit), np.uint32)
    padded[..., :length] = codes
    padded = padded.reshape(*rows, units, per_unit)
    # A code touches at most three bytes of its unit, each a fixed shift away.
    packed = np.zeros((*rows, units, unit_bits // 8), np.uint8)
    for j in range(per_unit):
        first, shift = divmod(j * bits, 8)
        word = padded[..., j] << shift
        for k in range(first, (j * bits + bits - 1) // 8 + 1):
            packed[..., k] |= (word >> (8 * (k - first)) & 0xFF).astype(np.uint8)
    return packed.reshape(*rows, -1)
