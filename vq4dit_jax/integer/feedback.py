"""Error feedback: columns are quantized in turn, and those that are yet to come make up for the error.

For tr((W - Q) H (W - Q)^T), H the second moments of the inputs, U upper triangular with H^-1 = U^T U, and b the columns of
one step (Frantar et al. 2023, GPTQ, arXiv 2210.17323, algorithm 1; van Baalen et al. 2024, GPTVQ, arXiv 2402.15319):

    Q_b     what the quantizer chooses for W_b
    e_b     = (W_b - Q_b) U_bb^-1
    W_right <- W_right - e_b U_b,right

The error of a row is then sum_b |e_b|^2. The columns go by in blocks: a step updates the rest of its block, and the later
blocks get all updates of a block in one product.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

Choose = Callable[[Float[Array, "d O"], Int[Array, ""]], tuple[Num[Array, "r O"], Float[Array, "d O"]]]


def feed_back(
    weight: Float[Array, "O I"], upper: Float[Array, "I I"], choose: Choose, *, d: int = 1, block: int | None = None
) -> tuple[Num[Array, "SR O"], Float[Array, " O"]]:
    """(what `choose` recorded at all S = I / d steps, the error of each row).

    Args:
      upper: U.
      choose: (W_b^T, b as the number of the step) -> (what is recorded, e_b^T). Where `block` does not divide I it is called
        for steps past the last; what it gives there is left out.
      d: columns of a step; divides `block` and I.
      block: columns of a block; None: all.
    """
    rows, columns = weight.shape
    block = columns if block is None else min(block, columns)
    missing = -columns % block
    # Columns lead, because they are read and written one by one; the last block is filled up.
    rest = jnp.pad(weight.T, ((0, missing), (0, 0)))
    upper = jnp.pad(upper, ((0, missing), (0, missing)))
    exact = dict(precision=jax.lax.Precision.HIGHEST)
    one = jax.eval_shape(choose, jax.ShapeDtypeStruct((d, rows), weight.dtype), jax.ShapeDtypeStruct((), jnp.int32))[0]

    def next_block(number, state):
        rest, records, total = state
        first = number * block
        across = jax.lax.dynamic_slice_in_dim(upper, first, block)
        within = jax.lax.dynamic_slice_in_dim(across, first, block, axis=1)

        def step(j, state):
            w, records, errors = state
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, j * d, d)
            record, error = choose(cut(w), number * (block // d) + j)
            error = jnp.where(first + j * d < columns, error, 0)
            # Of this step's own columns nothing is read again.
            w = w - jnp.matmul(cut(within).T, error, **exact)
            put = jax.lax.dynamic_update_slice_in_dim
            return w, put(records, record, j * len(record), 0), put(errors, error, j * d, 0)

        empty = jnp.zeros((block // d * one.shape[0], rows), one.dtype), jnp.zeros((block, rows), weight.dtype)
        start = jax.lax.dynamic_slice_in_dim(rest, first, block)
        _, found, errors = jax.lax.fori_loop(0, block // d, step, (start, *empty))
        # Earlier columns of `across` are 0, and those of this block are not read again.
        rest = rest - jnp.matmul(across.T, errors, **exact)
        records = jax.lax.dynamic_update_slice_in_dim(records, found, number * len(found), 0)
        return rest, records, total + jnp.square(errors).sum(0)

    steps = (columns + missing) // d
    start = (rest, jnp.zeros((steps * one.shape[0], rows), one.dtype), jnp.zeros(rows, weight.dtype))
    _, records, total = jax.lax.fori_loop(0, (columns + missing) // block, next_block, start)
    return records[: columns // d * one.shape[0]], total
