"""A table of methods on one model, on the same evaluation: JSON, markdown and a plot of Frechet distance against bits.

    python -m benchmarks.quality --config=benchmarks/quality/cifar10.py --seeds=3 --workdir=DIR [--rows=REGEX]
        [--output=benchmarks/results/quality_cifar10] [--stages=quantize,sample,time] [--report-only]

Every row at every seed is a process of its own (models: one device with all threads, as a user has it; samples: on a CPU
a device for each core) and has a folder, DIR/ROW/SEED. Killed anywhere, the same command goes on where it was. A folder
that was made from another definition (other bits, another recipe) is refused by its name. A key of the config that is
younger than a folder has, for that folder, the value that says what was done before there was the key (`rows.filled`).

The table has every row that is done, whatever --rows says, and names what is missing. It is written after each row. A row's
figures are enough for it: models and images may be removed, but for the few of full precision's that others are compared
with (first.npz). benchmarks/results/quality_cifar10 is such a DIR; with it as --workdir the table there goes on. What a
reader must know of how a model was made ("remark" in its definition.json) stands below the table.
"""

import argparse
import datetime
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import Any

from absl import logging

from benchmarks import record
from benchmarks.quality import chart, figures, stages, table
from benchmarks.quality.rows import Case, Table, cases, load_table
from vq4dit_jax import files
from vq4dit_jax.command_line import Parser, exit_code
from vq4dit_jax.errors import InputError
from vq4dit_jax.storage import provenance

_DEVICES = "--xla_force_host_platform_device_count"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("python -m benchmarks.quality", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--config",
        required=True,
        metavar="FILE",
        help="what the table is made of, such as benchmarks/quality/cifar10.py",
    )
    add("--workdir", required=True, type=pathlib.Path, metavar="DIR", help="where models and samples go")
    add("--seeds", type=int, default=3, metavar="N", help="seeds of every row, which share its images (default: 3)")
    add("--rows", default="", metavar="REGEX", help="work on the rows whose whole names it matches (default: all)")
    stages_help = "work on these: quantize, sample; time: milliseconds of a step (default: %(default)s)"
    add("--stages", default=",".join(stages.NEEDED), help=stages_help)
    add(
        "--output",
        type=pathlib.Path,
        metavar="PATH",
        help="of the table, without .json, .md, .svg (default: DIR/table)",
    )
    add("--report-only", action="store_true", help="only write the table of what is done")
    add("--case", help=argparse.SUPPRESS)  # STAGE:ROW:SEED, in a child process
    flags = parser.parse_args(arguments)
    for stage in flags.stages.split(","):
        if stage not in stages.STAGES:
            raise InputError(f"--stages={flags.stages}: {stage!r} is none; wanted some of {','.join(stages.STAGES)}")
    try:
        re.compile(flags.rows)
    except re.error as error:
        raise InputError(f"--rows={flags.rows}: no regular expression: {error}") from None
    return flags


def load(flags: argparse.Namespace) -> Table:
    found = load_table(flags.config)
    images = found.base.sample.num_images
    if flags.seeds < 1 or images % flags.seeds:
        raise InputError(f"--seeds={flags.seeds}: wanted a divisor of the config's {images} images a row")
    return found


def select(flags: argparse.Namespace, found: Table) -> list[list[Case]]:
    """The cases to work on, by row."""
    chosen = [row for row in found.rows if not flags.rows or re.fullmatch(flags.rows, row.name)]
    if not chosen:
        raise InputError(f"--rows={flags.rows}: matches none of {', '.join(row.name for row in found.rows)}")
    return [cases(found, row, flags.seeds, flags.workdir) for row in chosen]


def environment(stage: str) -> dict[str, str]:
    """Of a child process: XLA's CPU backend samples fastest on a virtual device for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = [option for option in os.environ.get("XLA_FLAGS", "").split() if not option.startswith(_DEVICES)]
    if stage == "sample":
        options.append(f"{_DEVICES}={cores}")
    return {**os.environ, "XLA_FLAGS": " ".join(options)}


def run_child(flags: argparse.Namespace, case: Case, stage: str) -> str | None:
    """Runs one stage of a case in a process; None, or why it failed."""
    command = [sys.executable, "-m", "benchmarks.quality", f"--config={flags.config}", f"--workdir={flags.workdir}"]
    command += [f"--seeds={flags.seeds}", f"--case={stage}:{case.row.name}:{case.seed}"]
    last = ""
    # The child ends with this process: its standard input closes.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(stage), errors="replace"
    ) as child:
        for line in child.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    if child.returncode == 0:
        return None
    return f"{stage} ended with code {child.returncode}: {last[-300:]}"


def child(flags: argparse.Namespace) -> None:
    def end_with_parent() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
            pass
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    stage, name, seed = flags.case.split(":")
    found = load(flags)
    row = next(row for row in found.rows if row.name == name)
    stages.STAGES[stage](cases(found, row, flags.seeds, flags.workdir)[int(seed)])


def report(
    flags: argparse.Namespace, found: Table, command: str, failures: dict[tuple[str, int], str]
) -> dict[str, Any]:
    """Writes the table as it is now."""
    result = figures.collect(found, flags.seeds, flags.workdir)
    for item in result["missing"]:
        item["what"] = failures.get((item["row"], item["seed"]), item["what"])
    head = {
        "format": 1,
        "command": command,
        "commit": record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": record.devices(),
        "versions": provenance.versions(),
    }
    result = head | result
    output = flags.output or flags.workdir / "table"
    files.write_json(f"{output}.json", result)
    files.write_text(f"{output}.md", table.markdown(result))
    drawing = chart.svg(result)
    if drawing:
        files.write_text(f"{output}.svg", drawing)
    return result


def work(flags: argparse.Namespace, command: str) -> None:
    # This process evaluates between its children; on a GPU it may not hold the memory that they need.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = load(flags)
    chosen = select(flags, found)
    failures: dict[tuple[str, int], str] = {}
    if not flags.report_only:
        for case in (case for row in chosen for case in row):
            stages.claim(case.model, case.made_from).check()
            stages.claim(case.samples, case.sampled_from).check()
        for row in chosen:
            for stage in stages.STAGES:
                for case in row:
                    if stage not in flags.stages.split(",") or (case.row.name, case.seed) in failures:
                        continue
                    if not stages.is_done(case, stage):
                        print(f"{case.name}: {stage}", flush=True)
                        if why := run_child(flags, case, stage):
                            failures[case.row.name, case.seed] = why
            report(flags, found, command, failures)
    result = report(flags, found, command, failures)
    output = flags.output or flags.workdir / "table"
    print(f"{output}.md: {len(result['rows'])} of {len(found.rows)} rows")
    if failures:
        (name, seed), why = next(iter(failures.items()))
        raise InputError(f"{len(failures)} of the cases failed; the first is {name}, seed {seed}: {why}")


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input or where a case failed, with one line on stderr."""
    logging.set_verbosity(logging.WARNING)

    def run() -> None:
        flags = parse(arguments)
        child(flags) if flags.case else work(flags, " ".join(["python -m benchmarks.quality", *arguments]))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
