"""Quality of anybody's samples: `python -m vq4dit_jax.evaluate SAMPLES.npz --reference=REF --features=NETWORK`.

Prints one JSON object: the figures, the reasons of those that are null, and the recipe they belong to.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from absl import logging

from vq4dit_jax import files
from vq4dit_jax.command_line import Parser, exit_code
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation import Classifier, Measurement, load_classifier, measure, open_images, open_reference
from vq4dit_jax.evaluation.images import checksum
from vq4dit_jax.evaluation.metrics import FIGURES
from vq4dit_jax.evaluation.monge import DIRECTIONS
from vq4dit_jax.evaluation.precision_recall import NEIGHBOURS
from vq4dit_jax.evaluation.tfgan import IS_SPLIT, KID_BLOCK
from vq4dit_jax.run import sources
from vq4dit_jax.storage import provenance

_DESCRIPTION = """\
Compares images with real ones and prints strict JSON: fid, sfid, mind, is, kid, precision, recall, fd768 (null where one
cannot be computed, with the reason under "reasons"), num_images, and under "recipe" all that the figures depend on."""
_EPILOG = """\
The Frechet distance is called fid on Inception's pool_3 features alone; on its mixed_7 features (incomplete weights) it
is fd768, and fd with any other network (the Monge distance: mind, md768, md; the kernel distance: kid, kd768, kd; the
Frechet distance on spatial features: sfid, sfd).
A recipe.json beside the samples, as `python -m vq4dit_jax.sample` writes it, becomes part of the recipe.

examples:
  python -m vq4dit_jax.evaluate samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --features=inception:pt_inception.pth
  python -m vq4dit_jax.evaluate png_folder/ --reference=asset:cifar10_reference.npz --features=cifar10_resnet56
docs/evaluation.md says which choices make figures comparable."""
_NAMES = {
    "pool_3": {"fd": "fid", "sfd": "sfid", "kd": "kid"},
    "mixed_7": {"fd": "fd768", "sfd": "sfid", "mind": "md768", "kd": "kd768"},
}
_OTHER = {"mind": "md"}
_ALWAYS = ("fid", "sfid", "mind", "is", "kid", "precision", "recall", "fd768")


def parser() -> Parser:
    out = Parser(
        "python -m vq4dit_jax.evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    add(
        "samples",
        metavar="SAMPLES",
        help="an .npz of uint8 images arr_0 (N, H, W, 3), or a folder of PNG or JPEG files",
    )
    add("--reference", required=True, metavar="REF", help="real images: a folder or an .npz of images, ADM's or "
        "pytorch-fid's .npz of moments, or a file of `python -m vq4dit_jax.evaluation.reference`")  # fmt: skip
    add("--features", required=True, metavar="NETWORK", help="feature network: inception:PATH or cifar10_resnet56")
    add("--num-images", type=int, metavar="N", help="use the first N samples (default: all)")
    add("--batch", type=int, metavar="B", help="images that the network computes at once (default: what suits it)")
    add("--out", metavar="FILE.json", help="write the JSON to this file too")
    return out


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input, with one line on stderr."""
    logging.set_verbosity(logging.WARNING)
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(flags: argparse.Namespace) -> None:
    samples, reference_path = pathlib.Path(flags.samples).expanduser(), pathlib.Path(sources.locate(flags.reference))
    if flags.batch is not None and flags.batch < 1:
        raise InputError(f"--batch={flags.batch}: wanted at least 1")
    out = None if flags.out is None else pathlib.Path(flags.out).expanduser()
    _check_output(out, (samples, reference_path))
    images = open_images(samples, flags.num_images)
    if not reference_path.exists():
        raise InputError(f"--reference={flags.reference}: no such file or folder")
    sampling = _sampling_recipe(samples, len(open_images(samples)))
    if isinstance(sampling, dict) and sampling.get("decoder") == sources.PREVIEW:
        raise InputError(
            f"{samples}: its recipe says that it is a {sources.PREVIEW}; sample again with --vae to evaluate"
        )
    classifier = load_classifier(sources.locate(flags.features))
    reference = open_reference(reference_path, classifier, batch_size=flags.batch)
    measured = measure(images, classifier, reference, flags.batch)
    figures, reasons = name_figures(measured, classifier)
    recipe = {
        "samples": {
            "file": str(samples),
            "sha256": checksum(samples),
            "num_images": len(images),
            "shape": images.shape[1:],
        },
        "sampling": sampling,
        "features": {
            "network": classifier.title,
            "layer": classifier.features,
            "width": measured.width,
            "weights_sha256": classifier.checksum,
        },
        "reference": {
            "file": str(reference_path),
            "sha256": checksum(reference_path),
            "source": reference.source,
            "num_images": reference.count,
            "feature_images": None if reference.features is None else len(reference.features),
        },
        "protocol": {
            "rounding": "uint8, as the samples are stored",
            "mind": f"{DIRECTIONS} directions of seed 0, quantile functions of all samples and feature images",
            "is": f"mean over consecutive splits of {IS_SPLIT} images",
            "kid": f"unbiased, blocks of at most {KID_BLOCK}, order permuted by seed 0, not multiplied by 1000",
            "precision_recall": f"{NEIGHBOURS} nearest neighbours, float64 distances, all samples",
        },
        "devices": provenance.devices(),
        "versions": provenance.versions(),
    }
    result = {"format": 1, **figures, "reasons": reasons, "num_images": len(images), "recipe": recipe}
    if out is not None:
        files.write_json(out, result)
    print(json.dumps(result, indent=1, allow_nan=False))


def name_figures(measured: Measurement, classifier: Classifier) -> tuple[dict[str, float | None], dict[str, str]]:
    """(figures, reasons) under the names that the feature network earns them: a fid is of Inception's pool_3 alone."""
    names = _NAMES.get(classifier.features, _OTHER)
    figures: dict[str, float | None] = dict.fromkeys(_ALWAYS)
    figures |= {names.get(name, name): measured.figures[name] for name in FIGURES}
    reasons = {names.get(name, name): reason for name, reason in measured.reasons.items()}
    for name in _ALWAYS:
        if figures[name] is None and name not in reasons:
            layer = {"fd768": "Inception's mixed_7", "sfid": "Inception's spatial"}.get(name, "Inception's pool_3")
            reasons[name] = f"it is defined on {layer} features; these are of {classifier.title}, {classifier.features}"
    return figures, reasons


def _check_output(out: pathlib.Path | None, inputs: tuple[pathlib.Path, ...]) -> None:
    if out is None:
        return
    try:
        files.check_target(out, "file")
    except InputError as error:
        raise InputError(f"--out={error}") from None
    if any(path.exists() and out.exists() and path.samefile(out) for path in inputs):
        raise InputError(f"--out={out} is a file to read; name another to write")


def _sampling_recipe(samples: pathlib.Path, count: int) -> Any:
    """What `recipe.json` beside the samples, or in their folder, says; None where there is none that can be theirs."""
    for folder in ([samples] if samples.is_dir() else []) + [samples.absolute().parent]:
        file = folder / "recipe.json"
        if not file.is_file():
            continue
        try:
            recipe = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
        except (OSError, ValueError, RecursionError) as error:
            logging.warning("left out of the recipe: %s is not readable as strict JSON: %s", file, error)
            return None
        made = recipe.get("num_images", count) if isinstance(recipe, dict) else count
        if made != count:
            logging.warning("left out of the recipe: %s is of %s images, and the samples are %d", file, made, count)
            return None
        return recipe
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
