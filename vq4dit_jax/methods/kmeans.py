"""The first step of every method on codebooks: each matrix quantized on its own, as rules say (k-means, for a `VQSpec`)."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.passes import Context, Report
from vq4dit_jax.networks.rules import rules_for
from vq4dit_jax.qarray.base import QuantizedArray
from vq4dit_jax.qarray.cast import cast_kept
from vq4dit_jax.qarray.parts import from_parts
from vq4dit_jax.qarray.rules import Part, Rule, plan
from vq4dit_jax.qarray.tree import Params, flatten, unflatten


def quantize(
    params: Params,
    bits: float | int = 2,
    *,
    key: jax.Array,
    rules: Sequence[Rule] | None = None,
    stacked: Sequence[str] | None = None,
    codebook_dtype: Any = None,
    max_iterations: int = 100,
    on_leaf: Callable[[str], None] = lambda path: None,
) -> dict[str, Any]:
    """Step 1 of the method: the same tree with quantized leaves where rules say so.

    Args:
      params: nested dicts of arrays; ours, or those of any Flax module with kernels (I, O).
      bits: of a network whose rules are known (`networks.rules`); not read where `rules` are given.
      key: of the k-means seeds.
      rules: (regular expression, spec or KEEP), see `Rule`; first match wins.
      stacked: prefixes under which leaves have a leading axis over blocks, see `plan`; () for none.
      codebook_dtype: in which codebooks are stored; None: as each `VQSpec` says, float32 by default.
      max_iterations: of Lloyd's algorithm.
      on_leaf: is called after each quantized leaf.

    A leaf whose blocks differ in their spec becomes `Parts` over consecutive blocks.

    Raises InputError where a path has no rule, a rule with a spec no path, a shape does not fit, a weight is not finite,
    or `codebook_dtype` cannot hold a codebook.
    """
    rules = rules_for(params, bits) if rules is None else rules
    flat = flatten(params)
    out = {}
    for path, parts in plan(params, rules, stacked).items():
        if not any(part.spec for part in parts):
            out[path] = flat[path]
            continue
        leaf_key, whole = jax.random.fold_in(key, zlib.crc32(path.encode())), np.asarray(flat[path])
        leaves = []
        for part in parts:
            if part.spec is None:
                leaves.append(part.cut(flat[path]))
                continue
            part_key = leaf_key if not part.start else jax.random.fold_in(leaf_key, part.start)
            leaves.append(_one(part.cut(whole), part, part_key, codebook_dtype, max_iterations))
        on_leaf(path)
        out[path] = from_parts(leaves)
    return unflatten(out)


@dataclasses.dataclass(frozen=True)
class KMeans:
    """`quantize` as a pass. `bits`, `rules`, `codebook_dtype` and `iterations` as there; blocks are those of the network.

    other_dtype: what all other parameters are stored in; None: as they are.
    """

    bits: float | int = 2
    rules: tuple[Rule, ...] | None = None
    codebook_dtype: str | None = None
    iterations: int = 100
    other_dtype: str | None = None
    name: ClassVar[str] = "kmeans"

    def __call__(self, run: Context, params: Params, key: jax.Array) -> tuple[Params, Report]:
        packed = quantize(
            params,
            self.bits,
            key=key,
            rules=self.rules,
            stacked=run.network.prefixes or None,
            codebook_dtype=self.codebook_dtype,
            max_iterations=self.iterations,
        )
        return packed if self.other_dtype is None else cast_kept(packed, self.other_dtype), {}


def _one(kernel: np.ndarray, part: Part, key: jax.Array, dtype: Any, iterations: int) -> QuantizedArray:
    weight = finite_weight(kernel, part.path)
    spec = part.spec if dtype is None else part.spec.with_dtype(dtype)
    try:
        return spec.quantize(weight, key, iterations=iterations)
    except InputError as error:
        raise InputError(f"parameter {part.path}: {error}") from error


def finite_weight(kernel: Any, path: str) -> np.ndarray:
    """W (*stack, O, I) float32 of a kernel (*stack, I, O); InputError where it is not finite."""
    weight = np.swapaxes(np.asarray(kernel, np.float32), -1, -2)
    if not np.isfinite(weight).all():
        raise InputError(f"parameter {path} holds NaN or infinity; the checkpoint is damaged")
    return weight
