"""What quantization did to each layer's weights."""

from typing import Any

import flax.traverse_util
import numpy as np

import pallas_kernels
from vq4dit_jax.qarray.quantization import block_path, matrices
from vq4dit_jax.qarray.vq import VQArray


def layer_table(teacher: Any, kmeans: Any, packed: Any) -> list[dict[str, Any]]:
    """One entry per quantized matrix, for `ReportData.layers`: shape, codebook, bits and relative Frobenius errors
    ||W_hat - W|| / ||W|| before and after calibration. A matrix at a time is decoded.
    """
    kernels = flax.traverse_util.flatten_dict(teacher, sep="/")
    rows = []
    for (path, block, before), (_, _, after) in zip(matrices(kmeans), matrices(packed), strict=True):
        weight = np.asarray(kernels[path] if block is None else kernels[path][block], np.float32).T
        errors = {"kmeans_error": _error(before, weight), "final_error": _error(after, weight)}
        rows.append({**_describe(path, block, after), **errors})
    return rows


def _describe(path: str, block: int | None, leaf: VQArray) -> dict[str, Any]:
    prefix, _, role = path.removesuffix("/kernel").partition("/")
    rows, columns = leaf.shape
    codes = rows * columns // leaf.subvector_length * pallas_kernels.code_bits(leaf.num_codewords)
    codebook = leaf.num_groups * leaf.num_codewords * leaf.subvector_length * 8 * leaf.codebook.dtype.itemsize
    return {
        "path": block_path(path, block),
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
