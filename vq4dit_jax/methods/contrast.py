"""One factor for the codebooks of all blocks, so that images have the teacher's contrast.

A student whose every layer and every step is right on the teacher's trajectory still diverges from it when it samples, and the
contrast that it loses there shows in its images alone. With the same noise and conditions they are S = s T + error; a 3-bit
model's s is one per cent below 1, in all octaves but the coarsest (docs/quality.md). It grows with the outputs of the blocks:

    s(g) = mean over octaves k of <S_k, T_k> / <T_k, T_k>,   S the images of codebooks (1 + g) C
    g = p (1 - s(0)) / (s(p) - s(0))                         the secant through g = 0 and a small p

Linears that read time and condition alone keep their scale: a factor there changes what the condition changes, too.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import lasting
from vq4dit_jax.methods.passes import Context, Report
from vq4dit_jax.networks.network import random_problem
from vq4dit_jax.qarray.tree import flatten, map_quantized, quantized_paths, replace

_PROBE, _MOST = 0.002, 0.01


@dataclasses.dataclass(frozen=True)
class FitContrast:
    """Multiplies the quantized weights of all blocks by 1 + g, |g| at most 0.01, in the types that they have.

    Attributes:
      images: how many are made three times, by the teacher and by the student with g = 0 and g = p. s of 64 is uncertain by
        about 0.0025 at 3 bits; s(p) - s(0) by much less, because both share their noise.
      num_steps, cfg_scale: of the sampler.
    """

    images: int = 64
    num_steps: int = 50
    cfg_scale: float = 1.5
    name: ClassVar[str] = "contrast"

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        network = run.network
        problem = random_problem(network, run.teacher, key, images=self.images, cfg_scale=self.cfg_scale)

        def images(weights: Any) -> Float[Array, "B *S C"]:
            how = dict(num_steps=self.num_steps, scale=self.cfg_scale)
            with jax.default_matmul_precision("highest"):
                return trajectory.observed(network, weights, problem, **how)[0]

        wanted = images(run.teacher)

        def contrast(factor: float) -> float:
            # In float32, because a step of p is near the rounding of 16-bit codebooks.
            return float(fine_slope(images(scaled(params, paths, factor, wide=True)), wanted))

        paths = tuple(path for path in quantized_paths(params) if not network.reads_conditioning(path))
        now, then = contrast(1.0), contrast(1.0 + _PROBE)
        gain = _PROBE * (1 - now) / (then - now) if then != now else 0.0
        gain = min(max(gain, -_MOST), _MOST)
        return scaled(params, paths, 1.0 + gain), {"contrast": now, "gain": gain}


@jax.jit
def fine_slope(found: Float[Array, "B *S C"], wanted: Float[Array, "B *S C"]) -> Float[Array, ""]:
    """The mean of `slope` over all octaves but the coarsest."""
    pairs = list(zip(lasting.octaves(found), lasting.octaves(wanted), strict=True))
    slopes = [slope(a, b) for a, b in pairs[: max(len(pairs) - 1, 1)]]
    return sum(slopes) / len(slopes)


def slope(found: Float[Array, "B *S C"], wanted: Float[Array, "B *S C"]) -> Float[Array, ""]:
    """Of the least-squares line through the origin of `found` on `wanted`; 1 where `wanted` is zero."""
    energy = jnp.square(wanted).sum()
    return jnp.where(energy > 0, (found * wanted).sum() / jnp.where(energy > 0, energy, 1.0), 1.0)


@functools.partial(jax.jit, static_argnames=("paths", "wide"))
def scaled(packed: Any, paths: tuple[str, ...], factor: Any, wide: bool = False) -> Any:
    """`packed` with the quantized weights at `paths` times `factor`, in the types that they have, or with `wide` in float32."""
    if wide:
        packed = map_quantized(lambda leaf: leaf.with_tuned(leaf.tunable()), packed)
    leaves = flatten(packed)
    return replace(packed, {path: map_quantized(lambda leaf: leaf.scaled(factor), leaves[path]) for path in paths})
