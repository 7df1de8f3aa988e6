"""Config files: programs that define get_config(), or the config.json of a run."""

import ast
import pathlib
import runpy
from typing import Any

from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import workdir

MOVED = {
    "vq4dit_jax.baselines": "vq4dit_jax.methods",
    "vq4dit_jax.calibration": "vq4dit_jax.methods",
    "vq4dit_jax.calibration.recipe": "vq4dit_jax.methods.vq4dit",
    "vq4dit_jax.checkpoint": "vq4dit_jax.storage.checkpoint",
    "vq4dit_jax.generation": "vq4dit_jax.run.generation",
    "vq4dit_jax.inference": "vq4dit_jax.networks.inference",
    "vq4dit_jax.models": "vq4dit_jax.networks",
    "vq4dit_jax.models.dit": "vq4dit_jax.networks.dit",
    "vq4dit_jax.pipeline": "vq4dit_jax.run.pipeline",
    "vq4dit_jax.quantization": "vq4dit_jax.qarray.rules",
    "vq4dit_jax.sampling": "vq4dit_jax.diffusion.sampling",
    "vq4dit_jax.vq": "vq4dit_jax.qarray",
}
"""Modules of 0.1.0 that a config may import -> what they are called now."""
NAMES = {
    **dict.fromkeys(("CANDIDATES", "FINE", "LAYERWISE", "PAPER", "RELEASED"), "vq4dit_jax.methods.vq4dit"),
    **dict.fromkeys(("dit_rules",), "vq4dit_jax.networks.rules"),
    **dict.fromkeys(("VQSpec",), "vq4dit_jax.qarray.spec"),
}
"""What a config may import from those modules and is not where the module is now -> the module where it is."""


def load(file: str) -> dict[str, Any]:
    """The names that a config file defines, `get_config` among them.

    A config is a program, as everywhere in this field: run only your own. A file whose name ends in `.json` is read as
    the config.json of a run. InputError, with the line, where the program fails.
    """
    path = files.config_file(file)
    if path.suffix == ".json":
        values = {key: value for key, value in files.read_json(path).items() if key not in workdir.OWN_KEYS}
        return {
            "get_config": lambda: configs.from_json(values, f"--config={file}").lock(),
            "__doc__": f"Read from {path}.",
        }
    try:
        module = runpy.run_path(str(path))
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--config={file}: {_moved(path) or error}") from None
    except Exception as error:
        raise _slip(file, path, error) from error
    make = module.get("get_config")
    if not callable(make):
        raise InputError(
            f"--config={file} defines no get_config(); wanted a config program or the config.json of a run"
        )

    def get_config() -> Any:
        try:
            return make()
        except InputError:
            raise
        except Exception as error:
            raise _slip(file, path, error) from error

    return {**module, "get_config": get_config}


def _moved(path: pathlib.Path) -> str:
    """What the imports of a program are called now, in words; "" where none has moved."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name: MOVED[alias.name] for alias in node.names if alias.name in MOVED}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name: MOVED[name] for name in whole if name in MOVED}
            if node.module in MOVED:
                names = {name: NAMES.get(name.rpartition(".")[2]) for name in whole}
                moved = {name: f"{home}.{name.rpartition('.')[2]}" for name, home in names.items() if home}
                found |= moved or ({} if whole[0] in found else {node.module: MOVED[node.module]})
    return "; ".join(f"{old} is now {new}" for old, new in found.items())


def _slip(file: str, path: pathlib.Path, error: Exception) -> InputError:
    """The last line of the program that an exception went through, and what the exception says."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = "" if line is None else f", line {line}"
    return InputError(f"--config={file}{where}: {type(error).__name__}: {error}; wanted a config program in Python")
