"""Statistics of what Linears read, taken while a network runs.

A backward pass visits every Linear, also under `lax.scan` and rematerialisation, and collects one array for each use of a
parameter. So a kernel is put in a `Probe` beside arrays of zeros, whose "gradients" are defined to be the statistics.
The probes below a probe are still visited, because the gradient of its input is defined as an array of zeros.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.diffusion.trajectory import Evaluation
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray.base import Kernel
from vq4dit_jax.qarray.tree import unflatten

Statistic = Callable[[Array], Any]
"""x (*batch, I) -> a tree of float32 arrays whose shapes depend on I alone; hashable, and without arrays."""
_EXAMPLE_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Kernel):
    """A dense kernel (*stack, I, O) that `linear` uses as it would the array; the gradient of `seen` is `statistic(x)`.

    `seen` leads with the axes of the stack, as the kernel does.
    """

    kernel: Any
    seen: Any
    statistic: Statistic = dataclasses.field(metadata={"static": True})

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """x @ kernel of one matrix (no stack axes)."""
        return _probe(self.statistic, x, self.kernel, self.seen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(statistic: Statistic, x: Array, kernel: Array, seen: Any) -> Array:
    return jnp.matmul(x, kernel.astype(x.dtype))


def _forward(statistic: Statistic, x: Array, kernel: Array, seen: Any) -> tuple[Array, tuple[Array, Array]]:
    return _probe(statistic, x, kernel, seen), (x, kernel)


def _backward(statistic: Statistic, residuals: tuple[Array, Array], _: Array) -> tuple[Array, Array, Any]:
    x, kernel = residuals
    return jnp.zeros_like(x), jnp.zeros_like(kernel), statistic(x)


_probe.defvjp(_forward, _backward)


def rows_of(x: Float[Array, "*batch I"]) -> Float[Array, "N I"]:
    """The rows of all of a batch, float32."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def statistics(
    network: Network, flat: Mapping[str, Any], wanted: Mapping[str, Statistic], evaluation: Evaluation
) -> dict[str, Any]:
    """path -> the statistic of what the kernel there reads in this evaluation, (*stack, ...).

    flat: the parameters by path. The network's blocks should be rematerialised, or all of their activations are kept.
    """
    zeros = {path: _zeros(flat[path], statistic) for path, statistic in wanted.items()}

    def probed(zeros: dict[str, Any]) -> Array:
        probes = {path: Probe(flat[path], zeros[path], statistic) for path, statistic in wanted.items()}
        params = unflatten({**flat, **probes})
        output, blocks = network.run(params, evaluation.x, evaluation.t, evaluation.cond, blocks=True)
        return sum(a.sum(dtype=jnp.float32) for a in jax.tree.leaves((output, blocks)))

    return jax.grad(probed)(zeros)


def _zeros(kernel: Any, statistic: Statistic) -> Any:
    *stack, columns, _ = kernel.shape
    shapes = jax.eval_shape(statistic, jax.ShapeDtypeStruct((_EXAMPLE_ROWS, columns), jnp.float32))
    return jax.tree.map(lambda one: jnp.zeros((*stack, *one.shape), one.dtype), shapes)


def check_paths(flat: Mapping[str, Any], paths: tuple[str, ...]) -> None:
    """InputError for a path that is no kernel of the parameters."""
    for path in paths:
        if getattr(flat.get(path), "ndim", 0) < 2:
            example = next(
                (path for path, leaf in flat.items() if getattr(leaf, "ndim", 0) >= 2), "none of these params"
            )
            raise InputError(f"moments of {path!r}: wanted the path of a kernel (*stack, I, O), such as {example}")


def refusal(error: Exception, paths: tuple[str, ...]) -> InputError:
    """What to say of an error that a user's function raises where it cannot take a probe."""
    what = next(iter(str(error).strip().splitlines()), "")
    return InputError(
        "moments are collected from Linears of vq4dit_jax.qarray.linear; this network does something else with "
        f"the kernels at {', '.join(paths[:3])} ({type(error).__name__}: {what})"
    )


REFUSED = (TypeError, ValueError, AttributeError)
"""What a user's function raises where it cannot take a probe."""
