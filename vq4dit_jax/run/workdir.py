"""A run's folder: what it was made from, which stages are done, and how long they took."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from vq4dit_jax import __version__, files
from vq4dit_jax.errors import InputError
from vq4dit_jax.run import config as configs
from vq4dit_jax.storage import identity

FORMAT = 2
"""Of a workdir. 1 was 0.1.0's, which did not write it down."""
OWN_KEYS = ("format", "version", "sources")
"""Keys of config.json beside those of the config."""
_MADE = ("seed", "model", "quantize", "viditq")
_CALIBRATED = (*_MADE, "calibration")
READS = {
    "quantize": _MADE,
    "calibrate": _CALIBRATED,
    "export": _CALIBRATED,
    "sample": (*_CALIBRATED, "sample", "evaluation.class_names"),
    "evaluate": (*_CALIBRATED, "sample", "evaluation", "beside"),
    "report": (*_CALIBRATED, "sample", "evaluation", "beside"),
}
"""Stage -> the sections and keys of the config that decide its result, those of the stages before it among them."""
NOT_READ = {"quantize": ("model.vae",), "calibrate": ("model.vae", "calibration.save_every"), "export": ("model.vae",)}
"""Stage -> keys within those sections that do not matter to it."""
STAGES = ("load", *READS)


class Workdir:
    """Paths of a run, and `stages.json`, which says what is done: a stage is in it once all its files are in place."""

    def __init__(self, root: str | os.PathLike):
        self.root = pathlib.Path(root).expanduser()
        self.config = self.root / "config.json"
        self.stages = self.root / "stages.json"
        self.metrics = self.root / "metrics.json"
        self.log = self.root / "train_log.jsonl"
        self.calibration = self.root / "calibration"
        self.quantized = self.root / "quantized"
        self.safetensors = self.root / "model.safetensors"
        self.samples = self.root / "samples"
        self.layers = self.root / "layers.json"
        self.table = self.root / "table.md"
        self.table_json = self.root / "table.json"
        self.report = self.root / "report.html"

    def made(self, name: str) -> pathlib.Path:
        """The folder of a model of the run, by its name in the metrics."""
        return self.calibration / name

    @contextlib.contextmanager
    def claim(self, resolved: dict[str, Any], digests: Callable[[], dict[str, str]]) -> Iterator[bool]:
        """Holds the folder for this process; yields whether the run is finished.

        Keys that no finished stage depends on (`READS`) may have changed since; config.json is then written anew, and
        the load stage checks the new ones. A file that the config names is known by its content, not by its path.

        Args:
          resolved: the config, JSON-ready.
          digests: makes `key -> what identifies the file it names`; not called for a finished run.

        Raises:
          InputError: the folder is in use, holds somebody else's files or a run of another version, or a stage that is
            done depends on what has changed.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--workdir={self.root} is a file; wanted a folder")
        theirs = self._read_config()
        if theirs is None:
            self._check_is_new()
        elif "report" in self.done():
            same = all(_at(resolved, key) == _at(theirs, key) for key in theirs.get("sources", {}))
            self._changed(resolved, theirs.get("sources", {}) if same else digests(), theirs)
            yield True
            return
        else:
            self._check_version(theirs)
        ours = digests()
        self.root.mkdir(parents=True, exist_ok=True)
        with files.exclusive(self.root / ".lock", f"--workdir={self.root} is in use by another run; wait for it"):
            theirs = self._read_config()  # another process may have written it by now
            if theirs is not None:
                self._check_version(theirs)
                # A file that is gone is still known.
                ours = {k: v for k, v in theirs["sources"].items() if _at(resolved, k) == _at(theirs, k)} | ours
                if self._changed(resolved, ours, theirs):
                    self._undo("load")
            written = {"format": FORMAT, "version": __version__, "sources": ours, **resolved}
            if theirs != written:
                files.write_json(self.config, written)
            yield "report" in self.done()

    def _read_config(self) -> dict[str, Any] | None:
        """config.json, or None where there is none. InputError where it is damaged, or no run's."""
        if not self.config.exists():
            return None
        held = files.read_json(self.config)
        sections = [held.get(name) for name in ("model", "quantize", "calibration", "sample")]
        if not all(isinstance(section, dict) for section in [*sections, held.get("sources", {})]):
            raise InputError(f"--workdir={self.root}: its config.json is no run's; choose an empty or new folder")
        return held

    def made_from(self) -> tuple[dict[str, Any], dict[str, str]]:
        """(config, digests of the files that it names) of a run that has begun; no digests of one of 0.1.0."""
        held = self._read_config()
        if held is None:
            raise InputError(f"{self.root} has no config.json; wanted the workdir of a run")
        return _filled(_config_of(held)), held.get("sources", {})

    def _check_is_new(self) -> None:
        """What a run leaves that was killed before its config.json was written may be there, nothing else."""
        leftovers = {".lock", f".{self.config.name}.partial"}
        if self.root.exists() and (held := sorted({p.name for p in self.root.iterdir()} - leftovers)):
            raise InputError(
                f"--workdir={self.root} holds files but no config.json of ours ({', '.join(held[:3])}); choose an empty or "
                "new folder"
            )

    def _check_version(self, theirs: dict[str, Any]) -> None:
        if (found := theirs.get("format", 1)) != FORMAT:
            version = theirs.get("version", "0.1.0" if found == 1 else "unknown")
            raise InputError(
                f"--workdir={self.root} was begun by vq4dit-jax {version} (format {found}), and this is {__version__} (format "
                f"{FORMAT}); finish it there, or choose another folder"
            )

    def _changed(self, resolved: dict[str, Any], digests: dict[str, str], theirs: dict[str, Any]) -> bool:
        """Whether the config differs from that of the folder; InputError where a stage depends on that, and has results."""
        sources, config = theirs.get("sources", {}), _filled(_config_of(theirs))
        if theirs.get("format") != FORMAT:  # keys of another version mean nothing here
            config = _common(config, resolved)
            resolved = _common(resolved, config)
        known = set(digests) & set(sources)
        found = identity.differences(_with(resolved, known, digests), _with(config, known, sources))
        for stage in READS:
            mattering = [(key, text) for key, text in found if _reads(stage, key)]
            state = "done" if stage in self.done() else "begun" if self._begun(stage) else None
            if mattering and state:
                remedy = f"remove {self.samples} to sample anew" if state == "begun" else "change it back"
                raise InputError(
                    f"--workdir={self.root} belongs to another config: {identity.spell(mattering)}; stage {stage} is {state} and "
                    f"depends on that; {remedy}, or choose another folder"
                )
        return bool(found)

    def _begun(self, stage: str) -> bool:
        """Whether a stage that is not done has left results which it would take for its own. Other stages leave none, or
        keep beside them what they are made from."""
        return stage == "sample" and any(self.samples.rglob("*.np[yz]"))

    def _undo(self, stage: str) -> None:
        if stage in (done := self.done()):
            files.write_json(self.stages, {name: seconds for name, seconds in done.items() if name != stage})

    def done(self) -> dict[str, float]:
        """Finished stages and their seconds."""
        if not self.stages.exists():
            return {}
        found = files.read_json(self.stages)
        if not all(type(seconds) in (int, float) for seconds in found.values()):
            raise InputError(f"{self.stages} is damaged: wanted a number of seconds for each stage")
        return found

    def finish(self, stage: str, seconds: float) -> None:
        files.write_json(self.stages, {**self.done(), stage: round(seconds, 3)})

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Yields whether the stage is still to do; marks it done, with its seconds, when the body ends well."""
        if name in self.done():
            yield False
            return
        begun = time.perf_counter()
        yield True
        self.finish(name, time.perf_counter() - begun)


def _reads(stage: str, key: str) -> bool:
    under = lambda names: any(key == name or key.startswith(f"{name}.") for name in names)
    return under(READS[stage]) and not under(NOT_READ.get(stage, ()))


def _config_of(held: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in held.items() if key not in OWN_KEYS}


def _filled(config: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """A key that a config lacks is younger than the config, and has its default."""
    defaults = configs.as_json(configs.default()) if defaults is None else defaults
    out = {**defaults, **config}
    nested = [key for key in config if isinstance(config[key], dict) and isinstance(defaults.get(key), dict)]
    return out | {key: _filled(config[key], defaults[key]) for key in nested}


def _common(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The values whose keys the other has, too."""
    out = {key: value for key, value in values.items() if key in other}
    nested = [key for key in out if isinstance(out[key], dict) and isinstance(other[key], dict)]
    return out | {key: _common(out[key], other[key]) for key in nested}


def _at(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return config.get(section, {}).get(name)


def _with(config: dict[str, Any], keys: set[str], digests: dict[str, str]) -> dict[str, Any]:
    """The config with a digest in the place of each path that has one."""
    out = dict(config)
    for key in keys:
        section, _, name = key.partition(".")
        out[section] = {**out[section], name: digests[key]}
    return out
