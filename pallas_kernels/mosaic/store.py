"""A tile of Y^T from the accumulators to rows of Y in shared memory."""

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_kernels.epilogue import saturate
from pallas_kernels.fragments import ROWS
from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.mlir import byte_address, constant, element

_PACK = {
    # d = four results: tokens 2c and 2c + 1 of row q (a, c) and of row q + 8 (b, d), as two 16-bit pairs.
    "int8": """{
        .reg .s32 a, b, c, d; .reg .b32 h;
        cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
        cvt.pack.sat.s8.s32.b32 h, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, h;
    }""",
    "float8_e4m3fn": """{
        .reg .b16 l, h;
        cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;
        mov.b32 $0, {l, h};
    }""",
}


def transforms(dtype: jax.typing.DTypeLike) -> tuple[Any, ...]:
    """Layout of a tile whose rows are 128 bytes or more: the 128-byte swizzle, without bank conflicts on either side."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def store_transposed(y: jax.Array, target: Any, interpret: bool, residual: bool) -> None:
    """bfloat16 y (64, tokens) to target (tokens, 64); with `residual` it is added to the target's values."""
    if interpret:
        target[...] = _sum(y.T, target[...]) if residual else y.T
        return
    rows = compat.transpose(target)
    y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    if residual:
        y = _sum(y, compat.load(rows, plgpu.Layout.WGMMA_TRANSPOSED))
    rows[...] = y


def _sum(y: jax.Array, residual: jax.Array) -> jax.Array:
    return (y.astype(jnp.float32) + residual.astype(jnp.float32)).astype(y.dtype)


def store_bytes(y: jax.Array, target: Any, dtype: jax.typing.DTypeLike, interpret: bool) -> None:
    """float32 y (64, tokens) to 8-bit target (tokens, 64), rows in the order of `FragmentOrder.paired_rows`.

    The matrix store transposes 16-bit elements. Rows q and q + 8, which one lane has, are stored as one such element.
    Their bytes come out in the order of Y because W's rows were paired when it was packed.
    """
    if interpret:
        natural = saturate(y, dtype).reshape(4, 2, 8, -1).transpose(0, 2, 1, 3).reshape(y.shape)
        target[...] = natural.T
        return
    tokens = y.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def emit(_: Any, values: Any, out: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        registers = values.registers
        packed = []
        for j in range(tokens // 8):
            pairs = [_register(registers, j, rr) for rr in range(2)]
            four = [element(pairs[rr], token) for token in range(2) for rr in range(2)]
            asm = _PACK[jnp.dtype(dtype).name]
            packed.append(llvm.inline_asm(i32, four, asm, "=r,f,f,f,f", has_side_effects=False))
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
        base = mgpu.utils.memref_ptr(mgpu.memref_fold(out, 0, 2))
        count = math.gcd(4, tokens // 8)
        operands = ", ".join(f"${i + 1}" for i in range(count))
        asm = f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [$0], {{{operands}}};"
        # Lane l gives the address of row l of the matrices: a token's 16 bytes of this warp. Fewer than four: the rest repeats.
        row = arith.andi(lane, constant(8 * count - 1))
        place = arith.addi(arith.shli(row, constant(6)), arith.shli(warp, constant(4)))
        for j in range(0, tokens // 8, count):
            address = byte_address(base, arith.addi(place, constant(8 * j * ROWS)))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [address, *packed[j : j + count]],
                asm,
                ",".join(["r"] * (count + 1)) + ",~{memory}",
                has_side_effects=True,
            )

    emit(y, target)


def _register(registers: Any, j: int, rr: int) -> Any:
    position = [0] * registers.ndim
    position[1], position[4] = j, rr
    return registers[tuple(position)]
