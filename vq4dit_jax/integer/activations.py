"""Activations in 2 to 8 bits: a scale for each token as it comes, or one scale that is fixed beforehand.

    symmetric     s = max |x| / (2^(b-1) - 1),  q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric    s = (max - min) / (2^b - 1) over the token and 0,  z = clip(round(-min / s), 0, 2^b - 1),
                  q = clip(round(x / s) + z, 0, 2^b - 1)
    clipped       asymmetric, with min and max times the one of `SHARES` that leaves the token the least squared error

A token that is all zero has the scale `FLOOR`, and so codes of 0. (ViDiT-Q, Zhao et al. 2025, arXiv 2406.02540, section 3.1; its
released code stops at such a token, and lets codes of asymmetric grids leave their range.)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vq4dit_jax.errors import InputError

FLOOR = 1e-12
"""The smallest scale: a token or a layer that reads only zeros."""
KINDS = ("symmetric", "asymmetric", "clipped")
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Of a token's range. With few levels the largest numbers may rather be clipped than all others be rounded more: of a normal
distribution 16 levels best span 2.5 standard deviations on each side, and the largest of 1,024 numbers is 3.2 away."""


class Tokens(NamedTuple):
    """x ~ scale (codes - zero); codes are whole numbers in the dtype of x, scale and zero (*batch, 1)."""

    codes: Float[Array, "*batch I"]
    scale: Float[Array, "*batch 1"]
    zero: Float[Array, "*batch 1"]

    def decode(self) -> Float[Array, "*batch I"]:
        return self.scale * (self.codes - self.zero)


def check(bits: int, kind: str) -> None:
    """InputError for what is no grid of activations."""
    if bits not in range(2, 9):
        raise InputError(f"activation bits={bits}: wanted 2 to 8")
    if kind not in KINDS:
        raise InputError(f"activation grid={kind!r}: wanted one of {', '.join(KINDS)}")


def quantize(
    x: Float[Array, "*batch I"],
    bits: int | Int[Array, ""],
    kind: str = "symmetric",
    scale: Float[Array, ""] | None = None,
) -> Tokens:
    """The codes of every token. `scale`: fixed for all tokens, symmetric; None: each token's own. Bits that are an array choose
    the grid at run time."""
    levels = 2**bits if isinstance(bits, int) else jnp.left_shift(1, bits.astype(jnp.int32)).astype(x.dtype)
    half = levels // 2
    top = half - 1
    if scale is not None or kind == "symmetric":
        own = jnp.abs(x).max(-1, keepdims=True) / top if scale is None else jnp.full((*x.shape[:-1], 1), scale)
        own = jnp.maximum(own, FLOOR)
        return Tokens(jnp.clip(jnp.round(x / own), -half, top), own, jnp.zeros_like(own))
    low, high = jnp.minimum(x.min(-1, keepdims=True), 0), jnp.maximum(x.max(-1, keepdims=True), 0)

    def within(share: float) -> Tokens:
        own = jnp.maximum(share * (high - low) / (levels - 1), FLOOR)
        zero = jnp.clip(jnp.round(-share * low / own), 0, levels - 1)
        return Tokens(jnp.clip(jnp.round(x / own) + zero, 0, levels - 1), own, zero)

    best = within(1.0)
    if kind == "clipped":
        lost = lambda tokens: jnp.square(tokens.decode() - x).sum(-1, keepdims=True)
        least = lost(best)
        for share in SHARES[1:]:
            tokens = within(share)
            found = lost(tokens)
            best = Tokens(*(jnp.where(found < least, new, old) for new, old in zip(tokens, best, strict=True)))
            least = jnp.minimum(found, least)
    return best
