"""Casts to the types of storage, refused where the values do not survive them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.tree import Params, map_slots

DTYPES = ("float32", "bfloat16", "float16")
"""In which tables and kept parameters are stored."""
_LOST = 0.01
"""Relative error of an array above which a cast is refused; float16 within its range rounds by at most 0.0005, bfloat16 by
at most 0.004."""


def checked_cast(array: Any, dtype: Any, name: str) -> Array:
    """`array` in `dtype`.

    Raises InputError that names `name` where a value is outside the range of `dtype`, or where the array as a whole loses
    more than a hundredth of its norm because its values are too small for it. (Single values that become 0 beside others
    that do not are rounding, as everywhere.)
    """
    dtype = jnp.dtype(dtype)
    wide = np.asarray(array, np.float32)
    with np.errstate(over="ignore"):
        cast = wide.astype(dtype)
    back = cast.astype(np.float32)
    if not np.isfinite(back[np.isfinite(wide)]).all():
        raise InputError(
            f"{name} holds {np.abs(wide[np.isfinite(wide)]).max():.3g}, which {dtype.name} cannot hold; "
            "store it as bfloat16 or float32"
        )
    scale = np.abs(wide).max(initial=0)
    if scale > 0 and np.isfinite(scale):
        lost = np.linalg.norm((back - wide) / scale) / np.linalg.norm(wide / scale)
        if lost > _LOST:
            raise InputError(
                f"{name} has values of at most {scale:.3g}, too small for {dtype.name}: {100 * lost:.0f} % of its norm would "
                "be lost; store it as bfloat16 or float32"
            )
    return jax.device_put(cast)


def cast_kept(params: Params, dtype: Any) -> dict[str, Any]:
    """The tree of `quantize` with everything that rules kept, also single blocks of a stack, in `dtype`.

    Quantized leaves and arrays that are not floating stay. Raises InputError as `checked_cast` does, by the path.
    """

    def one(path: str, leaf: Any) -> Any:
        if is_quantized(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return leaf if leaf.dtype == jnp.dtype(dtype) else checked_cast(leaf, dtype, f"parameter {path}")

    return map_slots(lambda slot: one(slot.path, slot.leaf), params)
