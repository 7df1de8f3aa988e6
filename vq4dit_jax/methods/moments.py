"""Moments of what Linears read on the teacher's own trajectory; the second is the Hessian of a layer's squared error.

For a Linear y = W x, the mean of |W x - Q x|^2 over N inputs is tr((W - Q) H (W - Q)^T) with H = X^T X / N, X (N, I)
(Frantar et al. 2023, arXiv 2210.17323, section 3, but for a factor of 2).

A backward pass visits every Linear, also under `lax.scan` and rematerialisation, and collects one array for each use of a
parameter. So a kernel is put in a `Probe` beside arrays of zeros (I, I) and (I,), whose "gradients" are defined to be
X^T X / N and the mean of X.
The probes below a probe are still visited, because the gradient of its input is defined as an array of zeros.
"""

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.network import Network, as_network, check, random_problem
from vq4dit_jax.qarray.base import Kernel
from vq4dit_jax.qarray.tree import flatten, unflatten


class InputMoments(NamedTuple):
    """Of the inputs x of one kernel (*stack, I, O), float32.

    Attributes:
      second: E[x x^T], each time step counting by its weight, and `differences` added.
      means: E[x] at each time step, by its index into the schedule.
      weights: what each time step counts; their mean is 1.
    """

    second: Float[Array, "*stack I I"]
    means: Float[Array, "N *stack I"]
    weights: Any

    def of_block(self, block: int | None) -> "InputMoments":
        """Those of one matrix of the stack; of a kernel without a stack (None), themselves."""
        return self if block is None else InputMoments(self.second[block], self.means[:, block], self.weights)

    def mean(self) -> Float[Array, "*stack I"]:
        """E[x] over all time steps."""
        return jnp.tensordot(jnp.asarray(self.weights), self.means, 1) / len(self.weights)

    def covariance(self) -> Float[Array, "*stack I I"]:
        """E[(x - m)(x - m)^T] around each time step's own mean m."""
        own = jnp.einsum("n,n...i,n...j->...ij", jnp.asarray(self.weights), self.means, self.means, precision="highest")
        return self.second - own / len(self.weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Kernel):
    """A dense kernel (*stack, I, O) that `linear` uses as it would the array; the gradient of `moments` is X^T X / N, that of
    `means` the mean of X.

    With `differences` > 0 those of x_label - x_null are added, scaled to that share of the trace: the first half of the rows
    has labels, and the second is the same with the null label.
    """

    kernel: Any
    moments: Any  # float32 (*stack, I, I)
    means: Any  # float32 (*stack, I)
    differences: float = dataclasses.field(default=0.0, metadata={"static": True})

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """x @ kernel of one matrix (no stack axes)."""
        return _probe(self.differences, x, self.kernel, self.moments, self.means)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(differences: float, x: Array, kernel: Array, moments: Array, means: Array) -> Array:
    return jnp.matmul(x, kernel.astype(x.dtype))


def _forward(
    differences: float, x: Array, kernel: Array, moments: Array, means: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _probe(differences, x, kernel, moments, means), (x, kernel)


def _backward(differences: float, residuals: tuple[Array, Array], _: Array) -> tuple[Array, Array, Array, Array]:
    x, kernel = residuals
    moments = _second_moments(x)
    if differences:
        label, null = jnp.split(x, 2)
        found = _second_moments(label - null)
        trace = jnp.trace(found)
        moments += (
            differences * found * jnp.where(trace > 0, jnp.trace(moments) / jnp.where(trace > 0, trace, 1.0), 0.0)
        )
    return jnp.zeros_like(x), jnp.zeros_like(kernel), moments, _rows(x).mean(0)


def _rows(x: Float[Array, "*batch I"]) -> Float[Array, "N I"]:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _second_moments(x: Float[Array, "*batch I"]) -> Float[Array, "I I"]:
    rows = _rows(x)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST) / len(rows)


_probe.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Collect:
    """The moments of one evaluation, weighted; an object without arrays, so that one program serves all calls."""

    network: Network
    paths: tuple[str, ...]
    differences: tuple[float, ...]
    num_steps: int

    def __call__(self, evaluation: trajectory.Evaluation, given: Any) -> dict[str, tuple[Array, Array]]:
        """`given`: (the teacher's flat parameters, weights (N,) by path). Returns second moments times the step's weight, and
        means (N, *stack, I) that are zero but for the step's own."""
        flat, weights = given
        zeros = {path: _zeros(flat[path]) for path in self.paths}

        def probed(zeros: dict[str, Any]) -> Array:
            probes = {
                path: Probe(flat[path], *zeros[path], share)
                for path, share in zip(self.paths, self.differences, strict=True)
            }
            params = unflatten(flat | probes)
            output, blocks = self.network.run(params, evaluation.x, evaluation.t, evaluation.cond, blocks=True)
            return sum(a.sum(dtype=jnp.float32) for a in jax.tree.leaves((output, blocks)))

        def at_step(second: Array, mean: Array, weight: Array) -> tuple[Array, Array]:
            own = jnp.arange(self.num_steps) == evaluation.i
            return weight[evaluation.i] * second, jnp.where(own.reshape(-1, *(1,) * mean.ndim), mean[None], 0.0)

        return {path: at_step(*pair, weights[path]) for path, pair in jax.grad(probed)(zeros).items()}


@jax.jit
def _traces(second: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.trace(a, axis1=-2, axis2=-1) for path, a in second.items()}


def _zeros(kernel: Any) -> tuple[Array, Array]:
    *stack, columns, _ = kernel.shape
    return jnp.zeros((*stack, columns, columns)), jnp.zeros((*stack, columns))


def input_moments(
    model: Any,
    params: Any,
    paths: Iterable[str],
    *,
    key: jax.Array,
    images: int = 16,
    num_steps: int = 10,
    cfg_scale: float = 1.5,
    weights: Mapping[str, Any] = types.MappingProxyType({}),
    differences: Mapping[str, float] = types.MappingProxyType({}),
) -> dict[str, InputMoments]:
    """Of the inputs of the kernels at `paths`, over one trajectory of the teacher (zero data).

    Args:
      model: a module of this library, or a `Network` whose Linears go through `qarray.linear.linear` and run once an evaluation.
      params: the teacher, full precision.
      paths: '/'-joined, of kernels (*stack, I, O), such as "blocks/attn/qkv/kernel".
      key: of noise and conditions.
      images: of the trajectory; with guidance the network sees twice as many rows.
      num_steps: of the trajectory.
      cfg_scale: its guidance.
      weights: path -> what each step counts for this kernel, with the indices of the schedule and a mean of 1; steps count
        alike where a path has none.
      differences: path -> what differences between a condition and the null count beside the whole, see `Probe`; nothing where
        a path has none, and without guidance.

    Memory: two copies of the moments, (I, I) float32 for each matrix.
    Raises InputError for a path that is no kernel of `params`, a network that cannot take a `Probe`, and a kernel that
    the network does not use.
    """
    network = model if isinstance(model, Network) else as_network(model, remat=True)
    check(network, params)
    flat = flatten(params)
    paths = tuple(paths)
    for path in paths:
        if getattr(flat.get(path), "ndim", 0) < 2:
            raise InputError(
                f"moments of {path!r}: wanted the path of a kernel (*stack, I, O), such as {_example(flat)}"
            )
    shares = tuple(differences.get(path, 0.0) if cfg_scale != 1.0 else 0.0 for path in paths)
    collect = _Collect(network, paths, shares, num_steps)
    counts = {path: np.asarray(weights.get(path, np.ones(num_steps)), np.float32) for path in paths}
    problem = random_problem(network, params, key, images=images, cfg_scale=cfg_scale)
    try:
        _, total = trajectory.observed(
            network,
            params,
            problem,
            num_steps=num_steps,
            scale=cfg_scale,
            observe=collect,
            given=(flat, {path: count / np.float32(num_steps) for path, count in counts.items()}),
            reduce="sum",
        )
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # what a user's function raises where it cannot take a probe
        what = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            "moments are collected from Linears of vq4dit_jax.qarray.linear; this network does something else with "
            f"the kernels at {', '.join(paths[:3])} ({type(error).__name__}: {what})"
        ) from error
    found = {path: InputMoments(*total[path], counts[path]) for path in paths}
    for path, trace in _traces({path: one.second for path, one in found.items()}).items():
        if not (np.asarray(trace) > 0).all():
            raise InputError(f"moments of {path}: the network does not use this kernel, or its inputs are all zero")
    return found


def _example(flat: dict[str, Any]) -> str:
    return next((path for path, leaf in flat.items() if getattr(leaf, "ndim", 0) >= 2), "none of these params")
