"""Results of a training run: the weights as a checkpoint of facebookresearch/DiT, samples, figures, the model card."""

import dataclasses
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from convert.facebook import FACEBOOK
from examples.data import Dataset
from examples.training import Recipe
from vq4dit_jax import evaluation, files, npz, reporting
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.run import generation
from vq4dit_jax.storage import provenance
from vq4dit_jax.storage.identity import Claim

_ROWS = 8
PROTOCOL = dict(sampler="ddpm", steps=50, cfg_scale=1.5, labels="balanced", seed=0)


def write_pretrained(file: str | os.PathLike, model: DiT, params: Any, metadata: dict[str, str]) -> None:
    """Writes dense parameters in float16 under facebookresearch/DiT's names; `load_pretrained` reads the file.

    The number of heads, which shapes do not tell, goes into the file's metadata. InputError where float16 cannot hold a
    number.
    """
    from safetensors.numpy import save_file

    leaves, tensors = flax.traverse_util.flatten_dict(params, sep="/"), {}
    for rule in FACEBOOK.rules:
        leaf = np.asarray(leaves[rule.path])
        with np.errstate(over="ignore"):
            narrow = leaf.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise InputError(f"{rule.path} holds {np.abs(leaf).max():.4g}, which float16 cannot; the training diverged")
        for name, part in zip(rule.names(model.depth), narrow if rule.stacked else [narrow], strict=True):
            tensors[name] = np.ascontiguousarray(rule.kind.back(part))
    with files.atomic_path(file) as partial:
        save_file(tensors, partial, metadata={"num_heads": str(model.num_heads), **metadata})
        partial.chmod(0o644)  # save_file lets only the owner read


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of weights. `started_from` are the weights that the training began with, None for random ones."""

    step: int
    recipe: Recipe
    data: Dataset
    started_from: str | None
    command: str


def write_all(workdir: pathlib.Path, model: DiT, params: Any, origin: Origin, eval_images: int) -> None:
    """Writes model.safetensors, samples.png, metrics.json and model_card.md; files of an earlier step are replaced."""
    from convert.load import load_pretrained

    file = workdir / "model.safetensors"
    made = f"`{origin.command}`, averaged weights of step {origin.step}"
    write_pretrained(file, model, params, {"origin": made, "licence": "Apache-2.0"})
    # All that follows uses the file, as others will read it.
    model, params = load_pretrained(file)
    samples = sample(workdir / "samples", model, params, max(eval_images, _ROWS * model.num_classes))
    reporting.write_grid(
        workdir / "samples.png", npz.read_head(samples, _ROWS * model.num_classes), columns=model.num_classes
    )
    metrics = {"step": origin.step, **(measure(samples, eval_images) if eval_images else {})}
    files.write_json(workdir / "metrics.json", metrics)
    files.write_text(workdir / "model_card.md", model_card(model, params, origin, metrics))
    print(f"{file}: step {origin.step} of {origin.recipe.steps}; {spell(metrics)}")


def sample(folder: pathlib.Path, model: DiT, params: Any, count: int) -> pathlib.Path:
    """`count` images in `folder`/samples.npz; continues an earlier run that was killed, unless it was of other weights."""
    recipe = {"num_images": count, **PROTOCOL, "model_sha256": provenance.digest(params)}
    target = folder / "samples.npz"
    claim = Claim(folder / "recipe.json", recipe)
    if claim.differing():
        files.remove(folder)
    claim.take()
    if not target.exists():
        plan = generation.Plan(count, **{name: value for name, value in PROTOCOL.items() if name != "seed"})
        generation.generate(plan, model, params, jax.random.key(PROTOCOL["seed"]), target, lambda x: x)
    return target


def measure(samples: pathlib.Path, count: int) -> dict[str, Any]:
    """Quality against CIFAR-10's test images, and how often the classifier sees the class that was asked for."""
    classifier = evaluation.load_classifier("cifar10_resnet56")
    reference = evaluation.load_reference(files.asset("cifar10_reference.npz"))
    images = npz.read_head(samples, count)
    figures, reasons = evaluation.evaluate_with_reasons(images, classifier, reference)
    for comparison in (figures, reasons):
        for name in evaluation.TO_FULL_PRECISION:
            del comparison[name]
    logits = classifier(images)["logits"]
    asked = np.arange(count) % logits.shape[1]  # the labels of PROTOCOL
    return {**figures, "class_agreement": float(np.mean(logits.argmax(1) == asked)), "reasons": reasons}


_CARD = """\
# A class-conditional DiT on {images:,} images of {m.input_size} x {m.input_size} pixels

`model.safetensors`: averaged weights of step {step} of {r.steps} in float16, under facebookresearch/DiT's parameter names. The
number of attention heads, which shapes do not tell, stands in the file's metadata.

| | |
|---|---|
| network | a Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748) in pixel space: it predicts noise and variance |
| size | width {m.hidden_size}, {m.depth} blocks, {m.num_heads} heads, patches of side {m.patch_size}, {parameters:,} numbers |
| input | images in [-1, 1], time steps 0 to 999, labels 0 to {last}, and {m.num_classes} for the null label of guidance |
| classes | {classes}, in this order |
| trained on | {images:,} images with flips; SHA-256 of images and labels {sha256} |
| from | {started} |
| objective | linear schedule of 1000 steps; squared error of the noise + L_vlb of the variance |
| labels | dropped at {r.label_dropout}, for guidance |
| length | {step} steps of batch {r.batch} ({epochs:.1f} epochs), seed {r.seed} |
| optimizer | AdamW without weight decay, {r.warmup} steps of warm-up to {r.learning_rate:g}, a cosine to 0 at step {r.steps} |
| | gradients clipped at norm {r.clip:g}; EMA {r.ema:g}; computed in {r.dtype} |
| with | {devices}; {versions} |
| command | `{command}` |
| figures | {figures} |

Figures are of 50 steps of DDPM with guidance 1.5, seed 0, balanced labels. `samples.png`: {rows} of each class, in columns.

```python
import vq4dit_jax as vq

model, params = vq.load_pretrained("model.safetensors")
```
"""


def model_card(model: DiT, params: Any, origin: Origin, metrics: dict[str, Any]) -> str:
    data = origin.data
    return _CARD.format(
        m=model,
        r=origin.recipe,
        step=origin.step,
        images=len(data.images),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        last=model.num_classes - 1,
        classes=", ".join(data.classes),
        sha256=data.sha256,
        started=f"the weights `{origin.started_from}`" if origin.started_from else "random weights",
        epochs=origin.step / (len(data.images) // origin.recipe.batch),
        devices=provenance.devices(),
        versions=", ".join(f"{name} {version}" for name, version in provenance.versions().items()),
        command=origin.command,
        figures=spell(metrics),
        rows=_ROWS,
    )


def spell(metrics: dict[str, Any]) -> str:
    """The figures in a line for people; those that are null say why."""
    if "num_images" not in metrics:
        return "not computed"
    names = {"fd": "Frechet distance", "sfd": "sFD", "mind": "Monge distance", "is": "IS", "precision": "precision",
             "recall": "recall"}  # fmt: skip
    names = {k: name for k, name in names.items() if k in metrics}
    parts = [f"{names[k]} {metrics[k]:.4g}" for k in names if metrics[k] is not None]
    parts += [f"{names[k]} not computed ({metrics['reasons'][k]})" for k in names if metrics[k] is None]
    agreement = f"the classifier agrees with the label of {metrics['class_agreement']:.1%}"
    return f"{', '.join(parts)}, {agreement}; {metrics['num_images']:,} images, {metrics['features']}"
