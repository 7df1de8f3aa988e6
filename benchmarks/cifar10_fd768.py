"""A test of fd768 as a measure: CIFAR-10's training images against its test images, and half of the classes against the others.

    python -m benchmarks.cifar10_fd768 CIFAR10 WEIGHTS --out=benchmarks/results/cifar10_fd768.json

CIFAR10 has the folders train/CLASS and test/CLASS. A Frechet distance falls with the number of images, so all but the
first row compare sets of the same size, with as many images of each class, the first by name:

  all of train against test     the common comparison
  train against test            small: two draws of one distribution
  the same with half of each    how much of that is the number of images, and how much it varies between draws
  5 classes against the other 5 another distribution, with as many images as in the second row

Features are kept in `--cache`, 1,000 images to a file, so that a run that was stopped goes on. `--per-class=1000` needs 20,000
of the 60,000 images and leaves out the first row; two Zen 3 cores do 12 images/s (benchmarks/inception_speed.py).
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np

from vq4dit_jax import files
from vq4dit_jax.command_line import Parser, exit_code
from vq4dit_jax.evaluation import Classifier, extract_features, frechet_distance, load_inception
from vq4dit_jax.evaluation.images import open_images
from vq4dit_jax.progress import progress
from vq4dit_jax.storage import provenance

OUTPUTS = ("mixed_7", "spatial")
_CHUNK = 1000


def class_features(
    classifier: Classifier, folder: pathlib.Path, limit: int | None, cache: pathlib.Path
) -> dict[str, np.ndarray]:
    """Features of the first `limit` images of a folder, or of all, from the cache where they are there."""
    chunks = []
    for start, chunk in zip(range(0, limit or sys.maxsize, _CHUNK), open_images(folder).batches(_CHUNK)):
        chunk = chunk[: limit - start] if limit else chunk
        name = f"{folder.parent.name}_{folder.name}_{start}_{len(chunk)}_{classifier.checksum[:8]}.npz"
        if not (cache / name).exists():
            outputs = extract_features(classifier, chunk)
            with files.atomic_path(cache / name) as partial, open(partial, "wb") as file:
                np.savez(file, **{name: outputs[name] for name in OUTPUTS})
        with np.load(cache / name, allow_pickle=False) as kept:
            chunks.append({name: kept[name] for name in OUTPUTS})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in OUTPUTS}


def comparisons(features: dict[tuple[str, str], np.ndarray]) -> dict[str, dict]:
    """Distances between sets of images; `features` maps (split, class) to features (N, D)."""
    classes = sorted({name for _, name in features})
    count = min(map(len, features.values()))
    equal, first, second = slice(0, count), slice(0, count // 2), slice(count // 2, count)

    def join(splits: str, names: list[str], rows: slice = equal) -> np.ndarray:
        return np.concatenate([features[split, name][rows] for split in splits.split("+") for name in names])

    pairs = {}
    if any(len(features["train", name]) > count for name in classes):
        pairs["all of train against test"] = join("train", classes, slice(None)), join("test", classes, slice(None))
    pairs |= {
        "train against test": (join("train", classes), join("test", classes)),
        "first half of train against first half of test": (join("train", classes, first), join("test", classes, first)),
        "second half of train against second half of test": (
            join("train", classes, second),
            join("test", classes, second),
        ),
        "first half of train against its second half": (join("train", classes, first), join("train", classes, second)),
    }
    for name, group in {
        f"{classes[0]}...{classes[4]} against the others": classes[:5],
        f"{', '.join(classes[::2])} against the others": classes[::2],
    }.items():
        pairs[name] = join("train+test", group), join("train+test", [c for c in classes if c not in group])
    return {name: {"distance": frechet_distance(a, b), "images": [len(a), len(b)]} for name, (a, b) in pairs.items()}


def main(arguments: list[str]) -> None:
    parser = Parser("python -m benchmarks.cifar10_fd768", description=__doc__.splitlines()[0])
    parser.add_argument("images", metavar="CIFAR10", type=pathlib.Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("weights", metavar="WEIGHTS", help="of Inception, for load_inception")
    parser.add_argument(
        "--per-class", type=int, metavar="N", help="only the first N images of each class and split (default: all)"
    )
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("runs/cifar10_fd768"), help="default: %(default)s"
    )
    parser.add_argument("--out", required=True, metavar="FILE.json")
    flags: argparse.Namespace = parser.parse_args(arguments)
    classifier = load_inception(flags.weights)
    folders = sorted(path for split in ("test", "train") for path in (flags.images / split).iterdir())
    found = {}
    for folder in progress(folders, "features", "folder"):
        found[folder.parent.name, folder.name] = class_features(classifier, folder, flags.per_class, flags.cache)
    result = {
        "command": "python -m benchmarks.cifar10_fd768 " + " ".join(arguments),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "network": classifier.title,
        "weights_sha256": classifier.checksum,
        "devices": provenance.devices(),
        "versions": provenance.versions(),
        "fd768": comparisons({key: value["mixed_7"] for key, value in found.items()}),
        "sfid": comparisons({key: value["spatial"] for key, value in found.items()}),
    }
    files.write_json(flags.out, result)
    for name, row in result["fd768"].items():
        print(f"{row['distance']:9.4f}  {name} ({row['images'][0]:,} and {row['images'][1]:,} images)")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
