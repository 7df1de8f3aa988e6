"""What may stand in a kernel's place: the protocol of a quantized leaf, and the registry of its kinds.

A leaf stands for the weight W (O, I) of a Linear, or for a stack of such weights that `lax.scan` runs over. All that the
rest of the code asks of a leaf is a method here; what it holds is the business of its own file.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.operand import Operand
from vq4dit_jax.errors import InputError

Json = Any


class Cost(NamedTuple):
    """Weights that a leaf stands for, and the bytes of its codes and of its tables (codebooks, scales, zero points)."""

    weights: int
    code_bytes: int
    table_bytes: int


def static(**options: Any) -> Any:
    """A dataclass field that is part of a leaf's type, not of its arrays."""
    return dataclasses.field(metadata={"static": True}, **options)


class Kernel(abc.ABC):
    """What stands in a kernel's place: `linear` asks it for nothing but `matmul`. Quantized leaves are kernels; so is a probe
    that keeps what a Linear reads."""

    @abc.abstractmethod
    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """x @ W^T of one matrix (no stack axes), in the dtype of `x`."""


class QuantizedArray(Kernel):
    """A quantized weight, or a stack of them. Subclasses are decorated with `register`.

    Attributes:
      kind: the manifest's tag and the key in `KINDS`.
      matrix: (O, I) of one matrix; a static field of every subclass, so slicing the stack keeps it.

    Every array of a leaf leads with the same stack axes. Arrays are not typed further, because tree transformations put
    shapes, shardings or numpy arrays in their place.
    """

    kind: ClassVar[str]
    matrix: tuple[int, int]

    @property
    @abc.abstractmethod
    def stack(self) -> tuple[int, ...]:
        """Axes before those of one matrix; () for a single matrix."""

    @abc.abstractmethod
    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        """The dense weight in `dtype`; None: the dtype of the leaf's own tables."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, Any]:
        """The arrays as files hold them: at `<path>/<name>`."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Json]:
        """What the manifest holds beside the arrays, JSON-ready; `kind` is added by the writer."""

    @classmethod
    @abc.abstractmethod
    def restore(cls, arrays: Mapping[str, Any], facts: Mapping[str, Json], name: str) -> "QuantizedArray":
        """The leaf of `arrays()` and `facts()`, validated; InputError names `name` and what does not hold."""

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Of the whole stack, packed; works on shapes alone."""

    # What a new kind inherits -------------------------------------------------------------------------------------

    @property
    def has_scale(self) -> bool:
        """Whether its operand has a scale or a centre for each input, which `methods.balance` chooses: `spec().balanced`."""
        return False

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        weight = self.decode(x.dtype).astype(x.dtype)
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))

    def block(self, index: Any) -> "QuantizedArray":
        """Entry (or slice) `index` of the first stack axis."""
        return jax.tree.map(lambda a: a[index], self)

    @property
    def has_times(self) -> bool:
        """Whether what it computes depends on the time, so that `at` has to be called before `matmul`."""
        return False

    def at(self, done: Float[Array, ""]) -> "QuantizedArray":
        """The leaf at a time, `done` of the way from noise to data (`diffusion.process.Process.done`)."""
        return self

    def tunable(self) -> dict[str, Any]:
        """The arrays that gradients may move, by name, in float32."""
        return {}

    def with_tuned(self, arrays: Mapping[str, Any]) -> "QuantizedArray":
        """The leaf with other values of what `tunable` gives."""
        return dataclasses.replace(self, **arrays)

    def spec(self) -> Any:
        """The `spec.Spec` that makes a leaf like this one of another weight."""
        raise InputError(f"a {type(self).__name__} has no spec; leave such leaves out of the passes that choose specs")

    def scaled(self, factor: Any) -> "QuantizedArray":
        """The leaf of W_hat times `factor`, in the types that it has."""
        raise InputError(f"a {type(self).__name__} cannot be scaled; leave such leaves out of the passes that scale")

    def soften(
        self, weight: Float[np.ndarray, "*stack O I"] | None, num_candidates: int, start: str
    ) -> "QuantizedArray":
        """The form that gradients train, made with the teacher's weight (not read, and None will do, for one candidate); the
        leaf itself where it has no other."""
        return self

    def harden(self) -> "QuantizedArray":
        """The form that is stored, from the one that gradients train."""
        return self

    def solve(
        self,
        kernel: Float[Array, "*stack I O"],
        second: Float[Array, "*stack I I"],
        block: Any = None,
        *,
        feedbacks: Any,
        rounds: Any,
        mean: Float[Array, "*stack I"] | None = None,
    ) -> "QuantizedArray | None":
        """One matrix solved anew for the teacher's `kernel` and second moments of its inputs, of which `block` is the
        entry that this leaf stands for (None: they have no stack axis). `mean` of the inputs is read where they are centred.
        None: this kind has no solver."""
        return None

    def prepare(self, operand_dtype: Any, *, as_one: bool = False, paired_rows: bool = False, table_bytes: int = 0):
        """(weights of `pallas_kernels.weights`, scales of rows (L, O) or None) of a stack of L matrices.

        Args:
          operand_dtype: bfloat16, int8 or float8_e4m3fn.
          as_one: the rows of all L matrices one after the other, as a stack of one.
          paired_rows: rows in the order in which kernels store 8-bit results.
          table_bytes: at most, of the kernel's table of codewords; 0 for its default.

        Raises InputError where the kernels have no form for the leaf.
        """
        raise InputError(
            f"a {type(self).__name__} has no form for the kernels; a VQArray has one, and an IntArray with 4 or 8 bits "
            "and a symmetric grid"
        )

    @property
    def activation_bits(self) -> int | None:
        """Bits that the rows of x are rounded to before the product; None: they are not."""
        return None

    def prepared_operand(self) -> Operand | None:
        """What the rows of x go through before they are rounded, of the stack as one axis; None: nothing."""
        return None

    def missing(self) -> Float[np.ndarray, "*stack O"] | None:
        """What the product with the prepared operand lacks, a constant for each output; None: nothing."""
        return None


class Transient(QuantizedArray):
    """A leaf that exists while a method runs, and in no file: the form that gradients train."""

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        # A backward pass decodes again; else it would keep the dense weights of all blocks.
        return jax.checkpoint(QuantizedArray.matmul)(self, x)

    def arrays(self) -> dict[str, Any]:
        raise InputError(f"a {type(self).__name__} is not stored; save what the method returns, or harden() the leaf")

    facts = arrays

    @classmethod
    def restore(cls, arrays: Mapping[str, Any], facts: Mapping[str, Json], name: str) -> "QuantizedArray":
        raise InputError(f"{name}: kind {cls.kind!r} is not stored in files; the file is damaged")


Leaf = TypeVar("Leaf", bound=QuantizedArray)

KINDS: dict[str, type[QuantizedArray]] = {}
"""Kind -> class: what a manifest's tag means."""


def register(cls: type[Leaf]) -> type[Leaf]:
    """Class decorator: a frozen dataclass, a pytree whose `static()` fields are its type, and an entry in `KINDS`.

    Raises ValueError where another class has that kind.
    """
    cls = jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
    other = KINDS.get(cls.kind)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"kind {cls.kind!r} is {other.__module__}.{other.__qualname__}; give {cls.__name__} another")
    KINDS[cls.kind] = cls
    return cls


def is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


# What implementations of `restore` share --------------------------------------------------------------------------


def take(arrays: Mapping[str, Any], wanted: Sequence[str], name: str) -> list[Any]:
    """The arrays of these names; InputError where one is missing or another is there."""
    for one in wanted:
        if one not in arrays:
            raise InputError(f"array {name}/{one} is in the manifest and not in the file; it is damaged")
    if more := sorted(set(arrays) - set(wanted)):
        raise InputError(f"{name}: the file holds {more[0]!r} beside {', '.join(wanted)}; it is damaged")
    return [arrays[one] for one in wanted]


def integer_fact(facts: Mapping[str, Json], key: str, low: int, high: int, name: str) -> int:
    """An integer of the manifest within bounds, or InputError."""
    value = facts.get(key)
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name}: the manifest has {key}={value!r:.40}; wanted a whole number from {low} to {high}")
    return value


def matrix_fact(facts: Mapping[str, Json], name: str) -> tuple[int, int]:
    """(O, I) of the manifest's `shape`, or InputError."""
    shape = facts.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise InputError(f"{name}: the manifest has shape={shape!r:.40}; wanted [outputs, inputs]")
    rows, columns = (integer_fact({"shape": n}, "shape", 1, 1 << 24, name) for n in shape)
    return rows, columns
