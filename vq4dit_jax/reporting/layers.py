"""What quantization did to each layer's weights."""

from typing import Any

import flax.traverse_util
import jax
import numpy as np

import pallas_kernels
from vq4dit_jax.vq import VQArray


def layer_table(teacher: Any, kmeans: Any, packed: Any) -> list[dict[str, Any]]:
    """One entry per quantized matrix, for `ReportData.layers`: shape, codebook, bits and relative Frobenius errors
    ||W_hat - W|| / ||W|| before and after calibration. A matrix at a time is decoded.
    """
    before = flax.traverse_util.flatten_dict(kmeans, sep="/")
    after = flax.traverse_util.flatten_dict(packed, sep="/")
    rows = []
    for path, kernel in flax.traverse_util.flatten_dict(teacher, sep="/").items():
        offset = 0
        for first, last in zip(_parts(before[path]), _parts(after[path]), strict=True):
            stacked = jax.tree.leaves(first)[0].shape[0] if len(_parts(before[path])) > 1 or _stacked(first) else None
            for i in range(stacked or 1) if isinstance(first, VQArray) else ():
                pick = (lambda a, i=i: a[i]) if stacked else (lambda a: a)
                weight = np.asarray(kernel[offset + i] if stacked else kernel, np.float32).T
                rows.append(
                    {
                        **_describe(path, offset + i if stacked else None, first),
                        "kmeans_error": _error(jax.tree.map(pick, first), weight),
                        "final_error": _error(jax.tree.map(pick, last), weight),
                    }
                )
            offset += stacked or 0
    return rows


def _parts(leaf: Any) -> tuple[Any, ...]:
    return leaf if isinstance(leaf, tuple) else (leaf,)


def _stacked(leaf: Any) -> bool:
    return isinstance(leaf, VQArray) and bool(leaf.stack)


def _describe(path: str, block: int | None, leaf: VQArray) -> dict[str, Any]:
    prefix, _, role = path.removesuffix("/kernel").partition("/")
    rows, columns = leaf.shape
    codes = rows * columns // leaf.subvector_length * pallas_kernels.code_bits(leaf.num_codewords)
    codebook = leaf.num_groups * leaf.num_codewords * leaf.subvector_length * 8 * leaf.codebook.dtype.itemsize
    return {
        "path": path if block is None else f"{prefix}/{block}/{role}/kernel",
        "block": block or 0,
        "role": role or prefix,
        "shape": [rows, columns],
        "codewords": leaf.num_codewords,
        "subvector": leaf.subvector_length,
        "groups": leaf.num_groups,
        "bits": (codes + codebook) / (rows * columns),
    }


def _error(leaf: VQArray, weight: np.ndarray) -> float:
    decoded = np.asarray(leaf.decode(), np.float32)
    return float(np.linalg.norm(decoded - weight) / max(np.linalg.norm(weight), np.finfo(np.float32).tiny))
