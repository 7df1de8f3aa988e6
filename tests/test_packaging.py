"""The wheel: what is in it, what it asks for, and that it works where there is no repository."""

import ast
import configparser
import importlib.metadata
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import zipfile

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("vq4dit_jax", "pallas_kernels", "convert")
# Where the folders of the repository's root stand inside the wheel.
IN_WHEEL = {**{name: name for name in PACKAGES}, "configs": "vq4dit_jax/_configs", "assets": "vq4dit_jax/_assets"}


def run(*command: str | os.PathLike, cwd: pathlib.Path, **env: str) -> str:
    """Standard output of a command that must succeed, run with neither the test's JAX settings nor a network index."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON", "PIP_"))}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_under(folder: pathlib.Path) -> list[str]:
    return [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    # From a copy, because setuptools leaves build/ and *.egg-info in the tree, and takes stale files from build/.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in IN_WHEEL:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, ".", cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("installed")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
        cwd=target,
    )
    return target


@pytest.fixture(scope="module")
def requirements(wheel) -> dict[str, set[str]]:
    """Names of the required distributions, normalized, by extra ("" for the core)."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", archive.read(metadata).decode(), re.MULTILINE)
    found: dict[str, set[str]] = {}
    for name, rest in lines:
        extra = re.search(r'extra == "(\w+)"', rest)
        found.setdefault(extra.group(1) if extra else "", set()).add(normalized(name))
    return found


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported_distributions() -> set[str]:
    """Third-party distributions that a source file of the product imports, at its top or inside a function."""
    modules = set()
    for folder in (*PACKAGES, "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules.add(node.module.split(".")[0])
    provider = importlib.metadata.packages_distributions()
    modules -= {*sys.stdlib_module_names, *PACKAGES, "configs"}
    return {normalized(provider.get(module, [module])[0]) for module in modules}


def test_wheel_holds_the_sources_the_configs_and_the_assets_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licences = [n for n in archive.namelist() if re.search(r"\.dist-info/.*LICENSE$", n)]
    assert names == {f"{place}/{file}" for folder, place in IN_WHEEL.items() for file in files_under(ROOT / folder)}
    assert licences


def test_every_import_is_a_declared_requirement(requirements):
    product = set.union(*(names for extra, names in requirements.items() if extra not in ("test", "reference")))
    assert imported_distributions() <= product


def test_every_core_requirement_is_imported(requirements):
    assert requirements[""] <= imported_distributions()


def test_pallas_of_the_package_index_is_not_required(requirements):
    # It is a client of a cloud service; Pallas the kernel language ships inside jax.
    assert "pallas" not in set.union(*requirements.values())


def test_constraints_pin_every_requirement(requirements):
    # Of extras that no machine of the tests has there are no versions to pin.
    with_torch = set.union(
        *(names for extra, names in requirements.items() if extra not in ("cuda12", "cuda13", "qwix"))
    )
    without = set.union(
        *(
            names
            for extra, names in requirements.items()
            if extra not in ("cuda12", "cuda13", "qwix", "convert", "reference")
        )
    )
    for version, wanted in (("311", with_torch), ("312", without)):
        lines = (ROOT / f"constraints/py{version}.txt").read_text().splitlines()
        assert lines[0].startswith("# Made by: make lock ")
        pins = [re.fullmatch(r"([\w.-]+)==[\w.!]+", line) for line in lines[1:]]
        assert all(pins), f"constraints/py{version}.txt has a line that is no plain pin"
        assert wanted <= {normalized(pin.group(1)) for pin in pins}


def test_declared_python_version_matches_the_constraints():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    assert options["options"]["python_requires"] == ">=3.11"
    assert sorted(f.name for f in (ROOT / "constraints").iterdir()) == ["py311.txt", "py312.txt"]


def test_installed_package_imports_light_and_finds_its_files_outside_the_repository(installed, tmp_path):
    asset = files_under(ROOT / "assets")[0]
    config = next(f for f in files_under(ROOT / "configs") if f.endswith(".py"))
    program = f"""
import sys
import vq4dit_jax
print(vq4dit_jax.__file__)
print(*sorted({{"tensorflow", "torch", "matplotlib", "faiss", "sklearn"}} & set(sys.modules)))
import vq4dit_jax.files
print(vq4dit_jax.files.asset({asset!r}))
print(vq4dit_jax.files.config_file({"configs/" + config!r}))
"""
    package, heavy, *found = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert pathlib.Path(package) == installed / "vq4dit_jax/__init__.py"
    assert heavy == ""
    assert [pathlib.Path(f) for f in found] == [
        installed / "vq4dit_jax/_assets" / asset,
        installed / "vq4dit_jax/_configs" / config,
    ]


def test_installed_command_prints_its_help_outside_the_repository(installed, tmp_path):
    out = run(sys.executable, "-m", "vq4dit_jax.main", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "--config" in out and "--workdir" in out
    script = run(installed / "bin/vq4dit", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "--config" in script


def test_tests_run_with_two_devices_strict_types_and_no_network():
    assert len(jax.devices()) == 2 and jax.devices()[0].platform == "cpu"
    one = jax.numpy.ones
    with pytest.raises(jax.dtypes.TypePromotionError):
        one(2, "int32") + one(2, "float32")
    with pytest.raises(ValueError, match="rank_promotion"):
        one((2, 2)) + one(2)
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("example.com", 80), timeout=1)
    with pytest.raises(OSError, match="no network"), socket.socket() as sock:
        sock.connect(("192.0.2.1", 80))
