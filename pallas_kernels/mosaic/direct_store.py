"""Stores from registers to global memory."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu


def direct_store(ref: Any, value: jax.Array, layout: Any, interpret: bool = False) -> None:
    """Writes `value`, which lies in registers in `layout`, to all of `ref` in global memory.

    It omits the two warpgroup barriers that Pallas puts around `ref[...] = value`, because no other thread reads these
    values. It also works where a warp writes less than a sector of 32 bytes, which Pallas refuses from JAX 0.11 on.
    """
    if interpret:
        ref[...] = value
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def emit(_: Any, target: Any, registers: Any) -> None:
        registers.store_untiled(target, optimized=False)

    emit(ref, value)
