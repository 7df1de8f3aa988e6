"""The Linear whose kernel may be an array or a quantized leaf."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vq4dit_jax.qarray.base import Kernel


def linear(
    x: Float[Array, "*batch I"], kernel: Array | Kernel, bias: Float[Array, " O"] | None
) -> Float[Array, "*batch O"]:
    """x @ kernel + bias in the dtype of `x`; a dense kernel is (I, O), as in Flax."""
    y = kernel.matmul(x) if isinstance(kernel, Kernel) else jnp.matmul(x, jnp.asarray(kernel, x.dtype))
    if bias is None:
        return y
    return y + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def leaf(module: nn.Module, name: str, init: Callable[..., Any], *args: Any) -> Any:
    """`module.param`, except that a value already there may be a struct, which `param` refuses.

    A plain array still goes through `param`, so that a wrong shape is an error that names the parameter.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if not hasattr(value, "dtype"):
            return value
    return module.param(name, init, *args)


class Linear(nn.Module):
    """y = x W + b with `kernel` (I, O) or a quantized leaf, `bias` (O,)."""

    features: int
    kernel_init: Callable[..., Any] = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        kernel = leaf(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return linear(x, kernel, bias)
