"""The same bits spread over the layers by what each one's error costs.

    minimise  sum_l s_l D(spec_l) / D(now_l)     subject to  sum_l bits(spec_l) <= budget

s_l is the share of L_s + L_c, the error of the sampler's next step (`losses.step_distance`), that layer l has when it alone is
quantized as it is now, summed over the steps of a trajectory, as if such errors added up. D is what a codebook leaves of the
error of a layer's outputs, and bits count codes and codewords. The sum is over few choices, so the least one is found exactly.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray.rules import KEEP, Rule
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import block_path, dequantize, matrices

DISTORTION = {(64, 8): 8.8, (256, 8): 4.2, (64, 4): 2.6, (256, 4): 1.0, (64, 2): 0.32, (256, 2): 0.073}
"""(K, d) -> D, in units of K = 256, d = 4: geometric means over the layers of the built-in model, after
`vq.layerwise.solve`. What the kernels have (codes of 6 and 8 bits) is what there is to choose from."""
_IMAGES, _STEPS = 4, 10
_STATES = 1 << 16
"""Sizes that are told apart at most, when bits are spread."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One quantized matrix. `path` is that of its rule, with the number of its block; `share` is s_l."""

    path: str
    rows: int
    columns: int
    spec: VQSpec
    share: float

    def bits(self, spec: VQSpec, codebook_bits: int) -> int:
        """Of codes and codebooks."""
        k, d = spec.codewords, spec.subvector
        return self.rows * (self.columns // d) * math.ceil(math.log2(k)) + spec.groups * k * d * codebook_bits

    def menu(self) -> dict[VQSpec, float]:
        """What it can have instead -> its share of the error then."""
        now = DISTORTION.get((self.spec.codewords, self.spec.subvector), 1.0)
        specs = (VQSpec(k, d, self.spec.groups) for k, d in DISTORTION if self.columns % d == 0)
        # A codebook that had to shrink for the layer's size is no longer what D was measured with.
        fitting = (spec for spec in specs if spec == spec.for_matrix(self.rows, self.columns))
        menu = {spec: self.share * DISTORTION[spec.codewords, spec.subvector] / now for spec in fitting}
        return menu or {self.spec: self.share}


def spread(layers: list[Layer], budget: int, codebook_bits: int, together: bool = False) -> dict[str, VQSpec]:
    """Path -> spec, with `budget` bits in all at most and the least cost that they can have.

    `together`: the blocks of a role share a spec, so that they stay one stack.
    Raises InputError where the least bits of the menu are above the budget.
    """
    roles: dict[str, list[Layer]] = {}
    for layer in layers:
        roles.setdefault(re.sub(r"/\d+/", "/*/", layer.path, count=1) if together else layer.path, []).append(layer)
    members, menus = list(roles.values()), []
    for role in members:
        each = [layer.menu() for layer in role]
        common = [spec for spec in each[0] if all(spec in menu for menu in each)]
        menus.append(
            {
                spec: (sum(layer.bits(spec, codebook_bits) for layer in role), sum(menu[spec] for menu in each))
                for spec in common
            }
        )
    least = sum(min(bits for bits, _ in menu.values()) for menu in menus)
    if least > budget:
        raise InputError(
            f"calibration.budget allows {budget // 8} bytes for codes and codebooks; the least that the layers can have is "
            f"{least // 8}: allow more"
        )
    chosen = _cheapest([list(menu.values()) for menu in menus], budget)
    return {
        layer.path: list(menu)[option]
        for role, menu, option in zip(members, menus, chosen, strict=True)
        for layer in role
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


def layers(
    network: Network, params: Any, packed: Any, *, key: jax.Array, cfg_scale: float, images: int = _IMAGES
) -> list[Layer]:
    """The quantized matrices of `packed` with the share of the error that each has, on trajectories of the teacher."""
    sched = diffusion.make_schedule(_STEPS)
    shown = trajectory.batches(network, params, _STEPS, key=key, images=images, cfg_scale=cfg_scale)
    batches = [dataclasses.replace(batch, blocks=None) for batch in shown]

    def error(student: Any, batch: trajectory.Batch) -> jax.Array:
        output = network.apply(student, batch.x, batch.t, batch.y)[0]
        return sum(losses.step_distance(network, sched, batch, output, cfg_scale))

    measure = jax.jit(error)
    teacher = flax.traverse_util.flatten_dict(params, sep="/")
    dense = flax.traverse_util.flatten_dict(dequantize(packed, jnp.float32), sep="/")

    def total(replaced: dict[str, Any]) -> float:
        student = flax.traverse_util.unflatten_dict(teacher | replaced, sep="/")
        return float(sum(measure(student, batch) for batch in batches))

    together = total(dense)
    out = []
    for path, block, leaf in matrices(packed):
        kernel = dense[path] if block is None else teacher[path].at[block].set(dense[path][block])
        share = total({path: kernel}) / max(together, 1e-30)
        spec = VQSpec(leaf.num_codewords, leaf.subvector_length, leaf.num_groups)
        out.append(Layer(block_path(path, block), *leaf.matrix, spec, share))
    return out
