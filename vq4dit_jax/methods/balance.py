"""Balance: what is hard to round in activations moves into weights and biases (ViDiT-Q's static balancing, and a centre).

    y = ((x - m) / s) (W s)^T + m W^T,      s_i = max|x_i - m_i|^a / max|w_i|^(1 - a),      m = E[x]

(Zhao et al. 2025, arXiv 2406.02540, section 3.2, after SmoothQuant, Xiao et al. 2023; the released code's alpha is 1 - a.) The
exponent a is each layer's own: that of a grid whose quantized layer, with its rotation, has the least error in its outputs

    e(a) = sum over x of |A((x - m) diag(t) Q) V_hat(a)^T - (x - m) W^T|^2,      t = 1 / s

over rows x of the teacher's trajectory. No scale at all is tried too. W is quantized from full precision for every a, so what
is stored was rounded once.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.passes import Context, Report, pass_key
from vq4dit_jax.methods.probe import REFUSED, check_paths, refusal, rows_of, statistics
from vq4dit_jax.networks.network import Network, random_problem
from vq4dit_jax.progress import progress
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.tree import flatten, matrices, restack, walk

_FLOOR = 1e-5
"""Of the magnitudes of an input and of its weights: an input that is always 0."""
_SEARCH_ITERATIONS = 10
"""Of the search for a codebook that one a is tried with."""


class Inputs(NamedTuple):
    """Of what a Linear reads: some rows, and of each input the least, the largest and the mean of all."""

    rows: Float[Array, "*stack N I"]
    low: Float[Array, "*stack I"]
    high: Float[Array, "*stack I"]
    mean: Float[Array, "*stack I"]

    def of_block(self, block: int | None) -> "Inputs":
        """Those of one matrix of the stack; without a stack (None), themselves."""
        return self if block is None else Inputs(*(a[block] for a in self))


@dataclasses.dataclass(frozen=True)
class Sample:
    """The statistic `Inputs` with `count` rows, evenly from all."""

    count: int

    def __call__(self, x: Float[Array, "*batch I"]) -> Inputs:
        rows = rows_of(x)
        return Inputs(rows[jnp.arange(self.count) * len(rows) // self.count], rows.min(0), rows.max(0), rows.mean(0))


@dataclasses.dataclass(frozen=True)
class _Collect:
    """`Inputs` of one evaluation; an object without arrays, so that one program serves all calls."""

    network: Network
    paths: tuple[str, ...]
    count: int

    def __call__(self, evaluation: trajectory.Evaluation, flat: Any) -> dict[str, Any]:
        return statistics(self.network, flat, dict.fromkeys(self.paths, Sample(self.count)), evaluation)


@dataclasses.dataclass(frozen=True)
class Balance:
    """Gives every leaf that has a scale or a centre for its operand the scale of the best a, and the mean, and quantizes it anew.

    Attributes:
      points: of the grid of a, from 0 to 1, the end left out.
      images, cfg_scale, steps: of the teacher's trajectory that inputs are taken from.
      noisiest: the share of these steps, the noisiest ones, that count; the paper takes few, its released code all.
      rows: of each step and layer that errors are measured on.
    """

    points: int = 20
    images: int = 16
    cfg_scale: float = 1.5
    steps: int = 20
    noisiest: float = 1.0
    rows: int = 16
    name: ClassVar[str] = "balance"

    def __post_init__(self) -> None:
        for name in ("points", "images", "steps", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"balance.{name}={getattr(self, name)}: wanted at least 1")
        if not 0 < self.noisiest <= 1:
            raise InputError(f"balance.noisiest={self.noisiest}: wanted a share of the steps, above 0 and at most 1")

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        paths = tuple(slot.path for slot in walk(params) if is_quantized(slot.leaf) and slot.leaf.has_scale)
        paths = tuple(dict.fromkeys(paths))
        if not paths:
            return params, {"exponents": {}, "errors": {}}
        seen = samples(run, paths, self, pass_key(key, "trajectory"))
        kernels, found = flatten(run.teacher), []
        exponents: dict[str, list[float | None]] = {path: [] for path in paths}
        errors: dict[str, list[list[float]]] = {path: [] for path in paths}
        shared: dict[str, Any] = {}
        with progress(sum(path in exponents for path, *_ in matrices(params)), "balance", "layer") as bar:
            for path, block, leaf in matrices(params):
                if path not in exponents:
                    found.append(leaf)
                    continue
                own = jax.random.fold_in(pass_key(key, path), block or 0)
                kernel = np.asarray(kernels[path], np.float32)
                weight, inputs = (kernel if block is None else kernel[block]).T, seen[path].of_block(block)
                if block is not None and run.network.reads_conditioning(path):
                    # All blocks read the same, and one product makes all of them: they share a scale and a centre.
                    if path not in shared:
                        rows = np.concatenate([w.T for w in kernel])
                        shared[path] = best(leaf.spec(), rows, seen[path].of_block(0), self.points, own)
                    one, a, error = shared[path]
                    new = leaf.spec().balanced(weight, one.scale, one.centre, own)
                else:
                    new, a, error = best(leaf.spec(), weight, inputs, self.points, own)
                found.append(jax.tree.map(np.asarray, new))
                exponents[path].append(a)
                errors[path].append(error)
                bar.update(1)
        return restack(params, iter(found)), {"exponents": exponents, "errors": errors}


def samples(run: Context, paths: tuple[str, ...], how: Balance, key: jax.Array) -> dict[str, Inputs]:
    """path -> the inputs of its kernel in the steps that count, on the host."""
    network = run.model if isinstance(run.model, Network) else run.recomputing()
    flat = flatten(run.teacher)
    check_paths(flat, paths)
    problem = random_problem(network, run.teacher, key, images=how.images, cfg_scale=how.cfg_scale)
    observe = _Collect(network, paths, how.rows)
    try:
        _, seen = trajectory.observed(
            network, run.teacher, problem, num_steps=how.steps, scale=how.cfg_scale, observe=observe, given=flat
        )
    except REFUSED as error:
        raise refusal(error, paths) from error
    # The first evaluation is the noisiest.
    count = max(1, round(how.noisiest * how.steps))

    def of(found: Inputs) -> Inputs:
        rows, low, high, mean = (np.asarray(a)[:count] for a in found)
        rows = np.moveaxis(rows, 0, -3)
        rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
        return Inputs(rows, low.min(0), high.max(0), mean.mean(0))

    return {path: of(found) for path, found in seen.items()}


def scale(weight: Float[np.ndarray, "O I"], top: Float[np.ndarray, " I"], a: float) -> Float[np.ndarray, " I"]:
    """t = 1 / s of the exponent a, with a geometric mean of 1."""
    logs = a * np.log(np.maximum(top, _FLOOR)) - (1 - a) * np.log(np.maximum(np.abs(weight).max(0), _FLOOR))
    return np.exp(logs.mean() - logs).astype(np.float32)


def best(
    spec: Any, weight: Float[np.ndarray, "O I"], inputs: Inputs, points: int, key: jax.Array
) -> tuple[Any, float | None, list[float]]:
    """(leaf, a, relative errors): the `OperandSpec`'s leaf of the exponent with the least error, None for no scale.

    Errors are those of no scale and then of each point, as shares of the energy of the outputs, without their mean where the
    spec is centred.
    """
    centre = inputs.mean if spec.centred else np.zeros_like(inputs.mean)
    top = np.maximum(inputs.high - centre, centre - inputs.low)
    rows = inputs.rows - centre
    wanted = _wanted(rows, weight)
    tried: list[float | None] = [None, *((i / points for i in range(points)) if spec.scaled else ())]
    found, errors = None, []
    for a in tried:
        t = None if a is None else scale(weight, top, a)
        leaf = spec.balanced(weight, t, centre, key, _SEARCH_ITERATIONS)
        errors.append(float(_error(dataclasses.replace(leaf, centre=None), rows, wanted)))
        if found is None or errors[-1] < errors[found[1]]:
            found = leaf, len(errors) - 1
    leaf, at = found
    return jax.tree.map(np.asarray, leaf), tried[at], [float(f"{error:.4g}") for error in errors]


@jax.jit
def _wanted(rows: Float[Array, "N I"], weight: Float[Array, "O I"]) -> Float[Array, "N O"]:
    return jnp.matmul(rows, weight.T, precision="highest")


@jax.jit
def _error(leaf: Any, rows: Float[Array, "N I"], wanted: Float[Array, "N O"]) -> Float[Array, ""]:
    with jax.default_matmul_precision("highest"):
        return jnp.square(leaf.matmul(rows) - wanted).sum() / jnp.maximum(jnp.square(wanted).sum(), _FLOOR)
