"""The stages of a case, each in a child process: the model, the samples. A killed stage continues when it is started again."""

import contextlib
import dataclasses
import datetime
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rows import Case, filled
from benchmarks.quality.speed import step_milliseconds
from vq4dit_jax import files, npz
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.agreement import held_out_agreement
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.inference import for_sampling
from vq4dit_jax.qarray.base import is_quantized
from vq4dit_jax.qarray.parts import is_parts
from vq4dit_jax.qarray.tree import Sizes, dequantize, rounds_activations
from vq4dit_jax.reporting.markup import figure
from vq4dit_jax.run import generation, sources
from vq4dit_jax.run.pipeline import Pipeline
from vq4dit_jax.run.seeds import HELD_OUT, SAMPLES
from vq4dit_jax.run.workdir import Workdir
from vq4dit_jax.storage import checkpoint, provenance
from vq4dit_jax.storage.identity import Claim

COMPARED = 340
"""Images of each seed that are compared with full precision's, which are kept for that: `first.npz`, 1 MB of CIFAR's size."""


@dataclasses.dataclass(frozen=True)
class Share(generation.Plan):
    """A plan of the images from number `first` on."""

    first: int = 0

    def indices(self, shard: int) -> np.ndarray:
        return self.first + super().indices(shard)


def quantize(case: Case) -> None:
    """Writes `packed/` (orbax) and then `figures.json`, which says that the model is done."""
    with _lock(case):
        claim(case.model, case.made_from).take()
        if is_done(case, "quantize"):
            return
        run = Pipeline(case.config, Workdir(case.model / "run"), "python -m benchmarks.quality")
        with run.dir.claim(run.resolved, lambda: {}):
            model, teacher = run.teacher
            made = METHODS[case.row.method].make(run, case.row.bits, case.row.group)
        peak = peak_bytes()
        checkpoint.save_quantized(case.model / "packed", model, made.params)
        held_out = held_out_agreement(
            model, teacher, {"this": dense(made.params)}, case.table.base.sample.cfg_scale, case.key(HELD_OUT)
        )
        l_d, noise_error = held_out["this"]
        figures = {
            "size": size_figures(made.sizes),
            "held_out": {"l_d": figure(l_d), "noise_error": figure(noise_error)},
            "seconds": {name: round(value, 3) for name, value in made.seconds.items()},
            "peak_bytes": peak,
        }
        files.write_json(case.model / "figures.json", figures)
        files.remove(case.model / "run" / "calibration")  # the optimizer's state, larger than the model


def sample(case: Case) -> None:
    """Writes the case's images, by the model in the form of `sampled`."""
    with _lock(case):
        claim(case.samples, case.sampled_from).check()
        if is_done(case, "sample"):
            return
        if not is_done(case, "quantize"):
            raise InputError(f"{case.model}: there is no finished model to sample; add quantize to --stages")
        claim(case.samples, case.sampled_from).take()
        if not case.images.exists():
            _generate(case)
        if case.row.method == "fp":
            first = npz.read_head(case.images, COMPARED)
            with files.atomic_path(case.first_images) as partial, open(partial, "wb") as file:
                np.savez_compressed(file, first)


def _generate(case: Case) -> None:
    model, params = sampled(case)
    c = case.table.base.sample
    first = case.seed * case.num_images
    generation.generate(
        Share(case.num_images, c.batch, c.labels, c.sampler, c.steps, c.cfg_scale, first=first),
        model,
        params,
        case.key(SAMPLES),
        case.images,
        sources.open_decoder(sources.locate(case.table.base.model.vae), model.in_channels)[0],
        case.name,
    )


def sampled(case: Case) -> tuple[DiT, Any]:
    """The case's model, and its parameters as its config has `sample.activations`: float32 for dense weights in float32,
    which all methods have (on a CPU they are as fast as packed ones), or the packed form with rounded activations."""
    model, params, _ = checkpoint.load_quantized(case.model / "packed")
    activations, c = case.config.sample.activations, case.table.base.sample
    if activations == "float32" or case.row.method == "fp":
        return model, dense(params)
    return model, for_sampling(model, params, activations, c.cfg_scale)


def time(case: Case) -> None:
    """Writes `speed.json`: milliseconds of a step of `c.batch` images, and full precision's in the same minute."""
    with _lock(case):
        if not (case.model / "packed").exists():
            raise InputError(f"{case.model}: there is no model to time; remove that folder to make it anew")
        model, params = sampled(case)
        _, teacher = Pipeline(case.config, Workdir(case.model / "run"), "python -m benchmarks.quality").teacher
        c = case.table.base.sample
        forms = {"this": params, "full_precision": dense(teacher)}
        found = step_milliseconds(model, forms, images=c.batch, cfg_scale=c.cfg_scale)
        about = {"images": c.batch, "devices": record.devices(), "commit": record.commit()}
        files.write_json(case.speed, {"milliseconds": found, **about})


STAGES = {"quantize": quantize, "sample": sample, "time": time}
NEEDED = ("quantize", "sample")
"""What a row of the table needs."""


def is_done(case: Case, stage: str) -> bool:
    """Figures are kept longer than models that were sampled and images that were evaluated."""
    if stage == "time":
        return case.speed.exists()
    if stage == "quantize":
        return (case.model / "figures.json").exists() and ((case.model / "packed").exists() or is_done(case, "sample"))
    sampled = case.images.exists() or (case.samples / "figures.json").exists()
    return sampled and (case.row.method != "fp" or case.first_images.exists())


def dense(params: Any) -> Any:
    """All of a tree in float32: its values are those of the stored types. Leaves that round their activations stay."""
    node = lambda leaf: is_quantized(leaf) or is_parts(leaf)

    def one(leaf: Any) -> Any:
        if rounds_activations(leaf):
            return leaf
        return dequantize({"leaf": leaf}, jnp.float32)["leaf"].astype(jnp.float32)

    return jax.tree.map(one, params, is_leaf=node)


def size_figures(sizes: Sizes) -> dict[str, float | int]:
    """Bytes by kind, and bits over the quantized weights (codes, codebooks, scales) and over all parameters (all bytes)."""
    whole = sizes.assignment_bytes + sizes.codebook_bytes + sizes.other_bytes
    every = 8 * whole / sizes.parameters
    return {
        **dataclasses.asdict(sizes),
        "bytes": whole,
        "bits_per_quantized_weight": sizes.bits_per_quantized_weight if sizes.quantized_parameters else every,
        "bits_per_parameter": every,
    }


def claim(folder: pathlib.Path, definition: dict[str, Any]) -> Claim:
    """The definition that a result in `folder` is made from."""
    about = lambda: {
        "commit": record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": record.devices(),
        "versions": provenance.versions(),
    }
    remedy = "remove that folder to make it anew"
    return Claim(folder / "definition.json", definition, remedy, about, "definition", filled)


@contextlib.contextmanager
def _lock(case: Case) -> Iterator[None]:
    """Waits until no other process is at this case."""
    folder = case.model.parent
    folder.mkdir(parents=True, exist_ok=True)
    with files.exclusive(folder / ".lock"):
        yield


def peak_bytes() -> int | None:
    """Peak resident memory of this process, on Linux alone: `getrusage` includes the parent's before `exec`."""
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None
