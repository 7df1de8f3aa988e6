"""A feature network that anyone can check, and images and features for it. Fixed seeds; nothing trained."""

import importlib.util

import numpy as np
import pytest

from vq4dit_jax.evaluation import Classifier

needs_tfgan = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tensorflow", "tensorflow_probability", "tensorflow_gan")),
    reason="needs TF-GAN: the extra 'tfgan' is not installed",
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def correlated(seed: int, count: int, width: int) -> np.ndarray:
    generator = rng(seed)
    mixing = generator.normal(size=(width, width)) / np.sqrt(width)
    return generator.normal(size=(count, width)) @ mixing + generator.normal(size=(1, width))


def linear_classifier(name: str = "linear", features: str = "pool", logits: bool = True, **fields) -> Classifier:
    """Features are fixed projections of the pixels; of Inception's widths where `features` names a layer of it."""
    widths = {
        features: {"pool": 6, "mixed_7": 768, "pool_3": 2048}[features],
        "spatial": 9 if features == "pool" else 2023,
    }
    widths |= {"logits": 4} if logits else {}
    ends = np.cumsum(list(widths.values()))
    weights = rng(5).normal(size=(8 * 8 * 3, ends[-1])) / 255

    def apply(images):
        outputs = (np.asarray(images).reshape(len(images), -1) @ weights).astype(np.float32)
        return dict(zip(widths, np.split(outputs, ends[:-1], axis=1)))

    return Classifier(name, apply, title="Linear net", features=features, **fields)


def images(count: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)
