"""Reference statistics of real images, as a command.

    python -m vq4dit_jax.evaluation.reference cifar10/test assets/cifar10_reference.npz --classifier=cifar10_resnet56

made the shipped file from the 10,000 test images of CIFAR-10 (JPEG).
"""

import argparse
import pathlib
import sys

from vq4dit_jax import files
from vq4dit_jax.command_line import Parser, exit_code
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.classifiers import load_classifier
from vq4dit_jax.evaluation.real_images import open_reference
from vq4dit_jax.evaluation.statistics import save_reference


def parser() -> Parser:
    out = Parser(
        "python -m vq4dit_jax.evaluation.reference",
        description="Computes what the quality metrics need of a set of real images, and writes it to one .npz file.",
        allow_abbrev=False,
    )
    add = out.add_argument
    add("images", metavar="IMAGES", help="a folder of images of one size (JPEG, PNG, ...), also in subfolders; an .npz of "
        "uint8 images arr_0 (N, H, W, 3); or ADM's reference .npz, whose moments are then taken over")  # fmt: skip
    add("output", metavar="OUT.npz", help="the file to write; an old one is replaced")
    add("--classifier", default="cifar10_resnet56", metavar="NETWORK",
        help="feature network: a name, or inception:PATH (default: %(default)s)")  # fmt: skip
    add(
        "--source",
        help='what the images are, as reports print it (default: by the path, such as "10,000 test images (JPEG)")',
    )
    add("--batch", type=int, metavar="B", help="images that the network computes at once (default: what suits it)")
    return out


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input, with one line on stderr."""
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(flags: argparse.Namespace) -> None:
    output = pathlib.Path(flags.output)
    if output.is_dir():
        raise InputError(f"{output} is a folder; name the .npz file to write")
    if output.exists() and output.samefile(flags.images):
        raise InputError(f"{output} is the file to read; name another to write")
    if flags.batch is not None and flags.batch < 1:
        raise InputError(f"--batch={flags.batch}: wanted at least 1")
    classifier = load_classifier(flags.classifier)
    reference = open_reference(files.resolve(flags.images), classifier, flags.source, flags.batch)
    save_reference(output, reference)
    print(f"{output}: {classifier.title} against {reference.source}, sha256 {reference.checksum}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
