"""The same bits spread over the layers by what each one's error costs.

    minimise  sum_l s_l D(spec_l) / D(now_l)     subject to  sum_l bits(spec_l) <= budget

s_l is the share of L_s + L_c, the error of the sampler's next step (`losses.step_distance`), that layer l has when it alone is
quantized as it is now, summed over the steps of a trajectory, as if such errors added up. D is what a codebook leaves of the
error of a layer's outputs, and bits count codes and codewords. For a price on bits every layer chooses on its own (Shoham &
Gersho 1988); the least price that the budget allows is found by bisection.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from vq4dit_jax import diffusion, quantization
from vq4dit_jax.calibration import losses, trajectory
from vq4dit_jax.calibration.network import Network
from vq4dit_jax.errors import InputError
from vq4dit_jax.quantization import KEEP, VQSpec

DISTORTION = {(64, 8): 8.8, (256, 8): 4.2, (64, 4): 2.6, (256, 4): 1.0, (64, 2): 0.32, (256, 2): 0.073}
"""(K, d) -> D, in units of K = 256, d = 4: geometric means over the layers of the built-in model, after
`vq.layerwise.solve`. What the kernels have (codes of 6 and 8 bits) is what there is to choose from."""
_IMAGES, _STEPS = 4, 10


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
        fitting = (spec for spec in specs if spec == spec.for_shape(self.rows, self.columns))
        menu = {spec: self.share * DISTORTION[spec.codewords, spec.subvector] / now for spec in fitting}
        return menu or {self.spec: self.share}


def spread(layers: list[Layer], budget: int, codebook_bits: int, together: bool = False) -> dict[str, VQSpec]:
    """Path -> spec, with `budget` bits in all at most.

    `together`: the blocks of a role share a spec, so that they stay one stack.
    Raises InputError where the least bits of the menu are above the budget.
    """
    roles: dict[str, list[Layer]] = {}
    for layer in layers:
        roles.setdefault(re.sub(r"/\d+/", "/*/", layer.path, count=1) if together else layer.path, []).append(layer)

    def choose(price: float) -> tuple[dict[str, VQSpec], int]:
        chosen, total = {}, 0
        for members in roles.values():
            menus = [layer.menu() for layer in members]
            common = [spec for spec in menus[0] if all(spec in menu for menu in menus)]
            size = lambda spec, members=members: sum(layer.bits(spec, codebook_bits) for layer in members)
            cost = lambda spec, menus=menus, size=size: sum(menu[spec] for menu in menus) + price * size(spec)
            best = min(common, key=cost)
            chosen.update({layer.path: best for layer in members})
            total += size(best)
        return chosen, total

    # Prices of a bit, as powers of two: from free to dearer than all error is worth.
    low, high = -80.0, 20.0
    chosen, least = choose(2.0**high)
    if least > budget:
        raise InputError(
            f"calibration.budget allows {budget // 8} bytes for codes and codebooks; the least that the layers can have is "
            f"{least // 8}: allow more"
        )
    for _ in range(60):
        middle = (low + high) / 2
        found, total = choose(2.0**middle)
        if total <= budget:
            high, chosen = middle, found
        else:
            low = middle
    return chosen


def rules(chosen: Mapping[str, VQSpec]) -> tuple[quantization.Rule, ...]:
    """For `quantization.quantize`: these paths with these specs, all others kept."""
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
    dense = flax.traverse_util.flatten_dict(quantization.dequantize(packed, jnp.float32), sep="/")

    def total(replaced: dict[str, Any]) -> float:
        student = flax.traverse_util.unflatten_dict(teacher | replaced, sep="/")
        return float(sum(measure(student, batch) for batch in batches))

    together = total(dense)
    out = []
    for path, block, leaf in quantization.matrices(packed):
        kernel = dense[path] if block is None else teacher[path].at[block].set(dense[path][block])
        share = total({path: kernel}) / max(together, 1e-30)
        spec = VQSpec(leaf.num_codewords, leaf.subvector_length, leaf.num_groups)
        out.append(Layer(quantization.block_path(path, block), *leaf.shape, spec, share))
    return out
