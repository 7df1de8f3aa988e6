"""Figures of the samples: of each seed's, and of all seeds' together; and the table's JSON from all that is done."""

import functools
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.quality import stages
from benchmarks.quality.rows import Case, Row, Table, cases
from vq4dit_jax import evaluation, files, npz
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation import TO_FULL_PRECISION
from vq4dit_jax.evaluation.images import checksum
from vq4dit_jax.evaluation.tfgan import IS_SPLIT
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import sources
from vq4dit_jax.storage import identity

POOLED = ("fd", "sfd", "mind", "is", "precision", "recall")
"""Of all seeds' samples."""
QUALITY = (*POOLED, *TO_FULL_PRECISION)
"""Of a seed's samples; its other figures are its model's."""
_READ_AT_ONCE = 1000


class Evaluator:
    """Evaluates images, and keeps the figures beside them, with the checksums of everything that they depend on.

    The figures are kept when the images are removed, which are the larger part of a table.
    """

    def __init__(self, table: Table):
        self.names = {name: table.base.evaluation[name] for name in ("classifier", "reference")}

    @functools.cached_property
    def evaluator(self) -> sources.Evaluator:
        if not all(self.names.values()):
            return sources.Evaluator(reason="no feature network is configured")
        return sources.open_evaluator(*map(sources.locate, self.names.values()))

    def of_seed(self, case: Case, originals: Case | None) -> dict[str, Any]:
        """Figures of one seed's images; `originals`: the case of full precision with the same noise and classes."""
        first = originals.first_images if originals and originals.first_images.exists() else None
        of = {
            "images": checksum(case.images) if case.images.exists() else kept_checksum(case),
            "full_precision": checksum(first) if first else None,
        }
        return self._figures(case.samples / "figures.json", of, lambda: case.images, first)

    def of_all(self, every: list[Case]) -> dict[str, Any]:
        """Figures of all seeds' images as one set."""
        kept = every[0].model.parent.parent / "pooled" / "figures.json"
        return self._figures(kept, {"images": [kept_checksum(case) for case in every]}, lambda: _join(every), None)

    def _figures(
        self,
        kept: pathlib.Path,
        of: dict[str, Any],
        find: Callable[[], pathlib.Path],
        originals: pathlib.Path | None,
    ) -> dict[str, Any]:
        """`evaluation.evaluate`; PSNR, SSIM and MS-SSIM are those of as many images as there are `originals`.

        Figures that were kept before one of these existed are computed anew where the images are there; else they lack it.
        """
        of |= self.names
        found = _read(kept) if kept.exists() else {"of": None}
        known = found["figures"] if found["of"] == of else None
        if known and known.keys() >= {*QUALITY}:
            return known
        images = find()
        if not images.exists():
            if known:
                return known
            raise InputError(
                f"{kept} is of other images or another comparison, and {images} is not there; "
                f"remove {images.parents[2]} to make the row anew"
            )
        evaluator = self.evaluator
        found, reasons = evaluation.evaluate_with_reasons(images, evaluator.classifier, evaluator.reference)
        if originals:
            there = evaluation.open_images(originals)
            head = npz.read_head(images, len(there))
            of_pairs, obstacles = evaluation.evaluate_with_reasons(head, None, None, originals)
            found |= {name: of_pairs[name] for name in TO_FULL_PRECISION}
            reasons = {name: why for name, why in reasons.items() if name not in TO_FULL_PRECISION}
            reasons |= {name: why for name, why in obstacles.items() if name in TO_FULL_PRECISION}
        if found["num_images"] > IS_SPLIT and found["num_images"] % IS_SPLIT:
            found["is"], reasons["is"] = None, f"{found['num_images']} images are no whole splits of {IS_SPLIT}"
        figures = {**found, "reasons": reasons}
        files.write_json(kept, {"of": of, "figures": figures})
        return figures


def collect(table: Table, seeds: int, workdir: pathlib.Path) -> dict[str, Any]:
    """The rows that are done at every seed, with their figures, and the missing parts of the others.

    A row has: its definition; "size"; "seeds", a list of the figures of each; their "mean" and "std" (of a sample: N - 1);
    "pooled", the figures of all seeds' images as one set. A Frechet distance falls with the number of images, so those
    of one seed compare with those of one seed, and pooled ones with pooled ones.
    """
    evaluate, rows, missing = Evaluator(table), [], []
    reference = next((row for row in table.rows if row.method == "fp"), None)
    for row in table.rows:
        every = cases(table, row, seeds, workdir)
        lacking = [{"row": row.name, "seed": case.seed, "what": what} for case in every if (what := _lacks(case))]
        if lacking:
            missing += lacking
            continue
        originals = None if row is reference or reference is None else cases(table, reference, seeds, workdir)
        rows.append(_row(row, every, originals, evaluate))
    base = configs.as_json(table.base)
    kept = {name: base[name] for name in ("seed", "model", "sample", "evaluation")}
    kept["calibration"] = {name: base["calibration"][name] for name in ("steps", "batch")}
    images = table.base.sample.num_images
    return {"seeds": seeds, "images": images, "config": kept, "rows": rows, "missing": missing}


def _lacks(case: Case) -> str | None:
    for folder, definition in ((case.model, case.made_from), (case.samples, case.sampled_from)):
        if differing := stages.claim(folder, definition).differing():
            return f"{folder} was made from something else: {identity.spell(differing[:1])}"
    return next((f"{stage} is not done" for stage in stages.NEEDED if not stages.is_done(case, stage)), None)


def _row(row: Row, every: list[Case], originals: list[Case] | None, evaluate: Evaluator) -> dict[str, Any]:
    found = [_seed(case, originals and originals[case.seed], evaluate) for case in every]
    numeric = [name for name, value in found[0].items() if name in QUALITY or isinstance(value, float)]
    values = {name: [seed[name] for seed in found if seed.get(name) is not None] for name in numeric}
    pooled = evaluate.of_all(every)
    return {
        "name": row.name,
        "label": row.label,
        "method": row.method,
        "bits": row.bits,
        "group": row.group,
        "config": row.config,
        "overrides": dict(row.overrides),
        "size": _read(every[0].model / "figures.json")["size"],
        "pooled": {
            **{name: pooled.get(name) for name in (*POOLED, "num_images", "features")},
            "reasons": {name: why for name, why in pooled["reasons"].items() if name in POOLED},
        },
        "mean": {name: statistics.fmean(v) if v else None for name, v in values.items()},
        "std": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()},
        "seeds": found,
    }


def _seed(case: Case, originals: Case | None, evaluate: Evaluator) -> dict[str, Any]:
    """The figures of one seed, flat."""
    model, quality = _read(case.model / "figures.json"), evaluate.of_seed(case, originals)
    made, sampled = (_read(folder / "definition.json") for folder in (case.model, case.samples))
    return {
        "seed": case.seed,
        "first_image": case.seed * case.num_images,
        "num_images": quality["num_images"],
        **{name: quality.get(name) for name in QUALITY},
        **model["held_out"],
        **{f"{name}_s": float(value) for name, value in model["seconds"].items()},
        **_speed(case),
        "peak_gb": model["peak_bytes"] and model["peak_bytes"] / 1e9,
        "commit": made["commit"],
        "date": made["date"],
        "devices": {"model": made["devices"], "samples": sampled["devices"]},
        "remark": made.get("remark"),
    }


def _speed(case: Case) -> dict[str, float]:
    """Milliseconds of a step, and its speed as a multiple of full precision's, where they were taken."""
    if not case.speed.exists():
        return {}
    found = _read(case.speed)["milliseconds"]
    return {"step_ms": found["this"], "speed": found["full_precision"] / found["this"]}


def kept_checksum(case: Case) -> str:
    """Of the images that a seed's figures are of."""
    return _read(case.samples / "figures.json")["of"]["images"]


def _join(every: list[Case]) -> pathlib.Path:
    """One `.npz` of all seeds' images, in their order; the first that is not there, where one is not."""
    target = every[0].model.parent.parent / "pooled" / "images.npz"
    parts = [case.images for case in every]
    if lacking := [part for part in parts if not part.exists()]:
        return lacking[0]
    opened = [evaluation.open_images(part) for part in parts]
    shape = (sum(map(len, opened)), *opened[0].shape[1:])
    batches = (batch for images in opened for batch in images.batches(_READ_AT_ONCE))
    npz.write_npz(target, shape, np.uint8, batches)
    return target


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
