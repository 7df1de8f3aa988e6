"""Facts of XLA's optimized program for an NVIDIA GPU, read from its text."""

import re

_DTYPES = {"f8e4m3fn": "float8_e4m3fn", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "s8": "int8"}


def products(hlo: str) -> list[tuple[str, str]]:
    """The dtypes of the two operands of every matrix product, XLA's own and its calls of cuBLAS, in the text's order."""
    define = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \(?(\w+)\[", re.MULTILINE)
    dtypes = {name: _DTYPES.get(dtype, dtype) for name, dtype in define.findall(hlo)}
    found = []
    for line in hlo.splitlines():
        call = re.search(r" (dot|custom-call)\(([^)]*)\)", line)
        if call and (call[1] == "dot" or 'custom_call_target="__cublas' in line):
            # An operand may have its type before it, `s8[2,4]{1,0} %b`.
            names = [operand.split()[-1].lstrip("%") for operand in re.split(r",\s+", call[2])[:2]]
            found.append(tuple(dtypes[name] for name in names))
    return found
