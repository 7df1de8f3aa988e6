"""Compiles every kernel for an H200 with no GPU, prints facts of the compiled code, and fails where a limit is exceeded.

    python -m benchmarks.aot [--json FILE] [--only PART]

Columns: registers a thread and bytes spilled; static and dynamic shared memory; the tensor-core instruction; instructions in
the main loop and the limit for it; launches of the program, and of one iteration of its innermost loop.
"""

import argparse
import dataclasses
import logging
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import record
from benchmarks.aot import compiler, sass
from vq4dit_jax import files
from vq4dit_jax.storage import provenance


@dataclasses.dataclass(frozen=True)
class Row:
    """The compiled code of one case; figures of the Mosaic kernel with the longest main loop."""

    case: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    mma: str | None
    main_loop: int
    main_loop_limit: int | None
    launches: int
    launches_per_iteration: int
    broken: tuple[str, ...]


def measure(name: str, case: Any) -> Row:
    """`case`: see `benchmarks.aot.cases`."""
    compiled = compiler.compile(case.fn, *case.shapes, name=name)
    if not compiled.mosaic_kernels:
        raise RuntimeError(f"{name}: the program has no Mosaic kernel")
    kernel = max(compiled.mosaic_kernels, key=lambda kernel: len(kernel.assembly.main_loop()))
    assembly = kernel.assembly
    loop, mma = len(assembly.main_loop()), assembly.mma()
    broken = []
    for each in compiled.mosaic_kernels:
        if each.assembly.spill_bytes:
            broken.append(f"{each.name} spills {each.assembly.spill_bytes} bytes")
    if mma != case.mma:
        broken.append(f"{mma or 'no tensor-core instruction'} where {case.mma or 'none'} is wanted")
    if case.max_loop is not None and loop > case.max_loop:
        broken.append(f"{loop} instructions in the main loop, more than {case.max_loop}")
    launches = len(compiled.launches_per_iteration())
    if case.max_launches is not None and launches > case.max_launches:
        broken.append(f"{launches} launches a block, more than {case.max_launches}")
    return Row(
        name,
        assembly.registers,
        assembly.spill_bytes,
        assembly.stack_bytes,
        assembly.shared_bytes,
        kernel.dynamic_shared_bytes,
        mma,
        loop,
        case.max_loop,
        len(compiled.launches()),
        launches,
        tuple(broken),
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    parser.add_argument("--only", metavar="PART", default="", help="only cases with PART in their name")
    flags = parser.parse_args(arguments)
    if reason := compiler.unavailable():
        print(reason, file=sys.stderr)
        return 2
    # XLA asks the plugin for a GPU, finds none, and logs that.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    from benchmarks.aot.cases import cases

    rows = [measure(name, case) for name, case in cases().items() if flags.only in name]
    columns = "regs spills  shared    mma  loop limit launches a loop"
    head = f"{'case':40} {columns}"
    print(head)
    for row in rows:
        shared = row.static_shared_bytes + row.dynamic_shared_bytes
        print(
            f"{row.case:40} {row.registers:4} {row.spill_bytes:6} {shared:7} {row.mma or '-':>6} {row.main_loop:5} "
            f"{'-' if row.main_loop_limit is None else row.main_loop_limit:>5} {row.launches:8} {row.launches_per_iteration:6}"
        )
    if flags.json:
        figures = {
            "command": "python -m benchmarks.aot",
            "commit": record.commit(),
            "target": "NVIDIA H200 (sm_90a), compiled with no GPU",
            "versions": provenance.versions() | {"ptxas": sass.version("ptxas")},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        files.write_json(flags.json, figures)
    for row in rows:
        for what in row.broken:
            print(f"{row.case}: {what}", file=sys.stderr)
    return 1 if any(row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
