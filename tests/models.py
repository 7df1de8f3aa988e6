"""Small models that many tests share. Fixed seeds; nothing trained."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import as_network, random_problem
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


@dataclasses.dataclass(frozen=True)
class _Kept:
    def __call__(self, evaluation: trajectory.Evaluation, given: Any) -> trajectory.Evaluation:
        return evaluation


def evaluations(
    model: Any, params: Any, *, key: jax.Array, images: int = 2, num_steps: int = 4, cfg_scale: float = 1.5
) -> list[trajectory.Evaluation]:
    """All evaluations of one trajectory with the blocks' outputs, the first one first."""
    network = as_network(model)
    problem = random_problem(network, params, key, images=images, cfg_scale=cfg_scale)
    how = dict(num_steps=num_steps, scale=cfg_scale, observe=_Kept(), blocks=True)
    kept = jax.tree.map(np.asarray, trajectory.observed(network, params, problem, **how)[1])
    return [jax.tree.map(lambda a: jnp.asarray(a[n]), kept) for n in range(num_steps)]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list to which every program that is compiled meanwhile adds an entry, also those that a cache on disk has."""
    seen = []

    def count(event: str, seconds: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(facts.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
