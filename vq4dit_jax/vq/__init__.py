"""Vector quantization on arrays: no Flax, no files."""

from vq4dit_jax.vq.array import VQArray, from_codes, validate
from vq4dit_jax.vq.kmeans import kmeans, nearest_codewords
from vq4dit_jax.vq.packing import pack_codes, packed_bytes
from vq4dit_jax.vq.soft import SoftVQArray, soften

__all__ = [
    "SoftVQArray",
    "VQArray",
    "from_codes",
    "kmeans",
    "nearest_codewords",
    "pack_codes",
    "packed_bytes",
    "soften",
    "validate",
]
