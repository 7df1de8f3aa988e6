"""How a matrix is quantized, as data: what it fits, what it costs, and the leaf that it makes."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels
from vq4dit_jax.codebook.kmeans import kmeans
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import grids
from vq4dit_jax.integer.packing import packed_bytes
from vq4dit_jax.qarray import integer
from vq4dit_jax.qarray.base import Json, QuantizedArray
from vq4dit_jax.qarray.cast import DTYPES, checked_cast
from vq4dit_jax.qarray.integer import IntArray
from vq4dit_jax.qarray.vq import VQArray, from_codes


class Spec(abc.ABC):
    """How one matrix (O, I), or every matrix of a stack, is quantized. Subclasses are frozen dataclasses of JSON values,
    decorated with `register_spec`."""

    kind: ClassVar[str]

    def for_matrix(self, rows: int, columns: int) -> "Spec":
        """The spec that a matrix of this size gets."""
        return self

    def with_dtype(self, dtype: Any) -> "Spec":
        """The same with its tables stored in `dtype`, where they can be."""
        return self

    @abc.abstractmethod
    def check(self, path: str, rows: int, columns: int) -> None:
        """InputError that names `path` where the matrix does not fit."""

    @abc.abstractmethod
    def abstract(self, stack: tuple[int, ...], rows: int, columns: int) -> QuantizedArray:
        """The leaf of `quantize`, with `jax.ShapeDtypeStruct`s for arrays."""

    @abc.abstractmethod
    def quantize(
        self, weight: Float[np.ndarray, "*stack O I"], key: jax.Array, *, iterations: int = 100
    ) -> QuantizedArray:
        """The leaf of a float32 weight on the host. `iterations`: at most, of a search that has such."""

    def stored_bits(self, rows: int, columns: int) -> int:
        """Of one matrix on disk: codes with the padding of their rows, and tables."""
        cost = self.abstract((), rows, columns).cost()
        return 8 * (cost.code_bytes + cost.table_bytes)

    def to_json(self) -> dict[str, Json]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


S = TypeVar("S", bound=Spec)

SPECS: dict[str, type[Spec]] = {}
"""Kind -> class."""


def register_spec(cls: type[S]) -> type[S]:
    """Class decorator: a frozen dataclass and an entry in `SPECS`."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    SPECS[cls.kind] = cls
    return cls


def spec_from_json(value: Any) -> Spec | None:
    """What a config's rule holds: () or None to keep, (K, d) or (K, d, groups) for a `VQSpec`, or a dict with "kind" and the
    fields of that spec. Raises InputError."""
    if isinstance(value, Spec):
        return value
    if value is None or (isinstance(value, list | tuple) and not value):
        return None
    if isinstance(value, list | tuple) and len(value) in (2, 3):
        return VQSpec(*value)
    value = value.to_dict() if hasattr(value, "to_dict") else value
    if not isinstance(value, Mapping) or value.get("kind") not in SPECS:
        raise InputError(
            f"a rule has {value!r:.80}; wanted () to keep, (K, d, groups), or a dict such as "
            f"{{'kind': 'int', 'bits': 4, 'group': 64}}; kinds are {', '.join(SPECS)}"
        )
    cls, fields = SPECS[value["kind"]], {k: v for k, v in value.items() if k != "kind"}
    names = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(names)):
        raise InputError(f"a rule of kind {cls.kind!r} has {unknown[0]!r}; its fields are {', '.join(names)}")
    try:
        return cls(**fields)
    except TypeError:  # a field without a default is missing
        raise InputError(f"a rule of kind {cls.kind!r} has {sorted(fields)}; wanted {', '.join(names)}") from None


def _whole(spec: Spec, name: str, low: int, high: int) -> None:
    """A field to a Python int within bounds, or InputError."""
    value = getattr(spec, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise InputError(f"{name}={value!r:.40} of a {type(spec).__name__}: wanted a whole number from {low} to {high}")
    object.__setattr__(spec, name, int(value))


@register_spec
class VQSpec(Spec):
    """K codewords of length d for each of `groups` equal groups of output rows; log2(K)/d bits a weight.

    `dtype`: of the codebooks on disk. Raises InputError for values that are out of range.
    """

    kind = "vq"
    codewords: int
    subvector: int
    groups: int = 1
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        _whole(self, "codewords", 1, 65536)
        _whole(self, "subvector", 1, 1 << 20)
        _whole(self, "groups", 1, 1 << 20)
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))

    def for_matrix(self, rows: int, columns: int) -> "VQSpec":
        """K = min(K, 2^floor(log2(O*S/4))) for a group of O rows, so that a small layer is not all codebook."""
        subvectors = rows // self.groups * (columns // self.subvector)
        limit = 2 ** max(0, math.floor(math.log2(max(1, subvectors / 4))))
        return dataclasses.replace(self, codewords=min(self.codewords, limit))

    def with_dtype(self, dtype: Any) -> "VQSpec":
        return dataclasses.replace(self, dtype=_dtype_name(dtype))

    def check(self, path: str, rows: int, columns: int) -> None:
        if columns % self.subvector or rows % self.groups:
            raise InputError(
                f"parameter {path} has {columns} inputs and {rows} outputs; wanted multiples of d={self.subvector} "
                f"and of groups={self.groups}; give it a rule of its own"
            )

    def abstract(self, stack: tuple[int, ...], rows: int, columns: int) -> VQArray:
        row = packed_bytes(columns // self.subvector, pallas_kernels.code_bits(self.codewords))
        codebook = (*stack, self.groups, self.codewords, self.subvector)
        return VQArray(
            jax.ShapeDtypeStruct(codebook, jnp.dtype(self.dtype)),
            jax.ShapeDtypeStruct((*stack, rows, row), jnp.uint8),
            (rows, columns),
        )

    def quantize(self, weight: Float[np.ndarray, "*stack O I"], key: jax.Array, *, iterations: int = 100) -> VQArray:
        """k-means of each group's sub-vectors."""
        *stack, rows, columns = weight.shape
        problems = weight.reshape(math.prod(stack) * self.groups, -1, self.subvector)
        result = kmeans(problems, self.codewords, key, max_iterations=iterations)
        codebook = result.codebook.reshape(*stack, self.groups, self.codewords, self.subvector)
        codes = np.asarray(result.assignments).reshape(*stack, rows, columns // self.subvector)
        return from_codes(checked_cast(codebook, self.dtype, "its codebook"), codes)


def _dtype_name(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise InputError(f"dtype={name:.40}: wanted one of {', '.join(DTYPES)}")
    return name


@register_spec
class IntSpec(Spec):
    """Codes of `bits` bits with a float16 scale for each output row and `group` inputs (None: the whole row).

    `grid`: "asymmetric", with a zero point for each scale; "symmetric"; or "centred" (`integer.grids`).
    """

    kind = "int"
    bits: int
    group: int | None = None
    grid: str = "asymmetric"

    def __post_init__(self) -> None:
        _whole(self, "bits", 2, 8)
        if self.group is not None:
            _whole(self, "group", 1, 1 << 24)
        grids.check(self.bits, self.group, self.grid)

    def check(self, path: str, rows: int, columns: int) -> None:
        """Every matrix fits: the last group is shorter where `group` does not divide I."""

    def abstract(self, stack: tuple[int, ...], rows: int, columns: int) -> IntArray:
        group = None if self.group is None or self.group >= columns else self.group
        groups = grids.num_groups(columns, group)
        asymmetric = grids.fixed_zero(self.bits, self.grid) is None
        packed = lambda *shape: jax.ShapeDtypeStruct((*stack, *shape), jnp.uint8)
        return IntArray(
            packed(rows, packed_bytes(columns, self.bits)),
            jax.ShapeDtypeStruct((*stack, rows, groups), jnp.float16),
            packed(packed_bytes(rows * groups, self.bits)) if asymmetric else None,
            f"int{self.bits}",
            self.grid,
            group,
            (rows, columns),
        )

    def quantize(self, weight: Float[np.ndarray, "*stack O I"], key: jax.Array, *, iterations: int = 100) -> IntArray:
        """Round to nearest, ranges as they are; `key` and `iterations` are not read."""
        return self.leaf(weight, lambda matrix, _: self.nearest(matrix, (1.0,)))

    def nearest(self, matrix: Float[Any, "O I"], shares: tuple[float, ...]) -> tuple[Any, grids.Grid]:
        """(codes, grid) of one matrix, by round to nearest; `shares` as in `grids.fit_grid`."""
        grid = grids.fit_grid(matrix, self.bits, self.group, self.grid, shares)
        return grids.codes(matrix, grid, self.bits, self.group), grid

    def leaf(
        self,
        weight: Float[np.ndarray, "*stack O I"],
        one: Callable[[Array, tuple[int, ...]], tuple[Any, grids.Grid]],
    ) -> IntArray:
        """The leaf of the (codes, grid) that `one(matrix (O, I), index into the stack)` gives for every matrix.

        Raises InputError where float16 cannot hold a scale.
        """
        *stack, rows, columns = weight.shape
        found = [one(jnp.asarray(weight[i]), i) for i in np.ndindex(*stack)]
        codes = np.stack([np.asarray(codes) for codes, _ in found]).reshape(weight.shape)
        scale, zero = (
            np.stack([np.asarray(a) for a in arrays]).reshape(*stack, rows, -1)
            for arrays in zip(*(grid for _, grid in found), strict=True)
        )
        largest = float(np.abs(weight).max(initial=0))
        if not np.isfinite(scale).all() or (largest > 0 and not scale.any()):
            raise InputError(
                f"its weights (largest magnitude {largest:.3g}) need scales that float16 does not have; keep it with a rule"
            )
        return integer.from_codes(codes, jnp.asarray(scale, jnp.float16), zero, self.bits, self.group, self.grid)
