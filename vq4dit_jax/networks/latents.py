"""Pictures of what a model samples: pixels as they are, latents by the VAE's decoder or by a linear preview."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.vae import AutoencoderKL

# RGB of the Stable Diffusion VAE's four channels by least squares, as published by K. Turner (Hugging Face forum, 2022).
_SD_PREVIEW = np.asarray(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]], np.float32
)
_SLICE_PIXELS = 512 * 512
"""Pixels that an accelerator decodes at a time by default: one image of 512x512, four of 256x256."""


def preview(samples: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B H W 3"]:
    """Images in [-1, 1]. C = 3: the samples. C = 4: colours of the latents, at their size; good to compare by eye, no
    substitute for the VAE's decoder.
    """
    channels = samples.shape[-1]
    if channels == 3:
        return samples
    if channels == 4:
        return np.clip(samples @ _SD_PREVIEW, -1, 1)
    raise InputError(f"no picture can be made of samples with {channels} channels; wanted 3 (pixels) or 4 (latents)")


def decode_images(
    vae: AutoencoderKL, params: Any, latents: jax.typing.ArrayLike, *, slice_size: int | None = None
) -> Float[np.ndarray, "B H W 3"]:
    """Images in [-1, 1] of latents (B, h, w, C) as a diffusion model samples them, that is times `vae.scaling_factor`.

    Every device of this process decodes `slice_size` images at a time, so the devices' memory does not depend on B.
    By default that is one image on a CPU, where more are not faster, and elsewhere as many as have the pixels of one of
    512x512. The last slice is padded, so a resolution is compiled once.

    Every image is decoded by itself, and image i is the same, bit for bit, wherever in whichever batch it stands and on
    any number of devices (measured: 1, 2 and 8 CPU devices). With another `slice_size` XLA may add in another order:
    differences of 2e-6 were measured in float32.

    Parameters that already are on all devices, as `jax.device_put(params, replicated)` leaves them, are not copied
    again. Raises InputError for latents of another shape and for a slice without images.
    """
    shape = np.shape(latents)
    if len(shape) != 4 or shape[-1] != vae.latent_channels:
        raise InputError(f"latents have shape {shape}; this VAE decodes (B, h, w, {vae.latent_channels})")
    count, height, width = shape[0], shape[1] * vae.downsampling, shape[2] * vae.downsampling
    devices = jax.local_devices()
    if slice_size is None:
        slice_size = default_slice_size(height, width, devices[0].platform)
    if slice_size < 1:
        raise InputError(f"slice_size={slice_size}: at least one image has to be decoded at a time")
    mesh = Mesh(np.asarray(devices), ("batch",))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    step = slice_size * len(devices)
    images = np.empty((count, height, width, vae.image_channels), np.float32)
    for start in range(0, count, step):
        z = np.asarray(latents[start : start + step], np.float32)
        padded = np.pad(z, ((0, step - len(z)), (0, 0), (0, 0), (0, 0)))
        images[start : start + step] = np.asarray(_decode(vae, params, jax.device_put(padded, rows)))[: len(z)]
    return images


def default_slice_size(height: int, width: int, platform: str) -> int:
    """Images of height x width pixels for one device of a JAX platform to decode at a time."""
    return 1 if platform == "cpu" else max(1, _SLICE_PIXELS // (height * width))


@functools.partial(jax.jit, static_argnames="vae")
def _decode(vae: AutoencoderKL, params: Any, z: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    return vae.apply({"params": params}, z / vae.scaling_factor, method="decode").clip(-1, 1)
