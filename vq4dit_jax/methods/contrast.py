"""One factor for the codebooks of all blocks, so that images have the teacher's contrast.

A student whose every layer and every step is right on the teacher's trajectory still goes its own way, and what it loses there
is seen in its images alone. With the same noise and classes they are S = s T + error; a 3-bit model's s is a per cent
under 1, in all octaves but the coarsest (docs/quality.md, section 6). It grows with the outputs of the blocks:

    s(g) = mean over octaves k of <S_k, T_k> / <T_k, T_k>,   S the images of codebooks (1 + g) C
    g = p (1 - s(0)) / (s(p) - s(0))                         the secant through g = 0 and a small p

Codebooks that read time and class alone keep their scale: a factor there moves what the class changes, too.
"""

import dataclasses
import re
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import lasting
from vq4dit_jax.methods.solve_layers import CONDITIONING, quantized_paths
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.tree import dequantize, map_leaves

IMAGES = 64
"""s of so many is uncertain by about 0.0025 at 3 bits; s(p) - s(0) by much less, for both share their noise."""
_PROBE, _MOST = 0.002, 0.01


def fit(
    network: Network,
    teacher: Any,
    student: Any,
    *,
    key: jax.Array,
    num_steps: int,
    cfg_scale: float,
    images: int = IMAGES,
) -> dict[str, Any]:
    """`student` with its blocks' codebooks times 1 + g, |g| at most 0.01, in the types that they have; all else stays.

    Args:
      network: how both are run.
      teacher: full precision.
      student: packed, as `quantize` gives it.
      key: of the noise and classes, which both get.
      num_steps, cfg_scale: of the DDPM sampler.
      images: how many are made three times, by the teacher and by the student with g = 0 and g = p.
    """
    sched = diffusion.make_schedule(num_steps)

    @jax.jit
    def step(params: Any, where: trajectory.Trajectory) -> tuple[trajectory.Batch, trajectory.Trajectory]:
        batch, where = trajectory.advance(network, params, sched, cfg_scale, where)
        return dataclasses.replace(batch, blocks=None), where

    def fine_octaves(params: Any) -> list[Float[Array, "B H W C"]]:
        where = trajectory.begin(network, sched, jax.random.key_data(key), jnp.int32(0), images)
        for _ in range(num_steps):
            batch, where = step(params, where)
        last = batch.x[:images]
        found = diffusion.ddpm_step(sched, batch.i, last, network.guide(batch.output, cfg_scale), jnp.zeros_like(last))
        parts = lasting.octaves(found)
        return parts[: max(len(parts) - 1, 1)]

    wanted = fine_octaves(teacher)
    paths = [path for path in quantized_paths(student) if not re.fullmatch(CONDITIONING, path)]
    # Dense like the teacher, so that all three runs are one program.
    dense = jax.tree.map(lambda a: a.astype(jnp.float32), dequantize(student, jnp.float32))
    flat = flax.traverse_util.flatten_dict(dense, sep="/")

    def contrast(factor: float) -> float:
        louder = flat | {path: factor * flat[path] for path in paths}
        found = fine_octaves(flax.traverse_util.unflatten_dict(louder, sep="/"))
        return float(jnp.stack([slope(a, b) for a, b in zip(found, wanted, strict=True)]).mean())

    now, then = contrast(1.0), contrast(1.0 + _PROBE)
    gain = _PROBE * (1 - now) / (then - now) if then != now else 0.0
    return scaled(student, paths, 1.0 + min(max(gain, -_MOST), _MOST))


def slope(found: Float[Array, "B H W C"], wanted: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Of the least-squares line through the origin of `found` on `wanted`; 1 where there is nothing to be seen."""
    energy = jnp.square(wanted).sum()
    return jnp.where(energy > 0, (found * wanted).sum() / jnp.where(energy > 0, energy, 1.0), 1.0)


def scaled(packed: Any, paths: list[str], factor: float) -> dict[str, Any]:
    """`packed` with the codebooks at `paths` times `factor`, in the types that they have."""

    one = lambda leaf: leaf.scaled(factor) if is_quantized(leaf) else leaf
    flat = flax.traverse_util.flatten_dict(packed, sep="/")
    return flax.traverse_util.unflatten_dict(flat | {path: map_leaves(one, flat[path]) for path in paths}, sep="/")
