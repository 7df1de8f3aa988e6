"""An emulator of the sm_90a PTX that Pallas Mosaic GPU writes: runs, on a CPU, what an H200 would run.

    from ptx import emulate
    (y,) = emulate(kernel, [x, w], [jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)])

It covers what interpret mode cannot: fragment layouts, packing, TMA and matrix descriptors, the machine's arithmetic.
Copies and products happen as late as they may, so that a missing wait gives wrong numbers; fences and time are not
modelled. It refuses whatever it does not know.

    parser      text to instructions             arithmetic, bits, conversions   of one thread
    numbers     types and roundings              lanes                           of the threads of a warp
    memory      address spaces                   movement, control               registers, memory; branches, barriers
    registers   threads and what they hold       tma, wgmma                      copies of boxes; the tensor cores
    machine     decodes and runs                 host, launch                    what starts a kernel; `emulate`
"""

from ptx import arithmetic, bits, control, conversions, lanes, movement, tma, wgmma
from ptx.launch import emulate
from ptx.parser import PtxError

__all__ = [
    "PtxError",
    "arithmetic",
    "bits",
    "control",
    "conversions",
    "emulate",
    "lanes",
    "movement",
    "tma",
    "wgmma",
]
