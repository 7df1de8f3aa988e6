"""What lets `.ci/run` leave out a part of the tests: the digest of what the part covers, and which files those are."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

_spec = importlib.util.spec_from_file_location("ci_digest", ROOT / ".ci" / "digest.py")
ci = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ci)

FILES = (
    "pallas_kernels/ops.py",
    "pallas_kernels/mosaic/matmul.py",
    "vq4dit_jax/main.py",
    "vq4dit_jax/networks/dit.py",
    "convert/load.py",
    "configs/cifar10_w2.py",
    "constraints/py311.txt",
    "constraints/py312.txt",
    "setup.cfg",
    "benchmarks/aot/cases.py",
    "benchmarks/cpu.py",
    "tests/ptx/machine.py",
    "tests/test_ptx_emulator.py",
    "tests/test_device_programs.py",
    "tests/test_vq.py",
    "tests/__pycache__/test_vq.pyc",
    "docs/kernels.md",
    "README.md",
)
ALL, NETWORKS, SECOND, NONE = {"emulator", "devices", "python312"}, {"devices", "python312"}, {"python312"}, set()
COMPILED, EMULATOR = {"emulator", "devices"}, {"emulator"}


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    """A repository whose parts have all passed."""
    for name in (*FILES, ci.PASSED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as it was")
    (tmp_path / ci.PASSED).unlink()
    ci.write(ci.PARTS, tmp_path)
    return tmp_path


def to_run(root: pathlib.Path) -> set[str]:
    return {name for name in ci.PARTS if ci.changed(name, root)}


@pytest.mark.parametrize(
    "name, parts",
    [
        ("pallas_kernels/ops.py", ALL),
        ("pallas_kernels/mosaic/matmul.py", ALL),
        ("vq4dit_jax/main.py", SECOND),
        ("vq4dit_jax/networks/dit.py", NETWORKS),
        ("convert/load.py", SECOND),
        ("configs/cifar10_w2.py", SECOND),
        ("setup.cfg", SECOND),
        ("constraints/py311.txt", COMPILED),
        ("constraints/py312.txt", ALL),
        ("benchmarks/aot/cases.py", COMPILED),
        ("tests/ptx/machine.py", EMULATOR),
        ("tests/test_ptx_emulator.py", EMULATOR),
        ("tests/test_device_programs.py", {"devices"}),
        ("benchmarks/cpu.py", NONE),
        ("tests/test_vq.py", NONE),
        ("tests/__pycache__/test_vq.pyc", NONE),
        ("docs/kernels.md", NONE),
        ("README.md", NONE),
    ],
)
def test_a_changed_file_runs_the_parts_that_cover_it_and_no_other(tree, name, parts):
    assert to_run(tree) == set()
    (tree / name).write_text("another")
    assert to_run(tree) == parts
    (tree / name).write_text("as it was")
    assert to_run(tree) == set()


def test_a_new_a_removed_and_a_renamed_file_are_changes(tree):
    file = tree / "pallas_kernels/ops.py"
    file.with_name("new.py").write_text("")
    assert to_run(tree) == ALL
    file.with_name("new.py").unlink()
    assert to_run(tree) == NONE
    file.rename(file.with_name("other.py"))
    assert to_run(tree) == ALL
    file.with_name("other.py").unlink()
    assert to_run(tree) == ALL


def test_the_digest_depends_neither_on_the_order_of_patterns_nor_on_the_age_of_files(tree):
    part = ci.PARTS["emulator"]
    turned = ci.Part(covers=part.tests[::-1], tests=part.covers[::-1])
    twice = ci.Part(covers=part.covers * 2, tests=part.tests)
    wanted = ci.digest(part, tree)
    assert ci.digest(turned, tree) == ci.digest(twice, tree) == wanted
    for name in FILES:
        os.utime(tree / name, (0, 0))
    assert ci.digest(part, tree) == wanted


def test_a_part_that_never_passed_has_changed_and_writing_one_keeps_the_others(tree):
    (tree / ci.PASSED).unlink()
    assert to_run(tree) == ALL
    ci.write(["emulator"], tree)
    assert to_run(tree) == NETWORKS
    ci.write(["devices"], tree)
    assert to_run(tree) == SECOND
    ci.write(["python312"], tree)
    assert to_run(tree) == NONE


def imported(file: pathlib.Path) -> set[pathlib.Path]:
    """The files of this repository that one imports itself, at its top or in a function."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    folders = [base / module.replace(".", "/") for base in (ROOT, ROOT / "tests") for module in modules]
    places = [place for folder in folders for place in (folder.with_suffix(".py"), folder / "__init__.py")]
    return {place for place in places if place.is_file()}


def test_what_the_emulators_tests_import_is_covered_but_for_the_networks():
    part = ci.PARTS["emulator"]
    covered, reached = set(ci.files(part.patterns)), set(ci.files(part.tests))
    assert len(reached) >= 8
    todo = list(reached)
    while todo:
        # Of vq4dit_jax they use what makes shapes, and LayerNorm's definition: not followed.
        new = {file for file in imported(todo.pop()) if file.relative_to(ROOT).parts[0] != "vq4dit_jax"} - reached
        reached |= new
        todo += new
    uncovered = {file.relative_to(ROOT).as_posix() for file in reached - covered}
    assert uncovered <= {"tests/conftest.py", "benchmarks/__init__.py"}


def test_every_pattern_finds_files():
    for part in ci.PARTS.values():
        for pattern in part.patterns:
            assert ci.files([pattern]), f"{pattern} finds nothing"


@pytest.fixture
def run_ci(tree):
    """Runs `.ci/run` in a repository whose `make test` notes its arguments: (exit status, output, arguments of each call)."""
    for name in ("run", "digest.py"):
        (tree / ".ci" / name).write_bytes((ROOT / ".ci" / name).read_bytes())
    programs = tree / "bin"
    programs.mkdir()
    scripts = {
        "chromium": "exit 0",
        "python3.11": f'[ "$1" = -c ] && echo 3.11 && exit; exec {sys.executable} "$@"',
        "python3.12": "echo 3.12",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)

    def run(status: int = 0, **env: str) -> tuple[int, str, list[str]]:
        log = tree / "log"
        log.write_text("")
        (tree / "Makefile").write_text(f"test:\n\t@echo '$(VENV) $(subst ',,$(PYTEST_ARGS))' >> log; exit {status}\n")
        everything = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tree), **env}
        done = subprocess.run(["bash", tree / ".ci/run"], env=everything, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, log.read_text().splitlines()

    return run


IGNORED = "--ignore=tests/test_ptx_emulator.py --ignore=tests/test_device_programs.py"


@pytest.mark.once
def test_what_has_not_changed_is_skipped_in_a_line_each(run_ci, tree):
    status, out, calls = run_ci()
    assert status == 0 and len(calls) == 1 and calls[0].startswith(".venv ") and calls[0].endswith(IGNORED)
    assert [line.split(",")[0] for line in out.splitlines() if "skipped" in line] == [
        ".ci/run: the part emulator is skipped",
        ".ci/run: the part devices is skipped",
        ".ci/run: Python 3.12 is skipped",
    ]
    (tree / "vq4dit_jax/main.py").write_text("another")
    status, out, calls = run_ci()
    assert status == 0 and [call.split()[0] for call in calls] == [".venv", ".venv312"]
    assert all(IGNORED in call for call in calls) and "-m not once" in calls[1]
    assert out.splitlines()[-1].endswith("python .ci/digest.py --write python312")


@pytest.mark.once
def test_a_changed_kernel_and_ci_full_run_everything(run_ci, tree):
    (tree / "pallas_kernels/ops.py").write_text("another")
    changed = run_ci()
    (tree / "pallas_kernels/ops.py").write_text("as it was")
    for status, out, calls in (changed, run_ci(CI_FULL="1")):
        assert status == 0 and [call.split()[0] for call in calls] == [".venv", ".venv312"]
        assert not any("--ignore" in call for call in calls)
        assert "skipped" not in out and out.splitlines()[-1].endswith("--write emulator devices python312")


@pytest.mark.once
@pytest.mark.parametrize("full", ["", "1"])
def test_a_failure_is_the_exit_status_and_nothing_is_to_be_recorded(run_ci, full):
    status, out, calls = run_ci(2, CI_FULL=full)
    assert status == 1 and len(calls) == (2 if full else 1)
    assert "--write" not in out
