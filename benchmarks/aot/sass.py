"""Assembles PTX and reads the machine code: registers, spills, opcodes, the main loop."""

import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

# Names of Hopper's tensor-core instructions in SASS: 16-bit floats, 8-bit integers, 8-bit floats.
MMA_OPCODES = ("HGMMA", "IGMMA", "QGMMA")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """One kernel as assembled by ptxas.

    `spill_bytes` counts stores and loads; `shared_bytes` is the static shared memory; `instructions` is the text of
    nvdisasm without labels, `labels` maps each label to the index of the instruction behind it.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    labels: dict[str, int]

    def opcodes(self) -> dict[str, int]:
        """How often each opcode stands in the code, by its name before the first dot, most frequent first."""
        return dict(collections.Counter(map(opcode, self.instructions)).most_common())

    def mma(self) -> str | None:
        """The tensor-core opcode, or None; RuntimeError where there are two kinds."""
        found = [name for name in MMA_OPCODES if name in self.opcodes()]
        if len(found) > 1:
            raise RuntimeError(f"a kernel with more than one kind of tensor-core instruction: {', '.join(found)}")
        return found[0] if found else None

    def main_loop(self) -> tuple[str, ...]:
        """Instructions of the shortest loop that holds a tensor-core instruction; empty where there is none.

        A loop is what lies between a branch and the label before it that the branch goes back to.
        """
        loops = []
        for end, text in enumerate(self.instructions):
            target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", text)
            if target and self.labels.get(target[1], end + 1) <= end:
                body = self.instructions[self.labels[target[1]] : end + 1]
                if any(opcode(line) in MMA_OPCODES for line in body):
                    loops.append(body)
        return min(loops, key=len, default=())


def opcode(instruction: str) -> str:
    """'@!P0 HGMMA.64x64x16.F32.BF16 R24, ...' -> 'HGMMA'"""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(None, 1)[0].split(".")[0]


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: on PATH, or in NVIDIA's wheels (`nvidia/cu13/bin`)."""
    folders = [os.environ.get("PATH", "")]
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        folders += [str(folder) for folder in sorted(pathlib.Path(place).glob("*/bin"))]
    return shutil.which(name, path=os.pathsep.join(folders))


def version(name: str) -> str | None:
    """The release of the program, such as "V13.0.88"; None where it is not there."""
    path = tool(name)
    found = re.search(r"\bV[\d.]+", _run([path, "--version"])) if path else None
    return found[0] if found else None


def assemble(ptx: str) -> dict[str, Assembly]:
    """ptxas and nvdisasm on a module, for the device that it names. Its kernels by name; RuntimeError with ptxas's words."""
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory(prefix="vq4dit-sass-") as folder:
        source, cubin = os.path.join(folder, "module.ptx"), os.path.join(folder, "module.cubin")
        pathlib.Path(source).write_text(ptx)
        log = _run([tool("ptxas"), f"-arch={architecture}", "-O3", "-v", source, "-o", cubin])
        code = _run([tool("nvdisasm"), "-c", cubin])
    return {name: Assembly(**facts, **_code(code, name)) for name, facts in _resources(log).items()}


def _run(command: list[str | None]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def _resources(log: str) -> dict[str, dict[str, int]]:
    """ptxas -v: one paragraph a kernel."""
    kernels = {}
    for paragraph in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'([^']+)'", paragraph)[1]
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", paragraph
            ).groups(),
        )
        shared = re.search(r"(\d+) bytes smem", paragraph)
        kernels[name] = {
            "registers": int(re.search(r"Used (\d+) registers", paragraph)[1]),
            "stack_bytes": stack,
            "spill_bytes": stores + loads,
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return kernels


def _code(text: str, kernel: str) -> dict:
    """Instructions and labels of one section `.text.KERNEL` of nvdisasm's listing."""
    section = re.search(rf"^\.text\.{re.escape(kernel)}:\n(.*?)(?=^\s*\.section|\Z)", text, re.MULTILINE | re.DOTALL)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in section[1].splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return {"instructions": tuple(instructions), "labels": labels}
