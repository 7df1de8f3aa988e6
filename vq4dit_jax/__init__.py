"""VQ4DiT in JAX: Diffusion Transformers in 2 bits a weight, packed, calibrated without data.

    import vq4dit_jax as vq
    model, params = vq.load_pretrained("DiT-XL-2-256x256.pt")
    kmeans = vq.quantize(params, bits=2, key=jax.random.key(0))
    packed = vq.calibrate(model, params, kmeans, key=jax.random.key(1))
    images = vq.sample(model, packed, labels, key=jax.random.key(2), num_steps=50)

Names are imported at first use, so that `import vq4dit_jax` is quick and brings neither TensorFlow nor PyTorch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "DIT_VARIANTS": "vq4dit_jax.networks.dit",
    "DiT": "vq4dit_jax.networks.dit",
    "IntArray": "vq4dit_jax.qarray.integer",
    "IntSpec": "vq4dit_jax.qarray.spec",
    "KEEP": "vq4dit_jax.qarray.rules",
    "Network": "vq4dit_jax.networks.network",
    "OperandArray": "vq4dit_jax.qarray.operand",
    "OperandSpec": "vq4dit_jax.qarray.operand",
    "VQArray": "vq4dit_jax.qarray.vq",
    "VQSpec": "vq4dit_jax.qarray.spec",
    "activation_ranges": "vq4dit_jax.networks.inference",
    "calibrate": "vq4dit_jax.methods.calibrate",
    "dequantize": "vq4dit_jax.qarray.tree",
    "explain_kernels": "vq4dit_jax.networks.explain",
    "load_pretrained": "convert.load",
    "load_quantized": "vq4dit_jax.storage.checkpoint",
    "load_safetensors": "vq4dit_jax.storage.checkpoint",
    "load_vae": "convert.vae",
    "prepare_for_inference": "vq4dit_jax.networks.inference",
    "quantize": "vq4dit_jax.methods.kmeans",
    "sample": "vq4dit_jax.networks.sampling",
    "save_convrot": "convert.to_convrot",
    "save_quantized": "vq4dit_jax.storage.checkpoint",
    "save_safetensors": "vq4dit_jax.storage.checkpoint",
    "sizes": "vq4dit_jax.qarray.tree",
}
_MODULES = ("diffusion", "errors", "evaluation", "methods", "networks", "qarray", "reporting")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
