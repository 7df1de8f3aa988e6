"""Soft VQ weights with their own backward pass, for calibration.

    W_hat = sum_n r_n C[a_n]        (VQ4DiT, eq 7)

Autodiff would keep the gathered codewords, (n, O, I), from the forward pass for the backward one. Here the residuals are
the arguments, and the backward pass gathers again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import reference, reference_soft, selector

IMPLEMENTATIONS = ("xla", "mosaic")


def soft_weights(
    codebook: Float[Array, "*stack G K d"],
    candidates: Int[Array, "*stack n O S"],
    ratios: Float[Array, "*stack n O S"],
    *,
    implementation: str | None = None,
    dtype: Any = jnp.float32,
    interpret: Any = None,
) -> Float[Array, "*stack O I"]:
    """W_hat in `dtype` (float32 or bfloat16), differentiable in codebook and ratios, whose gradients are float32.

    `implementation` None: the selector's. "mosaic": two kernels for Hopper, which take all layers of a stack in one
    launch. "xla": plain jnp, the backward pass by a segment sum on a CPU and by products with one-hot tiles elsewhere.
    Candidates may be uint8 or int32. `interpret` (mosaic): parameters of Pallas' GPU interpreter.
    """
    if implementation is None:
        codewords, length = codebook.shape[-2:]
        number = candidates.shape[-3]
        implementation = selector.soft_weights(selector.facts(), codewords, length, number).implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    return _soft_weights(implementation, jnp.dtype(dtype), interpret, codebook, candidates, ratios)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _soft_weights(implementation, dtype, interpret, codebook, candidates, ratios):
    if implementation == "mosaic":
        from pallas_kernels.mosaic.soft_decode import soft_decode

        return soft_decode(codebook, candidates, ratios, dtype=dtype, interpret=interpret)
    decode = _over_stack(reference.soft_decode, codebook.ndim - 3)
    return decode(codebook, candidates.astype(jnp.int32), ratios).astype(dtype)


def _forward(implementation, dtype, interpret, *operands):
    return _soft_weights(implementation, dtype, interpret, *operands), operands


def _backward(implementation, dtype, interpret, operands, gradient):
    codebook, candidates, ratios = operands
    if implementation == "mosaic":
        from pallas_kernels.mosaic.codebook_grad import codebook_grad

        by_codebook, by_ratios = codebook_grad(gradient, candidates, ratios, codebook, interpret=interpret)
    else:
        forms = (reference_soft.codebook_grad, reference_soft.codebook_grad_by_products)
        by_scatter, by_products = (_over_stack(form, codebook.ndim - 3) for form in forms)
        by_codebook, by_ratios = lax.platform_dependent(
            gradient, candidates, ratios, codebook, cpu=by_scatter, default=by_products
        )
    return by_codebook.astype(codebook.dtype), None, by_ratios.astype(ratios.dtype)


def _over_stack(function: Any, axes: int) -> Any:
    for _ in range(axes):
        function = jax.vmap(function)
    return function


_soft_weights.defvjp(_forward, _backward)
