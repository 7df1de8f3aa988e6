"""Milliseconds of a guided forward of a row's model, in the form that it is sampled in, beside full precision in the same run."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vq4dit_jax.networks.dit import DiT


def step_milliseconds(
    model: DiT, forms: dict[str, Any], *, images: int, cfg_scale: float, turns: int = 7
) -> dict[str, float]:
    """Form -> the median of `turns` calls for `images` images, two rows of the network each. `forms`: name -> parameters.

    The forms are called in turn, so that other work on the machine slows them all.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (images, model.input_size, model.input_size, model.in_channels))
    labels = jnp.arange(images) % model.num_classes
    arguments = (
        jnp.concatenate([x, x]),
        jnp.full(2 * images, 500, jnp.int32),
        jnp.concatenate([labels, jnp.full_like(labels, model.num_classes)]),
    )
    run = jax.jit(lambda tree, *a: model.apply({"params": tree}, *a, cfg_scale, method="forward_with_cfg"))
    calls = {name: _call(run, jax.device_put(tree), arguments) for name, tree in forms.items()}
    for call in calls.values():
        call()  # compiles
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def _call(run: Callable[..., jax.Array], tree: Any, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(run(tree, *arguments))
