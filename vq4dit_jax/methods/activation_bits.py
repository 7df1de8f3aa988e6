"""Activation bits by layer and time: fewer where rounding does little (ViDiT-Q, section 3.3). Weights have one copy for all
times.

    minimise  sum_{l,r} s_lr(b_lr)      subject to  sum_{l,r} I_l b_lr <= budget sum_{l,r} I_l

The way from noise to data is cut into equal ranges r. s_lr(b) is the error (`sensitivity.ERRORS`) that layer l alone makes in
the steps of range r when its I_l inputs are rounded to b bits. Errors are assumed to add up; the minimum is exact (`knapsack`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import sensitivity
from vq4dit_jax.methods.knapsack import cheapest
from vq4dit_jax.methods.passes import Context, Report, pass_key
from vq4dit_jax.methods.sensitivity import Matrix
from vq4dit_jax.qarray.tree import flatten, map_quantized, matrices, replace


@dataclasses.dataclass(frozen=True)
class MixActivations:
    """Chooses the bits of what every Linear of a token reads, of leaves that round it to at least the largest of `bits`.

    Attributes:
      budget: mean bits of an activation, over layers, their inputs and the ranges.
      bits: what there is to choose from.
      ranges: equal parts of the way from noise to data, at most 10.
      error: one of `sensitivity.ERRORS`.
      cfg_scale: of the trajectory.
    """

    budget: float
    bits: tuple[int, ...] = (4, 6, 8)
    ranges: int = 4
    error: str = "step"
    cfg_scale: float = 1.5
    name: ClassVar[str] = "mix_activations"

    def __post_init__(self) -> None:
        if not self.bits or any(b not in range(2, 9) for b in self.bits):
            raise InputError(f"mix_activations.bits={self.bits}: wanted whole numbers from 2 to 8")
        if self.budget < min(self.bits):
            raise InputError(f"mix_activations.budget={self.budget:g}: wanted at least the least of bits={self.bits}")
        if self.ranges not in range(1, sensitivity.STEPS + 1):
            raise InputError(f"mix_activations.ranges={self.ranges}: wanted 1 to {sensitivity.STEPS}")
        if self.error not in sensitivity.ERRORS:
            raise InputError(f"mix_activations.error={self.error!r}: wanted one of {', '.join(sensitivity.ERRORS)}")

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        wanted = [
            (path, block)
            for path, block, leaf in matrices(params)
            if leaf.activation_bits and not run.network.reads_conditioning(path)
        ]
        how = dict(key=pass_key(key, "trajectory"), cfg_scale=self.cfg_scale, error=self.error)
        errors = {}
        for bits in self.bits:
            tree = map_quantized(lambda leaf, bits=bits: _timed(leaf, bits), params)
            found = sensitivity.one_at_a_time(run.network, run.teacher, tree, wanted, **how)
            errors[bits] = {one: _by_range(each, found.done, self.ranges) for one, each in found.by_step.items()}
        inputs = {(path, block): leaf.matrix[1] for path, block, leaf in matrices(params)}
        chosen = self.choose(wanted, inputs, errors)
        return _with_times(params, chosen), _report(wanted, errors, chosen)

    def choose(
        self,
        wanted: Sequence[Matrix],
        inputs: dict[Matrix, int],
        errors: dict[int, dict[Matrix, Float[np.ndarray, " R"]]],
    ) -> dict[Matrix, tuple[int, ...]]:
        """Matrix -> bits of each range, from bits -> matrix -> error of each range."""
        places = [(one, r) for one in wanted for r in range(self.ranges)]
        menus = [[(b * inputs[one], float(errors[b][one][r])) for b in self.bits] for one, r in places]
        budget = int(self.budget * sum(inputs[one] for one, _ in places))
        taken = [self.bits[option] for option in cheapest(menus, budget)]
        return {one: tuple(taken[i * self.ranges : (i + 1) * self.ranges]) for i, one in enumerate(wanted)}


def _by_range(each: Float[np.ndarray, " E"], done: Float[np.ndarray, " E"], ranges: int) -> Float[np.ndarray, " R"]:
    """Sums of the evaluations that lie in each range."""
    place = np.clip(np.floor(done * ranges), 0, ranges - 1).astype(int)
    return np.bincount(place, each.astype(np.float64), ranges)


def _timed(leaf: Any, bits: int) -> Any:
    """The leaf with `bits` at all times; one that does not round its operand as it is."""
    if not leaf.activation_bits:
        return leaf
    return dataclasses.replace(leaf, times=jnp.full((*leaf.stack, 1), bits, jnp.int8))


def _with_times(params: Any, chosen: dict[Matrix, tuple[int, ...]]) -> Any:
    """The tree whose leaves have these bits. Every matrix of a leaf that has one of them is among them."""
    own: dict[str, list[tuple[int, ...]]] = {}
    for (path, _), bits in chosen.items():
        own.setdefault(path, []).append(bits)
    flat, changed = flatten(params), {}
    for path, bits in own.items():
        rows = iter(bits)

        def timed(leaf: Any, rows: Any = rows) -> Any:
            times = [next(rows) for _ in range(int(np.prod(leaf.stack)))]
            return dataclasses.replace(leaf, times=jnp.asarray(times, jnp.int8).reshape(*leaf.stack, -1))

        changed[path] = map_quantized(timed, flat[path])
    return replace(params, changed)


def _report(
    wanted: Sequence[Matrix], errors: dict[int, dict[Matrix, Any]], chosen: dict[Matrix, tuple[int, ...]]
) -> Report:
    """By path: the bits of its blocks in each range, and what each number of bits does there."""
    bits: dict[str, list[tuple[int, ...]]] = {}
    found: dict[str, dict[str, list[list[float]]]] = {}
    for path, block in wanted:
        bits.setdefault(path, []).append(chosen[path, block])
        for b, own in errors.items():
            row = [float(f"{value:.4g}") for value in own[path, block]]
            found.setdefault(path, {}).setdefault(str(b), []).append(row)
    return {"bits": bits, "sensitivity": found}
