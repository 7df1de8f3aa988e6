"""What a path or a name in a config or on a command line stands for: models, and decoders of their latents."""

import pathlib
from typing import Any

import numpy as np

from vq4dit_jax import checkpoint, files, latents, provenance
from vq4dit_jax.generation import Decoder
from vq4dit_jax.models import DiT

_OFFICIAL = "official:"


def open_pretrained(path: str, variant: str | None, num_heads: int | None, num_classes: int | None) -> tuple[DiT, Any]:
    """A full-precision model: a file or folder of any known layout, `asset:NAME`, or `official:NAME`."""
    from convert.download import official_checkpoint
    from convert.load import load_pretrained

    found = official_checkpoint(path.removeprefix(_OFFICIAL)) if path.startswith(_OFFICIAL) else files.resolve(path)
    return load_pretrained(found, variant or None, num_heads=num_heads or None, num_classes=num_classes or None)


def open_model(path: str, variant: str | None = None, num_heads: int | None = None) -> tuple[DiT, Any]:
    """A model of ours, packed (`quantized/`, `model.safetensors`, or the workdir around them), or a full-precision one."""
    file = pathlib.Path(path)
    if (file / "quantized").is_dir():
        file = file / "quantized"
    if file.is_dir() and not any(file.glob("*.json")):  # a diffusers folder has a config.json, orbax's has none
        return checkpoint.load_quantized(file)[:2]
    if file.suffix == ".safetensors" and _has_manifest(file):
        return checkpoint.load_safetensors(file)[:2]
    return open_pretrained(path, variant, num_heads, None)


def _has_manifest(file: pathlib.Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return "manifest" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False  # what is wrong with it, its loader says


def open_decoder(vae: str, channels: int) -> tuple[Decoder, str]:
    """(what makes images of a model's samples, its name in a recipe).

    Pixels (3 channels) need none. Latents are decoded by the VAE at `vae` (a path, or `official:sd-vae-ft-ema`); where
    that is empty they are shown by a linear preview, which no quality figure may be computed on.
    """
    if channels == 3:
        return lambda x: x, "none: the model samples pixels"
    if not vae:
        return latents.preview, PREVIEW
    from convert.vae import load_vae

    module, params = load_vae(files.resolve(vae) if vae.startswith("asset:") else vae)

    def decode(x: np.ndarray) -> np.ndarray:
        return latents.decode_images(module, params, x)

    return decode, f"VAE {vae}, sha256 {provenance.digest(params)}"


PREVIEW = "linear preview of the latents"
