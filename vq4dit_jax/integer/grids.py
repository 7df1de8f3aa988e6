"""Uniform scalar quantization, round to nearest: the grids of GPTQ, and the simplest baseline.

    w ~ s (q - z),  q = clip(round(w / s + z), 0, 2^b - 1)

A grid (scale s, zero point z) belongs to a row of W (O, I), or to each group of consecutive inputs in a row:

    symmetric     z = 2^(b-1), s = max |w| / (2^(b-1) - 1/2); 0 is a level, and one more level lies below it than above
    centred       z = (2^b - 1) / 2, s = max |w| / 2^(b-1); as many levels above 0 as below, and 0 is none
    asymmetric    s = (max - min) / (2^b - 1) over the weights and 0, z = round(-min / s), a code of its own

With a clip search s is that of the share of the range whose squared error is least (the `mse` option of GPTQ's code; OCTAV,
Sakr et al. 2022, arXiv 2206.06501, solves for it). Scales are float16, as they are stored.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError
from vq4dit_jax.integer.packing import packed_bytes

KINDS = ("symmetric", "centred", "asymmetric")
SHARES = tuple(np.linspace(1.0, 0.2, 41).tolist())
"""Shares of the range that a clip search tries."""


class Grid(NamedTuple):
    """Scales (0 where all weights are) and zero points of the groups of consecutive inputs in every row."""

    scale: Float[Array, "*stack O groups"]
    zero: Float[Array, "*stack O groups"]


def fixed_zero(bits: int, kind: str) -> float | None:
    """The zero point that all groups of such a grid share; None where each has its own."""
    return {"symmetric": 2.0 ** (bits - 1), "centred": (2**bits - 1) / 2, "asymmetric": None}[kind]


def check(bits: int, group: int | None, kind: str) -> None:
    """InputError for values that make no grid."""
    if bits not in range(2, 9):
        raise InputError(f"bits={bits}: wanted 2 to 8")
    if group is not None and group < 1:
        raise InputError(f"group={group}: wanted a number of inputs, or None for whole rows")
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}: wanted one of {', '.join(KINDS)}")


@functools.partial(jax.jit, static_argnames=("bits", "group", "kind"))
def fit_grid(
    weight: Float[Array, "O I"],
    bits: int,
    group: int | None = None,
    kind: str = "symmetric",
    shares: Sequence[float | Float[Array, ""]] = SHARES,
    importance: Float[Array, " I"] | None = None,
) -> Grid:
    """The grid of each row and group of `group` inputs (None: all; the last group is shorter where I is no multiple).

    shares: of the range, to choose the one with the least sum of importance (w - s (q - z))^2 from; (1.0,) for none.
    importance: of the inputs, such as their second moments; None: all alike.
    """
    rows, columns = weight.shape
    group = columns if group is None else min(group, columns)
    importance = jnp.ones(columns) if importance is None else importance
    padded = ((0, 0), (0, -columns % group))
    cells = jnp.pad(weight, padded).reshape(rows, -1, group)
    # Padding is 0, which changes no range, and has the count 0.
    counts = jnp.pad(importance[None], padded).reshape(1, -1, group)
    low, high = jnp.minimum(cells.min(-1), 0), jnp.maximum(cells.max(-1), 0)

    def grid(share: Array) -> Grid:
        if kind == "asymmetric":
            scale = _half(share * (high - low) / (2**bits - 1))
            return Grid(scale, jnp.clip(jnp.round(_ratio(-share * low, scale)), 0, 2**bits - 1))
        zero = fixed_zero(bits, kind)
        # Half a step beyond the outermost level: symmetric 2^(b-1) - 1/2, centred 2^(b-1).
        scale = _half(share * jnp.maximum(-low, high) / (2**bits - 0.5 - zero))
        return Grid(scale, jnp.full_like(scale, zero))

    def error(grid: Grid) -> Array:
        scale, zero = grid.scale[..., None], grid.zero[..., None]
        return (counts * jnp.square(cells - scale * (quantize(cells, scale, zero, bits) - zero))).sum(-1)

    def better(best: tuple[Grid, Array], share: Array) -> tuple[tuple[Grid, Array], None]:
        new = grid(share)
        squared = error(new)
        keep = squared < best[1]
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), (new, squared), best), None

    shares = jnp.asarray(shares, jnp.float32)
    first = grid(shares[0])
    return jax.lax.scan(better, (first, error(first)), shares[1:])[0][0]


def _half(scale: Array) -> Array:
    return scale.astype(jnp.float16).astype(jnp.float32)


def _ratio(weight: Array, scale: Array) -> Array:
    """weight / scale, 0 where the scale is."""
    return jnp.where(scale > 0, weight / jnp.where(scale > 0, scale, 1), 0)


def quantize(weight: Array, scale: Array, zero: Array, bits: int) -> Array:
    """Codes q as floats, for arrays of one shape (or with axes of length 1)."""
    return jnp.clip(jnp.round(_ratio(weight, scale) + zero), 0, 2**bits - 1)


@functools.partial(jax.jit, static_argnames=("columns", "group"))
def expand(grid: Grid, columns: int, group: int | None) -> Grid:
    """The grid of every weight, (*stack, O, I)."""
    group = columns if group is None else group
    repeat = lambda a: jnp.repeat(a, group, axis=-1, total_repeat_length=a.shape[-1] * group)[..., :columns]
    return Grid(*map(repeat, grid))


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def codes(weight: Float[Array, "*stack O I"], grid: Grid, bits: int, group: int | None = None) -> Array:
    """Codes q of the nearest levels, uint8."""
    return quantize(weight, *expand(grid, weight.shape[-1], group), bits).astype(jnp.uint8)


def decode(codes: Array, grid: Grid, group: int | None = None) -> Float[Array, "*stack O I"]:
    """The quantized weight s (q - z) in float32."""
    scale, zero = expand(grid, codes.shape[-1], group)
    return scale * (codes.astype(jnp.float32) - zero)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def round_to_nearest(weight: Float[Array, "*stack O I"], grid: Grid, bits: int, group: int | None = None) -> Array:
    """The nearest level of every weight's grid."""
    return decode(codes(weight, grid, bits, group), grid, group)


def num_groups(columns: int, group: int | None) -> int:
    """Grids of a row."""
    return 1 if group is None else -(-columns // group)


def stored_bytes(shape: tuple[int, int], bits: int, group: int | None, kind: str) -> tuple[int, int]:
    """(bytes of packed codes, bytes of scales and zero points) of a weight (O, I)."""
    rows, columns = shape
    groups = num_groups(columns, group)
    zeros = packed_bytes(rows * groups, bits) if kind == "asymmetric" else 0
    return rows * packed_bytes(columns, bits), 2 * rows * groups + zeros
