"""Round-to-nearest and GPTQ on a whole parameter tree, and what the result takes on disk."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError
from vq4dit_jax.integer import grids as uniform
from vq4dit_jax.integer.gptq import SHARES, quantize_weight
from vq4dit_jax.qarray import quantization

_WHICH = quantization.dit_rules(2)
"""The Linears of the blocks; of a rule only that it quantizes is read here, not how."""


class Uniform(NamedTuple):
    """A quantized model as dense float32 arrays, for its quality, and the bytes of its packed form.

    Of `sizes`, `assignment_bytes` are codes, `codebook_bytes` are scales and zero points.
    """

    params: dict[str, Any]
    sizes: quantization.Sizes


def rtn(
    params: Any,
    bits: int,
    group: int | None = None,
    *,
    kind: str | None = None,
    shares: tuple[float, ...] = (1.0,),
    rules: Sequence[quantization.Rule] = _WHICH,
    other_dtype: Any = jnp.float16,
) -> Uniform:
    """Round to nearest, which needs no data (`uniform`).

    Args:
      params: the full-precision tree, kernels (*stack, I, O).
      bits: of a code, 2 to 8.
      group: consecutive inputs that share a scale; None: all of an output row ("per channel").
      kind: see `uniform`. None: "centred" at 2 bits, else "asymmetric", which are the best there on the built-in model.
      shares: see `uniform.fit_grid`. No clip search: on the built-in model at 2 bits it lowers the error of the weights
        and raises L_d from 0.015 to 0.060, because the large weights are those that matter.
      rules: a kernel is quantized where its rule has a VQSpec.
      other_dtype: what all other parameters are rounded to and stored in.

    Raises InputError for arguments that no grid can be made of, and as `quantization.plan` does.
    """

    kind = kind or ("centred" if bits == 2 else "asymmetric")

    def one(weight: Float[Array, "O I"], path: str, index: tuple[int, ...]) -> Float[Array, "O I"]:
        grid = uniform.fit_grid(weight, bits, group, kind, shares)
        return uniform.round_to_nearest(weight, grid, bits, group)

    return _quantize_tree(params, bits, group, kind, rules, other_dtype, one)


def gptq(
    params: Any,
    moments: Mapping[str, Float[Array, "*stack I I"]],
    bits: int,
    group: int | None = None,
    *,
    kind: str = "asymmetric",
    shares: tuple[float, ...] = SHARES,
    act_order: bool = True,
    rules: Sequence[quantization.Rule] = _WHICH,
    other_dtype: Any = jnp.float16,
) -> Uniform:
    """GPTQ (`gptq`) with the moments of every quantized kernel's inputs (`calibration.moments.InputMoments.second`).

    Other arguments and errors as in `rtn`, and InputError for moments that are missing, of a wrong shape or not finite.
    """

    def one(weight: Float[Array, "O I"], path: str, index: tuple[int, ...]) -> Float[Array, "O I"]:
        columns = weight.shape[1]
        found = np.asarray(moments[path])[index] if path in moments else None
        if found is None or found.shape != (columns, columns) or not np.isfinite(found).all():
            has = "are missing" if found is None else f"of {found.shape}, or not finite"
            raise InputError(
                f"moments of {path} {has}; wanted finite {(columns, columns)} for each matrix of the stack"
            )
        return quantize_weight(weight, found, bits, group, kind, shares, act_order)

    return _quantize_tree(params, bits, group, kind, rules, other_dtype, one)


def _quantize_tree(
    params: Any,
    bits: int,
    group: int | None,
    kind: str,
    rules: Sequence[quantization.Rule],
    other_dtype: Any,
    one: Callable[[Array, str, tuple[int, ...]], Array],
) -> Uniform:
    """`one(weight (O, I), path, index into the stack)` for every matrix that `rules` quantize."""
    uniform.check(bits, group, kind)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    other_dtype = jnp.dtype(other_dtype)
    count = dict(parameters=0, quantized_parameters=0, assignment_bytes=0, codebook_bytes=0, other_bytes=0)
    out = {}
    for path, parts in quantization.plan(params, rules).items():
        leaf = np.asarray(flat[path], np.float32)
        count["parameters"] += leaf.size
        whole = leaf.astype(other_dtype).astype(np.float32)
        for part in parts:
            kernels = leaf if part.start is None else leaf[part.start : part.stop]
            if part.spec is None:
                count["other_bytes"] += kernels.size * other_dtype.itemsize
                continue
            *stack, columns, rows = kernels.shape
            codes, grids = uniform.stored_bytes((rows, columns), bits, group, kind)
            count["quantized_parameters"] += kernels.size
            count["assignment_bytes"] += codes * math.prod(stack)
            count["codebook_bytes"] += grids * math.prod(stack)
            for i in np.ndindex(*stack):
                index = i if part.start is None else (i[0] + part.start, *i[1:])
                whole[index] = np.asarray(one(jnp.asarray(leaf[index].T), path, index)).T
        out[path] = jnp.asarray(whole)
    return Uniform(flax.traverse_util.unflatten_dict(out, sep="/"), quantization.Sizes(**count))
