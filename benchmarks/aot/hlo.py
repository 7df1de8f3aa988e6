"""Facts of XLA's optimized program for an NVIDIA GPU, read from its text."""

import re

_DTYPES = {"f8e4m3fn": "float8_e4m3fn", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "s8": "int8"}


def products(hlo: str) -> list[tuple[str, str]]:
    """The dtypes of the two operands of every matrix product, XLA's own and its calls of cuBLAS, in the text's order."""
    define = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) [\w-]+\(", re.MULTILINE)
    results = {name: re.findall(r"(\w+)\[", shape) for name, shape in define.findall(hlo)}

    def dtype(operand: str) -> str:
        """Of an operand, which may have its type before it, `s8[2,4]{1,0} %b`, or be a part of a tuple, `%c#1`."""
        name, _, part = operand.split()[-1].lstrip("%").partition("#")
        found = results[name][int(part or 0)]
        return _DTYPES.get(found, found)

    found = []
    for line in hlo.splitlines():
        call = re.search(r" (dot|custom-call)\(([^)]*)\)", line)
        if call and (call[1] == "dot" or 'custom_call_target="__cublas' in line):
            left, right, *_ = re.split(r",\s+", call[2])
            found.append((dtype(left), dtype(right)))
    return found
