"""The same bits spread over the layers by what each one's error costs.

    minimise  sum_l s_l D(spec_l) / D(now_l)     subject to  sum_l bits(spec_l) <= budget

s_l is the share of L_s + L_c, the error of the sampler's next step (`losses.step_distance`), that layer l has when it alone is
quantized in its present form, summed over the steps of a trajectory. Such errors are assumed to add up. D is the error of a
layer's outputs that a codebook leaves, and bits count codes with their padding and codewords. The sum is over few choices, so
the minimum is found exactly.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.passes import Context, Report, pass_key
from vq4dit_jax.methods.solve_layers import moments_for, solve
from vq4dit_jax.networks.network import Network, random_problem
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.base import Kernel
from vq4dit_jax.qarray.rules import KEEP, Rule
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import block_path, flatten, matrices, quantized_paths, replace, sizes

DISTORTION = {(64, 8): 8.8, (256, 8): 4.2, (64, 4): 2.6, (256, 4): 1.0, (64, 2): 0.32, (256, 2): 0.073}
"""(K, d) -> D, in units of K = 256, d = 4: geometric means over the layers of the built-in model, after
`codebook.solver.solve`. What the kernels have (codes of 6 and 8 bits) is what there is to choose from."""
_IMAGES, _STEPS = 4, 10
_STATES = 1 << 16
"""Maximum number of states of the dynamic programme."""
_LLOYD_ITERATIONS = 10
"""Of a codebook that an allocation asked for; the layer solver goes on from there."""
BY = ("layers", "roles")


@dataclasses.dataclass(frozen=True)
class Allocate:
    """Spreads the bits of the model that it is given over its layers, and makes them anew by k-means.

    Attributes:
      budget: bits that codes and codebooks may take in all, in units of the codes of the model that it is given: 2.1 bits a
        weight for 1.05 and K = 256, d = 4. (A small model's codebooks are more than a tenth of it.)
      by: "layers", each block by itself, or "roles": the blocks of a role share a spec, so that they stay one stack.
      images, cfg_scale: of the trajectory that the layers are solved for once, to compare them with each other.
    """

    budget: float = 1.05
    by: str = "layers"
    images: int = 16
    cfg_scale: float = 1.5
    name: ClassVar[str] = "allocate"

    def __post_init__(self):
        if self.by not in BY:
            raise InputError(f"allocate.by={self.by!r}: wanted one of {', '.join(BY)}")

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        moments = moments_for(run, params, self.images, self.cfg_scale)
        with progress(sum(1 for _ in matrices(params)), "compare layers", "layer") as bar:
            found = solve(run.teacher, params, moments, lambda: bar.update(1), feedbacks=1, rounds=1)
        shares = layers(run.network, run.teacher, found, key=pass_key(key, "shares"), cfg_scale=self.cfg_scale)
        chosen = spread(shares, int(self.budget * 8 * sizes(params).assignment_bytes), together=self.by == "roles")
        fresh = quantize(
            run.teacher,
            key=pass_key(key, "kmeans"),
            rules=rules(chosen),
            stacked=run.network.prefixes,
            max_iterations=_LLOYD_ITERATIONS,
        )
        # All else stays as it was given: what is not quantized may have been rounded, and other kinds have no menu.
        allocated = {path for path, _, leaf in matrices(params) if leaf.kind == "vq"}
        kept = {path: leaf for path, leaf in flatten(params).items() if path not in allocated}
        return replace(fresh, kept), {"specs": {path: dataclasses.asdict(spec) for path, spec in chosen.items()}}


def least_budget(layers: list["Layer"], assignment_bytes: int, together: bool = False) -> float:
    """The smallest `Allocate.budget` that these layers can be given."""
    least = sum(min(bits for bits, _ in menu.values()) for _, menu in _menus(layers, together))
    return least / (8 * assignment_bytes)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One quantized matrix. `path` is that of its rule, with the number of its block; `share` is s_l."""

    path: str
    rows: int
    columns: int
    spec: VQSpec
    share: float

    def menu(self) -> dict[VQSpec, float]:
        """What it can have instead -> its share of the error then."""
        now = DISTORTION.get((self.spec.codewords, self.spec.subvector), 1.0)
        specs = (
            dataclasses.replace(self.spec, codewords=k, subvector=d) for k, d in DISTORTION if self.columns % d == 0
        )
        # A codebook that had to shrink for the layer's size is no longer what D was measured with.
        fitting = (spec for spec in specs if spec == spec.for_matrix(self.rows, self.columns))
        menu = {spec: self.share * DISTORTION[spec.codewords, spec.subvector] / now for spec in fitting}
        return menu or {self.spec: self.share}


def _menus(layers: list[Layer], together: bool) -> list[tuple[list[Layer], dict[VQSpec, tuple[int, float]]]]:
    """Layers that share a spec, and what they can have: spec -> (bits, share of the error) of all of them."""
    shared: dict[str, list[Layer]] = {}
    for layer in layers:
        shared.setdefault(re.sub(r"/\d+/", "/*/", layer.path, count=1) if together else layer.path, []).append(layer)
    out = []
    for members in shared.values():
        each = [layer.menu() for layer in members]
        common = [spec for spec in each[0] if all(spec in menu for menu in each)]
        cost = lambda spec: (
            sum(spec.stored_bits(layer.rows, layer.columns) for layer in members),
            sum(menu[spec] for menu in each),
        )
        out.append((members, {spec: cost(spec) for spec in common}))
    return out


def spread(layers: list[Layer], budget: int, together: bool = False) -> dict[str, VQSpec]:
    """Path -> spec, with `budget` bits in all at most and the least cost that they can have.

    `together`: the blocks of a role share a spec, so that they stay one stack.
    Raises InputError where the least bits of the menu are above the budget.
    """
    menus = _menus(layers, together)
    least = sum(min(bits for bits, _ in menu.values()) for _, menu in menus)
    if least > budget:
        raise InputError(
            f"calibration.budget allows {budget // 8} bytes for codes and codebooks; the least that the layers can have is "
            f"{-(-least // 8)}: multiply the budget by at least {least / max(budget, 1):.4f}"
        )
    chosen = _cheapest([list(menu.values()) for _, menu in menus], budget)
    return {
        layer.path: list(menu)[option]
        for (members, menu), option in zip(menus, chosen, strict=True)
        for layer in members
    }


def _cheapest(menus: list[list[tuple[int, float]]], budget: int) -> list[int]:
    """Of each menu of (bits, cost) the option to take: the knapsack problem with a choice of each kind, by dynamic programming.

    Some choice keeps the budget. Bits are counted in their common divisor, or in a part of the budget where that would be
    too many states; then they are rounded up, and the budget holds.
    """
    divisor = math.gcd(*(bits for menu in menus for bits, _ in menu))
    unit = max(divisor, -(-budget // _STATES))
    # best[s]: the least cost of the menus so far with s units at most.
    best, taken = np.zeros(budget // unit + 1), []
    for menu in menus:
        costs = np.full((len(menu), len(best)), np.inf)
        for option, (bits, cost) in enumerate(menu):
            size = -(-bits // unit)
            costs[option, size:] = best[: max(len(best) - size, 0)] + cost
        taken.append(costs.argmin(0))
        best = costs.min(0)
    if not np.isfinite(best[-1]):  # only the rounding is in the way
        return [min(range(len(menu)), key=lambda option: menu[option]) for menu in menus]
    left, chosen = len(best) - 1, []
    for menu, options in zip(reversed(menus), reversed(taken), strict=True):
        chosen.append(int(options[left]))
        left -= -(-menu[chosen[-1]][0] // unit)
    return chosen[::-1]


def rules(chosen: Mapping[str, VQSpec]) -> tuple[Rule, ...]:
    """For `quantize`: these paths with these specs, all others kept."""
    return (*((re.escape(path), spec) for path, spec in chosen.items()), (".*", KEEP))


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Keeps evaluations, without block outputs."""

    def __call__(self, evaluation: trajectory.Evaluation, given: Any) -> trajectory.Evaluation:
        return evaluation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Either(Kernel):
    """A quantized matrix where `use` is set, else the teacher's; in a stack all three lead with its axis."""

    dense: Any
    quantized: Any
    use: Any  # bool (*stack)

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        dense = lambda x: jnp.matmul(x, self.dense.astype(x.dtype))
        return jax.lax.cond(self.use, self.quantized.matmul, dense, x)


def _step_errors(network: Network, cfg_scale: float, student: Any, evaluations: trajectory.Evaluation) -> jax.Array:
    """L_s + L_c of a student, summed over a stack of evaluations."""
    sched = network.process.schedule(_STEPS)

    def one(total: jax.Array, evaluation: trajectory.Evaluation) -> tuple[jax.Array, None]:
        output, _ = network.run(student, evaluation.x, evaluation.t, evaluation.cond)
        return total + sum(losses.step_distance(network, sched, evaluation, output, cfg_scale)), None

    return jax.lax.scan(one, jnp.float32(0.0), evaluations)[0]


_measure = jax.jit(_step_errors, static_argnames=("network", "cfg_scale"))


def layers(
    network: Network, teacher: Any, packed: Any, *, key: jax.Array, cfg_scale: float, images: int = _IMAGES
) -> list[Layer]:
    """The quantized matrices of `packed` with the share of the error that each has, on a trajectory of the teacher.

    A student is the teacher with one matrix of `packed` in its place. All of them are one program: which one is an argument.
    """
    problem = random_problem(network, teacher, key, images=images, cfg_scale=cfg_scale)
    _, evaluations = trajectory.observed(network, teacher, problem, num_steps=_STEPS, scale=cfg_scale, observe=_Keep())
    kernels, leaves = flatten(teacher), flatten(packed)
    stack = {path: kernels[path].shape[:-2] for path in quantized_paths(packed)}  # (), or (blocks,)

    def total(use: dict[str, Any]) -> float:
        """Of the student whose matrices are quantized where `use[path]`, bool (*stack), is set."""
        either = {path: _Either(kernels[path], leaves[path], use[path]) for path in stack}
        return float(_measure(network, cfg_scale, replace(teacher, either), evaluations))

    together = total({path: np.ones(shape, bool) for path, shape in stack.items()})
    out = []
    for path, block, leaf in matrices(packed):
        if leaf.kind != "vq":
            continue
        use = {other: np.zeros(shape, bool) for other, shape in stack.items()}
        use[path][... if block is None else block] = True
        share = total(use) / max(together, 1e-30)
        out.append(Layer(block_path(path, block, network.prefixes), *leaf.matrix, leaf.spec(), share))
    return out
