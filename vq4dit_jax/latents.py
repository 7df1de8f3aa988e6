"""Pictures of what a model samples: pixels as they are, latents by a linear preview."""

import numpy as np
from jaxtyping import Float

from vq4dit_jax.errors import InputError

# RGB of the Stable Diffusion VAE's four channels by least squares, as published by K. Turner (Hugging Face forum, 2022).
_SD_PREVIEW = np.asarray(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]], np.float32
)


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
