"""`IntArray`: a weight matrix as packed integer codes, with a scale and a zero point for each row and group of inputs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

import pallas_kernels
from pallas_kernels import nibbles
from pallas_kernels.weights import ByteWeights, NibbleWeights, pair_rows
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import gptq, grids
from vq4dit_jax.integer.descent import descend
from vq4dit_jax.integer.packing import pack_codes, packed_bytes
from vq4dit_jax.qarray.base import (
    Cost,
    Json,
    QuantizedArray,
    integer_fact,
    matrix_fact,
    register,
    static,
    take,
)  # fmt: skip


@register
class IntArray(QuantizedArray):
    """W_hat = s (q - z) with codes q of b = 2 to 8 bits (`integer.grids`). Field names are those of qwix's QArray.

    Invariants (`restore` checks them):
      * `qvalue` (*stack, O, bytes) uint8: the codes of each row, packed as those of a `VQArray`.
      * `scale` (*stack, O, groups) floating, finite and not negative; input i belongs to group i // `group`, the last of
        which is shorter where `group` does not divide I; `group` None is one group for the whole row.
      * `zero_point` is (*stack, bytes) uint8 for the "asymmetric" `grid`: codes of b bits too, O * groups of them packed as
        one row. For "symmetric" and "centred" it is None, because b gives it.
      * `qtype` is "int2" to "int8".
    """

    kind = "int"
    qvalue: Any
    scale: Any
    zero_point: Any
    qtype: str = static()
    grid: str = static()
    group: int | None = static()
    matrix: tuple[int, int] = static()

    @property
    def bits(self) -> int:
        return int(self.qtype.removeprefix("int"))

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.scale.shape[:-2])

    def codes(self) -> Integer[Array, "*stack O I"]:
        """q as int32."""
        return pallas_kernels.unpack_codes(jnp.asarray(self.qvalue), self.bits, self.matrix[1])

    def zeros(self) -> Float[Array, "*stack O groups"]:
        """z as float32."""
        shape, fixed = self.scale.shape, grids.fixed_zero(self.bits, self.grid)
        if fixed is not None:
            return jnp.full(shape, fixed, jnp.float32)
        codes = pallas_kernels.unpack_codes(jnp.asarray(self.zero_point), self.bits, math.prod(shape[-2:]))
        return codes.reshape(shape).astype(jnp.float32)

    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        """The dense weight, computed in float32."""
        grid = grids.Grid(jnp.asarray(self.scale, jnp.float32), self.zeros())
        weight = grids.decode(self.codes(), grid, self.group)
        return weight if dtype is None else weight.astype(dtype)

    def arrays(self) -> dict[str, Any]:
        zeros = {} if self.zero_point is None else {"zero_point": self.zero_point}
        return {"qvalue": self.qvalue, "scale": self.scale, **zeros}

    def facts(self) -> dict[str, Json]:
        return {"shape": list(self.matrix), "bits": self.bits, "group": self.group, "grid": self.grid}

    @classmethod
    def restore(cls, arrays: Mapping[str, Any], facts: Mapping[str, Json], name: str) -> "IntArray":
        rows, columns = matrix_fact(facts, name)
        bits = integer_fact(facts, "bits", 2, 8, name)
        group = None if facts.get("group") is None else integer_fact(facts, "group", 1, columns, name)
        grid = facts.get("grid")
        if grid not in grids.KINDS:
            raise InputError(f"{name}: the manifest has grid={grid!r:.40}; wanted one of {', '.join(grids.KINDS)}")
        zeros = ("zero_point",) if grid == "asymmetric" else ()
        qvalue, scale, *rest = take(arrays, ("qvalue", "scale", *zeros), name)
        stack, groups = scale.shape[:-2], grids.num_groups(columns, group)
        wanted = {
            "qvalue": (qvalue, (*stack, rows, packed_bytes(columns, bits))),
            "zero_point": (rest[0] if rest else None, (*stack, packed_bytes(rows * groups, bits))),
        }
        for key, (found, shape) in wanted.items():
            if found is not None and (found.shape != shape or found.dtype != np.uint8):
                raise InputError(f"{name}: {key} is {found.dtype}{found.shape}; wanted uint8{shape}")
        if scale.shape[-2:] != (rows, groups) or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise InputError(f"{name}: scale is {scale.dtype}{scale.shape}; wanted floating (*stack, {rows}, {groups})")
        wide = np.asarray(scale, np.float32)
        if not (np.isfinite(wide).all() and (wide >= 0).all()):
            raise InputError(f"{name}: a scale is negative, NaN or infinity; the file is damaged, make it again")
        return cls(qvalue, scale, rest[0] if rest else None, f"int{bits}", grid, group, (rows, columns))

    def cost(self) -> Cost:
        zeros = 0 if self.zero_point is None else math.prod(self.zero_point.shape)
        return Cost(
            math.prod(self.stack) * math.prod(self.matrix),
            math.prod(self.qvalue.shape),
            math.prod(self.scale.shape) * np.dtype(self.scale.dtype).itemsize + zeros,
        )

    def spec(self) -> Any:
        from vq4dit_jax.qarray.spec import IntSpec  # that file knows this class

        return IntSpec(self.bits, self.group, self.grid)

    def scaled(self, factor: Any) -> "IntArray":
        scale = jnp.asarray(self.scale, jnp.float32) * factor
        return dataclasses.replace(self, scale=scale.astype(self.scale.dtype))

    def solve(
        self, kernel: Any, second: Any, block: Any = None, *, feedbacks: Any, rounds: Any, mean: Any = None
    ) -> "IntArray":
        """Codes and grids of GPTQ (`integer.gptq`) for whole numbers of `feedbacks` above 0, else of round to nearest; of both
        the better of several clipped grids for each row. Then `rounds` of `integer.descent`, where there was feedback."""
        cut = lambda a: np.asarray(a if block is None else a[block])
        weight, second = jnp.asarray(cut(kernel).T, jnp.float32), cut(second)
        if not feedbacks:
            second, rounds = np.diag(np.diagonal(second)), 0
        codes, grid = gptq.quantize_weight(weight, second, self.bits, self.group, self.grid)
        if rounds:
            codes, grid = descend(weight, jnp.asarray(second), codes, grid, self.bits, self.group, int(rounds))
        return from_codes(codes, grid.scale.astype(self.scale.dtype), grid.zero, self.bits, self.group, self.grid)

    def prepare(
        self, operand_dtype: Any, *, as_one: bool = False, paired_rows: bool = False, table_bytes: int = 0
    ) -> tuple[ByteWeights | NibbleWeights, Float[np.ndarray, "L O"] | None]:
        """8-bit operands: bytes with a scale for each row, or nibbles of up to 4 bits with one for each row and 128 inputs."""
        as_bytes = self.group is None or self.group >= self.matrix[1]
        as_nibbles = self.bits <= 4 and self.group == nibbles.COLUMNS
        if jnp.dtype(operand_dtype) != jnp.int8 or self.grid != "symmetric" or not (as_bytes or as_nibbles):
            raise InputError(
                f"the kernels have no form for {self.qtype} with a {self.grid} grid for each "
                f"{self.group or 'row'} and {jnp.dtype(operand_dtype).name} activations; they have int8 activations, "
                f"symmetric grids, and scales for whole rows, or int2 to int4 with a scale for each {nibbles.COLUMNS} inputs"
            )
        values = (np.asarray(self.codes()) - 2 ** (self.bits - 1)).astype(np.int8)
        scale, columns = np.asarray(self.scale, np.float32), self.matrix[1]
        layers = math.prod(self.stack)
        values = values.reshape(1 if as_one else layers, -1, columns)
        values = np.pad(values, ((0, 0), (0, 0), (0, -columns % nibbles.COLUMNS)))
        pair = pair_rows if paired_rows else lambda a: a
        if as_bytes:
            return ByteWeights(jnp.asarray(pair(values)), columns, paired_rows), scale.reshape(layers, -1)
        scales = pair(scale.reshape(len(values), -1, scale.shape[-1])).swapaxes(1, 2)
        packed = jnp.asarray(nibbles.pack(values, paired_rows))
        return NibbleWeights(packed, jnp.asarray(np.ascontiguousarray(scales)), columns, paired_rows), None

    def to_qwix(self) -> Any:
        """The same weight as a qwix QArray (O, I); InputError where its grids have no such form.

        qwix has no zero points between integers, so a centred code q becomes the odd number 2q - (2^b - 1) at half the scale.
        """
        from qwix._src.core.qarray import QArray

        bits, groups = self.bits, self.scale.shape[-1]
        if self.matrix[1] % groups or (self.grid == "centred" and bits == 8):
            raise InputError(
                f"a {self.qtype} leaf with {self.matrix[1]} inputs in {groups} groups and a {self.grid} grid has no form in "
                "qwix; wanted groups of equal length, and for centred grids at most 7 bits"
            )
        codes, scale = self.codes(), jnp.asarray(self.scale)
        if self.grid == "centred":
            return QArray((2 * codes - (2**bits - 1)).astype(jnp.int8), scale / 2, None, "int8")
        dtype = jnp.dtype(self.qtype) if bits in (2, 4, 8) else jnp.dtype(jnp.int8)
        signed = lambda a: (a - 2 ** (bits - 1)).astype(dtype)
        zeros = None if self.grid == "symmetric" else signed(self.zeros().astype(jnp.int32))
        return QArray(signed(codes), scale, zeros, self.qtype)

    @classmethod
    def from_qwix(cls, array: Any, name: str = "QArray") -> "IntArray":
        """A qwix QArray (*stack, O, I) of integers with one scale for each row and group of consecutive inputs."""
        qtype = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
        *_, rows, columns = array.qvalue.shape
        if qtype not in {f"int{b}" for b in range(2, 9)} or array.scale.shape[:-1] != array.qvalue.shape[:-1]:
            raise InputError(
                f"{name} is {qtype} of {array.qvalue.shape} with scales {array.scale.shape}; wanted int2 to int8 and scales "
                "(*stack, O, groups)"
            )
        bits, groups = int(qtype.removeprefix("int")), array.scale.shape[-1]
        unsigned = lambda a: np.asarray(a).astype(np.int32) + 2 ** (bits - 1)
        zeros = None if array.zero_point is None else unsigned(array.zero_point)
        grid = "symmetric" if zeros is None else "asymmetric"
        group = None if groups == 1 else columns // groups
        if zeros is not None and zeros.shape != array.scale.shape:
            zeros = np.broadcast_to(zeros, array.scale.shape)
        return from_codes(unsigned(array.qvalue), array.scale, zeros, bits, group, grid)


def from_codes(
    codes: Integer[Any, "*stack O I"],
    scale: Float[Any, "*stack O groups"],
    zeros: Any,
    bits: int,
    group: int | None,
    grid: str,
) -> IntArray:
    """Packs codes and, of asymmetric grids, zero points (*stack, O, groups), whole numbers below 2^b; else they are not read."""
    *stack, rows, columns = codes.shape
    packed = None
    if grid == "asymmetric":
        flat = np.asarray(zeros).astype(np.int32).reshape(*stack, -1)
        packed = jnp.asarray(pack_codes(flat, bits))
    qvalue = jnp.asarray(pack_codes(np.asarray(codes), bits))
    group = None if group is None or group >= columns else group
    return IntArray(qvalue, jnp.asarray(scale), packed, f"int{bits}", grid, group, (rows, columns))
