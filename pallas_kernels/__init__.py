"""Kernels that run a model from its packed form, and the plain-jnp references that define what they compute."""

from pallas_kernels.reference import code_bits, decode, soft_decode, unpack_codes, vq_matmul

__all__ = ["code_bits", "decode", "soft_decode", "unpack_codes", "vq_matmul"]
