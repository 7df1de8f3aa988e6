"""The few names of Mosaic GPU that differ between the supported versions of jax (0.10.2 and 0.11 to 0.12)."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

_OLD = jax.__version_info__ < (0, 11)

INTERPRETER_CLIPS = not _OLD
"""Whether the interpreter's copy engine reads zeros and writes nothing beyond an array's end, as the hardware's does."""


def load(ref: Any, layout: Any, interpret: bool = False) -> jax.Array:
    """A vector from global or shared memory to registers in `layout`, which the interpreter ignores."""
    if interpret:
        return ref[...]
    return (
        plgpu.load(ref, (), layout=layout, optimized=False) if _OLD else plgpu.load(ref, layout=layout, optimized=False)
    )


def transpose(ref: Any) -> Any:
    """The view of a two-dimensional ref with its axes exchanged."""
    return plgpu.transpose_ref(ref, (1, 0)) if _OLD else ref.T


def interpret_params() -> Any:
    """The value for `plgpu.kernel(interpret=...)` that runs a kernel on the CPU."""
    if _OLD:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams()
    return plgpu.InterpretGPUParams()
