"""What stands in a kernel's place: quantized arrays, and what is done to the trees that hold them."""

from vq4dit_jax.qarray.base import QuantizedArray, is_quantized

__all__ = ["QuantizedArray", "is_quantized"]
