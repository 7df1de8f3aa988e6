"""The same bits spread over the layers by what each one's error costs.

    minimise  sum_l s_l D(spec_l) / D(now_l)     subject to  sum_l bits(spec_l) <= budget

s_l is the share of L_s + L_c, the error of the sampler's next step (`losses.step_distance`), that layer l has when it alone is
quantized in its present form, summed over the steps of a trajectory. Such errors are assumed to add up. D is the error of a
layer's outputs that a codebook leaves, and bits count codes with their padding and codewords. The sum is over few choices, so
the minimum is found exactly.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import sensitivity
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.knapsack import cheapest
from vq4dit_jax.methods.passes import Context, Report, pass_key
from vq4dit_jax.methods.solve_layers import moments_for, solve
from vq4dit_jax.networks.network import Network
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.base import QuantizedArray
from vq4dit_jax.qarray.rules import KEEP, Rule
from vq4dit_jax.qarray.spec import Spec, VQSpec
from vq4dit_jax.qarray.tree import block_path, flatten, matrices, replace, sizes

DISTORTION = {(64, 8): 8.8, (256, 8): 4.2, (64, 4): 2.6, (256, 4): 1.0, (64, 2): 0.32, (256, 2): 0.073}
"""(K, d) -> D, in units of K = 256, d = 4: geometric means over the layers of the built-in model, after
`codebook.solver.solve`. What the kernels have (codes of 6 and 8 bits) is what there is to choose from."""
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
        allocated = {path for path, _, leaf in matrices(params) if is_allocated(leaf)}
        kept = {path: leaf for path, leaf in flatten(params).items() if path not in allocated}
        return replace(fresh, kept), {"specs": {path: spec.to_json() for path, spec in chosen.items()}}


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
    spec: Spec
    share: float

    def menu(self) -> dict[Spec, float]:
        """What it can have instead -> its share of the error then."""
        own = _codebook(self.spec)
        now = DISTORTION.get((own.codewords, own.subvector), 1.0)
        specs = (dataclasses.replace(own, codewords=k, subvector=d) for k, d in DISTORTION if self.columns % d == 0)
        # A codebook that had to shrink for the layer's size is no longer what D was measured with.
        fitting = (spec for spec in specs if spec == spec.for_matrix(self.rows, self.columns))
        menu = {self._with(spec): self.share * DISTORTION[spec.codewords, spec.subvector] / now for spec in fitting}
        return menu or {self.spec: self.share}

    def _with(self, codebook: VQSpec) -> Spec:
        """The spec with other codebooks; what its operand goes through stays."""
        return codebook if isinstance(self.spec, VQSpec) else dataclasses.replace(self.spec, weight=codebook)


def _codebook(spec: Spec) -> VQSpec:
    """The codebooks of a spec, or of the weight inside it."""
    return getattr(spec, "weight", spec)


def is_allocated(leaf: QuantizedArray) -> bool:
    """Whether a leaf is made of codebooks, or has a weight inside that is: other kinds have no menu."""
    return getattr(leaf, "weight", leaf).kind == "vq"


def _menus(layers: list[Layer], together: bool) -> list[tuple[list[Layer], dict[Spec, tuple[int, float]]]]:
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


def spread(layers: list[Layer], budget: int, together: bool = False) -> dict[str, Spec]:
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
    chosen = cheapest([list(menu.values()) for _, menu in menus], budget)
    return {
        layer.path: list(menu)[option]
        for (members, menu), option in zip(menus, chosen, strict=True)
        for layer in members
    }


def rules(chosen: Mapping[str, Spec]) -> tuple[Rule, ...]:
    """For `quantize`: these paths with these specs, all others kept."""
    return (*((re.escape(path), spec) for path, spec in chosen.items()), (".*", KEEP))


def layers(
    network: Network, teacher: Any, packed: Any, *, key: jax.Array, cfg_scale: float, images: int = sensitivity.IMAGES
) -> list[Layer]:
    """The matrices of codebooks of `packed` with the share of the error that each has, on a trajectory of the teacher."""
    wanted = [(path, block) for path, block, leaf in matrices(packed) if is_allocated(leaf)]
    how = dict(key=key, cfg_scale=cfg_scale, images=images)
    found = sensitivity.one_at_a_time(network, teacher, packed, wanted, **how)
    share = lambda path, block: found.alone[path, block] / max(found.together, 1e-30)
    return [
        Layer(block_path(path, block, network.prefixes), *leaf.matrix, leaf.spec(), share(path, block))
        for path, block, leaf in matrices(packed)
        if (path, block) in found.alone
    ]
