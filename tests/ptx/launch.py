"""Compiles a function that is one Mosaic kernel for an H200, and runs what comes out."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.aot import compiler
from ptx.host import Launch, run_host
from ptx.machine import Machine, layout, sizes
from ptx.memory import POISON, GlobalMemory, Memory
from ptx.parser import PtxError, parse


def emulate(fn: Callable, inputs: Sequence[np.ndarray], outputs: Sequence) -> list[np.ndarray]:
    """Runs every CTA of the sm_90a code of `fn`, which must launch one Mosaic kernel and nothing else.

    Args:
        fn: of arrays like `inputs`; its results are flattened.
        inputs: numpy arrays (bfloat16 and float8 as ml_dtypes has them).
        outputs: what the results must look like: anything with a shape and a dtype.

    Returns:
        The results, as new arrays. What the kernel did not write is NaN, or -1 in integers.

    Raises:
        PtxError: the code does something that the emulator does not know, or that no GPU would do.
    """
    compiled = compiler.compile(fn, *inputs, name="emulated")
    found = [(value.shape, np.dtype(value.dtype)) for value in compiled.outputs]
    if found != [(tuple(value.shape), np.dtype(value.dtype)) for value in outputs]:
        raise PtxError(f"the function returns {found}")
    kinds = [thunk.kind for thunk in compiled.thunks if thunk.kind != "kCopy"]
    if kinds != ["kCustomCall"] or len(compiled.mosaic_kernels) != 1:
        listed = ", ".join(f"{thunk.kind} {thunk.name}" for thunk in compiled.launches())
        raise PtxError(f"the function is not one Mosaic kernel; it launches: {listed}")
    call = _find_call(compiled.hlo)
    arrays = [np.ascontiguousarray(inputs[index]) for index in call.operands]
    places = list(range(len(arrays)))  # of the buffers that the kernel gets, operands and then results, in `arrays`
    for result in range(len(outputs)):
        if result not in call.aliases:
            value = outputs[call.outputs.index(result)]
            arrays.append(np.full(math.prod(value.shape) * np.dtype(value.dtype).itemsize, POISON, np.uint8))
        places.append(call.aliases.get(result, len(arrays) - 1))
    memory = GlobalMemory(arrays)
    kernel = compiled.mosaic_kernels[0]
    run(kernel.ptx, run_host(kernel.host, [int(memory.starts[place]) for place in places]), memory)
    results = [memory.contents(places[len(call.operands) + result]) for result in call.outputs]
    return [raw.copy().view(value.dtype).reshape(value.shape) for raw, value in zip(results, outputs)]


@dataclasses.dataclass(frozen=True)
class _Call:
    """operands: of the custom call, as indices of the program's inputs. outputs: the call's result that each output is.
    aliases: the operand whose buffer a result takes."""

    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    aliases: dict[int, int]


def _find_call(hlo: str) -> _Call:
    """The Mosaic call in the entry computation of optimized HLO; copies and bitcasts around it leave the bytes alone."""
    entry = hlo[hlo.index("\nENTRY ") :].split("\n}", 1)[0]
    pattern = r"^  (ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, (.*))?$"
    lines = {name: rest for _, name, *rest in re.findall(pattern, entry, re.M)}
    ((call, call_type),) = re.findall(r"%([\w.-]+) = (\(.*?\)|\S+) custom-call\(.*kernel_hash", entry)
    (root,) = re.findall(r"^  ROOT %([\w.-]+) = ", entry, re.M)

    def origin(name: str) -> tuple[str, int]:
        """('input', index) or ('result', index)."""
        name, _, element = name.partition("#")  # XLA writes %call#1, or an instruction get-tuple-element
        type_, opcode, arguments, rest = lines[name]
        if opcode == "parameter":
            return "input", int(arguments)
        if name == call:
            return "result", int(element or 0)
        if opcode == "get-tuple-element" and arguments == f"%{call}":
            return "result", int(re.search(r"index=(\d+)", rest)[1])
        # A copy between layouts moves bytes.
        if opcode == "bitcast" or (opcode == "copy" and lines[arguments.removeprefix("%")][0] == type_):
            return origin(arguments.removeprefix("%"))
        raise PtxError(f"%{name}, a {opcode}, stands between the kernel and the program's inputs or outputs")

    names = lambda text: re.findall(r"%([\w.#-]+)", text)
    operands = [origin(name) for name in names(lines[call][2])]
    results = len(re.findall(r"\w+\[[\d,]*\]", call_type))
    if root == call:
        outputs = [("result", i) for i in range(results)]
    else:
        outputs = [origin(name) for name in (names(lines[root][2]) if lines[root][1] == "tuple" else [root])]
    if {kind for kind, _ in operands} - {"input"} or {kind for kind, _ in outputs} - {"result"}:
        raise PtxError("an operand is no input of the program, or an output is no result of the kernel")
    if {index for _, index in outputs} != set(range(results)):
        raise PtxError("the program does not return all results of the kernel")
    aliasing = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", lines[call][3])
    aliases = re.findall(r"\{(\d*)\}: \((\d+), \{\}", aliasing[1]) if aliasing else []
    return _Call(
        tuple(index for _, index in operands),
        tuple(index for _, index in outputs),
        {int(result or 0): int(operand) for result, operand in aliases},
    )


def run(ptx: str, launch: Launch, buffers: GlobalMemory) -> Machine:
    """Runs every CTA of a launch, one after another. The machine, for those who count instructions."""
    program = parse(ptx)
    bytes_ = sizes(program)
    if len(program.parameters) != len(launch.parameters):
        raise PtxError(f"{len(program.parameters)} parameters, but {len(launch.parameters)} arguments")
    parameters = np.zeros(-(-bytes_["param"] // 8) * 8, np.uint8)
    tensor_maps = {}
    addresses = layout(program)
    for parameter, value in zip(program.parameters, launch.parameters):
        at = addresses[parameter.name]
        if isinstance(value, dict):
            tensor_maps |= {at + offset: tensor_map for offset, tensor_map in value.items()}
        else:
            parameters[at : at + parameter.bytes] = (
                np.array(value, np.uint64).reshape(1).view(np.uint8)[: parameter.bytes]
            )
    memory = Memory(buffers, parameters, tensor_maps, bytes_["shared"] + launch.shared_bytes, bytes_["local"])
    with np.errstate(all="ignore"):
        machine = Machine(program, memory, launch.block, launch.grid)
        for z, y, x in np.ndindex(*reversed(launch.grid)):
            machine.run((x, y, z))
    return machine
