"""Small models that many tests share. Fixed seeds; nothing trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.qarray.tree import random_params

SOFT = (
    "--config.calibration.layerwise=False",
    "--config.calibration.allocation=given",
    "--config.calibration.gains=False",
    "--config.calibration.num_candidates=2",
)
"""Flags of a run whose layers are not solved: that takes minutes. test_layerwise_calibration does it to a small model."""


@functools.cache
def tiny(**overrides: Any) -> tuple[DiT, Any]:
    """A DiT of two blocks and width 32 on 8x8 pixels, with random weights large enough to matter."""
    fields = dict(
        input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, mlp_ratio=2.0
    )
    model = DiT(**{**fields, **overrides})
    size = model.input_size
    x, label = jnp.zeros((1, size, size, model.in_channels)), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, label, label)["params"]
    return model, random_params(shapes, jax.random.key(1), scale=0.2)


def inputs(model: DiT, batch: int = 4, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, t, y of the model's shapes."""
    key = jax.random.key(seed)
    x = jax.random.normal(key, (batch, model.input_size, model.input_size, model.in_channels))
    t = jax.random.randint(jax.random.fold_in(key, 1), (batch,), 0, 1000)
    return x, t, jnp.arange(batch, dtype=jnp.int32) % model.num_classes
