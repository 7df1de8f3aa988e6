"""Rows that were quantized by token, against their exact values."""

import jax.numpy as jnp
import numpy as np

INT8, E4M3, BF16 = jnp.int8, jnp.float8_e4m3fn, jnp.bfloat16


def check(out, v, dtype):
    """Every number of `out` lies within the rounding of `dtype` of the float64 values."""
    if dtype == BF16:
        np.testing.assert_allclose(np.asarray(out, np.float64), v, rtol=2**-8, atol=2e-5)
        return
    q, token_scale = (np.asarray(a) for a in out)
    limit = {INT8: 127, E4M3: 448}[dtype]
    np.testing.assert_allclose(token_scale, np.abs(v).max(1) / limit, rtol=1e-5)
    got, step = q.astype(np.float64) * token_scale[:, None], token_scale[:, None].astype(np.float64)
    # int8: half a step. e4m3: four bits of significand, and 2^-9 between the smallest numbers.
    half_step = step / 2 if dtype == INT8 else np.maximum(np.abs(v) * 2**-4, step * 2**-10)
    assert (np.abs(got - v) <= half_step * 1.001 + 2e-5).all()
    assert (np.abs(q.astype(np.float64)).max(1) == limit).all()
