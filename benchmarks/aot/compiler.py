"""Compiles a jitted function for an NVIDIA GPU on a machine that has none, and keeps the texts that XLA and Mosaic write."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.mosaic.gpu  # sets MOSAIC_GPU_CUDA_ROOT when first imported: before we do
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxlib.mlir import ir

from benchmarks.aot import sass
from benchmarks.aot.launches import Thunk, innermost_body, launches_of, parse_thunks
from benchmarks.aot.targets import H200, Target


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        name: its entry function.
        ptx: the module that it stands in.
        host: for a Mosaic kernel the program that launches it, as MLIR text (TMA descriptors, grid, order of parameters);
            None for a kernel that XLA wrote.
        dynamic_shared_bytes: shared memory asked for at launch; 0 for XLA's kernels, whose launch is not dumped.
    """

    name: str
    ptx: str
    host: str | None = None
    dynamic_shared_bytes: int = 0

    @property
    def is_mosaic(self) -> bool:
        return self.host is not None

    @functools.cached_property
    def assembly(self) -> sass.Assembly:
        """Registers, spills and machine code. Runs ptxas and nvdisasm when first read."""
        return sass.assemble(self.ptx)[self.name]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its kernels, and its launches in order.

    `hlo` is XLA's optimized program without the code of Mosaic's kernels in it; `outputs` are its results, flattened;
    `temporary_bytes` is the memory that it takes beside arguments and results.
    """

    name: str
    kernels: tuple[Kernel, ...]
    thunks: tuple[Thunk, ...]
    hlo: str
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    temporary_bytes: int

    @property
    def mosaic_kernels(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.is_mosaic)

    def launches(self) -> tuple[Thunk, ...]:
        """Launches of one pass through the program, a loop counted as one pass through its body."""
        return launches_of(self.thunks)

    def launches_per_iteration(self) -> tuple[Thunk, ...]:
        """Launches of one iteration of the innermost loop (of the program where it has no loop)."""
        return launches_of(innermost_body(self.thunks))


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be compiled here, with the remedy; None where everything is there."""
    missing = []
    try:
        plugin = any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
    except ModuleNotFoundError:
        plugin = False
    if not plugin:
        missing.append("the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jax's version")
    if not sass.tool("ptxas"):
        missing.append("ptxas (CUDA 13, or the wheel nvidia-cuda-nvcc)")
    if not sass.tool("nvdisasm"):
        missing.append("nvdisasm (the wheel nvidia-cuda-nvdisasm)")
    return f"compiling for a GPU needs {'; '.join(missing)}" if missing else None


def compile(fn: Callable, *shapes: Any, name: str = "program", target: Target = H200) -> Compiled:
    """Compiles `fn` for a device; our kernels for Hopper alone, elsewhere they end the process.

    Args:
        fn: a function of arrays, jitted or not.
        shapes: pytrees of jax.ShapeDtypeStruct or arrays, one for each argument; arrays lend only shape and dtype.
        name: of the program; other characters than letters and digits become '_'.
        target: the device.

    Raises:
        RuntimeError: something is missing here (`unavailable`), or the compiler's output has an unknown form.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    name = re.sub(r"\W", "_", name)

    def program(*arguments):
        return fn(*arguments)

    program.__name__ = name
    everywhere = NamedSharding(topologies.make_mesh(_topology(target), (1,), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)
    with tempfile.TemporaryDirectory(prefix="vq4dit-aot-") as folder:
        with _dumping(folder), use_abstract_mesh(_abstract_mesh(target)):
            lowered = jax.jit(program, keep_unused=True).lower(*shapes)
            _make_kernels_unknown(lowered.compiler_ir("stablehlo"))
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"})
        outputs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(lowered.out_info)]
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return _collect(name, pathlib.Path(folder), tuple(outputs), temporary)


@functools.cache
def _topology(target: Target) -> topologies.TopologyDescription:
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target.description)


def _abstract_mesh(target: Target) -> AbstractMesh:
    """Describes the device to the lowering rules: Mosaic needs the number of cores."""
    facts = target.facts
    device = AbstractDevice(device_kind=facts.name, num_cores=facts.multiprocessors, platform="gpu")
    return AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Mosaic writes its texts to `folder`, XLA finds ptxas, and nothing goes into JAX's compilation cache.

    JAX cannot read such cache entries back without a client with a device. Mosaic disassembles all its dumps, twice; it gets a
    disassembler that does nothing, because `Kernel.assembly` does that on demand.
    """
    disassembler = pathlib.Path(folder, "bin", "nvdisasm")
    disassembler.parent.mkdir()
    disassembler.symlink_to(shutil.which("true"))
    environment = {
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_CUDA_ROOT": folder,
        "PATH": os.pathsep.join([os.path.dirname(sass.tool("ptxas")), os.environ.get("PATH", "")]),
    }
    before = {key: os.environ.get(key) for key in environment}
    least_time = jax.config.jax_persistent_cache_min_compile_time_secs
    os.environ.update(environment)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_time)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _make_kernels_unknown(module: ir.Module) -> None:
    """Gives each Mosaic kernel of the program a hash that was never used.

    Within a process Mosaic compiles, and dumps, a kernel once, and finds it again by this hash. With a fresh one every
    program has all its texts.
    """
    fresh: dict[bytes, str] = {}

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and "mhlo.backend_config" in operation.attributes:
            config = operation.attributes["mhlo.backend_config"]
            entries = {config[i].name: config[i].attr for i in range(len(config))}
            if "kernel_hash" in entries:
                old = ir.StringAttr(entries["kernel_hash"]).value_bytes
                # Mosaic's hash is 32 bytes long; these are letters, so that HLO's text shows them as they are.
                new = fresh.setdefault(old, secrets.token_hex(16))
                with operation.context:
                    entries["kernel_hash"] = ir.StringAttr.get(new)
                    operation.attributes["mhlo.backend_config"] = ir.DictAttr.get(entries)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


def _collect(name: str, folder: pathlib.Path, outputs: tuple[jax.ShapeDtypeStruct, ...], temporary: int) -> Compiled:
    def dump(ending: str) -> str:
        (path,) = folder.glob(f"module_*{ending}")
        return path.read_text()

    dumps = (path for path in folder.glob("*.ptx") if _passes_log(path).exists())
    mosaic = [_mosaic_kernel(path) for path in sorted(dumps, key=lambda path: int(path.stem.rsplit("_", 1)[1]))]
    xla = [
        Kernel(entry, text)
        for text in (path.read_text() for path in sorted(folder.glob("module_*.ptx")))
        for entry in _entries(text)
    ]
    # Custom calls as `%name = ... kernel_hash = "..."`, each on a line of the optimized HLO.
    hlo = re.sub(r'\bmodule = "(?:[^"\\]|\\.)*"', 'module = ""', dump("after_optimizations.txt"))
    calls = dict(re.findall(r'%?([\w.-]+) = .*custom-call\(.*\bkernel_hash = "(\w+)"', hlo))
    metadata = dump("thunk_metadata.txt")
    order = re.findall(r'profile_annotation: "([^"]+)"\s+thunk_id: \d+', metadata)
    hashes = list(dict.fromkeys(calls[instruction] for instruction in order if instruction in calls))
    if len(hashes) != len(mosaic):
        raise RuntimeError(f"{name}: XLA calls {len(hashes)} Mosaic kernels, but {len(mosaic)} were written")
    # Mosaic numbers its kernels as XLA meets them, which is the order of the thunks' numbers.
    names = {hash: kernel.name for hash, kernel in zip(hashes, mosaic)}
    kernels = {instruction: names[hash] for instruction, hash in calls.items() if hash in names}
    thunks = parse_thunks(dump("thunk_sequence.txt"), metadata, kernels)
    return Compiled(name, (*mosaic, *xla), thunks, hlo, outputs, temporary)


def _passes_log(ptx: pathlib.Path) -> pathlib.Path:
    return ptx.with_suffix(".mlir-passes.log")


def _entries(ptx: str) -> list[str]:
    return re.findall(r"^\.visible \.entry (\w+)\(", ptx, re.MULTILINE)


def _mosaic_kernel(path: pathlib.Path) -> Kernel:
    ptx = path.read_text()
    (entry,) = _entries(ptx)
    # The passes' log holds the module before every pass. The last that still launches by gpu.launch_func says everything
    # about the launch in constants.
    stages = _passes_log(path).read_text().split("// -----// IR Dump ")
    stage = [text for text in stages if "gpu.launch_func" in text][-1]
    without_locations = re.sub(r" loc\(.*$", "", stage, flags=re.MULTILINE)
    (host,) = re.findall(r"^  func\.func @.*?^  \}$", without_locations, re.MULTILINE | re.DOTALL)
    constants = dict(re.findall(r"(%\w+) = llvm\.mlir\.constant\((\d+) : \w+\)", host))
    shared = re.search(r"dynamic_shared_memory_size (%\w+)", host)
    return Kernel(entry, ptx, host, int(constants[shared[1]]) if shared else 0)
