"""The error of each layer's weights after quantization."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.qarray.base import QuantizedArray
from vq4dit_jax.qarray.tree import block_path, flatten, matrices


def layer_table(teacher: Any, kmeans: Any, packed: Any) -> list[dict[str, Any]]:
    """One entry per quantized matrix, for `ReportData.layers`: shape, codebook, bits and relative Frobenius errors
    ||W_hat - W|| / ||W|| before and after calibration. One matrix at a time is decoded.
    """
    kernels = flatten(teacher)
    rows = []
    for (path, block, before), (_, _, after) in zip(matrices(kmeans), matrices(packed), strict=True):
        weight = np.asarray(kernels[path] if block is None else kernels[path][block], np.float32).T
        errors = {"kmeans_error": float(_error(before, weight)), "final_error": float(_error(after, weight))}
        rows.append({**_describe(path, block, after), **errors})
    return rows


def _describe(path: str, block: int | None, leaf: QuantizedArray) -> dict[str, Any]:
    prefix, _, role = path.removesuffix("/kernel").partition("/")
    cost = leaf.cost()
    return {
        "path": path if block is None else block_path(path, block, (path.partition("/")[0],)),
        "block": block or 0,
        "role": role or prefix,
        "kind": leaf.kind,
        **leaf.facts(),
        "bits": 8 * (cost.code_bytes + cost.table_bytes) / cost.weights,
    }


@jax.jit
def _error(leaf: QuantizedArray, weight: Float[Array, "O I"]) -> Float[Array, ""]:
    """One program for all matrices of a shape; decoded outside of one, each operation is compiled for itself."""
    lost = jnp.linalg.norm(leaf.decode(jnp.float32) - weight)
    return lost / jnp.maximum(jnp.linalg.norm(weight), jnp.finfo(jnp.float32).tiny)
