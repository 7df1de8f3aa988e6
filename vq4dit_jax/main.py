"""python -m vq4dit_jax.main --config=configs/xl2_256_w2.py --workdir=DIR [--config.section.key=value ...]

Quantizes a Diffusion Transformer to a few bits a weight by VQ4DiT, saves it packed, samples it beside the original
and reports sizes and quality in DIR. Run again, it goes on where it stopped.

  --config=FILE               what to run: a file, the name of one that ships (configs/cifar10_w2.py, ...), or a run's config.json
  --workdir=DIR               where everything goes; a new folder, or that of a run to continue
  --config.section.key=value  changes one value, for example --config.calibration.steps=100
  --help                      this text, and with --config=FILE its notes and all its keys
"""

import shlex
import sys

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vq4dit_jax.command_line import exit_code
from vq4dit_jax.errors import InputError
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import pipeline, programs


def parse(arguments: list[str]) -> tuple[ConfigDict, str]:
    """(config, workdir) of the command line; InputError for anything that cannot be used."""
    file, rest = _config_argument(arguments)
    if file is None:
        raise InputError("--config=FILE is missing, for example --config=configs/cifar10_w2.py; --help says more")
    config = programs.load(file)["get_config"]()
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "where everything goes", flag_values=values)
    command_line = ["vq4dit", *rest]
    try:
        config_flags.DEFINE_config_dict("config", config, "", flag_values=values, sys_argv=command_line)
        left = values(command_line)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{error}; `--config={file} --help` lists the keys") from None
    if left:
        raise InputError(f"cannot use the argument {left[0]!r}; options are written --name=value")
    if not values.workdir:
        raise InputError("--workdir=DIR is missing: the folder where everything goes")
    configs.validate(config)
    return config, values.workdir


def _config_argument(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(the file that --config names, or None; the other arguments). Both --config=FILE and --config FILE."""
    file, rest, left = None, [], list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name.lstrip("-") == "config" and name.startswith("-"):
            file = value if equals else (left.pop(0) if left else None)
        else:
            rest.append(name + equals + value)
    return file, rest


def help_text(arguments: list[str]) -> str:
    """The text above, and the notes and keys of the config that is named."""
    file, _ = _config_argument(arguments)
    if file is None:
        return __doc__
    module = programs.load(file)
    return f"{__doc__}\n{module.get('__doc__') or ''}\nKeys and their values:\n{module['get_config']()}"


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input, with one line on stderr."""
    logging.set_verbosity(logging.WARNING)
    return exit_code(lambda: _main(arguments))


def _main(arguments: list[str]) -> None:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(help_text(arguments))
        return
    config, workdir = parse(arguments)
    pipeline.run(config, workdir, "python -m vq4dit_jax.main " + shlex.join(arguments))


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
