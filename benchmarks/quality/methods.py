"""The methods of the table: from a run's config to a model and the bytes of its packed form."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from vq4dit_jax import methods
from vq4dit_jax.methods.moments import input_moments
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.qarray.rules import plan
from vq4dit_jax.qarray.tree import Sizes, sizes
from vq4dit_jax.run.pipeline import Pipeline
from vq4dit_jax.run.seeds import TRAJECTORIES
from vq4dit_jax.storage import checkpoint


@dataclasses.dataclass(frozen=True)
class Built:
    """A model.

    Attributes:
      params: a tree that `checkpoint.save_quantized` takes.
      sizes: bytes of its packed form.
      seconds: "quantize" and "calibrate".
    """

    params: Any
    sizes: Sizes
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is made, and the parts of its row that decide it beside the teacher (names in `rows.Case.made_from`)."""

    make: Callable[[Pipeline, float, int | None], Built]
    reads: tuple[str, ...]


def full_precision(run: Pipeline, bits: float, group: int | None) -> Built:
    _, teacher = run.teacher
    return Built(teacher, sizes(teacher), {})


def kmeans(run: Pipeline, bits: float, group: int | None) -> Built:
    run.quantize()
    return Built(run.first, sizes(run.first), {"quantize": run.dir.done()["quantize"]})


def calibrated(run: Pipeline, bits: float, group: int | None) -> Built:
    """The final model of a run, by any method and form: the config says which."""
    run.quantize()
    run.calibrate()
    _, params, manifest = checkpoint.load_quantized(run.dir.made(run.names[-1]))
    seconds = sum(report["seconds"] for report in manifest["extra"]["passes"])
    return Built(params, sizes(params), {"quantize": run.dir.done()["quantize"], "calibrate": seconds})


def dkm(run: Pipeline, bits: float, group: int | None) -> Built:
    run.quantize()
    fields = {field.name for field in dataclasses.fields(methods.DKM)}
    one = methods.DKM(**{name: value for name, value in run.config.calibration.items() if name in fields})
    context = methods.begin(*run.teacher, run.key(TRAJECTORIES))
    params, (report,) = methods.apply((one,), context, run.first)
    seconds = {"quantize": run.dir.done()["quantize"], "calibrate": report["seconds"]}
    return Built(params, sizes(params), seconds)


def round_to_nearest(run: Pipeline, bits: float, group: int | None) -> Built:
    begun = time.perf_counter()
    made = methods.rtn(run.teacher[1], int(bits), group, other_dtype=run.config.quantize.other_dtype)
    return Built(made, sizes(made), {"quantize": time.perf_counter() - begun})


def gptq(run: Pipeline, bits: float, group: int | None) -> Built:
    """Moments of one trajectory with the batch, steps and guidance of the table's calibration."""
    model, teacher = run.teacher
    c, begun = run.config.calibration, time.perf_counter()
    moments = input_moments(
        model,
        teacher,
        [path for path, parts in plan(teacher, dit_rules(2)).items() if parts[0].spec],
        key=run.key(TRAJECTORIES),
        images=c.batch,
        num_steps=c.trajectory_steps,
        cfg_scale=c.cfg_scale,
    )
    second = {path: found.second for path, found in moments.items()}
    made = methods.gptq(teacher, second, int(bits), group, other_dtype=run.config.quantize.other_dtype)
    return Built(made, sizes(made), {"quantize": time.perf_counter() - begun})


METHODS = {
    "fp": Method(full_precision, ()),
    "rtn": Method(round_to_nearest, ("bits", "group", "other_dtype")),
    "gptq": Method(gptq, ("seed", "bits", "group", "other_dtype", "moments")),
    "kmeans": Method(kmeans, ("seed", "quantize")),
    "dkm": Method(dkm, ("seed", "quantize", "calibration")),
    "vq4dit": Method(calibrated, ("seed", "quantize", "calibration")),
    "viditq": Method(calibrated, ("seed", "quantize", "calibration", "viditq")),
}
