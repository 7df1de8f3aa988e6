"""Coordinate descent on codes and scales, from those of GPTQ: no single code or scale can be moved to a smaller error.

    E = sum over rows e of W - Q:  e H e^T       Q = s (q - z),  H the second moments of the inputs

    code of input j, all rows at once      q_j <- nearest level to Q_j + (e H)_j / H_jj
    scale of a group g of inputs           s_g <- s_g + e H b_g^T / (b_g H b_g^T),  b_g = q - z inside the group

Each move is the exact minimum along its coordinate, so E never rises but by the rounding of scales to float16; every row keeps
the best that it has seen. (For codes: QuantEase, Behdin et al. 2023, arXiv 2309.01885.) A round costs O I^2 multiplications.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from vq4dit_jax.integer.grids import Grid, decode, expand, num_groups, quantize


@functools.partial(jax.jit, static_argnames=("bits", "group", "rounds"))
def descend(
    weight: Float[Array, "O I"],
    moments: Float[Array, "I I"],
    codes: UInt8[Array, "O I"],
    grid: Grid,
    bits: int,
    group: int | None,
    rounds: int,
) -> tuple[UInt8[Array, "O I"], Grid]:
    """(codes, grid) after so many rounds over all scales and codes; zero points stay, and codes of inputs that are always 0."""
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    columns = weight.shape[1]
    size = columns if group is None else group
    diagonal = jnp.diagonal(moments)

    def errors(q: Array, scale: Array) -> Float[Array, " O"]:
        left = weight - decode(q, Grid(scale, grid.zero), group)
        return (product(left, moments) * left).sum(1)

    def move_codes(q: Array, scale: Array) -> Array:
        every = expand(Grid(scale, grid.zero), columns, group)
        along = product(weight - decode(q, Grid(scale, grid.zero), group), moments)

        def one(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            q, along = carry
            s, z, old = every.scale[:, j], every.zero[:, j], q[:, j]
            wanted = s * (old - z) + along[:, j] / jnp.maximum(diagonal[j], 1e-30)
            new = jnp.where((diagonal[j] > 0) & (s > 0), quantize(wanted, s, z, bits), old)
            return q.at[:, j].set(new), along - (s * (new - old))[:, None] * moments[j][None]

        return lax.fori_loop(0, columns, one, (q, along))[0]

    def move_scales(q: Array, scale: Array) -> Array:
        left = weight - decode(q, Grid(scale, grid.zero), group)
        for g in range(num_groups(columns, group)):
            own = slice(g * size, min((g + 1) * size, columns))
            b = q[:, own] - grid.zero[:, g : g + 1]
            # Only the group's own columns of b are not 0.
            against = product(left, moments[:, own])
            step = (against * b).sum(1) / jnp.maximum((product(b, moments[own, own]) * b).sum(1), 1e-30)
            # Rounded as they are stored; a scale that would vanish or turn its sign stays.
            moved = (scale[:, g] + step).astype(jnp.float16).astype(jnp.float32)
            moved = jnp.where((moved > 0) & jnp.isfinite(moved) & (scale[:, g] > 0), moved, scale[:, g])
            left = left.at[:, own].add(-(moved - scale[:, g])[:, None] * b)
            scale = scale.at[:, g].set(moved)
        return scale

    def round_(_: Array, carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        q, scale, best_q, best_scale, least = carry
        scale = move_scales(q, scale)
        q = move_codes(q, scale)
        found = errors(q, scale)
        better = (found < least)[:, None]
        return q, scale, jnp.where(better, q, best_q), jnp.where(better, scale, best_scale), jnp.minimum(found, least)

    q = codes.astype(jnp.float32)
    start = (q, grid.scale, q, grid.scale, errors(q, grid.scale))
    _, _, q, scale, _ = lax.fori_loop(0, rounds, round_, start)
    return q.astype(jnp.uint8), Grid(scale, grid.zero)
