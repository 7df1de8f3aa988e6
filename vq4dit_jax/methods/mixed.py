"""Mixed precision: every layer gets the weight bits that a budget buys (ViDiT-Q, section 3.3, as an exact search).

    minimise  sum_l s_l(b_l)      subject to  sum_l bits(b_l) <= budget

s_l(b) is what layer l alone, with b bits, does to the sampler's step or to the prediction (`sensitivity`); it is measured for
every layer and every b with weights that are solved, so that a layer is judged by what would be stored. bits count codes,
scales, centres and padding. Errors are assumed to add up; the minimum is exact (`knapsack`). The paper spends a budget
greedily, by the group of a layer; its code for that is not released. Weights have one copy for all time steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import sensitivity
from vq4dit_jax.methods.knapsack import cheapest
from vq4dit_jax.methods.passes import Context, Report, pass_key
from vq4dit_jax.methods.sensitivity import Matrix
from vq4dit_jax.methods.solve_layers import moments_for, restore, solve
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.parts import stack_blocks
from vq4dit_jax.qarray.spec import IntSpec
from vq4dit_jax.qarray.tree import flatten, matrices, replace

BY = ("layers", "roles")


@dataclasses.dataclass(frozen=True)
class Mix:
    """Chooses the bits of every integer weight that has an operand of its own, and solves it.

    Attributes:
      budget: bits a weight over all of these, everything counted.
      bits: what there is to choose from; 8 bits have a scale for each row, fewer the groups of the model that it is given.
      by: "layers", or "roles": the blocks of a role have the same bits, so that they stay one stack.
      error: what s_l is an error of, one of `sensitivity.ERRORS`.
      images, cfg_scale: of the trajectories.
    """

    budget: float
    bits: tuple[int, ...] = (2, 3, 4, 8)
    by: str = "layers"
    error: str = "step"
    images: int = 16
    cfg_scale: float = 1.5
    name: ClassVar[str] = "mix"

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise InputError(f"mix.by={self.by!r}: wanted one of {', '.join(BY)}")
        if self.error not in sensitivity.ERRORS:
            raise InputError(f"mix.error={self.error!r}: wanted one of {', '.join(sensitivity.ERRORS)}")
        if not self.bits or any(b not in range(2, 9) for b in self.bits):
            raise InputError(f"mix.bits={self.bits}: wanted whole numbers from 2 to 8")

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        wanted = [(path, block) for path, block, leaf in matrices(params) if _is_mixed(leaf)]
        moments = moments_for(run, params, self.images, self.cfg_scale, alike=True)
        errors, costs, made = {}, {}, {}
        with progress(len(self.bits) * len(wanted), "bits by bits", "layer") as bar:
            for bits in self.bits:
                tree = _with_bits(run.teacher, params, bits, pass_key(key, f"{bits} bits"))
                tree = solve(run.teacher, tree, moments, lambda: bar.update(1), shift=True)
                how = dict(key=pass_key(key, "trajectory"), cfg_scale=self.cfg_scale, error=self.error)
                errors[bits] = sensitivity.one_at_a_time(run.network, run.teacher, tree, wanted, **how).alone
                made[bits] = {(path, block): leaf for path, block, leaf in matrices(tree)}
                costs[bits] = {one: _stored_bits(made[bits][one]) for one in wanted}
        chosen = self.choose(wanted, costs, errors, sum(_weights(made[self.bits[0]][one]) for one in wanted))
        leaves: dict[str, list[Any]] = {}
        for one in wanted:
            leaves.setdefault(one[0], []).append(made[chosen[one]][one])
        stacks = {
            path: stack_blocks(own) if flatten(run.teacher)[path].ndim > 2 else own[0] for path, own in leaves.items()
        }
        mixed = restore(run.network, run.teacher, replace(params, stacks), moments, gains=False)
        return mixed, _report(run, wanted, errors, chosen)

    def choose(
        self,
        wanted: Sequence[Matrix],
        costs: dict[int, dict[Matrix, int]],
        errors: dict[int, dict[Matrix, float]],
        weights: int,
    ) -> dict[Matrix, int]:
        """Matrix -> bits, from bits -> matrix -> (bits stored, error). Raises InputError where nothing fits the budget."""
        shared: dict[Any, list[Matrix]] = {}
        for one in wanted:
            shared.setdefault(one[0] if self.by == "roles" else one, []).append(one)
        total = lambda of, bits, members: sum(of[bits][one] for one in members)
        menus = [[(total(costs, b, own), total(errors, b, own)) for b in self.bits] for own in shared.values()]
        budget, least = int(self.budget * weights), sum(min(bits for bits, _ in menu) for menu in menus)
        if least > budget:
            raise InputError(
                f"viditq.budget={self.budget:g} bits a weight: the least that {min(self.bits)} bits take with their scales is "
                f"{least / weights:.3f}; give more"
            )
        options = cheapest(menus, budget)
        return {one: self.bits[o] for own, o in zip(shared.values(), options, strict=True) for one in own}


def _is_mixed(leaf: Any) -> bool:
    return getattr(leaf, "weight", leaf).kind == "int"


def least_budget(params: Any, bits: Sequence[int]) -> float:
    """The smallest `Mix.budget` that these leaves can be given; works on shapes alone."""
    stored = weights = 0
    for _, _, leaf in matrices(params):
        if _is_mixed(leaf):
            inner = getattr(leaf, "weight", leaf)
            own = _stored_bits(leaf) - _stored_bits(inner)
            stored += own + min(_spec(inner, b).stored_bits(*leaf.matrix) for b in bits)
            weights += _weights(leaf)
    return stored / max(weights, 1)


def _spec(leaf: Any, bits: int) -> IntSpec:
    """That of a leaf of integers with other bits."""
    now = leaf.spec()
    return IntSpec(bits, None if bits == 8 else now.group, now.grid)


def _with_bits(teacher: Any, params: Any, bits: int, key: jax.Array) -> Any:
    """The tree with all integer weights made anew in other bits."""
    kernels = flatten(teacher)

    def one(path: str, block: int | None, leaf: Any) -> Any:
        if not _is_mixed(leaf):
            return leaf
        weight = np.asarray(kernels[path] if block is None else kernels[path][block], np.float32).T
        spec = _spec(getattr(leaf, "weight", leaf), bits)
        return spec.quantize(weight, key) if leaf.kind == "int" else leaf.with_weight(spec, weight, key)

    made: dict[str, list[Any]] = {}
    for path, block, leaf in matrices(params):
        made.setdefault(path, []).append(one(path, block, leaf))
    stacked = lambda path, own: stack_blocks(own) if kernels[path].ndim > 2 else own[0]
    return replace(params, {path: stacked(path, own) for path, own in made.items()})


def _stored_bits(leaf: Any) -> int:
    cost = leaf.cost()
    return 8 * (cost.code_bytes + cost.table_bytes)


def _weights(leaf: Any) -> int:
    return leaf.cost().weights


def _report(run: Context, wanted: Sequence[Matrix], errors: dict[int, Any], chosen: dict[Matrix, int]) -> Report:
    """The sensitivity map: by path the bits of its blocks, and what each number of bits does; and the sums of the groups."""
    bits: dict[str, list[int]] = {}
    found: dict[str, dict[str, list[float]]] = {}
    groups: dict[str, dict[str, float]] = {}
    for path, block in wanted:
        bits.setdefault(path, []).append(chosen[path, block])
        role = run.network.role(path)
        for b, own in errors.items():
            value = own[path, block]
            found.setdefault(path, {}).setdefault(str(b), []).append(float(f"{value:.4g}"))
            group = groups.setdefault(role.group if role else "other", {})
            group[str(b)] = group.get(str(b), 0.0) + value
    return {"bits": bits, "sensitivity": found, "groups": groups}
