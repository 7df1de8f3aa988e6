"""The stages of a run, in order: load, quantize, calibrate, export, sample, evaluate, report.

Each writes its files beside and renames them, and is then marked done in `stages.json`; a run that was killed goes
on with the first stage that is not, and ends with the same figures.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from vq4dit_jax import __version__, evaluation, files, methods, npz, reporting
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.agreement import held_out_agreement
from vq4dit_jax.methods.method import FULL_PRECISION, Model
from vq4dit_jax.networks import dit, inference
from vq4dit_jax.networks.dit import DiT, parameter_shapes, variant
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.qarray.tree import quantized_paths, random_params, sizes
from vq4dit_jax.reporting.layers import layer_table
from vq4dit_jax.run import checks, generation, seeds, sources, summary
from vq4dit_jax.run import config as configs
from vq4dit_jax.run.generation import Decoder, Plan
from vq4dit_jax.run.seeds import HELD_OUT, INIT, KMEANS, SAMPLES, TRAJECTORIES
from vq4dit_jax.run.workdir import Workdir
from vq4dit_jax.storage import checkpoint


def run(config: Any, workdir: str, command: str) -> None:
    """Runs what is not yet done of a validated config in `workdir`."""
    Pipeline(config, Workdir(workdir), command).run()


class Pipeline:
    """One run. The models are loaded when a stage first needs them, so a resumed run loads only what it uses."""

    def __init__(self, config: Any, workdir: Workdir, command: str):
        self.config, self.dir, self.command = config, workdir, command
        self.resolved = configs.as_json(config)

    def run(self) -> None:
        with self.dir.claim(self.resolved, lambda: self.digests) as finished:
            if finished:
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
        return seeds.stream(self.config.seed, stream)

    @functools.cached_property
    def teacher(self) -> tuple[DiT, Any]:
        """The full-precision model."""
        return load_teacher(self.config.model, self.key(INIT))

    @functools.cached_property
    def models(self) -> tuple[Model, ...]:
        """What this run makes, the final model last."""
        return configs.models(self.config)

    @functools.cached_property
    def source(self) -> Any:
        """What the final model is a quantized form of: the teacher's parameters, or others of the same function."""
        model, teacher = self.teacher
        return self.models[-1].source(as_network(model), teacher)

    @property
    def names(self) -> list[str]:
        """Of all models that are sampled and evaluated, full precision first."""
        return [FULL_PRECISION, *(model.name for model in self.models)]

    def _names(self, steps: int) -> list[str]:
        """Those that are sampled in so many steps: all in the config's own number, else full precision and the final one."""
        return self.names if steps == self.config.sample.steps else [self.names[0], self.names[-1]]

    @functools.cached_property
    def first(self) -> Any:
        """The model before calibration."""
        return checkpoint.load_quantized(self.dir.made(self.models[0].name))[1]

    @functools.cached_property
    def packed(self) -> tuple[DiT, Any]:
        """The final model as a user would load it."""
        return checkpoint.load_quantized(self.dir.quantized)[:2]

    @functools.cached_property
    def found(self) -> dict[str, str]:
        """Where the VAE, the feature network and the real images are; "" where there are none and one can do without."""
        return {
            "vae": self._locate("model", "vae", "the pictures are then a preview"),
            "classifier": self._locate("evaluation", "classifier", "quality figures are then null"),
            "reference": self._locate("evaluation", "reference", "quality figures are then null"),
        }

    def _locate(self, section: str, name: str, without: str) -> str:
        value, untrained = self.config[section][name], self.config.model.random_init
        try:
            return sources.locate(value, download=not untrained)
        except InputError as error:
            # A trained model whose latents cannot be decoded is of no use; without quality figures it is.
            if not value.startswith(sources.OFFICIAL) or (name == "vae" and not untrained):
                raise InputError(f"--config.{section}.{name}={value}: {error}; or leave it empty, {without}") from None
            logging.warning("--config.%s.%s=%s: %s; %s", section, name, value, error, without)
            return ""

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """What identifies the files that the config names, by key. Files that are not there are the load stage's business."""
        c = self.config
        named = {
            "model.checkpoint": "" if c.model.random_init else sources.locate(c.model.checkpoint),
            "model.vae": self.found["vae"],
            "evaluation.classifier": self.found["classifier"],
            "evaluation.reference": self.found["reference"],
        }
        there = {key: path for key, path in named.items() if path and os.path.exists(path)}
        return {key: sources.fingerprint(path, images=key == "evaluation.reference") for key, path in there.items()}

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Samples to images in [-1, 1]."""
        return sources.open_decoder(self.found["vae"], as_network(self.teacher[0]).sample_shape[-1])[0]

    @functools.cached_property
    def evaluator(self) -> sources.Evaluator:
        """The feature network and the real images of the quality figures, or why there are none."""
        if as_network(self.teacher[0]).sample_shape[-1] not in (1, 3) and not self.found["vae"]:
            return sources.Evaluator(reason="the samples are latents, and there is no VAE to decode them")
        if not self.config.evaluation.classifier:
            return sources.Evaluator(reason="no feature network is configured")
        if not (self.found["classifier"] and self.found["reference"]):
            return sources.Evaluator(reason="the feature network or the real images were not to be had on this machine")
        return sources.open_evaluator(self.found["classifier"], self.found["reference"])

    def params(self, name: str) -> Any:
        if name == FULL_PRECISION:
            return self.teacher[1]
        return self.packed[1] if name == self.names[-1] else checkpoint.load_quantized(self.dir.made(name))[1]

    # Stages ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        with self.dir.stage("load") as to_do:
            if to_do:
                model, params = self.teacher
                # What is missing or does not fit is said before hours of work, not after.
                self._check_targets()
                _ = self.decoder
                checks.check(self.config, model, params)
                for folder in self.config.beside:
                    sources.check_beside(Workdir(folder), self.digests)
                if self.found["classifier"] and self.found["reference"]:
                    sources.check_evaluator(self.found["classifier"], self.found["reference"])
                logging.info("%s: %d parameters", _title(self.config, model), sizes(params).parameters)

    def _check_targets(self) -> None:
        d = self.dir
        for file in (d.metrics, d.log, d.safetensors, d.layers, d.table, d.table_json, d.report):
            files.check_target(file, "file")
        for folder in (d.quantized, *(d.made(model.name) for model in self.models)):
            files.check_target(folder, "folder")

    def quantize(self) -> None:
        """The first model: every matrix that the rules name, on its own."""
        with self.dir.stage("quantize") as to_do:
            if to_do:
                self._make(self.models[0], self.source, self.key(KMEANS))

    def calibrate(self) -> None:
        """The models after it."""
        with self.dir.stage("calibrate") as to_do:
            if not to_do:
                return
            params = self.first
            for model in self.models[1:]:
                params = self._make(model, params, self.key(TRAJECTORIES))

    def _make(self, made: Model, params: Any, key: jax.Array) -> Any:
        """Runs the passes of a model on the one before it, and keeps the result."""
        model, _ = self.teacher
        target = self.dir.made(made.name)
        context = methods.begin(
            model,
            self.source,
            key,
            target.with_name(f"{made.name}_passes"),
            log_file=self.dir.log,
            save_every=self.config.calibration.save_every,
        )
        try:
            params, reports = methods.apply(made.passes, context, params)
            checkpoint.save_quantized(target, model, params, {"model": made.name, "passes": reports})
        except BaseException:
            with contextlib.suppress(OSError):  # an empty folder says nothing; one that holds results stays
                context.folder.rmdir()
            raise
        files.remove(context.folder)
        return params

    def export(self) -> None:
        """Writes the model in both formats, and the table of layers."""
        with self.dir.stage("export") as to_do:
            if not to_do:
                return
            model, _ = self.teacher
            _, packed, _ = checkpoint.load_quantized(self.dir.made(self.names[-1]))
            extra = {"config": self.resolved, "vq4dit_jax": __version__}
            checkpoint.save_quantized(self.dir.quantized, model, packed, extra)
            checkpoint.save_safetensors(self.dir.safetensors, model, packed, extra)
            files.write_json(self.dir.layers, layer_table(self.source, self.first, packed))

    def sample(self) -> None:
        """The same seeds and labels for every model; for each further number of steps those of the table."""
        with self.dir.stage("sample") as to_do:
            if not to_do:
                return
            model, _ = self.teacher
            for steps in self._all_steps():
                for name in self._names(steps):
                    if not self._npz(name, steps).exists() and not (name == FULL_PRECISION and self._borrow(steps)):
                        generation.generate(
                            self._plan(steps),
                            model,
                            self._sampling_params(name),
                            self.key(SAMPLES),
                            self._npz(name, steps),
                            self.decoder,
                            f"sample {name}, {steps} steps",
                        )
            images, names = self._grids(model)
            columns = min(8, len(names))
            for name in (self.names[0], self.names[-1]):
                reporting.write_grid(self.dir.samples / f"{name}.png", images[name], columns)
            reporting.write_comparison(self.dir.samples / "comparison.png", images, names)

    def _sampling_params(self, name: str) -> Any:
        c = self.config.sample
        model, params = self.teacher[0], self.params(name)
        return params if name == FULL_PRECISION else inference.for_sampling(model, params, c.activations, c.cfg_scale)

    def _all_steps(self) -> list[int]:
        return [self.config.sample.steps, *self.config.sample.more_steps]

    def _plan(self, steps: int) -> Plan:
        c = self.config.sample
        return Plan(c.num_images, c.batch, c.labels, c.sampler, steps, c.cfg_scale)

    def _npz(self, name: str, steps: int) -> pathlib.Path:
        suffix = "" if steps == self.config.sample.steps else f"_{steps}"
        return self.dir.samples / f"{name}{suffix}.npz"

    def _borrow(self, steps: int) -> bool:
        """Takes the full-precision samples of a run beside this one that sampled the same model in the same way."""
        for folder in map(pathlib.Path, self.config.beside):
            theirs = Workdir(folder)
            same = sources.same_samples(theirs, self.resolved, self.digests)
            source = theirs.samples / self._npz(FULL_PRECISION, steps).name
            if same and source.exists():
                with files.atomic_path(self._npz(FULL_PRECISION, steps)) as partial:
                    try:
                        os.link(source, partial)
                    except OSError:  # another file system
                        shutil.copyfile(source, partial)
                return True
        return False

    def _grids(self, model: DiT) -> tuple[dict[str, np.ndarray], list[str]]:
        """The first images of every model and the names of their classes."""
        c = self.config.sample
        count = min(c.grid_images, c.num_images)
        images = {name: npz.read_head(self._npz(name, c.steps), count) for name in self.names}
        conditioning = as_network(model).conditioning
        cond = conditioning.choose(c.labels, self.key(SAMPLES), np.arange(count))
        return images, conditioning.titles(cond, list(self.config.evaluation.class_names))

    def evaluate(self) -> None:
        begun = time.perf_counter()
        with self.dir.stage("evaluate") as to_do:
            if not to_do:
                return
            model, teacher = self.teacher
            _, packed = self.packed
            held_out = held_out_agreement(
                model,
                teacher,
                {self.names[1]: self.first, self.names[-1]: packed},
                self.config.calibration.cfg_scale,
                self.key(HELD_OUT),
            )
            size = sizes(packed)
            quality = {
                (name, steps): self._quality(name, steps) for steps in self._all_steps() for name in self._names(steps)
            }
            rows = [
                summary.table_row(name, steps, self.config, size, found)
                for (name, steps), found in quality.items()
                if name in (self.names[0], self.names[-1])
            ]
            rows += [row for folder in self.config.beside for row in files.read_json(Workdir(folder).table_json, list)]
            files.write_json(self.dir.table_json, rows)
            title = _title(self.config, model)
            files.write_text(self.dir.table, reporting.markdown(title, rows, self.command))
            main = {name: quality[name, self.config.sample.steps] for name in self.names}
            log = methods.read_log(self.dir.log)
            seconds = time.perf_counter() - begun
            found = summary.metrics(self.dir, self.config, title, size, main, held_out, log, seconds)
            files.write_json(self.dir.metrics, found)

    def _quality(self, name: str, steps: int) -> dict[str, Any]:
        """The figures of one set of samples, and under "reasons" why some are null."""
        original = None if name == FULL_PRECISION else self._npz(FULL_PRECISION, steps)
        evaluator = self.evaluator
        found, reasons = evaluation.evaluate_with_reasons(
            self._npz(name, steps), evaluator.classifier, evaluator.reference, original
        )
        return {**found, "reasons": {"all figures": evaluator.reason} if evaluator.reason else reasons}

    def report(self) -> None:
        with self.dir.stage("report") as to_do:
            if not to_do:
                return
            metrics = files.read_json(self.dir.metrics)
            model, _, _ = checkpoint.load_quantized(self.dir.quantized)
            images, names = self._grids(model)
            data = reporting.ReportData(
                title=f"{metrics['model']['variant']} at {configs.bits(self.config):g} bits",
                metrics=metrics,
                config=self.resolved,
                train_log=methods.read_log(self.dir.log),
                layers=files.read_json(self.dir.layers, list),
                table=files.read_json(self.dir.table_json, list),
                images=images,
                labels=names,
                command=self.command,
                passes=checkpoint.load_metadata(self.dir.made(self.names[-1]))["extra"]["passes"],
            )
            reporting.write_report(self.dir.report, data)


def load_teacher(c: Any, key: jax.Array) -> tuple[DiT, Any]:
    """The model that a config's `model` section names, in float32."""
    if c.random_init:
        overrides = {"input_size": c.input_size}
        overrides |= {name: c[name] for name in ("depth", *dit.SETTINGS) if c[name]}
        model = variant(c.variant, **overrides)
        return model, random_params(parameter_shapes(model), key)
    model, params = sources.open_pretrained(c.checkpoint, c.variant, **{name: c[name] for name in dit.SETTINGS})
    if packed := quantized_paths(params):
        raise InputError(
            f"--config.model.checkpoint={c.checkpoint} holds int8 weights already ({packed[0]}, ...); a run quantizes a model in "
            "full precision; give that one, or sample from this file with python -m vq4dit_jax.sample"
        )
    return model, params


def _title(config: Any, model: DiT) -> str:
    name = config.model.variant or f"DiT {model.depth}x{model.hidden_size}/{model.patch_size}"
    return f"{name}, {model.input_size}x{model.input_size}x{model.in_channels}"
