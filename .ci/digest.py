"""Which parts of the tests `.ci/run` need not run again, because what they cover is as it was when they last passed.

    python .ci/digest.py                        every part, and whether it has changed since .ci/passed.json was written
    python .ci/digest.py --changed PART         exit status 0 where the part has changed, 1 where it has not
    python .ci/digest.py --ignore PART          the pytest options that leave the part's own tests out
    python .ci/digest.py --write PART ...       records the parts (default: all); to be called and committed after they passed

A part's digest is that of the names and contents of the files that it covers. Standard library only.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
PASSED = ".ci/passed.json"
CONSTRAINTS = "constraints/*.txt"


@dataclasses.dataclass(frozen=True)
class Part:
    """Patterns of `pathlib.Path.glob` from the repository's root. `tests` are files of tests that are of this part alone."""

    covers: tuple[str, ...]
    tests: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the files whose change makes the part run again."""
        return (*self.covers, *self.tests)


PARTS = {
    # The kernels: interpreted, compiled for a Hopper GPU, and the compiled code emulated. These tests import `pallas_kernels`,
    # and of `vq4dit_jax` no more than LayerNorm and the shapes of networks. A test of `tests/test_ci.py` holds them to it.
    "emulator": Part(
        covers=(
            "pallas_kernels/**/*.py",
            "benchmarks/aot/*.py",
            "benchmarks/aot/*.txtpb",
            "benchmarks/record.py",
            "tests/ptx/*.py",
            "tests/product_cases.py",
            "tests/row_cases.py",
            CONSTRAINTS,
        ),
        tests=(
            "tests/test_aot_*.py",
            "tests/test_attention_kernel.py",
            "tests/test_emulated_products.py",
            "tests/test_fragments.py",
            "tests/test_ln_modulate_quantize.py",
            "tests/test_product_kernels.py",
            "tests/test_ptx_*.py",
            "tests/test_rotate_quantize.py",
            "tests/test_soft_kernels.py",
        ),
    ),
    # Sampler steps of every form of a prepared network, compiled for six GPUs, and launches of a block: five minutes of a core.
    "devices": Part(
        covers=(
            "pallas_kernels/**/*.py",
            "benchmarks/aot/*.py",
            "benchmarks/aot/*.txtpb",
            "vq4dit_jax/diffusion/*.py",
            "vq4dit_jax/networks/*.py",
            "vq4dit_jax/qarray/*.py",
            CONSTRAINTS,
        ),
        tests=("tests/test_device_programs.py", "tests/test_launches.py"),
    ),
    # On the second Python, with another jax, what is looked for is calls that do not exist or mean something else. They stand in
    # the packages. The tests themselves are run on the first Python, whatever has changed.
    "python312": Part(
        covers=(
            "vq4dit_jax/**/*.py",
            "vq4dit_jax/**/*.html",
            "pallas_kernels/**/*.py",
            "convert/**/*.py",
            "configs/**/*.py",
            "setup.cfg",
            "constraints/py312.txt",
        ),
    ),
}


def files(patterns: Iterable[str], root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """The files that match, each once, sorted by name."""
    return sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})


def digest(part: Part, root: pathlib.Path = ROOT) -> str:
    """SHA-256 (hexadecimal) of the names and contents of the part's files."""
    out = hashlib.sha256()
    for file in files(part.patterns, root):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        out.update(f"{content}  {file.relative_to(root).as_posix()}\n".encode())
    return out.hexdigest()


def passed(root: pathlib.Path = ROOT) -> dict[str, str]:
    """The recorded digests by part; none where there is no record."""
    file = root / PASSED
    return json.loads(file.read_text()) if file.exists() else {}


def changed(name: str, root: pathlib.Path = ROOT) -> bool:
    """Whether a part has to run: its digest is another than the recorded one, or none is recorded."""
    return passed(root).get(name) != digest(PARTS[name], root)


def write(names: Iterable[str], root: pathlib.Path = ROOT) -> None:
    """Records the parts' digests and keeps those of the other parts."""
    found = passed(root) | {name: digest(PARTS[name], root) for name in names}
    (root / PASSED).write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python .ci/digest.py", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--changed", choices=PARTS, metavar="PART")
    action.add_argument("--ignore", choices=PARTS, metavar="PART")
    action.add_argument("--write", nargs="*", choices=PARTS, metavar="PART")
    flags = parser.parse_args(arguments)
    if flags.changed:
        return 0 if changed(flags.changed) else 1
    if flags.ignore:
        print(*(f"--ignore={file.relative_to(ROOT).as_posix()}" for file in files(PARTS[flags.ignore].tests)))
    elif flags.write is not None:
        write(flags.write or PARTS)
    else:
        for name, part in PARTS.items():
            print(name, digest(part), "changed" if changed(name) else "as it was when it passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
