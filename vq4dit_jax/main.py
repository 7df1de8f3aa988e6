"""python -m vq4dit_jax.main --config=configs/xl2_256_w2.py --workdir=DIR [--config.section.key=value ...]

Quantizes a Diffusion Transformer to a few bits a weight by VQ4DiT, saves it packed, samples it beside the original
and reports sizes and quality in DIR. Run again, it goes on where it stopped.

  --config=FILE               what to run: a file, or the name of one that ships (configs/cifar10_w2.py, ...)
  --workdir=DIR               where everything goes; a new folder, or that of a run to continue
  --config.section.key=value  changes one value, for example --config.calibration.steps=100
  --help                      this text, and with --config=FILE its notes and all its keys
"""

import runpy
import shlex
import sys

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vq4dit_jax import config as configs
from vq4dit_jax import files, pipeline
from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.workdir import is_disk_full


def parse(arguments: list[str]) -> tuple[ConfigDict, str]:
    """(config, workdir) of the command line; InputError for anything that cannot be used."""
    values = flags.FlagValues()
    named = [a.partition("=")[2] for a in arguments if a.startswith(("--config=", "-config="))]
    if not named:
        raise InputError("--config=FILE is missing, for example --config=configs/cifar10_w2.py; --help says more")
    file = str(files.config_file(named[-1]))
    arguments = [f"--config={file}" if a.startswith(("--config=", "-config=")) else a for a in arguments]
    config_flags.DEFINE_config_file("config", None, "what to run", flag_values=values)
    flags.DEFINE_string("workdir", None, "where everything goes", flag_values=values)
    try:
        rest = values(["vq4dit", *arguments])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{error}; `--config={named[-1]} --help` lists the keys") from None
    if rest:
        raise InputError(f"cannot use the argument {rest[0]!r}; options are written --name=value")
    if not values.workdir:
        raise InputError("--workdir=DIR is missing: the folder where everything goes")
    configs.validate(values.config)
    return values.config, values.workdir


def help_text(arguments: list[str]) -> str:
    """The text above, and the notes and keys of the config that is named."""
    text = __doc__
    for argument in arguments:
        if argument.startswith("--config="):
            module = runpy.run_path(str(files.config_file(argument.partition("=")[2])))
            text += f"\n{module.get('__doc__') or ''}\nKeys and their values:\n{module['get_config']()}"
    return text


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input, with one line on stderr."""
    logging.set_verbosity(logging.WARNING)
    try:
        if not arguments or "--help" in arguments or "-h" in arguments:
            print(help_text(arguments))
            return 0
        config, workdir = parse(arguments)
        pipeline.run(config, workdir, "python -m vq4dit_jax.main " + shlex.join(arguments))
        return 0
    except (InputError, MissingExtraError) as error:
        message = str(error)
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = f"the disk is full, or a file may grow no larger: {error}; make room and run the same command again"
    print("vq4dit: " + " ".join(message.split()), file=sys.stderr)
    return 2


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
