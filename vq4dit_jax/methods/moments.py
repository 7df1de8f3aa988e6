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

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import Network, as_network, check


class InputMoments(NamedTuple):
    """Of the inputs x of one kernel (*stack, I, O), float32.

    Attributes:
      second: E[x x^T], each time step counting by its weight, and `differences` added.
      means: E[x] at each time step, by its index into `diffusion.Schedule`.
      weights: what each time step counts; their mean is 1.
    """

    second: Float[Array, "*stack I I"]
    means: Float[Array, "N *stack I"]
    weights: Float[Array, " N"]

    def of_block(self, block: int | None) -> "InputMoments":
        """Those of one matrix of the stack; of a kernel without a stack (None), themselves."""
        return self if block is None else InputMoments(self.second[block], self.means[:, block], self.weights)

    def mean(self) -> Float[Array, "*stack I"]:
        """E[x] over all time steps."""
        return jnp.tensordot(self.weights, self.means, 1) / len(self.weights)

    def spread(self) -> Float[Array, "*stack I I"]:
        """E[(x - m)(x - m)^T] around each time step's own mean m."""
        own = jnp.einsum("n,n...i,n...j->...ij", self.weights, self.means, self.means, precision="highest")
        return self.second - own / len(self.weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
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


def input_moments(
    model: DiT | Network,
    params: Any,
    paths: Iterable[str],
    *,
    key: jax.Array,
    images: int = 16,
    num_steps: int = 10,
    trajectories: int = 1,
    cfg_scale: float = 1.5,
    weights: Mapping[str, Float[Array, " N"]] = types.MappingProxyType({}),
    differences: Mapping[str, float] = types.MappingProxyType({}),
) -> dict[str, InputMoments]:
    """Of the inputs of the kernels at `paths`, over the teacher's guided DDPM trajectories (zero data).

    Args:
      model: a `DiT`, or a `Network` whose Linears go through `models.linear.linear` and run once an evaluation.
      params: the teacher, full precision.
      paths: '/'-joined, of kernels (*stack, I, O), such as "blocks/attn/qkv/kernel".
      key: of noise and classes.
      images: of a trajectory; the network sees twice as many rows, with labels and with the null label.
      num_steps: of a trajectory, evenly spaced over the time steps.
      trajectories: how many, one after the other.
      cfg_scale: guidance of the trajectories.
      weights: path -> what each step counts for this kernel, with the indices of `diffusion.Schedule` and a mean of 1; steps
        count alike where a path has none.
      differences: path -> what differences between a label and the null label count beside the whole, see `Probe`; nothing
        where a path has none.

    Raises InputError for a path that is no kernel of `params`, a network that cannot take a `Probe`, and a kernel that
    the network does not use.
    """
    network = as_network(model, remat=True) if isinstance(model, DiT) else model
    check(network, params)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    zeros = {}
    for path in paths:
        kernel = flat.get(path)
        if getattr(kernel, "ndim", 0) < 2:
            raise InputError(
                f"moments of {path!r}: wanted the path of a kernel (*stack, I, O), such as {_example(flat)}"
            )
        *stack, columns, _ = kernel.shape
        zeros[path] = (jnp.zeros((*stack, columns, columns)), jnp.zeros((*stack, columns)))
    sched = diffusion.make_schedule(num_steps)

    def probed(zeros: dict[str, Any], where: Any, flat: dict[str, Any]) -> tuple[Array, Any]:
        leaves = flat | {path: Probe(flat[path], *pair, differences.get(path, 0.0)) for path, pair in zeros.items()}
        teacher = flax.traverse_util.unflatten_dict(leaves, sep="/")
        batch, where = trajectory.advance(network, teacher, sched, cfg_scale, where)
        return sum(a.sum(dtype=jnp.float32) for a in jax.tree.leaves((batch.output, batch.blocks))), where

    def step(total: dict[str, InputMoments], where: Any, flat: dict[str, Any]) -> tuple[dict[str, InputMoments], Any]:
        found, following = jax.grad(probed, has_aux=True)(zeros, where, flat)

        def added(to: InputMoments, second: Array, mean: Array) -> InputMoments:
            return InputMoments(to.second + to.weights[where.i] * second, to.means.at[where.i].add(mean), to.weights)

        return {path: added(total[path], *found[path]) for path in zeros}, following

    where = trajectory.begin(network, sched, jax.random.key_data(key), jnp.int32(0), images)
    alike = jnp.ones(num_steps)
    total = {
        path: InputMoments(jnp.copy(second), jnp.zeros((num_steps, *mean.shape)), jnp.array(weights.get(path, alike)))
        for path, (second, mean) in zeros.items()
    }
    try:
        traced = jax.jit(step, donate_argnums=0).trace(total, where, flat)
    except Exception as error:  # whatever the user's function raises
        what = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            "moments are collected from Linears of vq4dit_jax.qarray.linear; this network does something else with "
            f"the kernels at {', '.join(list(zeros)[:3])} ({type(error).__name__}: {what})"
        ) from error
    compiled = traced.lower().compile()
    for _ in range(num_steps * trajectories):
        total, where = compiled(total, where, flat)
    for path in zeros:
        if not (jnp.trace(total[path].second, axis1=-2, axis2=-1) > 0).all():
            raise InputError(f"moments of {path}: the network does not use this kernel, or its inputs are all zero")

    def averaged(second: Array, means: Array, counts: Array) -> InputMoments:
        return InputMoments(second / (num_steps * trajectories), means / trajectories, counts)

    return {path: averaged(*total[path]) for path in zeros}


def _example(flat: dict[str, Any]) -> str:
    return next((path for path, leaf in flat.items() if getattr(leaf, "ndim", 0) >= 2), "none of these params")
