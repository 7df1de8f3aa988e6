"""Round-to-nearest and GPTQ on a whole parameter tree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError
from vq4dit_jax.integer.gptq import SHARES, quantize_weight
from vq4dit_jax.integer.grids import Grid
from vq4dit_jax.methods.kmeans import finite_weight
from vq4dit_jax.networks.rules import rules_for
from vq4dit_jax.qarray.cast import cast_kept
from vq4dit_jax.qarray.parts import from_parts
from vq4dit_jax.qarray.rules import Rule, plan
from vq4dit_jax.qarray.spec import IntSpec
from vq4dit_jax.qarray.tree import Params, flatten, unflatten


def rtn(
    params: Params,
    bits: int,
    group: int | None = None,
    *,
    kind: str | None = None,
    shares: tuple[float, ...] = (1.0,),
    rules: Sequence[Rule] | None = None,
    stacked: Sequence[str] | None = None,
    other_dtype: Any = jnp.float16,
) -> dict[str, Any]:
    """Round to nearest (`integer.grids`), which needs no data: the tree with `IntArray` leaves.

    Args:
      params: the full-precision tree, kernels (*stack, I, O).
      bits: of a code, 2 to 8.
      group: consecutive inputs that share a scale; None: all of an output row ("per channel").
      kind: of the grids. None: "centred" at 2 bits, else "asymmetric", which are the best there on the built-in model.
      shares: see `grids.fit_grid`. No clip search: on the built-in model at 2 bits it lowers the error of the weights
        and raises L_d from 0.015 to 0.060, because the large weights are those that matter.
      rules: a kernel is quantized where its rule has a spec; how is said by the arguments above. None: those of the network.
      stacked: as in `quantize`.
      other_dtype: what all other parameters are stored in.

    Raises InputError for arguments that no grid can be made of, and as `quantize` and `cast_kept` do.
    """
    spec = IntSpec(bits, group, kind or ("centred" if bits == 2 else "asymmetric"))

    def one(matrix: Float[Array, "O I"], path: str, index: tuple[int, ...]) -> tuple[Array, Grid]:
        return spec.nearest(matrix, shares)

    return _quantize_tree(params, spec, rules, stacked, other_dtype, one)


def gptq(
    params: Params,
    moments: Mapping[str, Float[Array, "*stack I I"]],
    bits: int,
    group: int | None = None,
    *,
    kind: str = "asymmetric",
    shares: tuple[float, ...] = SHARES,
    act_order: bool = True,
    rules: Sequence[Rule] | None = None,
    stacked: Sequence[str] | None = None,
    other_dtype: Any = jnp.float16,
) -> dict[str, Any]:
    """GPTQ (`integer.gptq`) with the moments of every quantized kernel's inputs (`methods.moments.InputMoments.second`).

    Other arguments and errors as in `rtn`, and InputError for moments that are missing, of a wrong shape or not finite.
    """
    spec = IntSpec(bits, group, kind)

    def one(matrix: Float[Array, "O I"], path: str, index: tuple[int, ...]) -> tuple[Array, Grid]:
        columns = matrix.shape[1]
        found = np.asarray(moments[path])[index] if path in moments else None
        if found is None or found.shape != (columns, columns) or not np.isfinite(found).all():
            has = "are missing" if found is None else f"of {found.shape}, or not finite"
            raise InputError(
                f"moments of {path} {has}; wanted finite {(columns, columns)} for each matrix of the stack"
            )
        return quantize_weight(matrix, found, bits, group, kind, shares, act_order)

    return _quantize_tree(params, spec, rules, stacked, other_dtype, one)


def _quantize_tree(
    params: Params,
    spec: IntSpec,
    rules: Sequence[Rule] | None,
    stacked: Sequence[str] | None,
    other_dtype: Any,
    one: Callable[[Array, str, tuple[int, ...]], tuple[Array, Grid]],
) -> dict[str, Any]:
    """`one(matrix (O, I), path, index into the whole stack)` for every matrix that `rules` quantize."""
    rules = rules_for(params, 2) if rules is None else rules
    flat = flatten(params)
    out = {}
    for path, parts in plan(params, [(pattern, its and spec) for pattern, its in rules], stacked).items():
        leaves = []
        for part in parts:
            kernel = part.cut(flat[path])
            if part.spec is None:
                leaves.append(kernel)
                continue

            def at(matrix: Array, i: tuple[int, ...], path: str = path, first: int = part.start or 0) -> Any:
                return one(matrix, path, (i[0] + first, *i[1:]) if i else i)

            try:
                leaves.append(spec.leaf(finite_weight(kernel, path), at))
            except InputError as error:
                raise InputError(str(error) if path in str(error) else f"parameter {path}: {error}") from error
        out[path] = from_parts(leaves)
    return cast_kept(unflatten(out), other_dtype)
