"""What a path or a name in a config or on a command line stands for: models, and decoders of their latents."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from vq4dit_jax import evaluation, files
from vq4dit_jax.diffusion.sampling import replicated
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks import latents
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.run.generation import Decoder
from vq4dit_jax.run.workdir import Workdir
from vq4dit_jax.storage import checkpoint, identity, provenance

OFFICIAL = "official:"
PREVIEW = "linear preview of the latents"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What quality is measured with; both None with the `reason` where there is nothing to measure with."""

    classifier: evaluation.Classifier | None = None
    reference: evaluation.ReferenceStatistics | None = None
    reason: str | None = None


def locate(name: str, download: bool = True) -> str:
    """The path that a name stands for: `official:NAME` from the cache folder, else downloaded; `asset:NAME` as shipped.

    Any other name is its own path. InputError where an official file is not to be had.
    """
    if name.startswith(OFFICIAL):
        from convert.download import official

        return str(official(name.removeprefix(OFFICIAL), download=download))
    return str(files.resolve(name)) if name else ""


def fingerprint(path: str, images: bool = False) -> str:
    """What identifies a file that a config names, wherever it lies: the digest of its content, or of a model's folder. A
    folder of `images` is its own path, because to read a data set takes longer than to use it.
    """
    found = pathlib.Path(path)
    return f"folder {found.resolve()}" if images and found.is_dir() else f"sha256 {identity.digest_file(found)}"


def check_beside(other: Workdir, digests: dict[str, str]) -> None:
    """Raises InputError where the run beside this one is of another model, as far as it says of which."""
    theirs = other.made_from()[1].get("model.checkpoint")
    ours = digests.get("model.checkpoint")
    if theirs != ours and theirs and ours:
        raise InputError(
            f"--config.beside={other.root} is a run of another model ({ours} here, {theirs} there); leave it out"
        )


def same_samples(other: Workdir, config: dict[str, Any], digests: dict[str, str]) -> bool:
    """Whether another run's full-precision samples are this one's: of the same files, the same seed and the same sampling.

    A run that does not say what its files were (0.1.0's) is taken for another.
    """
    theirs, known = other.made_from()
    files_of = ("model.checkpoint", "model.vae")
    for key in files_of:
        section, name = key.split(".")
        if digests.get(key) != known.get(key) or (config[section][name] and key not in known):
            return False
    named = {key.split(".")[1] for key in files_of}
    model = lambda facts: {name: value for name, value in facts["model"].items() if name not in named}
    return model(theirs) == model(config) and all(theirs[key] == config[key] for key in ("seed", "sample"))


def open_pretrained(path: str, variant: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """A full-precision model: a file or folder of any known layout, `asset:NAME`, or `official:NAME`.

    `settings`: keywords of `convert.load.load_pretrained`; 0 and None are left to the file.
    """
    from convert.load import load_pretrained

    return load_pretrained(locate(path), variant or None, **{name: value or None for name, value in settings.items()})


def open_model(path: str, variant: str | None = None, num_heads: int | None = None) -> tuple[DiT, Any]:
    """A model of ours, packed (`quantized/`, `model.safetensors`, or the workdir around them), or a full-precision one."""
    file = pathlib.Path(path).expanduser()
    files.recover(file / "quantized")
    if (file / "quantized").is_dir():
        file = file / "quantized"
    if file.is_dir() and not any(file.glob("*.json")):  # a diffusers folder has a config.json, orbax's has none
        return checkpoint.load_quantized(file)[:2]
    if file.suffix == ".safetensors" and _has_manifest(file):
        return checkpoint.load_safetensors(file)[:2]
    return open_pretrained(path, variant, num_heads=num_heads)


def _has_manifest(file: pathlib.Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return "manifest" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False  # what is wrong with it, its loader says


def open_decoder(vae: str, channels: int) -> tuple[Decoder, str]:
    """(what makes images of a model's samples, its name in a recipe).

    Pixels (3 channels, or 1 of gray) need none. Latents are decoded by the VAE at `vae` (a path, or
    `official:sd-vae-ft-ema`); where that is empty they are shown by a linear preview, which no quality figure may be computed on.
    """
    if channels in (1, 3):
        return lambda x: np.repeat(x, 3 // channels, axis=-1), "none: the model samples pixels"
    if not vae and channels != 4:
        raise InputError(f"no picture can be made of samples with {channels} channels without a VAE; give its path")
    if not vae:
        return latents.preview, PREVIEW
    from convert.vae import load_vae

    module, params = load_vae(locate(vae))
    if module.latent_channels != channels:
        raise InputError(
            f"the VAE {vae} decodes latents of {module.latent_channels} channels, and the model samples {channels}; give "
            "the VAE that the model was trained with"
        )
    params = jax.device_put(params, replicated())

    def decode(x: np.ndarray) -> np.ndarray:
        return latents.decode_images(module, params, x)

    return decode, f"VAE {vae}, sha256 {provenance.digest(params)}"


def check_evaluator(classifier: str, reference: str) -> None:
    """Raises `open_evaluator`'s InputErrors that can be told without reading the images."""
    evaluation.load_classifier(classifier)
    if not pathlib.Path(reference).exists():
        raise InputError(f"{reference}: no such file or folder of real images or their statistics")


def open_evaluator(classifier: str, reference: str) -> Evaluator:
    """The feature network and the statistics of the real images at these names or paths."""
    network = evaluation.load_classifier(classifier)
    return Evaluator(network, evaluation.open_reference(reference, network))
