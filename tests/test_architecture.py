"""The house: which part may import which, who knows what, and how long a file may be. Read from the sources, nothing is run."""

import ast
import pathlib
import re
import statistics
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("vq4dit_jax", "convert", "pallas_kernels")
ORDER = (
    ("main", "sample", "evaluate", "config"),
    ("run",),
    ("reporting", "evaluation"),
    ("methods",),
    ("storage",),
    ("networks",),
    ("diffusion",),
    ("qarray",),
    ("codebook",),
    ("integer",),
    ("pallas_kernels",),
    ("npz",),
    ("files", "progress", "command_line"),
    ("errors",),
    ("vq4dit_jax",),
)
"""From the top to the bottom; parts of a line do not import each other. The package itself has the version, and imports
nothing at once."""
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
LOADERS = {"convert"}
"""Imported inside functions alone, where a file of somebody else's is opened; imports networks and what is below them."""


def _modules() -> dict[str, pathlib.Path]:
    out = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            out[name.removesuffix(".__init__")] = file
    return out


MODULES = _modules()


def _imports(module: str) -> Iterator[tuple[str, bool]]:
    """(module of ours that is imported, whether at the top of the file)."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = name if name in MODULES else name.rpartition(".")[0]
            if found in MODULES:
                yield found, id(node) not in inside


def _part(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "vq4dit_jax" and rest else first


def test_every_module_has_its_place():
    assert {_part(module) for module in MODULES} == set(RANK) | LOADERS


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    part = _part(module)
    for imported, at_top in _imports(module):
        below = _part(imported)
        if below == part:
            continue
        if part in LOADERS:
            assert RANK[below] >= RANK["networks"] or imported.startswith("vq4dit_jax.evaluation.networks"), imported
        elif below in LOADERS:
            assert not at_top and part in ("run", "evaluation"), f"{imported} is imported where nothing is opened yet"
        else:
            assert RANK[below] > RANK[part], f"{module} imports {imported}, which is not below it"


def test_imports_make_no_circle():
    above: dict[str, set[str]] = {module: set() for module in MODULES}
    for module in MODULES:
        for imported, at_top in _imports(module):
            if at_top and imported != module:
                above[module].add(imported)
    left = dict(above)
    while free := [module for module, its in left.items() if not its & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {sorted(left)}"


def _naming(pattern: str) -> set[str]:
    """Files of the product, as from the root, with a match."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in MODULES.values()
        if re.search(pattern, file.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize(
    ("pattern", "folders"),
    [
        (r"isinstance\(.*VQArray", ("vq4dit_jax/qarray/",)),
        ("adaLN", ("vq4dit_jax/networks/", "convert/")),
        ("num_classes", ("vq4dit_jax/networks/", "vq4dit_jax/evaluation/networks/", "convert/")),
    ],
)
def test_a_knowledge_stands_in_one_place(pattern, folders):
    """How a leaf is stored, what a network's parameters are called, and that a condition is a class."""
    assert {file for file in _naming(pattern) if not file.startswith(folders)} == set()


def test_files_are_of_one_subject():
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in MODULES.items()}
    assert statistics.median(lines.values()) <= 150
    assert {name: count for name, count in lines.items() if count > 400} == {}
