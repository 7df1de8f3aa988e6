"""What was written for 0.1.0 is taken, or refused in one line that says what to do: config files, flags, workdirs.

tests/data/configs_0.1.0 has the files that 0.1.0 shipped, and what each resolved to there (`values.json`).
"""

import json
import pathlib

import pytest

from vq4dit_jax import main as command
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import viditq
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import programs

FOLDER = pathlib.Path(__file__).parent / "data" / "configs_0.1.0"
VALUES = json.loads((FOLDER / "values.json").read_text())
NEW = {"quantize.method": "vq4dit", "calibration.variance": True}
NEW |= {f"viditq.{k}": list(v) if isinstance(v, tuple) else v for k, v in viditq.SETTINGS.items()}
"""Keys that 0.1.0 did not have, with the value that says what it did for the configs that it shipped."""
PUBLISHED = ("paper/cifar10_w2.py", "released/cifar10_w2.py")


def _flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _renamed(text: str, line: str) -> str:
    """The program with what the refusal says instead of what it names."""
    for part in line.partition(": ")[2].split("; "):
        old, new = part.split(" is now ")
        (module, name), (home, same) = old.rsplit(".", 1), new.rsplit(".", 1)
        assert name == same and f"from {module} import {name}" in text
        text = text.replace(f"from {module} import {name}", f"from {home} import {name}")
    return text


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_config_of_0_1_0_means_what_it_meant_or_names_what_to_write(name, tmp_path):
    file = FOLDER / name
    try:
        config = programs.load(str(file))["get_config"]()
    except InputError as error:
        assert "\n" not in str(error) and "is now vq4dit_jax.methods.vq4dit." in str(error)
        corrected = tmp_path / "config.py"
        corrected.write_text(_renamed(file.read_text(), str(error)))
        config = programs.load(str(corrected))["get_config"]()
    configs.validate(config)
    found = _flat(configs.as_json(config))
    new = {**NEW, "calibration.variance": name not in PUBLISHED}
    assert found == _flat(VALUES[name]) | new


@pytest.mark.parametrize("key", sorted(_flat(VALUES["cifar10_w2.py"])))
def test_a_flag_of_0_1_0_is_taken(key, tmp_path):
    value = _flat(VALUES["cifar10_w2.py"])[key]
    text = repr(tuple(value)) if isinstance(value, list) else str(value)
    config, _ = command.parse(
        ["--config=configs/cifar10_w2.py", f"--workdir={tmp_path / 'w'}", f"--config.{key}={text}"]
    )
    assert _flat(configs.as_json(config))[key] == value


def test_an_unfinished_workdir_of_0_1_0_is_refused_in_one_line(tmp_path, capsys):
    """Its calibration would go on in another way: passes have other keys and other folders."""
    (tmp_path / "config.json").write_text(json.dumps(VALUES["cifar10_w2.py"]))
    (tmp_path / "stages.json").write_text('{"load": 1.2, "quantize": 30.1}')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert command.main(["--config=configs/cifar10_w2.py", f"--workdir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "begun by vq4dit-jax 0.1.0" in err and "choose another folder" in err and err.count("\n") == 1
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name in before}
