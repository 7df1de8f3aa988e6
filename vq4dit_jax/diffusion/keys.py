"""Randomness by image: a key for each image of a stream, so that image i is the same in any batch, on any number of devices.

key of image i      fold_in(key, i)
its streams         fold_in(key of image i, INITIAL | STEPS | CONDITION)
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

INITIAL, STEPS, CONDITION = range(3)
"""Streams of an image's key: the first noise, the noise of the steps, and what the image is conditioned on."""


def image_keys(key: PRNGKeyArray, indices: jax.typing.ArrayLike) -> Shaped[PRNGKeyArray, " B"]:
    """The keys of the images with these global indices, (B,) integers of 32 bits."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(indices, jnp.uint32))


def noise(
    keys: Shaped[PRNGKeyArray, " B"], stream: int, step: int | Array, shape: tuple[int, ...]
) -> Float[Array, "B ..."]:
    """Standard normal noise (B, *shape), float32, of each image's own stream."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), step), shape, jnp.float32)

    return jax.vmap(one)(keys)


def condition_keys(keys: Shaped[PRNGKeyArray, " B"]) -> Shaped[PRNGKeyArray, " B"]:
    """The keys that decide what each image is conditioned on."""
    return jax.vmap(lambda key: jax.random.fold_in(key, CONDITION))(keys)
