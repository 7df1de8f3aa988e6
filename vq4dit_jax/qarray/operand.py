"""`OperandArray`: a quantized weight whose operand is centred, scaled, rotated and rounded before the product (ViDiT-Q).

    y = A((x - m) diag(t) Q) V^T + m W_hat^T      V = W diag(1 / t) Q, quantized;  A rounds activations;  Q Q^T = 1

Without A this is x W_hat^T with W_hat = V Q^T diag(t). (Zhao et al. 2025, arXiv 2406.02540, section 3.2: t is 1 / s there. The
centre m is ours: what a Linear of a diffusion transformer reads has a mean with up to half of its energy, and that part costs
levels without need. The last term is a constant: a bias of the prepared form.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.operand import Operand
from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import activations, hadamard
from vq4dit_jax.qarray.base import KINDS, Cost, Json, QuantizedArray, integer_fact, matrix_fact, register, static
from vq4dit_jax.qarray.spec import Spec, register_spec, spec_from_json


@register
class OperandArray(QuantizedArray):
    """A quantized weight V that reads A(x diag(t) Q).

    Attributes:
      weight: V, a quantized leaf (*stack, O, I).
      scale: t (*stack, I) floating, finite and positive; None: 1, or folded into what comes before.
      signs: of the rotation, (*stack, I) int8 of 1 and -1; None: all 1.
      centre: m (*stack, I) floating, finite; None: 0.
      rotation: inputs of a group of Q; 0: no rotation.
      bits: of the activations; None: they are not rounded.
      grid: of the activations, see `integer.activations`.
      times: bits of the activations in R equal ranges of the way from noise to data, (*stack, R) int8; None: `bits` always. The
        leaf `at` a time has one range, and runs.
    """

    kind = "operand"
    weight: Any
    scale: Any
    signs: Any
    centre: Any
    rotation: int = static()
    bits: int | None = static()
    grid: str = static()
    matrix: tuple[int, int] = static()
    times: Any = None

    @property
    def stack(self) -> tuple[int, ...]:
        return self.weight.stack

    @property
    def has_scale(self) -> bool:
        return self.scale is not None or self.centre is not None

    @property
    def has_times(self) -> bool:
        return self.times is not None

    def at(self, done: Float[Array, ""]) -> "OperandArray":
        if self.times is None:
            return self
        ranges = self.times.shape[-1]
        now = jnp.clip(jnp.floor(done * ranges), 0, ranges - 1).astype(jnp.int32)
        return dataclasses.replace(self, times=jax.lax.dynamic_slice_in_dim(self.times, now, 1, axis=-1))

    def moved(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
        """x diag(t) Q of one matrix, in the dtype of x."""
        if self.scale is not None:
            x = x * self._along(self.scale, x)
        if not self.rotation:
            return x
        return hadamard.rotate(x, self.rotation, None if self.signs is None else self._along(self.signs, x))

    def operand(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
        """A((x - m) diag(t) Q) of one matrix, in the dtype of x; gradients go through A as through the identity."""
        moved = self.moved(x if self.centre is None else x - self._along(self.centre, x))
        if self.bits is None:
            return moved
        if self.times is not None and self.times.shape[-1] != 1:
            raise InputError(
                "activations have other bits at other times; run the network through its Network, which tells the leaves the "
                "time (network.run, vq.sample), or call qarray.tree.at_time"
            )
        bits = self.bits if self.times is None else self.times[..., 0]
        rounded = activations.quantize(moved, bits, self.grid).decode()
        return moved + jax.lax.stop_gradient(rounded - moved)

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        y = self.weight.matmul(self.operand(x))
        if self.centre is None:
            return y
        constant = self.weight.matmul(self.moved(jnp.asarray(self.centre).astype(x.dtype)))
        return y + constant.reshape((1,) * (x.ndim - 1) + (-1,))

    def _along(self, a: Any, x: Array) -> Array:
        """What is given for each input, of one matrix, in the dtype and with the axes of x."""
        return jnp.asarray(a).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        weight = self.weight.decode(jnp.float32)
        if self.rotation:
            weight = hadamard.rotate_back(weight, self.rotation, self._rows(self.signs))
        if self.scale is not None:
            weight = weight * self._rows(self.scale)
        return weight if dtype is None else weight.astype(dtype)

    def arrays(self) -> dict[str, Any]:
        inner = {f"weight/{name}": a for name, a in self.weight.arrays().items()}
        own = {"scale": self.scale, "signs": self.signs, "centre": self.centre, "times": self.times}
        return inner | {name: a for name, a in own.items() if a is not None}

    def facts(self) -> dict[str, Json]:
        return {
            "shape": list(self.matrix),
            "weight": {"kind": self.weight.kind, **self.weight.facts()},
            "scaled": self.scale is not None,
            "signed": self.signs is not None,
            "centred": self.centre is not None,
            "timed": self.times is not None,
            "rotation": self.rotation,
            "bits": self.bits,
            "grid": self.grid,
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, Any], facts: Mapping[str, Json], name: str) -> "OperandArray":
        matrix = matrix_fact(facts, name)
        inner = facts.get("weight")
        kind = inner.get("kind") if isinstance(inner, Mapping) else None
        if kind not in KINDS or kind == cls.kind:
            raise InputError(
                f"{name}: the manifest has a weight of kind {kind!r:.40}; wanted one of {', '.join(sorted(KINDS))}"
            )
        names = {"scale": "scaled", "signs": "signed", "centre": "centred", "times": "timed"}
        own = [key for key, fact in names.items() if facts.get(fact)]
        mine = {key: a for key, a in arrays.items() if key in own}
        rest = {key.removeprefix("weight/"): a for key, a in arrays.items() if key not in own}
        if missing := sorted(set(own) - set(mine)):
            raise InputError(f"array {name}/{missing[0]} is in the manifest and not in the file; it is damaged")
        weight = KINDS[kind].restore(rest, inner, f"{name}/weight")
        rotation = integer_fact(facts, "rotation", 0, matrix[1], name)
        if rotation:
            hadamard.check(rotation, matrix[1])
        bits = None if facts.get("bits") is None else integer_fact(facts, "bits", 2, 8, name)
        grid = facts.get("grid")
        activations.check(bits or 8, grid)
        vectors = (mine.get(key) for key in ("scale", "signs", "centre"))
        out = cls(weight, *vectors, rotation, bits, grid, matrix, mine.get("times"))
        if weight.matrix != matrix:
            raise InputError(
                f"{name}: the manifest has matrices {matrix}, and its weight {weight.matrix}; it is damaged"
            )
        for key, a in mine.items():
            wanted = (*weight.stack, a.shape[-1] if key == "times" and a.ndim else matrix[1])
            if a.shape != wanted:
                raise InputError(f"{name}: {key} has shape {a.shape}; wanted {wanted}")
        if out.times is not None and not (bits and ((out.times >= 2) & (out.times <= bits)).all()):
            raise InputError(f"{name}: bits of a time are not 2 to {bits}; the file is damaged, make it again")
        if out.scale is not None and not _positive(out.scale):
            raise InputError(f"{name}: a scale is not finite and positive; the file is damaged, make it again")
        if out.centre is not None and not np.isfinite(np.asarray(out.centre, np.float32)).all():
            raise InputError(f"{name}: a centre is not finite; the file is damaged, make it again")
        if out.signs is not None and (np.abs(np.asarray(out.signs)) != 1).any():
            raise InputError(f"{name}: a sign is neither 1 nor -1; the file is damaged, make it again")
        return out

    def cost(self) -> Cost:
        inner = self.weight.cost()
        of = lambda a: 0 if a is None else int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize
        own = sum(map(of, (self.scale, self.signs, self.centre, self.times)))
        return inner._replace(table_bytes=inner.table_bytes + own)

    # Everything else is the weight's own --------------------------------------------------------------------------

    def tunable(self) -> dict[str, Any]:
        return self.weight.tunable()

    def spec(self) -> "OperandSpec":
        there = (a is not None for a in (self.signs, self.scale, self.centre))
        return OperandSpec(self.weight.spec(), self.bits, self.grid, self.rotation, *there)

    def with_tuned(self, arrays: Mapping[str, Any]) -> "OperandArray":
        return dataclasses.replace(self, weight=self.weight.with_tuned(arrays))

    def scaled(self, factor: Any) -> "OperandArray":
        return dataclasses.replace(self, weight=self.weight.scaled(factor))

    def with_weight(
        self, spec: Spec, weight: Float[np.ndarray, "*stack O I"], key: jax.Array, iterations: int = 100
    ) -> "OperandArray":
        """The leaf of this weight with V made by another spec; all that its operand goes through stays."""
        turned = np.asarray(self.turned(jnp.asarray(weight, jnp.float32)))
        return dataclasses.replace(self, weight=spec.quantize(turned, key, iterations=iterations))

    def turned(self, weight: Float[Array, "*stack O I"]) -> Float[Array, "*stack O I"]:
        """W diag(1 / t) Q, what `weight` stands for."""
        if self.scale is not None:
            weight = weight / self._rows(self.scale)
        return hadamard.rotate(weight, self.rotation, self._rows(self.signs)) if self.rotation else weight

    def _rows(self, a: Any) -> Array | None:
        """(*stack, 1, I) float32 of what is given for each input."""
        return None if a is None else jnp.asarray(a, jnp.float32)[..., None, :]

    def prepare(self, operand_dtype: Any, **how: Any) -> Any:
        """The weight's own form. Its rows must be rounded as `activations` of 8 bits, or not at all."""
        if self.times is not None:
            raise InputError(
                "its activations have other bits at other times, and all kernels read 8 bits or bfloat16; run it with "
                "activations=float32 (fewer bits than 8 save no time and no memory there)"
            )
        wanted = None if jnp.dtype(operand_dtype).itemsize == 2 else 8
        if self.bits != wanted or (self.bits and self.grid != "symmetric"):
            has = "not rounded" if self.bits is None else f"in {self.bits} bits ({self.grid})"
            raise InputError(
                f"its activations are {has}, and the prepared form was asked for {jnp.dtype(operand_dtype).name}; there are "
                "bfloat16 for activations that are not rounded, and 8 bits for symmetric ones of 8"
            )
        return self.weight.prepare(operand_dtype, **how)

    @property
    def activation_bits(self) -> int | None:
        return self.bits

    def prepared_operand(self) -> Operand | None:
        if not self.has_scale and not self.rotation:
            return None
        wide = lambda a: None if a is None else np.asarray(a, np.float32).reshape(-1, self.matrix[1])
        scale, signs, centre = wide(self.scale), wide(self.signs), wide(self.centre)
        if signs is not None:
            scale = signs if scale is None else scale * signs
        shift = None if centre is None else -centre if scale is None else -centre * scale
        vectors = (None if a is None else jnp.asarray(a, jnp.float32) for a in (scale, shift))
        return Operand(*vectors, self.rotation)

    def missing(self) -> Any:
        """m W_hat^T, decoded a block at a time, so that one dense weight is there at once."""
        if self.centre is None:
            return None
        flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[len(self.stack) :]), self)
        blocks = (flat.block(i) for i in range(len(flat.centre)))
        found = [np.asarray(one.decode(jnp.float32)) @ np.asarray(one.centre, np.float32) for one in blocks]
        return np.stack(found).reshape(*self.stack, -1)

    def solve(
        self, kernel: Any, second: Any, block: Any = None, *, feedbacks: Any, rounds: Any, mean: Any = None
    ) -> "OperandArray | None":
        """The weight solved for V and for what it reads. Rounding of activations is left out, and so is the constant
        m (W - W_hat)^T, which belongs to the bias, where `mean` is given."""
        cut = lambda a: a if block is None or a is None else a[block]
        kernel, second = _turned(self, cut(kernel), cut(second), cut(mean))
        found = self.weight.solve(kernel, second, None, feedbacks=feedbacks, rounds=rounds)
        return None if found is None else dataclasses.replace(self, weight=found)


@jax.jit
def _turned(leaf: OperandArray, kernel: Any, second: Any, mean: Any) -> tuple[Float[Array, "I O"], Float[Array, "I I"]]:
    """(kernel of V, E[z z^T] of z = (x - m) diag(t) Q) of one matrix, from its kernel, E[x x^T] and E[x]."""
    second = second.astype(jnp.float32)
    if leaf.centre is not None and mean is not None:
        m, mean = jnp.asarray(leaf.centre, jnp.float32), mean.astype(jnp.float32)
        cross = jnp.outer(m, mean)
        second = second - cross - cross.T + jnp.outer(m, m)
    half = leaf.moved(second)
    return leaf.turned(kernel.T.astype(jnp.float32)).T, leaf.moved(half.T)


def _positive(scale: Any) -> bool:
    wide = np.asarray(scale, np.float32)
    return bool(np.isfinite(wide).all() and (wide > 0).all())


@register_spec
class OperandSpec(Spec):
    """A weight as `weight` says, whose operand is rotated and rounded.

    Attributes:
      weight: the spec of V, or its JSON.
      bits, grid: of the activations, see `integer.activations`; None for no rounding.
      rotation: inputs of a group; None: the largest of `hadamard.GROUPS` that divides the inputs; 0: none.
      signed: random signs before the rotation.
      scaled: there is a scale for every input, 1 until it is chosen (`balanced`).
      centred: there is a centre for every input, 0 until it is chosen.
    """

    kind = "operand"
    weight: Any
    bits: int | None = 8
    grid: str = "symmetric"
    rotation: int | None = None
    signed: bool = False
    scaled: bool = False
    centred: bool = False

    def __post_init__(self) -> None:
        weight = spec_from_json(self.weight)
        if weight is None or weight.kind == self.kind:
            raise InputError(f"weight={self.weight!r:.60} of an operand spec: wanted the spec of a quantized weight")
        object.__setattr__(self, "weight", weight)
        activations.check(8 if self.bits is None else self.bits, self.grid)
        if self.rotation:
            hadamard.regular(self.rotation)

    def _group(self, columns: int) -> int:
        return hadamard.largest_group(columns) if self.rotation is None else self.rotation

    def for_matrix(self, rows: int, columns: int) -> "OperandSpec":
        return dataclasses.replace(self, weight=self.weight.for_matrix(rows, columns))

    def with_dtype(self, dtype: Any) -> "OperandSpec":
        return dataclasses.replace(self, weight=self.weight.with_dtype(dtype))

    def check(self, path: str, rows: int, columns: int) -> None:
        self.weight.check(path, rows, columns)
        if group := self._group(columns):
            try:
                hadamard.check(group, columns)
            except InputError as error:
                raise InputError(f"parameter {path}: {error}") from error

    def abstract(self, stack: tuple[int, ...], rows: int, columns: int) -> OperandArray:
        of = lambda there, dtype: jax.ShapeDtypeStruct((*stack, columns), dtype) if there else None
        own = (of(self.scaled, jnp.float16), of(self.signed, jnp.int8), of(self.centred, jnp.float16))
        return self._leaf(self.weight.abstract(stack, rows, columns), *own)

    def quantize(
        self, weight: Float[np.ndarray, "*stack O I"], key: jax.Array, *, iterations: int = 100
    ) -> OperandArray:
        return self.balanced(weight, None, None, key, iterations)

    def balanced(
        self,
        weight: Float[np.ndarray, "*stack O I"],
        scale: Float[np.ndarray, "*stack I"] | None,
        centre: Float[np.ndarray, "*stack I"] | None,
        key: jax.Array,
        iterations: int = 100,
    ) -> OperandArray:
        """The leaf with this t and m, stored as float16, where the spec is `scaled` and `centred`; None: 1 and 0."""
        *stack, _, columns = weight.shape
        signs = None
        if self.signed:
            signs = 2 * jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (*stack, columns)).astype(jnp.int8) - 1
        of = lambda there, a, otherwise: (
            jnp.asarray(np.full((*stack, columns), otherwise) if a is None else a, jnp.float16) if there else None
        )
        own = (of(self.scaled, scale, 1.0), signs, of(self.centred, centre, 0.0))
        return self._leaf(None, *own, weight.shape[-2:]).with_weight(self.weight, weight, key, iterations)

    def _leaf(self, weight: Any, scale: Any, signs: Any, centre: Any, matrix: Any = None) -> OperandArray:
        matrix = tuple(weight.matrix if matrix is None else matrix)
        return OperandArray(weight, scale, signs, centre, self._group(matrix[1]), self.bits, self.grid, matrix)

    def to_json(self) -> dict[str, Json]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **own, "weight": self.weight.to_json()}
