"""The streams of a seed: the same seed means the same images in a run and in the sample command."""

import numbers
from typing import Any

import jax

from vq4dit_jax.errors import InputError

KMEANS, TRAJECTORIES, SAMPLES, HELD_OUT, INIT = range(5)
"""What a run draws random numbers for."""
_SEEDS = 2**32


def stream(seed: int, number: int) -> jax.Array:
    """The key of one stream of a seed."""
    return jax.random.fold_in(jax.random.key(seed), number)


def check_seed(name: str, seed: Any) -> int:
    """The seed; InputError where JAX would take it modulo 2**32, so that two names gave the same images."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < _SEEDS:
        raise InputError(f"{name}={seed}: wanted a whole number from 0 to {_SEEDS - 1}")
    return int(seed)
