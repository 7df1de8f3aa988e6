"""What images are conditioned on: class labels, text features with a mask, or nothing.

A condition is a tree of arrays whose leaves lead with the sample axis. All implementations have these methods:

    draw(keys)                   a random condition for each image, from its own key: what calibration runs on, without data
    choose(spec, key, indices)   the conditions of the images with these global indices, as a user names them
    null(params, cond)           the condition of guidance's other half, as many rows as `cond`; it may be a parameter
    check(cond)                  the condition as arrays; InputError where it is none
    titles(cond)                 a few words for each row
    guidable                     whether there is a null
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from vq4dit_jax.diffusion.keys import condition_keys, image_keys
from vq4dit_jax.errors import InputError

Keys = Shaped[PRNGKeyArray, " B"]
Labels = Int[Array | np.ndarray, " B"]


def _random_below(keys: Keys, count: int) -> Int[Array, " B"]:
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, count, jnp.int32))(condition_keys(keys))


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """y (B,) int32, a class 0..num_classes-1; num_classes is the null label, where the network was trained with one.

    Attributes:
      num_classes: without the null label.
      has_null: whether there is a null label; without one guidance is refused.
    """

    num_classes: int
    has_null: bool = True

    def __post_init__(self):
        if self.num_classes < 1:
            raise InputError(f"num_classes={self.num_classes}: wanted at least 1; a network without classes ignores y")

    @property
    def guidable(self) -> bool:
        return self.has_null

    def draw(self, keys: Keys) -> Int[Array, " B"]:
        return _random_below(keys, self.num_classes)

    def choose(self, spec: str, key: jax.Array, indices: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """`spec`: "balanced" (image i has class i mod classes), "random", or classes that are taken in turn: "207,360"."""
        indices = np.asarray(indices)
        if spec == "balanced":
            return (indices % self.num_classes).astype(np.int32)
        if spec == "random":
            return np.asarray(self.draw(image_keys(key, indices)))
        try:
            chosen = np.asarray([int(label) for label in spec.split(",")], np.int32)
        except (ValueError, OverflowError):
            raise InputError(f"labels={spec}: wanted balanced, random, or class numbers such as 207,360,387") from None
        if chosen.min() < 0 or chosen.max() >= self.num_classes:
            raise InputError(f"labels={spec}: wanted classes 0..{self.num_classes - 1}")
        return chosen[indices % len(chosen)]

    def null(self, params: Any, cond: Labels) -> Int[Array, " B"]:
        if not self.has_null:
            raise InputError(
                "cfg_scale: this network has no null label (it was trained without dropping labels), so it cannot be guided; "
                "wanted cfg_scale=1"
            )
        return jnp.full_like(cond, self.num_classes)

    def check(self, cond: Any) -> Int[np.ndarray, " B"]:
        labels = np.asarray(cond)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"labels have shape {labels.shape} and dtype {labels.dtype}; wanted integers (B,)")
        most = self.num_classes if self.has_null else self.num_classes - 1
        if labels.size == 0:
            raise InputError("labels are empty; wanted at least one class")
        if labels.min() < 0 or labels.max() > most:
            raise InputError(f"labels lie in {labels.min()}..{labels.max()}; wanted 0..{most}")
        return labels.astype(np.int32)

    def titles(self, cond: Labels, names: Sequence[str] = ()) -> list[str]:
        return [names[i] if i < len(names) else f"class {i}" for i in np.asarray(cond)]


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """A dict of arrays of each sample, such as {"text": (B, L, F) float, "mask": (B, L) int}.

    Attributes:
      bank: the conditions to draw from, a dict of arrays (N, ...); N prompts.
      null_of: (params, cond) -> the null condition, as many rows as `cond`; None: the network is never guided.
      prompts: N names for pictures.
    """

    bank: dict[str, Any]
    null_of: Callable[[Any, Any], Any] | None = None
    prompts: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def count(self) -> int:
        return len(next(iter(self.bank.values())))

    @property
    def guidable(self) -> bool:
        return self.null_of is not None

    def _take(self, rows: Any) -> dict[str, Any]:
        return {name: jnp.asarray(a)[rows] for name, a in self.bank.items()}

    def draw(self, keys: Keys) -> dict[str, Any]:
        return self._take(_random_below(keys, self.count))

    def choose(self, spec: str, key: jax.Array, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """`spec`: "balanced" (prompt i mod N), "random", or numbers of prompts that are taken in turn."""
        rows = ClassLabels(self.count, has_null=False).choose(spec, key, indices)
        return {name: np.asarray(a)[rows] for name, a in self.bank.items()}

    def null(self, params: Any, cond: dict[str, Any]) -> dict[str, Any]:
        if self.null_of is None:
            raise InputError("cfg_scale: this network has no null condition; wanted cfg_scale=1, or null=")
        return self.null_of(params, cond)

    def check(self, cond: Any) -> dict[str, Any]:
        wanted = {name: np.shape(a)[1:] for name, a in self.bank.items()}
        if not isinstance(cond, dict) or set(cond) != set(wanted):
            found = ", ".join(sorted(cond)) if isinstance(cond, dict) else f"a {type(cond).__name__}"
            raise InputError(f"cond has {found}; wanted a dict of {', '.join(sorted(wanted))}")
        rows = {name: np.shape(a)[:1] for name, a in cond.items()}
        if len(set(rows.values())) != 1 or () in rows.values():
            raise InputError(f"cond's arrays have {rows} rows; wanted the same number in all")
        return {name: jnp.asarray(a) for name, a in cond.items()}

    def titles(self, cond: Any, names: Sequence[str] = ()) -> list[str]:
        rows = len(next(iter(cond.values())))
        return [f"prompt {i}" for i in range(rows)]


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """Nothing: an array (B, 0), so that the number of samples is known. Never guided."""

    guidable = False

    def draw(self, keys: Keys) -> Any:
        return jnp.zeros((keys.shape[0], 0))

    def choose(self, spec: str, key: jax.Array, indices: Int[np.ndarray, " B"]) -> np.ndarray:
        return np.zeros((len(indices), 0), np.float32)

    def null(self, params: Any, cond: Any) -> Any:
        raise InputError("cfg_scale: this network has no condition, so it cannot be guided; wanted cfg_scale=1")

    def check(self, cond: Any) -> np.ndarray:
        if np.ndim(cond) != 2 or np.shape(cond)[1] != 0:
            raise InputError(f"cond has shape {np.shape(cond)}; wanted (B, 0): this network has no condition")
        return np.asarray(cond, np.float32)

    def titles(self, cond: Any, names: Sequence[str] = ()) -> list[str]:
        return [f"sample {i}" for i in range(len(cond))]
