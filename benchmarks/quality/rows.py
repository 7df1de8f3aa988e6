"""The rows of a table as data, and for each seed of a row its definition and its folders."""

import copy
import dataclasses
import functools
import pathlib
import re
import runpy
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.quality.methods import METHODS
from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray.rules import BITS
from vq4dit_jax.run import config as configs


@dataclasses.dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
      name: of its folder; `--rows` is matched with it.
      label: the method for people; rows with the same one are a line of the plot.
      method: one of `methods.METHODS`.
      bits: nominal, a weight.
      group: inputs that share a scale, of methods with scales; None for one scale a row.
      config: the config file whose `quantize`, `calibration` and `viditq` sections and `sample.activations` are used, the steps
        and the batch excepted; "" for the table's own.
      overrides: "section.key" -> value, applied last.
    """

    name: str
    label: str
    method: str
    bits: float = 32
    group: int | None = None
    config: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"row {self.name}: method={self.method!r}: wanted one of {', '.join(METHODS)}")


@dataclasses.dataclass(frozen=True)
class Table:
    """A locked config, whose model, evaluation, samples (`sample.num_images` a row, over all seeds), calibration steps and
    batch are those of every row; and the rows."""

    base: ConfigDict
    rows: tuple[Row, ...]

    def __post_init__(self):
        names = [row.name for row in self.rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"rows: {', '.join(sorted(twice))} stands there twice; give each row a name of its own")


def load_table(file: str) -> Table:
    """What `get_config()` of a Python file gives. A config is a program: run only your own."""
    if not pathlib.Path(file).is_file():
        raise InputError(f"--config={file}: no such file; wanted one such as benchmarks/quality/cifar10.py")
    found = runpy.run_path(file).get("get_config", lambda: None)()
    if not isinstance(found, Table):
        raise InputError(f"--config={file}: its get_config() gives no Table; see benchmarks/quality/cifar10.py")
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One row at one seed: its model, and its share of the samples.

    Seed s decides k-means and trajectories, as `--config.seed=s` does in a run of `vq4dit_jax.main`, and samples the images
    s*n to (s+1)*n - 1 of one stream of noise and labels: image i is of the same noise and class in every row.
    """

    table: Table
    row: Row
    seed: int
    seeds: int
    workdir: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def model(self) -> pathlib.Path:
        """The folder of the model and its figures."""
        return self.workdir / self.row.name / str(self.seed) / "model"

    @property
    def samples(self) -> pathlib.Path:
        """The folder of its images."""
        return self.workdir / self.row.name / str(self.seed) / "samples"

    @property
    def images(self) -> pathlib.Path:
        return self.samples / "images.npz"

    @property
    def speed(self) -> pathlib.Path:
        """The times of a forward, where they were taken."""
        return self.samples / "speed.json"

    @property
    def first_images(self) -> pathlib.Path:
        """The first of full precision's images, which the other rows' are compared with (`stages.COMPARED`)."""
        return self.samples / "first.npz"

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The run's config; of its samples the activations are used alone, and its evaluation is not."""
        base, row = self.table.base, self.row
        theirs = base
        if row.config:
            theirs = runpy.run_path(str(files.config_file(row.config)))["get_config"]()
        out = configs.default()
        out.seed = self.seed
        for section, source in (("model", base), ("quantize", theirs), ("calibration", theirs), ("viditq", theirs)):
            out[section].update(copy.deepcopy(source[section]))
        out.calibration.steps, out.calibration.batch = base.calibration.steps, base.calibration.batch
        out.sample.activations = theirs.sample.activations
        if row.bits in BITS:
            out.quantize.bits = float(row.bits)
        for key, value in row.overrides.items():
            section, _, name = key.partition(".")
            own = section in ("quantize", "calibration", "viditq") and name in out[section]
            if not own and key != "sample.activations":
                raise InputError(
                    f"row {row.name}: overrides: {key} is no key of quantize, calibration or viditq, and not sample.activations"
                )
            out[section][name] = value
        configs.validate(out)
        return out.lock()

    def key(self, stream: int) -> jax.Array:
        """A stream that all rows and seeds share."""
        return jax.random.fold_in(jax.random.key(self.table.base.seed), stream)

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Everything that decides the model, and nothing else: round-to-nearest does not depend on the calibration's settings."""
        resolved, row = configs.as_json(self.config), self.row
        named = {
            "seed": self.seed,
            "bits": row.bits,
            "group": row.group,
            "other_dtype": resolved["quantize"]["other_dtype"],
            "quantize": resolved["quantize"],
            "calibration": resolved["calibration"],
            "viditq": resolved["viditq"],
            "moments": {name: resolved["calibration"][name] for name in ("batch", "trajectory_steps", "cfg_scale")},
        }
        reads = METHODS[row.method].reads
        return {"method": row.method, "model": resolved["model"], **{name: named[name] for name in reads}}

    @functools.cached_property
    def sampled_from(self) -> dict[str, Any]:
        """All that decides the samples."""
        base = configs.as_json(self.table.base)
        keys = ("batch", "labels", "sampler", "steps", "cfg_scale")
        own = {"stream": base["seed"], "first_image": self.seed * self.num_images, "num_images": self.num_images}
        decoder = {"vae": base["model"]["vae"]}
        how = {"activations": self.config.sample.activations}
        return {
            "model": self.made_from,
            "sample": {**own, **{key: base["sample"][key] for key in keys}, **how, **decoder},
        }

    @property
    def num_images(self) -> int:
        """Images of this seed."""
        return self.table.base.sample.num_images // self.seeds


def filled(definition: dict[str, Any]) -> dict[str, Any]:
    """A `made_from` or `sampled_from` of an older version with the keys of the config that are younger.

    They have their defaults, which describe the earlier behaviour. `calibration.variance` alone has another one: in 0.1.0 the
    variance was fitted where the steps trained the last layer on what an error leaves in the image.
    """
    defaults = configs.as_json(configs.default())
    if "sample" in definition:
        activations = defaults["sample"]["activations"]
        return {"model": filled(definition["model"]), "sample": {"activations": activations, **definition["sample"]}}
    if "calibration" in definition:
        theirs = {**defaults["calibration"], **definition["calibration"]}
        trained = re.fullmatch(theirs["tuned"], "final_layer/linear/kernel") is not None
        defaults["calibration"]["variance"] = trained and theirs["lambda_s"] > 0
    sections = [name for name in ("model", "quantize", "calibration", "viditq") if name in definition]
    return {**definition, **{name: {**defaults[name], **definition[name]} for name in sections}}


def cases(table: Table, row: Row, seeds: int, workdir: pathlib.Path) -> list[Case]:
    return [Case(table, row, seed, seeds, workdir) for seed in range(seeds)]
