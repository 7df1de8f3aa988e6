"""Before any gradient: assignments and codebooks that keep each layer's outputs on the teacher's trajectory.

The mathematics, for one layer, is in `vq.layerwise`; here it is done to a tree.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vq4dit_jax.codebook import solver as layerwise
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import allocate, lasting, losses
from vq4dit_jax.methods.kmeans import quantize
from vq4dit_jax.methods.moments import InputMoments, input_moments
from vq4dit_jax.methods.recipe import Recipe
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import Network, as_network
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.tree import map_leaves, matrices, sizes
from vq4dit_jax.qarray.vq import VQArray, from_codes

_MOMENTS, _SHARES, _KMEANS, _WEIGHTS = range(4)
"""Streams of the key."""
_MOMENT_STEPS = 25
CONDITIONING = ".*adaLN.*"
"""Kernels that read time and class alone. Each time step has a few inputs of its own and must be right; and what the class
changes in them is a small part of their energy, and all that guidance has."""
_LABELS = 0.5
"""`differences` of their moments."""
_ALIKE = 0.25
"""The share of moments in which every time step counts alike; the rest is for what an error leaves in the image. Of the
moments of `CONDITIONING` one half more counts alike."""
_LLOYD_ITERATIONS = 10
"""Of a codebook that an allocation asked for: `solve` goes on from there."""
_AT_ONCE = 4
"""Layers that are solved side by side."""


def start(recipe: Recipe, model: DiT | Network, params: Any, packed: Any, key: jax.Array) -> Any:
    """What the gradient steps start from: `packed` solved layer by layer, its bits spread anew where the recipe says so.

    Memory: the moments of all layers, (I, I) float32 each, 3 GB for DiT-XL/2; and a few copies of those of the `_AT_ONCE`
    layers that are solved side by side.
    """
    network, keys = as_network(model, recipe.remat), [jax.random.fold_in(key, i) for i in range(4)]
    paths = quantized_paths(packed)
    weights = step_weights(network, params, key=keys[_WEIGHTS], images=recipe.batch, cfg_scale=recipe.cfg_scale)
    moments = input_moments(
        model,
        params,
        paths,
        key=keys[_MOMENTS],
        images=recipe.batch,
        num_steps=_MOMENT_STEPS,
        cfg_scale=recipe.cfg_scale,
        weights={path: (1 + weights) / 2 if re.fullmatch(CONDITIONING, path) else weights for path in paths},
        differences={path: _LABELS for path in paths if re.fullmatch(CONDITIONING, path)},
    )
    finished = lambda solved: restore(params, solved, moments) if recipe.gains else solved
    if recipe.allocation == "given":
        return finished(_solve_with_progress(params, packed, moments))
    # To compare layers with each other the first pass is enough.
    found = _solve_with_progress(params, packed, moments, feedbacks=1, rounds=1)
    size = sizes(packed)
    layers = allocate.layers(network, params, found, key=keys[_SHARES], cfg_scale=recipe.cfg_scale)
    dtype = next(leaf.codebook.dtype for _, _, leaf in matrices(packed))
    chosen = allocate.spread(
        layers,
        int(recipe.budget * 8 * size.assignment_bytes),
        8 * dtype.itemsize,
        together=recipe.allocation == "roles",
    )
    fresh = quantize(
        params,
        key=keys[_KMEANS],
        rules=allocate.rules(chosen),
        codebook_dtype=dtype,
        max_iterations=_LLOYD_ITERATIONS,
    )
    return finished(_solve_with_progress(params, _with_kept(fresh, packed), moments))


def step_weights(network: Network, params: Any, *, key: jax.Array, images: int, cfg_scale: float) -> Float[Array, " N"]:
    """What the time steps of the moments count, mean 1: `_ALIKE`, and the rest by what an error in the noise prediction leaves
    in the image (`lasting`)."""
    sched = diffusion.make_schedule(_MOMENT_STEPS)

    @jax.jit
    def weight(batch: trajectory.Batch) -> jax.Array:
        eps = losses.guided_eps(network, batch.output, cfg_scale)
        clean = diffusion.predict_x0(sched, batch.i, batch.x[:images], eps)
        return lasting.noise_prediction_weight(sched, batch.i, lasting.octaves(clean))

    shown = trajectory.batches(network, params, _MOMENT_STEPS, key=key, images=images, cfg_scale=cfg_scale)
    weights = jnp.stack([weight(dataclasses.replace(batch, blocks=None)) for batch in shown])[::-1]
    return _ALIKE + (1 - _ALIKE) * weights / weights.mean()


def _with_kept(fresh: Any, packed: Any) -> Any:
    """`fresh`, with what is not quantized from `packed` (where it may have been rounded)."""
    kept = flax.traverse_util.flatten_dict(packed, sep="/")
    quantized = set(quantized_paths(packed))
    leaves = flax.traverse_util.flatten_dict(fresh, sep="/")
    return flax.traverse_util.unflatten_dict(
        {path: leaf if path in quantized else kept[path] for path, leaf in leaves.items()}, sep="/"
    )


def _solve_with_progress(params: Any, packed: Any, moments: dict[str, InputMoments], **passes: int) -> Any:
    with progress(sum(1 for _ in matrices(packed)), "layer by layer", "layer") as bar:
        return solve(params, packed, moments, lambda: bar.update(1), **passes)


def quantized_paths(packed: Any) -> list[str]:
    """'/'-joined paths of the leaves that are quantized, also in parts."""
    return list(dict.fromkeys(path for path, _, _ in matrices(packed)))


def solve(
    params: Any,
    packed: Any,
    moments: dict[str, InputMoments],
    on_layer: Callable[[], None] = lambda: None,
    feedbacks: int = layerwise.FEEDBACKS,
    rounds: int = layerwise.ROUNDS,
) -> Any:
    """`packed` with every layer's codebook and assignments solved anew for the inputs that `moments` are of.

    Args:
      params: the teacher.
      packed: its `quantize`; shapes stay, and codebooks are where the search starts.
      moments: by path, see `input_moments`.
      on_layer: is called after each layer.
      feedbacks, rounds: of `vq.layerwise.solve`.
    """
    weights = flax.traverse_util.flatten_dict(params, sep="/")

    def one(matrix: tuple[str, int | None, VQArray]) -> tuple[np.ndarray, np.ndarray]:
        path, block, leaf = matrix
        codebook = np.asarray(leaf.codebook, np.float32)
        found = _solve_block(weights[path], moments[path].second, codebook, block, feedbacks, rounds)
        return tuple(map(np.asarray, found))

    solved = []
    # A program is compiled, and mostly runs, on one core.
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(one, matrices(packed)):
            solved.append(found)
            on_layer()
    return _again(packed, iter(solved))


@jax.jit
def _solve_block(
    kernel: Float[Array, "*stack I O"],
    second: Float[Array, "*stack I I"],
    codebook: Float[Array, "G K d"],
    block: layerwise.Integer | None,
    feedbacks: layerwise.Integer,
    rounds: layerwise.Integer,
) -> tuple[Float[Array, "G K d"], Int[Array, "O S"]]:
    """(codebook, assignments) of block `block` of a stack, or of a kernel without one (None): one program for all blocks."""
    weight = _of_block(kernel, block).T.astype(jnp.float32)
    moments = layerwise.condition(_of_block(second, block))
    return layerwise.solve(weight, moments, codebook, feedbacks=feedbacks, rounds=rounds)[:2]


def restore(params: Any, packed: Any, moments: dict[str, InputMoments]) -> Any:
    """`packed` with codebooks and biases whose outputs have the teacher's scale and mean (`vq.layerwise.restored`).

    Where a layer has no bias its mean stays. Codebooks of `CONDITIONING` keep their scale: at one time step only the label
    varies, which is represented worse than the time step, and a factor for the one would be too much for the other.
    """
    weights = flax.traverse_util.flatten_dict(params, sep="/")
    leaves = flax.traverse_util.flatten_dict(packed, sep="/")
    bias_of = {path: path.rpartition("/")[0] + "/bias" for path in quantized_paths(packed)}
    biases = {bias: jnp.asarray(leaves[bias], jnp.float32) for bias in bias_of.values() if bias in leaves}

    def one(path: str, block: int | None, leaf: VQArray) -> tuple[np.ndarray, np.ndarray]:
        kernel, found = _of_block(weights[path], block), moments[path].of_block(block)
        codes, scale = leaf.codes(), not re.fullmatch(CONDITIONING, path)
        wide = [jnp.asarray(a, jnp.float32) for a in (kernel.T, found.spread(), found.mean(), leaf.codebook)]
        codebook, shift = layerwise.restored(*wide, codes, scale=scale)
        if (bias := bias_of[path]) in biases:
            biases[bias] = biases[bias].at[... if block is None else block].add(shift)
        return np.asarray(codebook), np.asarray(codes)

    again = _again(packed, (one(*matrix) for matrix in matrices(packed)))
    shifted = {path: bias.astype(leaves[path].dtype) for path, bias in biases.items()}
    return flax.traverse_util.unflatten_dict(flax.traverse_util.flatten_dict(again, sep="/") | shifted, sep="/")


def _of_block(stack: Any, block: layerwise.Integer | None) -> Any:
    return stack if block is None else stack[block]


def _again(packed: Any, matrices: Iterator[tuple[np.ndarray, np.ndarray]]) -> Any:
    """`packed` with the (codebook, codes) of `matrices`, which come in the order of `matrices`."""

    def again(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        codebooks, codes = zip(*itertools.islice(matrices, math.prod(leaf.stack)), strict=True)
        codebook = np.stack(codebooks).reshape(leaf.codebook.shape).astype(leaf.codebook.dtype)
        return from_codes(jnp.asarray(codebook), np.stack(codes).reshape(*leaf.stack, *codes[0].shape))

    leaves = flax.traverse_util.flatten_dict(packed, sep="/")
    return flax.traverse_util.unflatten_dict({path: map_leaves(again, leaf) for path, leaf in leaves.items()}, sep="/")
