"""What each quantized matrix alone does: the error of a teacher that has that matrix in its place.

s_l = sum over the steps of a trajectory of an error (`ERRORS`) of the teacher with layer l quantized
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import losses
from vq4dit_jax.networks.network import Network, random_problem
from vq4dit_jax.qarray.base import Kernel
from vq4dit_jax.qarray.tree import flatten, quantized_paths, replace

IMAGES, STEPS = 4, 10
"""Of the trajectory."""

Matrix = tuple[str, int | None]
"""The path of a leaf, and the number of the block in its stack."""


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Keeps evaluations, without block outputs."""

    def __call__(self, evaluation: trajectory.Evaluation, given: Any) -> trajectory.Evaluation:
        return evaluation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Either(Kernel):
    """A quantized matrix where `use` is set, else the teacher's; in a stack all three lead with its axis."""

    dense: Any
    quantized: Any
    use: Any  # bool (*stack)

    def matmul(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        dense = lambda x: jnp.matmul(x, self.dense.astype(x.dtype))
        return jax.lax.cond(self.use, self.quantized.matmul, dense, x)


def _of_step(network: Network, sched: Any, evaluation: trajectory.Evaluation, output: Any, scale: float) -> jax.Array:
    return sum(losses.step_distance(network, sched, evaluation, output, scale))


def _of_prediction(network: Network, sched: Any, evaluation: trajectory.Evaluation, output: Any, scale: float) -> Any:
    prediction = lambda out: network.prediction(out, scale)
    return jnp.square(prediction(output) - prediction(evaluation.output)).mean()


ERRORS = {"step": _of_step, "prediction": _of_prediction}
"""
    step        L_s + L_c, what the sampler's next step leaves of the error in the image (`losses.step_distance`)
    prediction  the mean squared error of the guided prediction, which ViDiT-Q calls MSE
"""


def _errors(
    network: Network, cfg_scale: float, error: str, student: Any, evaluations: trajectory.Evaluation
) -> tuple[Float[Array, ""], tuple[Float[Array, " E"], Float[Array, " E"]]]:
    """An error of a student, summed over a stack of evaluations; that of each, and how much of the way lies behind it."""
    sched = network.process.schedule(STEPS)

    def one(total: jax.Array, evaluation: trajectory.Evaluation) -> tuple[jax.Array, Any]:
        output, _ = network.run(student, evaluation.x, evaluation.t, evaluation.cond)
        found = ERRORS[error](network, sched, evaluation, output, cfg_scale)
        return total + found, (found, network.process.done(evaluation.t[0]))

    return jax.lax.scan(one, jnp.float32(0.0), evaluations)


_measure = jax.jit(_errors, static_argnames=("network", "cfg_scale", "error"))


class Found(NamedTuple):
    """Errors of a trajectory's evaluations.

    Attributes:
      alone: of each matrix alone, the sum; `by_step` each evaluation's (E,), from noise to data.
      together: of all quantized matrices together, the sum.
      done: (E,), how much of the way from noise to data lies behind each evaluation.
    """

    alone: dict[Matrix, float]
    by_step: dict[Matrix, Float[np.ndarray, " E"]]
    together: float
    done: Float[np.ndarray, " E"]


def one_at_a_time(
    network: Network,
    teacher: Any,
    packed: Any,
    wanted: Sequence[Matrix],
    *,
    key: jax.Array,
    cfg_scale: float,
    images: int = IMAGES,
    error: str = "step",
) -> Found:
    """The errors of each wanted matrix, on a trajectory of the teacher; `error`: one of `ERRORS`.

    A student is the teacher with one matrix of `packed` in its place. All of them are one program: which one is an argument.
    """
    problem = random_problem(network, teacher, key, images=images, cfg_scale=cfg_scale)
    _, evaluations = trajectory.observed(network, teacher, problem, num_steps=STEPS, scale=cfg_scale, observe=_Keep())
    kernels, leaves = flatten(teacher), flatten(packed)
    stack = {path: kernels[path].shape[:-2] for path in quantized_paths(packed)}  # (), or (blocks,)

    def total(use: dict[str, Any]) -> tuple[Any, Any]:
        """Of the student whose matrices are quantized where `use[path]`, bool (*stack), is set."""
        either = {path: _Either(kernels[path], leaves[path], use[path]) for path in stack}
        return _measure(network, cfg_scale, error, replace(teacher, either), evaluations)

    def alone(matrix: Matrix) -> tuple[Any, Any]:
        path, block = matrix
        use = {other: np.zeros(shape, bool) for other, shape in stack.items()}
        use[path][... if block is None else block] = True
        return total(use)

    together, (_, done) = total({path: np.ones(shape, bool) for path, shape in stack.items()})
    found = {matrix: alone(matrix) for matrix in wanted}
    return Found(
        {matrix: float(whole) for matrix, (whole, _) in found.items()},
        {matrix: np.asarray(each) for matrix, (_, (each, _)) in found.items()},
        float(together),
        np.asarray(done),
    )
