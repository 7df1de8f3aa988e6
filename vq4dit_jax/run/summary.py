"""What a run has found, as its files say it: metrics.json, and the rows of table.json."""

from typing import Any

from vq4dit_jax import files
from vq4dit_jax.evaluation import TO_FULL_PRECISION
from vq4dit_jax.methods import method
from vq4dit_jax.methods.method import FULL_PRECISION
from vq4dit_jax.qarray.tree import Sizes
from vq4dit_jax.run.workdir import Workdir
from vq4dit_jax.storage import checkpoint, provenance

_QUALITY = ("fd", "sfd", "mind", "is", "precision", "recall", *TO_FULL_PRECISION, "num_images", "features")


def metrics(
    workdir: Workdir,
    config: Any,
    title: str,
    size: Sizes,
    quality: dict[str, dict[str, Any]],
    held_out: dict[str, tuple[float, float]],
    log: list[dict[str, Any]],
    evaluate_seconds: float,
) -> dict[str, Any]:
    """metrics.json, format 1.

    Args:
      quality: name of each model, in the order in which they are made -> what `evaluation.evaluate` found at the config's own
        number of steps.
      held_out: name of the first and of the final quantized model -> (L_d, relative error of the guided prediction).
      log: the lines of train_log.jsonl.
    """
    last = log[-1] if log else {}
    first, *_, final = [*held_out.values()] * (2 if len(held_out) == 1 else 1)
    return {
        "format": 1,
        "model": {
            "variant": title,
            "parameters": size.parameters,
            "quantized_parameters": size.quantized_parameters,
        },
        "size": {
            "fp32_bytes": 4 * size.parameters,
            "quantized_bytes": files.bytes_on_disk(workdir.quantized),
            "assignment_bytes": size.assignment_bytes,
            "codebook_bytes": size.codebook_bytes,
            "other_bytes": size.other_bytes,
            "bits_per_quantized_weight": size.bits_per_quantized_weight,
        },
        "quality": {name: {key: found[key] for key in _QUALITY} for name, found in quality.items()},
        "calibration": {
            "steps": last.get("step", 0),
            "l_d_last": last.get("l_d"),
            "l_r_last": last.get("l_r"),
            "frozen_fraction": last.get("frozen_fraction"),
            "kmeans_l_d": first[0],
            "hard_l_d": final[0],
            "kmeans_eps_error": first[1],
            "hard_eps_error": final[1],
        },
        "time_s": {**_times(workdir, list(quality)[2:]), "evaluate": round(evaluate_seconds, 3)},
        "recipe": {
            "sampler": config.sample.sampler,
            "steps": config.sample.steps,
            "cfg_scale": config.sample.cfg_scale,
            "seed": config.seed,
            "batch": config.sample.batch,
            "devices": provenance.devices(),
            "versions": provenance.versions(),
        },
    }


def _times(workdir: Workdir, calibrated: list[str]) -> dict[str, float]:
    """Seconds of the stages before `evaluate`. Those of calibration are its passes', of all attempts that were kept.

    `calibrated`: names of the models after the first quantized one.
    """
    names = {"quantize": "kmeans"}
    times = {names.get(s, s): seconds for s, seconds in workdir.done().items() if s not in ("evaluate", "report")}
    reports = (checkpoint.load_metadata(workdir.made(name))["extra"]["passes"] for name in calibrated)
    return {**times, "calibrate": round(sum(one["seconds"] for passes in reports for one in passes), 3)}


def table_row(name: str, steps: int, config: Any, size: Sizes, found: dict[str, Any]) -> dict[str, Any]:
    """A row of table.json (see `reporting.table`): full precision or the final model, sampled in `steps`."""
    packed = size.assignment_bytes + size.codebook_bytes + size.other_bytes
    return {
        "method": method.title(name),
        "bits": 32.0 if name == FULL_PRECISION else float(round(size.bits_per_quantized_weight, 1)),
        "bytes": 4 * size.parameters if name == FULL_PRECISION else packed,
        "steps": steps,
        "sampler": config.sample.sampler,
        "cfg_scale": config.sample.cfg_scale,
        "seed": config.seed,
        **found,
    }
