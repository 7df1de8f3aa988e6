"""What each form of a prepared network runs on, device by device, as the selector has it: the table in docs/kernels.md.

    python -m benchmarks.aot.devices                                prints the table
    python -m benchmarks.aot.devices --compile [--only t4] [--json FILE]
                                                                    compiles a sampler step of DiT-XL/2 for each device and form

The second prints the operands of all products, launches of an iteration of the loop over blocks, and temporary memory; 256 px,
one image with guidance. Exit code 1 where one does not compile.
"""

import argparse
import dataclasses
import itertools
import logging
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp

from benchmarks import record
from benchmarks.aot import compiler, sass, steps
from benchmarks.aot.hlo import products
from benchmarks.aot.steps import FORMS, Form
from benchmarks.aot.targets import TARGETS, Target
from pallas_kernels.selector import Choice, Facts
from vq4dit_jax import files
from vq4dit_jax.networks.dit import DiT, variant
from vq4dit_jax.networks.explain import choices
from vq4dit_jax.storage import provenance

_LINEARS = ("qkv", "proj", "fc1", "fc2")


def xl(pixels: int = 256) -> DiT:
    return variant("DiT-XL/2", input_size=pixels // 8, dtype=jnp.bfloat16)


def told(model: DiT, form: Form, facts: Facts, batch: int = 1) -> dict[str, Choice]:
    """The selector's choice for each operation of a block; `batch` images with guidance."""
    return choices(model, 2 * batch, steps.shapes_of(model, form)["blocks"], facts)


def table(model: DiT | None = None) -> str:
    """Markdown: a row a device, a column a form. Ranges choose nothing, so forms differ in activations and weights alone."""
    model = model or xl()
    columns = [form for form in FORMS if form.activations is None or not form.ranges]
    lines = [["device", *map(str, columns), "attention"]]
    for facts in (*(target.facts for target in TARGETS.values()), Facts("cpu")):
        row = [_device(facts)]
        for form in columns:
            found = told(model, form, facts)
            row.append(_cell(found[name] for name in _LINEARS))
        with_cudnn = dataclasses.replace(facts, cudnn=facts.platform == "gpu")
        both = (_cell([told(model, columns[0], each)["attention"]]) for each in (with_cudnn, facts))
        lines.append([*row, " or ".join(dict.fromkeys(both))])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _device(facts: Facts) -> str:
    return f"{facts.name} ({'.'.join(map(str, facts.capability))})" if facts.capability else facts.platform.upper()


def _cell(found: Any) -> str:
    names = {"mosaic": lambda c: "kernels", "cudnn": lambda c: "cuDNN", "xla": lambda c: f"XLA {c.operands.name}"}
    return ", ".join(dict.fromkeys(names[choice.implementation](choice) for choice in found))


@dataclasses.dataclass(frozen=True)
class Row:
    """A compiled step: operand dtypes of XLA's products in it, launches a block, bytes of temporaries. Or `error`, one line."""

    target: str
    form: str
    operands: tuple[str, ...] = ()
    launches: int = 0
    temporary_bytes: int = 0
    error: str | None = None


def measure(target: Target, form: Form, model: DiT) -> Row:
    fn, shapes = steps.step(model, 1, target.facts)
    shapes = (steps.shapes_of(model, form), *shapes)
    try:
        compiled = compiler.compile(fn, *shapes, name=f"{target.name} {form}", target=target)
    except Exception as error:  # whatever XLA raises
        return Row(target.name, str(form), error=next(iter(str(error).strip().splitlines()), type(error).__name__))
    operands = tuple(sorted({operand for pair in products(compiled.hlo) for operand in pair}))
    launches = len(compiled.launches_per_iteration())
    return Row(target.name, str(form), operands, launches, compiled.temporary_bytes)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.devices", description=__doc__.split("\n")[0])
    parser.add_argument("--compile", action="store_true", help="compile every form too")
    parser.add_argument("--only", choices=TARGETS, help="only for this device")
    parser.add_argument("--json", metavar="FILE", help="write what was compiled there too")
    flags = parser.parse_args(arguments)
    if not flags.compile:
        print(table())
        return 0
    if reason := compiler.unavailable():
        print(reason, file=sys.stderr)
        return 2
    # XLA asks the plugin for a GPU, finds none, and logs that.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    rows = []
    for target, form in itertools.product(TARGETS.values(), FORMS):
        if flags.only in (None, target.name):
            rows.append(row := measure(target, form, xl()))
            sizes = f"{row.launches:3} launches {row.temporary_bytes / 1e6:7.1f} MB"
            print(f"{row.target:8} {row.form:22} {row.error or sizes}  {' '.join(row.operands)}", flush=True)
    if flags.json:
        figures = {
            "command": "python -m benchmarks.aot.devices --compile",
            "commit": record.commit(),
            "program": "a sampler step of DiT-XL/2 at 256 px, one image with guidance; compiled with no GPU",
            "versions": provenance.versions() | {"ptxas": sass.version("ptxas")},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        files.write_json(flags.json, figures)
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
