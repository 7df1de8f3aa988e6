"""Moments of what Linears read on the teacher's own trajectory; the second is the Hessian of a layer's squared error.

For a Linear y = W x, the mean of |W x - Q x|^2 over N inputs is tr((W - Q) H (W - Q)^T) with H = X^T X / N, X (N, I)
(Frantar et al. 2023, arXiv 2210.17323, section 3, but for a factor of 2).
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.probe import REFUSED, check_paths, refusal, rows_of, statistics
from vq4dit_jax.networks.network import Network, as_network, check, random_problem
from vq4dit_jax.qarray.tree import flatten


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


@dataclasses.dataclass(frozen=True)
class Moments:
    """The statistic (X^T X / N, mean of X) of the rows X (N, I) that a Linear reads.

    With `differences` > 0 those of x_label - x_null are added to the first, scaled to that share of its trace: the first half of
    the rows has labels, and the second is the same with the null label.
    """

    differences: float = 0.0

    def __call__(self, x: Float[Array, "*batch I"]) -> tuple[Float[Array, "I I"], Float[Array, " I"]]:
        moments = _second_moments(x)
        if self.differences:
            label, null = jnp.split(x, 2)
            found = _second_moments(label - null)
            trace = jnp.trace(found)
            moments += (
                self.differences
                * found
                * jnp.where(trace > 0, jnp.trace(moments) / jnp.where(trace > 0, trace, 1.0), 0.0)
            )
        return moments, rows_of(x).mean(0)


def _second_moments(x: Float[Array, "*batch I"]) -> Float[Array, "I I"]:
    rows = rows_of(x)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST) / len(rows)


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
        wanted = {path: Moments(share) for path, share in zip(self.paths, self.differences, strict=True)}
        found = statistics(self.network, flat, wanted, evaluation)

        def at_step(second: Array, mean: Array, weight: Array) -> tuple[Array, Array]:
            own = jnp.arange(self.num_steps) == evaluation.i
            return weight[evaluation.i] * second, jnp.where(own.reshape(-1, *(1,) * mean.ndim), mean[None], 0.0)

        return {path: at_step(*pair, weights[path]) for path, pair in found.items()}


@jax.jit
def _traces(second: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.trace(a, axis1=-2, axis2=-1) for path, a in second.items()}


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
      differences: path -> what differences between a condition and the null count beside the whole, see `Moments`; nothing where
        a path has none, and without guidance.

    Memory: two copies of the moments, (I, I) float32 for each matrix.
    Raises InputError for a path that is no kernel of `params`, a network that cannot take a `probe.Probe`, and a kernel that
    the network does not use.
    """
    network = model if isinstance(model, Network) else as_network(model, remat=True)
    check(network, params)
    flat = flatten(params)
    paths = tuple(paths)
    check_paths(flat, paths)
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
    except REFUSED as error:
        raise refusal(error, paths) from error
    found = {path: InputMoments(*total[path], counts[path]) for path in paths}
    for path, trace in _traces({path: one.second for path, one in found.items()}).items():
        if not (np.asarray(trace) > 0).all():
            raise InputError(f"moments of {path}: the network does not use this kernel, or its inputs are all zero")
    return found
