"""Helpers for the MLIR that the kernels inline where Pallas lacks an operation."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector


def constant(value: int) -> Any:
    """An i32."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def element(register: Any, i: int) -> Any:
    """Element i of a register that is a vector."""
    return vector.extract(register, dynamic_position=[], static_position=[i])


def byte_address(base: Any, offset: Any) -> Any:
    """The pointer `offset` bytes (i32) behind `base`."""
    return mgpu.utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8))
