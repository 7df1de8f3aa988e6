"""Many images from one model: `python -m vq4dit_jax.sample --checkpoint=quantized/ --num-images=50000 --out=DIR`.

A command only: in Python `vq4dit_jax.sample` is the function of `vq4dit_jax.networks.sampling`, and `vq4dit_jax.run.generation`
does the work.
"""

import argparse
import pathlib
import sys

import jax
from absl import logging

from vq4dit_jax import files, npz, reporting
from vq4dit_jax.command_line import Parser, exit_code
from vq4dit_jax.diffusion.samplers import sampler_for
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks import inference
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.run import generation, seeds, sources
from vq4dit_jax.run.generation import Plan
from vq4dit_jax.storage import provenance
from vq4dit_jax.storage.identity import Claim

_DESCRIPTION = """\
Samples images and writes them as ADM's evaluation files are: DIR/samples.npz with arr_0, uint8 (N, H, W, 3), beside it
DIR/grid.png and DIR/recipe.json. Killed and started again with the same command it loses at most the running batch.
Image i is the same on any number of devices and processes. Evaluate with `python -m vq4dit_jax.evaluate`."""
_EXAMPLES = """\
examples:
  python -m vq4dit_jax.sample --checkpoint=runs/xl2/quantized --num-images=50000 --out=runs/xl2/50k --steps=250
  python -m vq4dit_jax.sample --checkpoint=official:DiT-XL-2-256x256.pt --variant=DiT-XL/2 --num-images=10000 --out=fp
on several hosts with a shared folder, the same command on each: add --distributed (SLURM, TPU pods, Kubernetes tell
  their processes themselves), or --coordinator=HOST:PORT --processes=P --process=I."""


def parser() -> Parser:
    out = Parser(
        "python -m vq4dit_jax.sample",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="quantized/ (orbax), model.safetensors, or full precision: "
        ".pt, .safetensors, a diffusers folder, official:NAME, asset:NAME")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="folder to write to; that of an unfinished run is continued")
    add("--num-images", type=int, default=50_000, metavar="N", help="default: %(default)s")
    add(
        "--labels",
        default="balanced",
        help="balanced (classes in turn), random, or classes such as 207,360 (default: %(default)s)",
    )
    add("--sampler", default="ddpm", help="ddpm, ddim or dpm++ (default: %(default)s)")
    add("--steps", type=int, default=250, help="1 to 1000 (default: %(default)s)")
    add(
        "--cfg-scale",
        type=float,
        default=1.5,
        help="guidance; 1 for none, which is twice as fast (default: %(default)s)",
    )
    add(
        "--seed", type=int, default=0, help="of noise and random labels, as config.seed of a run (default: %(default)s)"
    )
    add("--batch", type=int, default=50, help="images that a device makes at once (default: %(default)s)")
    add("--vae", default="official:sd-vae-ft-ema", metavar="PATH", help="decoder of latents: a diffusers folder or file, "
        "official:NAME, or none for a colour preview; not used by models of pixels (default: %(default)s)")  # fmt: skip
    add(
        "--activations",
        default="float32",
        help="float32: the weights as they are; bfloat16, int8 or e4m3: through the kernels of docs/kernels.md "
        "(W2A16, W2A8; of a full-precision checkpoint int8 alone, W8A8) (default: %(default)s)",
    )
    add("--variant", help="of a full-precision checkpoint, such as DiT-XL/2; by default from its shapes")
    add("--num-heads", type=int, help="of a full-precision checkpoint whose heads cannot be told")
    add("--grid-images", type=int, default=64, help="images in grid.png (default: %(default)s)")
    add("--distributed", action="store_true", help="this is one process of several (see below)")
    add("--coordinator", metavar="HOST:PORT", help="of a --distributed job that has no cluster to ask")
    add("--processes", type=int, metavar="P", help="how many there are")
    add("--process", type=int, metavar="I", help="which this is, from 0")
    add(
        "--patience",
        type=float,
        default=generation.PATIENCE / 60,
        metavar="MINUTES",
        help="how long without anything new other processes are waited for (default: %(default)g)",
    )
    return out


def main(arguments: list[str]) -> int:
    """Exit code: 0 on success, 2 for bad input, with one line on stderr."""
    logging.set_verbosity(logging.WARNING)
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(flags: argparse.Namespace) -> None:
    plan = Plan(flags.num_images, flags.batch, flags.labels, flags.sampler, flags.steps, flags.cfg_scale)
    seeds.check_seed("--seed", flags.seed)
    if flags.grid_images < 1:
        raise InputError(f"--grid-images={flags.grid_images}: wanted at least 1")
    if not flags.patience > 0:
        raise InputError(f"--patience={flags.patience}: wanted more than 0 minutes")
    if flags.distributed or flags.coordinator:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
    key = seeds.stream(flags.seed, seeds.SAMPLES)
    folder = pathlib.Path(flags.out).expanduser()
    target = folder / "samples.npz"
    for file in (target, folder / "grid.png", folder / "recipe.json"):
        files.check_target(file, "file")
    model, params = sources.open_model(flags.checkpoint, flags.variant, flags.num_heads)
    decode, decoder = sources.open_decoder(flags.vae if flags.vae != "none" else "", as_network(model).sample_shape[-1])
    network = as_network(model)
    network.conditioning.choose(plan.labels, key, plan.indices(0))
    sampler_for(network.process, plan.sampler)
    recipe = {
        "format": 2,  # in 1 a seed was another key
        "num_images": plan.num_images,
        "sampler": plan.sampler,
        "steps": plan.steps,
        "cfg_scale": plan.cfg_scale,
        "labels": plan.labels,
        "seed": flags.seed,
        "batch": plan.batch,
        "activations": flags.activations,
        "model": provenance.facts_of(model),  # the same parameters with other heads are another
        "model_sha256": provenance.digest(params),
        "decoder": decoder,
        "rounding": "uint8, 127.5 x + 128, clipped, cut off",
    }
    about = lambda: {"checkpoint": flags.checkpoint, "devices": provenance.devices(), "versions": provenance.versions()}
    made_from = Claim(folder / "recipe.json", recipe, about=about)
    # A refusal must not keep the folder: everything is checked before it is claimed.
    made_from.check()
    if not target.exists():
        params = inference.for_sampling(model, params, flags.activations, plan.cfg_scale)
    folder.mkdir(parents=True, exist_ok=True)
    # A lock for each process of a job, so that no two commands write the same shards.
    with files.exclusive(
        folder / f".lock{jax.process_index() or ''}", f"--out={folder} is in use by another run; wait for it"
    ):
        patience = 60 * flags.patience
        generation.claim(made_from, patience)
        if target.exists():
            print(f"{target} is finished; another --out makes new samples.")
            return
        generation.generate(plan, model, params, key, target, decode, patience=patience)
        if jax.process_index() == 0:
            images = npz.read_head(target, flags.grid_images)
            reporting.write_grid(folder / "grid.png", images, columns=min(8, len(images)))
            size = f"{images.shape[2]}x{images.shape[1]}"
            print(f"{target}: {plan.num_images} images of {size} pixels; recipe.json and grid.png beside it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
