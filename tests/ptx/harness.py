"""A few instructions on given registers, for tests of single instructions."""

import numpy as np

from ptx.host import Launch
from ptx.launch import run
from ptx.memory import GlobalMemory


def kernel(body: str, inputs: list[np.ndarray], out: np.dtype) -> str:
    """PTX that loads one element of each input into a, b, c, ... of its thread, runs `body`, and stores d."""
    letters = "abcefg"[: len(inputs)]
    declared = "".join(f".reg .b{8 * x.itemsize} {name};\n" for name, x in zip(letters, inputs))
    loads = ""
    for i, (name, x) in enumerate(zip(letters, inputs)):
        loads += f"ld.param.b64 %rd1, [p{i}]; mad.wide.u32 %rd2, %r0, {x.itemsize}, %rd1;\n"
        loads += f"ld.global.b{8 * x.itemsize} {name}, [%rd2];\n"
    size = np.dtype(out).itemsize
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry k({", ".join(f".param .u64 p{i}" for i in range(len(inputs) + 1))})
{{
.reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .b{8 * size} d;
{declared}.shared .align 128 .b8 buffer[2048];
mov.u32 %r0, %tid.x;
{loads}{body}
ld.param.b64 %rd1, [p{len(inputs)}]; mad.wide.u32 %rd2, %r0, {size}, %rd1; st.global.b{8 * size} [%rd2], d;
ret;
}}
"""


def execute(body: str, inputs: list[np.ndarray], out=np.uint32) -> np.ndarray:
    """d of each thread."""
    threads = len(inputs[0])
    memory = GlobalMemory([*inputs, np.zeros(threads, out)])
    starts = tuple(int(start) for start in memory.starts)
    run(kernel(body, inputs, out), Launch((1, 1, 1), (threads, 1, 1), 0, starts), memory)
    return memory.contents(len(inputs)).copy().view(out)
