"""The stages of a run, in order: load, quantize, calibrate, export, sample, evaluate, report.

Each writes its files beside and renames them, and is then marked done in `stages.json`; a run that was killed goes
on with the first stage that is not, and ends with the same figures.
"""

import functools
import importlib.metadata
import json
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vq4dit_jax import (
    __version__,
    calibration,
    checkpoint,
    evaluation,
    files,
    latents,
    quantization,
    reporting,
    sampling,
)
from vq4dit_jax import config as configs
from vq4dit_jax.calibration import held_out_agreement
from vq4dit_jax.models import DiT, variant
from vq4dit_jax.reporting.layers import layer_table
from vq4dit_jax.workdir import Workdir

_KMEANS, _TRAJECTORIES, _SAMPLES, _HELD_OUT, _INIT = range(5)
"""Streams of the run's seed."""
MODELS = ("fp", "kmeans", "vq4dit")


def run(config: Any, workdir: str, command: str) -> None:
    """Runs what is not yet done of a validated config in `workdir`."""
    Pipeline(config, Workdir(workdir), command).run()


class Pipeline:
    """One run. The models are loaded when a stage first needs them, so a resumed run loads only what it uses."""

    def __init__(self, config: Any, workdir: Workdir, command: str):
        self.config, self.dir, self.command = config, workdir, command
        self.resolved = configs.as_json(config)

    def run(self) -> None:
        with self.dir.claim(self.resolved):
            if "report" in self.dir.done():
                print(f"{self.dir.root} is finished; see {self.dir.report}. Another --workdir makes a new run.")
                return
            self.load()
            self.quantize()
            self.calibrate()
            self.export()
            self.sample()
            self.evaluate()
            self.report()
            print(f"Done: {self.dir.report}")

    # What the stages share ------------------------------------------------------------------------------------

    def key(self, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), stream)

    @functools.cached_property
    def teacher(self) -> tuple[DiT, Any]:
        """The full-precision model."""
        return load_teacher(self.config.model, self.key(_INIT))

    @functools.cached_property
    def kmeans(self) -> Any:
        return checkpoint.load_quantized(self.dir.calibration / "kmeans")[1]

    @functools.cached_property
    def packed(self) -> tuple[DiT, Any]:
        """The final model as a user would load it."""
        return checkpoint.load_quantized(self.dir.quantized)[:2]

    def params(self, name: str) -> Any:
        return {"fp": lambda: self.teacher[1], "kmeans": lambda: self.kmeans, "vq4dit": lambda: self.packed[1]}[name]()

    # Stages ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        with self.dir.stage("load") as to_do:
            if to_do:
                model, params = self.teacher
                logging.info("%s: %d parameters", _title(self.config, model), quantization.sizes(params).parameters)

    def quantize(self) -> None:
        """k-means: codebooks and assignments of every Linear that the rules name."""
        with self.dir.stage("quantize") as to_do:
            if not to_do:
                return
            model, teacher = self.teacher
            rules, c = configs.rules(self.config), self.config.quantize
            roles = sum(any(p.spec for p in parts) for parts in quantization.plan(teacher, rules).values())
            with reporting.progress(roles, "k-means", "layer stack") as bar:
                packed = quantization.quantize(
                    _cast_kept(teacher, c.other_dtype),
                    key=self.key(_KMEANS),
                    rules=rules,
                    codebook_dtype=c.codebook_dtype,
                    max_iterations=c.kmeans_iterations,
                    on_leaf=lambda path: bar.update(1),
                )
            checkpoint.save_quantized(self.dir.calibration / "kmeans", model, packed, {"stage": "k-means only"})

    def calibrate(self) -> None:
        with self.dir.stage("calibrate") as to_do:
            if not to_do:
                return
            model, teacher = self.teacher
            hard = calibration.run(
                configs.recipe(self.config),
                model,
                teacher,
                self.kmeans,
                self.key(_TRAJECTORIES),
                self.dir.calibration,
                self.dir.log,
                self.config.calibration.save_every,
            )
            checkpoint.save_quantized(
                self.dir.calibration / "hard", model, hard, {"stage": "calibrated, before rounding"}
            )

    def export(self) -> None:
        """Rounds what is not assignments to its stored type, writes both files, and the table of layers."""
        with self.dir.stage("export") as to_do:
            if not to_do:
                return
            model, teacher = self.teacher
            _, hard, _ = checkpoint.load_quantized(self.dir.calibration / "hard")
            packed = _round(hard, self.config.quantize.codebook_dtype, self.config.quantize.other_dtype)
            extra = {"config": self.resolved, "vq4dit_jax": __version__}
            checkpoint.save_quantized(self.dir.quantized, model, packed, extra)
            checkpoint.save_safetensors(self.dir.safetensors, model, packed, extra)
            files.write_json(self.dir.layers, layer_table(teacher, self.kmeans, packed))

    def sample(self) -> None:
        """The same seeds and labels for every model."""
        with self.dir.stage("sample") as to_do:
            if not to_do:
                return
            model, _ = self.teacher
            labels = self.labels(model)
            for name in MODELS:
                target = self.dir.samples / f"{name}.npz"
                if not target.exists():
                    images = self._images(model, self.params(name), labels, name)
                    with files.atomic_path(target) as partial, open(partial, "wb") as file:
                        np.savez(file, arr_0=images)
            images, names = self._grids(labels)
            columns = min(8, len(names))
            for name in ("fp", "vq4dit"):
                reporting.write_grid(self.dir.samples / f"{name}.png", images[name], columns)
            reporting.write_comparison(self.dir.samples / "comparison.png", images, names)

    def labels(self, model: DiT) -> np.ndarray:
        """Classes in turn: balanced, and each appears in the first pictures."""
        return (np.arange(self.config.sample.num_images) % model.num_classes).astype(np.int32)

    def _images(self, model: DiT, params: Any, labels: np.ndarray, name: str) -> np.ndarray:
        c, out = self.config.sample, []
        with reporting.progress(len(labels), f"sample {name}", "image") as bar:
            for first in range(0, len(labels), c.batch):
                # The last batch is filled up, so that the sampler compiles once; image i is the same in any batch.
                chunk = np.resize(labels[first : first + c.batch], min(c.batch, len(labels)))
                x = sampling.sample(
                    model,
                    params,
                    chunk,
                    key=self.key(_SAMPLES),
                    num_steps=c.steps,
                    sampler=c.sampler,
                    cfg_scale=c.cfg_scale,
                    first_index=first,
                )
                count = min(c.batch, len(labels) - first)
                out.append(sampling.to_uint8(latents.preview(np.asarray(x))[:count]))
                bar.update(count)
        return np.concatenate(out)

    def _grids(self, labels: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
        """The first images of every model and the names of their classes."""
        count = min(self.config.sample.grid_images, len(labels))
        images = {name: self._load_images(name)[:count] for name in MODELS}
        names = list(self.config.evaluation.class_names)
        return images, [names[i] if i < len(names) else f"class {i}" for i in labels[:count]]

    def _load_images(self, name: str) -> np.ndarray:
        with np.load(self.dir.samples / f"{name}.npz", allow_pickle=False) as file:
            return file["arr_0"]

    def evaluate(self) -> None:
        begun = time.perf_counter()
        with self.dir.stage("evaluate") as to_do:
            if not to_do:
                return
            model, teacher = self.teacher
            _, packed = self.packed
            found = held_out_agreement(
                model,
                teacher,
                {"kmeans": self.kmeans, "hard": packed},
                self.config.calibration.cfg_scale,
                self.key(_HELD_OUT),
            )
            log = calibration.read_log(self.dir.log)
            size = quantization.sizes(packed)
            metrics = {
                "format": 1,
                "model": {
                    "variant": _title(self.config, model),
                    "parameters": size.parameters,
                    "quantized_parameters": size.quantized_parameters,
                },
                "size": {
                    "fp32_bytes": 4 * size.parameters,
                    "quantized_bytes": files.bytes_on_disk(self.dir.quantized),
                    "assignment_bytes": size.assignment_bytes,
                    "codebook_bytes": size.codebook_bytes,
                    "other_bytes": size.other_bytes,
                    "bits_per_quantized_weight": size.bits_per_quantized_weight,
                },
                "quality": self._quality(),
                "calibration": {
                    "steps": log[-1]["step"],
                    "l_d_last": log[-1]["l_d"],
                    "l_r_last": log[-1]["l_r"],
                    "frozen_fraction": log[-1]["frozen_fraction"],
                    "kmeans_l_d": found["kmeans"][0],
                    "hard_l_d": found["hard"][0],
                    "kmeans_eps_error": found["kmeans"][1],
                    "hard_eps_error": found["hard"][1],
                },
                "time_s": {
                    **{s: t for s, t in self._times(log).items() if s not in ("evaluate", "report")},
                    "evaluate": round(time.perf_counter() - begun, 3),
                },
                "recipe": {
                    "sampler": self.config.sample.sampler,
                    "steps": self.config.sample.steps,
                    "cfg_scale": self.config.sample.cfg_scale,
                    "seed": self.config.seed,
                    "batch": self.config.sample.batch,
                    "devices": _devices(),
                    "versions": _versions(),
                },
            }
            files.write_json(self.dir.metrics, metrics)

    def _times(self, log: list[dict]) -> dict[str, float]:
        """Seconds of the stages; calibration counts the steps of all its attempts that were kept."""
        names = {"quantize": "kmeans"}
        times = {names.get(stage, stage): seconds for stage, seconds in self.dir.done().items()}
        return {**times, "calibrate": round(sum(line["seconds"] for line in log), 3)}

    def _quality(self) -> dict[str, dict]:
        c, originals = self.config.evaluation, self._load_images("fp")
        classifier = evaluation.load_classifier(c.classifier) if c.classifier else None
        reference = evaluation.load_reference(files.resolve(c.reference)) if c.classifier else None
        return {
            name: evaluation.evaluate(
                self._load_images(name), classifier, reference, None if name == "fp" else originals
            )
            for name in MODELS
        }

    def report(self) -> None:
        with self.dir.stage("report") as to_do:
            if not to_do:
                return
            metrics = json.loads(self.dir.metrics.read_text(encoding="utf-8"))
            model, _, _ = checkpoint.load_quantized(self.dir.quantized)
            images, names = self._grids(self.labels(model))
            data = reporting.ReportData(
                title=f"{metrics['model']['variant']} at {self.config.quantize.bits:g} bits",
                metrics=metrics,
                config=self.resolved,
                train_log=calibration.read_log(self.dir.log),
                layers=json.loads(self.dir.layers.read_text(encoding="utf-8")),
                images=images,
                labels=names,
                command=self.command,
            )
            reporting.write_report(self.dir.report, data)


def load_teacher(c: Any, key: jax.Array) -> tuple[DiT, Any]:
    """The model that a config's `model` section names, in float32."""
    from convert.download import official_checkpoint
    from convert.load import load_pretrained

    if c.random_init:
        overrides = {"input_size": c.input_size}
        overrides |= {name: c[name] for name in ("depth", "num_heads", "num_classes") if c[name]}
        model = variant(c.variant, **overrides)
        x, label = jnp.zeros((1, c.input_size, c.input_size, model.in_channels)), jnp.zeros((1,), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x, label, label)["params"]
        return model, quantization.random_params(shapes, key)
    path = files.resolve(c.checkpoint)
    if c.checkpoint.startswith("official:"):
        path = official_checkpoint(c.checkpoint.removeprefix("official:"))
    return load_pretrained(path, c.variant or None, num_heads=c.num_heads or None, num_classes=c.num_classes or None)


def _cast_kept(params: Any, dtype: str) -> Any:
    """Biases and kept layers in their stored type; the kernels that k-means sees stay as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: a if path[-1].key == "kernel" and path[0].key == "blocks" else a.astype(dtype), params
    )


def _round(params: Any, codebook_dtype: str, other_dtype: str) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, quantization.VQArray):
            return leaf.with_codebook(leaf.codebook.astype(codebook_dtype))
        return leaf.astype(other_dtype)

    return quantization.map_leaves(one, params)


def _title(config: Any, model: DiT) -> str:
    name = config.model.variant or f"DiT {model.depth}x{model.hidden_size}/{model.patch_size}"
    return f"{name}, {model.input_size}x{model.input_size}x{model.in_channels}"


def _devices() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version(), "vq4dit-jax": __version__}
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "faiss-cpu", "tensorflow", "tensorflow-gan"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
