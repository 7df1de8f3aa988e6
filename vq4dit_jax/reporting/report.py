"""report.html of a run: one file, no network access."""

import dataclasses
import html
import importlib.resources
import os
import string

import numpy as np

from vq4dit_jax.files import write_text
from vq4dit_jax.reporting import outcome, process
from vq4dit_jax.reporting import table as papers
from vq4dit_jax.reporting.markup import render
from vq4dit_jax.reporting.sensitivity import sensitivity


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The data of the page. Any of it may come from outside: all of it is escaped.

    A figure that was not computed is None or left out, and is shown as a dash; a part without data says so.

    Attributes:
      title: headline, e.g. "DiT-S/2 on CIFAR-10 in 2 bits".
      metrics: the contents of metrics.json ( model, size, quality, calibration, time_s, recipe).
      config: resolved configuration; nested dicts, leaves of any type.
      train_log: one dict per calibration step, ascending: "step", "trajectory", "timestep", "l_d", "l_r", "loss",
        "frozen_fraction" (0 to 1), "seconds"; on some lines "ratio_histogram": counts of the ratio r of the first
        candidate over all sub-vectors, in equal bins of [0, 1] (20 of them).
      layers: one dict per block and role: "path" (of the kernel), "block" (int), "role" ("attn/qkv"),
        "shape" ([O, I]), "codewords" (K), "subvector" (d), "groups" (codebooks in it), "bits" (codes and codebook,
        per weight), "kmeans_error" and "final_error" (relative Frobenius error of the weights, before and after
        calibration).
      table: the rows of table.json, see `reporting.table`.
      passes: the reports of the passes that made the final model.
      images: model ("fp", "kmeans", "vq4dit", in this order) -> uint8 (N, H, W, 3); picture i of each from the same
        seed and label. N may differ: the page shows the pictures that all models have.
      labels: class name of each picture.
      command: the command line that reproduces the run.
    """

    title: str
    metrics: dict
    config: dict
    train_log: list[dict]
    layers: list[dict]
    images: dict[str, np.ndarray]
    labels: list[str]
    command: str
    table: list[dict] = dataclasses.field(default_factory=list)
    passes: list[dict] = dataclasses.field(default_factory=list)


def write_report(path: str | os.PathLike, data: ReportData) -> None:
    """Writes one self-contained HTML page: no scripts, no fonts, no external resources.

    It adapts to the width of a phone, to dark mode and to paper. Long logs are thinned and large pictures
    reduced, so that it stays under about 3 MB.
    """
    body = [
        outcome.headline(data.title, data.metrics),
        outcome.pictures(data.images, data.labels),
        outcome.quality(data.metrics),
        papers.quality_by_steps(data.table),
        process.calibration(data.metrics, data.train_log),
        process.ratios(data.train_log),
        outcome.size(data.metrics),
        process.layer_errors(data.layers),
        sensitivity(data.passes),
        process.time(data.metrics),
        process.recipe(data.metrics, data.config, data.command),
    ]
    template = importlib.resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    title = html.escape(data.title).encode("utf-8", "replace").decode("utf-8")
    text = "\n".join(render(part) for part in body if part is not None)
    write_text(path, string.Template(template).substitute(title=title, body=text))
