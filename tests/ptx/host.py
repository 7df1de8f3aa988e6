"""Runs the host part of a Mosaic kernel: MLIR text that fills TMA descriptors and launches the kernel.

The text is that of the last stage before the launch is lowered, where every operand is a constant or a pointer. Host memory
is a dictionary; pointers are integers. Operations that are not listed here are refused.
"""

import dataclasses
import re

from ptx.parser import PtxError
from ptx.tma import ELEMENT_TYPES, TensorMap

_ARGUMENTS = 1 << 20  # host address of the array of buffers' addresses
_VALUE = r"(%[\w.-]+(?:#\d+)?)"


@dataclasses.dataclass(frozen=True)
class Launch:
    """parameters: in the kernel's order, an address of global memory, or the TMA descriptors of a block by offset."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: tuple["int | dict[int, TensorMap]", ...]


def run_host(text: str, buffers: list[int]) -> Launch:
    """buffers: global addresses of the custom call's operands and results."""
    return _Host(text, buffers).run()


class _Host:
    def __init__(self, text: str, buffers: list[int]):
        lines = [line.strip() for line in text.splitlines()]
        self.lines = [line for line in lines if line and line not in ("return", "}")]
        self.values: dict = {}
        self.memory: dict = {_ARGUMENTS + 8 * i: address for i, address in enumerate(buffers)}
        self.top = 2 * _ARGUMENTS

    def run(self) -> Launch:
        # The second argument is the array of buffers. Locations, which would follow the first, are cut off with the rest.
        first = re.match(rf"func\.func @\w+\({_VALUE}", self.lines[0])
        if not first:
            raise PtxError(f"the host program begins with {self.lines[0]!r}")
        self.values[first[1]] = 0
        launch = None
        for line in self.lines[1:]:
            if line.startswith("gpu.launch_func"):
                launch = self.launch(line)
            elif call := re.match(r"call @mosaic_gpu_init_tma_desc\((.*?)\)", line):
                self.tensor_map(*self.all(call[1]))
            elif store := re.match(rf"llvm\.store {_VALUE}, {_VALUE}", line):
                self.memory[self.value(store[2])] = self.value(store[1])
            elif store := re.match(rf"memref\.store {_VALUE}, {_VALUE}\[{_VALUE}\] : memref<\d+xi64>", line):
                self.memory[self.value(store[2])[1] + 8 * self.value(store[3])] = self.value(store[1])
            elif define := re.match(rf"{_VALUE} = (.*)", line):
                self.values[define[1]] = self.define(define[2])
            else:
                raise PtxError(f"host program: {line[:160]!r} is not emulated")
        if launch is None:
            raise PtxError("the host program launches nothing")
        return launch

    def value(self, name: str):
        if name not in self.values and not self.values.get("arguments"):
            # The one name that nothing defines is the second argument's.
            self.values |= {name: _ARGUMENTS, "arguments": True}
        return self.values[name]

    def all(self, names: str) -> list:
        return [self.value(name.strip()) for name in names.split(",")]

    def define(self, text: str):
        match = lambda pattern: re.match(pattern.replace("VALUE", _VALUE), text)
        if found := match(r"(?:llvm\.mlir|arith)\.constant\(?\s*(-?\d+) : \w+"):
            return int(found[1])
        if match(r"llvm\.mlir\.undef : !llvm\.struct"):
            return [None, None, None, {}, {}]
        if found := match(r"llvm\.load VALUE : !llvm\.ptr -> !llvm\.array<(\d+) x i8>"):
            return self.block(self.value(found[1]), int(found[2]))
        if found := match(r"llvm\.load VALUE : !llvm\.ptr -> !llvm\.ptr"):
            return self.memory[self.value(found[1])]
        if found := match(r"llvm\.getelementptr (?:inbounds )?VALUE\[(\d+)\] : \(!llvm\.ptr\) -> !llvm\.ptr, (\S+)"):
            size = {"i8": 1, "i32": 4, "i64": 8, "!llvm.ptr": 8}[found[3]]
            return self.value(found[1]) + size * int(found[2])
        if found := match(r"llvm\.insertvalue VALUE, VALUE\[(\d+)(?:, (\d+))?\]"):
            return self.insert(self.value(found[2]), self.value(found[1]), int(found[3]), found[4])
        if found := match(r"llvm\.extractvalue VALUE\[(\d)\]"):
            return self.value(found[1])[int(found[2])]
        if found := match(r"llvm\.(mul|add) VALUE, VALUE"):
            a, b = self.value(found[2]), self.value(found[3])
            return a * b if found[1] == "mul" else a + b
        if found := match(
            r"(?:builtin\.unrealized_conversion_cast|llvm\.ptrtoint|llvm\.inttoptr|memref\.transpose) VALUE\b"
        ):
            return self.value(found[1])
        if found := match(r"memref\.extract_aligned_pointer_as_index VALUE"):
            return self.value(found[1])[1]
        if found := match(r"memref\.reinterpret_cast VALUE to offset: \[(\d+)\]"):
            # Sizes and strides are written to the descriptor as constants; only the address is taken from here.
            return [*self.value(found[1])[:2], int(found[2]), {}, {}]
        if found := match(r"llvm\.alloca VALUE x (?:!llvm\.array<(\d+) x i8>|i64)"):
            return self.allocate(self.value(found[1]) * (int(found[2]) if found[2] else 8))
        if found := match(r"memref\.alloca\(\) : memref<(\d+)xi64>"):
            address = self.allocate(8 * int(found[1]))
            return [address, address, 0, {}, {}]
        raise PtxError(f"host program: {text[:160]!r} is not emulated")

    def insert(self, struct: list, value, field: int, item: str | None) -> list:
        copy = [*struct]
        copy[field] = value if item is None else {**copy[field], int(item): value}
        return copy

    def allocate(self, size: int) -> int:
        address = self.top
        self.top += -(-size // 64) * 64
        return address

    def block(self, address: int, size: int) -> dict[int, TensorMap]:
        return {at - address: found for at, found in self.memory.items() if address <= at < address + size}

    def tensor_map(self, target, address, element, rank, sizes, strides, swizzle, box) -> None:
        if element not in ELEMENT_TYPES:
            raise PtxError(f"TMA element type {element} is not emulated")
        array = lambda start: tuple(self.memory[start + 8 * i] for i in range(rank))
        self.memory[target] = TensorMap(
            address, ELEMENT_TYPES[element], array(sizes), array(strides), array(box), swizzle
        )

    def launch(self, line: str) -> Launch:
        match = re.match(
            rf"gpu\.launch_func\s+(?:async )?<{_VALUE} : !llvm\.ptr>\s+@\S+\s+"
            r"(?:clusters in \((?P<cluster>.*?)\)\s+)?blocks in \((?P<grid>.*?)\)\s+threads in \((?P<block>.*?)\)\s*: i64\s+"
            rf"(?:dynamic_shared_memory_size {_VALUE}\s+)?args\((?P<arguments>.*)\)",
            line,
        )
        if not match:
            raise PtxError(f"host program: {line[:160]!r} is not emulated")
        if match["cluster"] and self.all(match["cluster"]) != [1, 1, 1]:
            raise PtxError("clusters of more than one CTA are not emulated")
        names = re.findall(rf"{_VALUE} : !llvm", match["arguments"])
        return Launch(
            tuple(self.all(match["grid"])),
            tuple(self.all(match["block"])),
            self.value(match[5]) if match[5] else 0,
            tuple(self.value(name) for name in names),
        )
