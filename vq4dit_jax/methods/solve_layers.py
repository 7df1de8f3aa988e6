"""Assignments and codebooks that keep each layer's outputs on the teacher's trajectory, before any gradient.

The mathematics of one layer is the leaf's own (`QuantizedArray.solve`, `codebook.solver`); here it is done to trees.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.codebook import solver
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import lasting
from vq4dit_jax.methods.moments import InputMoments, input_moments
from vq4dit_jax.methods.passes import Context, Report, pass_key
from vq4dit_jax.networks.network import Network, random_problem
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.base import QuantizedArray, is_quantized
from vq4dit_jax.qarray.tree import Slot, flatten, map_slots, matrices, quantized_paths, replace, restack, walk

_MOMENT_STEPS = 25
_DIFFERENCES = 0.5
"""`differences` in the moments of Linears that read time and condition alone: what the condition changes in them is a small
part of their energy, and guidance is made of nothing else."""
_ALIKE = 0.25
"""The share of moments in which every time step counts alike; the rest is for what an error leaves in the image. Of the Linears
that read time and condition alone, half more counts alike: each time step has few inputs of its own and must be right."""
_AT_ONCE = 4
"""Layers that are solved side by side."""


@dataclasses.dataclass(frozen=True)
class SolveLayers:
    """Solves every layer anew for the inputs that it reads on the teacher's trajectory.

    Attributes:
      images, cfg_scale: of the trajectory.
      restore: give every solved layer the factor and its bias the shift that restore its outputs' scale and mean.
      shift: only the shift. Layers with a centre are then solved for what varies in their inputs.
      alike: all time steps count alike, and all parts of the inputs. Else time steps count by what an error leaves in the
        image, and of Linears that read the condition alone differences between conditions count more (`moments_for`).
      feedbacks, rounds: of `QuantizedArray.solve`.
    """

    images: int = 16
    cfg_scale: float = 1.5
    restore: bool = False
    shift: bool = False
    alike: bool = False
    feedbacks: int = solver.FEEDBACKS
    rounds: int = solver.ROUNDS
    name: ClassVar[str] = "solve_layers"

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        moments = moments_for(run, params, self.images, self.cfg_scale, self.alike)
        count = sum(1 for _ in matrices(params))
        with progress(count, "layer by layer", "layer") as bar:
            how = dict(feedbacks=self.feedbacks, rounds=self.rounds, shift=self.restore or self.shift)
            solved = solve(run.teacher, params, moments, lambda: bar.update(1), **how)
        if self.restore or self.shift:
            solved = restore(run.network, run.teacher, solved, moments, gains=self.restore)
        return solved, {"layers": count}


def moments_for(
    run: Context, params: Any, images: int, cfg_scale: float, alike: bool = False
) -> dict[str, InputMoments]:
    """The moments of all quantized kernels, on a trajectory that all passes of a run share; `alike` as in `SolveLayers`.

    Memory: (I, I) float32 for each matrix, 3 GB for DiT-XL/2, and while they are collected twice that.
    """
    # Sorted, because an allocation that replaces leaves may change their order in the tree, and moments are of paths.
    paths = tuple(sorted(quantized_paths(params)))
    wanted = ("moments", paths, images, cfg_scale, alike)
    if wanted not in run.memo:
        network = run.network
        of_condition = {path for path in paths if network.reads_conditioning(path)}
        keys = {name: pass_key(run.key, name) for name in ("moments", "step weights")}
        counts: dict[str, Any] = {}
        if not alike:
            weights = step_weights(network, run.teacher, key=keys["step weights"], images=images, cfg_scale=cfg_scale)
            counts = dict(
                weights={path: (1 + weights) / 2 if path in of_condition else weights for path in paths},
                differences=dict.fromkeys(of_condition, _DIFFERENCES),
            )
        run.memo[wanted] = input_moments(
            run.model,
            run.teacher,
            paths,
            key=keys["moments"],
            images=images,
            num_steps=_MOMENT_STEPS,
            cfg_scale=cfg_scale,
            **counts,
        )
    return run.memo[wanted]


@dataclasses.dataclass(frozen=True)
class _Weight:
    network: Network
    cfg_scale: float

    def __call__(self, evaluation: trajectory.Evaluation, given: Any) -> jax.Array:
        network, sched = self.network, self.network.process.schedule(_MOMENT_STEPS)
        x = evaluation.x[: network.images(len(evaluation.x), self.cfg_scale)]
        clean = sched.clean(evaluation.i, x, network.prediction(evaluation.output, self.cfg_scale))
        return lasting.prediction_weight(sched, evaluation.i, lasting.octaves(clean))


def step_weights(
    network: Network, params: Any, *, key: jax.Array, images: int, cfg_scale: float
) -> Float[np.ndarray, " N"]:
    """What the time steps of the moments count, mean 1: `_ALIKE`, and the rest by what an error in the prediction leaves in the
    image (`lasting`)."""
    problem = random_problem(network, params, key, images=images, cfg_scale=cfg_scale)
    how = dict(num_steps=_MOMENT_STEPS, scale=cfg_scale, observe=_Weight(network, cfg_scale))
    _, seen = trajectory.observed(network, params, problem, **how)
    weights = np.asarray(seen)[::-1]
    return _ALIKE + (1 - _ALIKE) * weights / weights.mean()


def solve(
    teacher: Any,
    packed: Any,
    moments: dict[str, InputMoments],
    on_layer: Callable[[], None] = lambda: None,
    feedbacks: int = solver.FEEDBACKS,
    rounds: int = solver.ROUNDS,
    shift: bool = False,
) -> Any:
    """`packed` with every layer solved anew for the inputs that `moments` are of; kinds of leaves without a solver stay.

    Args:
      teacher: full precision.
      packed: its `quantize`; shapes stay, and codebooks are where the search starts.
      moments: by path, see `input_moments`.
      on_layer: is called after each layer.
      feedbacks, rounds: of `QuantizedArray.solve`.
      shift: layers that have a bias are given the means of their inputs; the biases are then for `restore`.
    """
    kernels, leaves = flatten(teacher), flatten(packed)
    # By numpy: a program for each shape would be compiled for a few numbers.
    means = {
        path: np.tensordot(np.asarray(found.weights), np.asarray(found.means), 1) / np.float32(len(found.weights))
        for path, found in moments.items()
        if shift and _bias_of(path) in leaves
    }

    def one(matrix: tuple[str, int | None, Any]) -> Any:
        path, block, leaf = matrix
        how = dict(feedbacks=feedbacks, rounds=rounds, mean=means.get(path))
        found = leaf.solve(kernels[path], moments[path].second, block, **how)
        return leaf if found is None else found

    solved = []
    # A program is compiled, and mostly runs, on one core.
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for leaf in pool.map(one, matrices(packed)):
            solved.append(leaf)
            on_layer()
    return restack(packed, iter(solved))


def _bias_of(path: str) -> str:
    """The path of the bias beside a kernel."""
    return path.rpartition("/")[0] + "/bias"


def restore(network: Network, teacher: Any, packed: Any, moments: dict[str, InputMoments], gains: bool = True) -> Any:
    """`packed` with weights and biases whose outputs have the teacher's scale and mean.

    At the optimum of a layer's error the error is orthogonal to the quantized outputs, so their energy is too small by the
    relative squared error. This accumulates over layers as lost contrast. With S the covariance of x the factor
    g = tr(W S W^T) / tr(W S W_hat^T) makes the least-squares slope of g W_hat x on W x equal to 1, all outputs together; the
    bias gets (W - g W_hat) E[x].

    Without `gains` every g is 1. Where a layer has no bias its mean stays. Linears that read time and condition alone keep their
    scale: at one time step only the condition varies, which is represented worse than the time step, and one factor cannot fit
    both.
    """
    leaves = flatten(packed)
    slots = [slot for slot in walk(packed) if is_quantized(slot.leaf)]
    bias_of = {slot.path: _bias_of(slot.path) for slot in slots}
    biases = {bias: np.array(leaves[bias], np.float32) for bias in bias_of.values() if bias in leaves}
    keeps = tuple(not gains or network.reads_conditioning(slot.path) for slot in slots)
    places = tuple((slot.path, slot.start) for slot in slots)
    kernels = {path: kernel for path, kernel in flatten(teacher).items() if path in moments}
    found = iter(_restored(places, keeps, kernels, [slot.leaf for slot in slots], moments))

    def one(slot: Slot) -> Any:
        if not is_quantized(slot.leaf):
            return slot.leaf
        leaf, shift = next(found)
        if (bias := bias_of[slot.path]) in biases:
            start = slot.start or 0
            biases[bias][... if slot.start is None else slice(start, start + len(shift))] += np.asarray(shift)
        return leaf

    again = map_slots(one, packed)
    shifted = {path: bias.astype(leaves[path].dtype) for path, bias in biases.items()}
    return replace(again, shifted)


@functools.partial(jax.jit, static_argnames=("places", "keeps"))
def _restored(
    places: tuple[tuple[str, int | None], ...],
    keeps: tuple[bool, ...],
    kernels: dict[str, Array],
    leaves: list[QuantizedArray],
    moments: dict[str, InputMoments],
) -> list[tuple[QuantizedArray, Float[Array, "*stack O"]]]:
    """(leaf times g, what to add to the bias) of the leaves at `places` (path, first block); one program for all of them.

    g = 1 where a leaf `keeps` its scale, or has nothing in common with the teacher's.
    """

    def matrix(keep: bool, kernel: Array, leaf: QuantizedArray, second: Array, means: Array, weights: Array) -> Any:
        found = InputMoments(second, means, weights)
        weight, quantized = kernel.T.astype(jnp.float32), leaf.decode(jnp.float32)
        along = weight @ found.covariance()
        wanted, common = (along * weight).sum(), (along * quantized).sum()
        factor = 1.0 if keep else jnp.where(common > 0, wanted / jnp.where(common > 0, common, 1.0), 1.0)
        return leaf if keep else leaf.scaled(factor), (weight - factor * quantized) @ found.mean()

    def one(place: tuple[str, int | None], keep: bool, leaf: QuantizedArray) -> Any:
        path, start = place
        (second, means, weights), kernel = moments[path], kernels[path]
        if not leaf.stack:
            return matrix(keep, kernel, leaf, second, means, weights)
        blocks = slice(start or 0, (start or 0) + leaf.stack[0])
        stacked = (kernel[blocks], leaf, second[blocks], jnp.moveaxis(means, 0, 1)[blocks])
        return jax.lax.map(lambda own: matrix(keep, *own, weights), stacked)

    with jax.default_matmul_precision("highest"):
        return [one(*each) for each in zip(places, keeps, leaves, strict=True)]
