"""Reference statistics of real images.

    python -m vq4dit_jax.evaluation.reference cifar10/test assets/cifar10_reference.npz --classifier=cifar10_resnet56

made the shipped file from the 10,000 test images of CIFAR-10 (JPEG).
"""

import argparse
import os
import pathlib
import sys

import numpy as np
from PIL import Image
from tqdm import tqdm

from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.classifiers import Classifier, extract_features, load_classifier
from vq4dit_jax.evaluation.statistics import ReferenceStatistics, moments, save_reference

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WebP", ".bmp": "BMP"}


def find_images(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Image files (JPEG, PNG, WebP, BMP) in a folder and all below it, sorted by path. InputError if there are none."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _FORMATS)
    if not paths:
        raise InputError(f"{folder}: no images in it; files named {', '.join(sorted(_FORMATS))} are read")
    return paths


def read_images(paths: list[pathlib.Path]) -> np.ndarray:
    """Image files of one size -> uint8 (N, H, W, 3). InputError names a file that cannot be read or does not fit."""
    images = None
    for index, path in enumerate(tqdm(paths, desc="reading", unit=" image", disable=None, leave=False)):
        try:
            with Image.open(path) as file:
                image = np.asarray(file.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: not readable as an image: {error}") from None
        if images is None:
            images = np.empty((len(paths), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise InputError(f"{path}: {_size(image)} pixels, but {paths[0]} has {_size(images[0])}; resize them alike")
        images[index] = image
    return images


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def compute_reference(images: np.ndarray, classifier: Classifier, source: str) -> ReferenceStatistics:
    """Statistics of uint8 images (N, H, W, 3), N >= 2. `source` says what they are; see `ReferenceStatistics`."""
    if len(images) < 2:
        raise InputError(f"{source}: {len(images)} images; at least 2 are wanted for a covariance")
    outputs = extract_features(classifier, images)
    features, spatial = outputs[classifier.features], outputs["spatial"]
    if not (np.isfinite(features).all() and np.isfinite(spatial).all()):
        raise InputError(f"{source}: {classifier.title} gives features that are not finite numbers")
    fits = np.abs(features).max() <= np.finfo(np.float16).max
    mu_s, sigma_s = moments(spatial)
    return ReferenceStatistics(
        *moments(features),
        mu_s,
        sigma_s.astype(np.float32).astype(np.float64),  # so that a saved and loaded copy is the same
        features.astype(np.float16 if fits else np.float32),
        classifier.name,
        source,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vq4dit_jax.evaluation.reference",
        description="Computes what the quality metrics need of a set of real images, and writes it to one .npz file.",
    )
    parser.add_argument(
        "folder", metavar="IMAGE_FOLDER", help="images of one size (JPEG, PNG, ...), also in subfolders"
    )
    parser.add_argument("output", metavar="OUT.npz", help="the file to write; an old one is replaced")
    parser.add_argument("--classifier", default="cifar10_resnet56", help="feature network (default: %(default)s)")
    parser.add_argument(
        "--source",
        help='what the images are, as reports print it (default: by the folder, such as "10,000 test images (JPEG)")',
    )
    flags = parser.parse_args(arguments)
    try:
        classifier = load_classifier(flags.classifier)
        paths = find_images(flags.folder)
        formats = "/".join(sorted({_FORMATS[path.suffix.lower()] for path in paths}))
        source = flags.source or f"{len(paths):,} {pathlib.Path(flags.folder).resolve().name} images ({formats})"
        reference = compute_reference(read_images(paths), classifier, source)
        save_reference(flags.output, reference)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{flags.output}: {classifier.title} against {reference.source}, sha256 {reference.checksum}")


if __name__ == "__main__":
    main()
