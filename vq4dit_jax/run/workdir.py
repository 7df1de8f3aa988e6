"""A run's folder: whose it is, which stages are done, and how long they took."""

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from vq4dit_jax import files
from vq4dit_jax.errors import InputError
from vq4dit_jax.run import config as configs

STAGES = ("load", "quantize", "calibrate", "export", "sample", "evaluate", "report")


class Workdir:
    """Paths of a run, and `stages.json`, which says what is done: a stage is in it once all its files are in place."""

    def __init__(self, root: str | os.PathLike):
        self.root = pathlib.Path(root)
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

    @contextlib.contextmanager
    def claim(self, resolved: dict[str, Any]) -> Iterator[None]:
        """Holds the folder for this process; InputError where it is in use or belongs to another config."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--workdir={self.root} is a file; wanted a folder")
        if self.config.exists():
            theirs = json.loads(self.config.read_text(encoding="utf-8"))
            differing = configs.differences(resolved, theirs)
            if differing:
                shown = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
                raise InputError(f"--workdir={self.root} belongs to another config: {shown}; choose another folder")
        elif self.root.exists() and any(p.name != ".lock" for p in self.root.iterdir()):
            raise InputError(
                f"--workdir={self.root} holds files but no config.json of ours; choose an empty or new folder"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--workdir={self.root} is in use by another run; wait for it") from None
            if not self.config.exists():
                files.write_json(self.config, resolved)
            yield

    def done(self) -> dict[str, float]:
        """Finished stages and their seconds."""
        return json.loads(self.stages.read_text(encoding="utf-8")) if self.stages.exists() else {}

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
