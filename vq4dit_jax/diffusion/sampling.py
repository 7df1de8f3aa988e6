"""The sampling loop: one `lax.scan` over time steps, sharded over the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT

SAMPLERS = ("ddpm", "ddim", "dpm++")
INITIAL, STEPS = 0, 1
"""Streams of randomness: the first noise, and the noise of the steps."""


def image_keys(key: jax.Array, indices: Int[np.ndarray, " B"]) -> jax.Array:
    """A key per image from its global index, so that image i is the same in any batch on any number of devices."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(indices, jnp.uint32))


def noise(keys: jax.Array, stream: int, step: int | jax.Array, shape: tuple[int, ...]) -> Float[Array, "B H W C"]:
    """Standard normal noise of each image's own stream."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), step), shape, jnp.float32)

    return jax.vmap(one)(keys)


def _with_null(model: DiT, labels: jax.Array) -> jax.Array:
    return jnp.concatenate([labels, jnp.full_like(labels, model.num_classes)])


def guided(
    model: DiT, params: Any, x: jax.Array, t: jax.Array, labels: jax.Array, cfg_scale: Any, modulations: Any = None
) -> jax.Array:
    """Model output for x (B, H, W, C) with guidance; t a scalar."""
    both, y = jnp.concatenate([x, x]), _with_null(model, labels)
    ts = jnp.full((both.shape[0],), t, jnp.int32)
    out = model.apply({"params": params}, both, ts, y, cfg_scale, modulations, method="forward_with_cfg")
    return out[: x.shape[0]]


def denoise(
    predict: Callable[..., jax.Array],
    sched: diffusion.Schedule,
    keys: jax.Array,
    shape: tuple[int, ...],
    sampler: str,
    per_step: Any = None,
) -> Float[Array, "B H W C"]:
    """Runs `predict(x, t) -> model output` from noise to image. Pure and jittable.

    `per_step`: arrays with a leading axis of N steps, of which step i gives `predict` a third argument.
    """
    x = noise(keys, INITIAL, 0, shape)

    def step(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, x0 = carry
        given = () if per_step is None else (jax.tree.map(lambda a: a[i], per_step),)
        output = predict(x, sched.timesteps[i], *given)
        if sampler == "ddpm":
            x = diffusion.ddpm_step(sched, i, x, output, noise(keys, STEPS, i, shape))
        elif sampler == "ddim":
            x = diffusion.ddim_step(sched, i, x, output)
        else:
            x, x0 = diffusion.dpmpp_2m_step(sched, i, x, output, x0)
        return (x, x0), None

    order = jnp.arange(sched.num_steps - 1, -1, -1, dtype=jnp.int32)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), order)
    return x


@functools.partial(jax.jit, static_argnames=("model", "mesh", "sampler", "use_guidance", "hoist_modulations"))
def _sample(model, mesh, params, labels, keys, sched, cfg_scale, *, sampler, use_guidance, hoist_modulations):
    def on_one_device(params, labels, keys, sched, cfg_scale):
        def predict(x: jax.Array, t: jax.Array, modulations: Any = None) -> jax.Array:
            if use_guidance:
                return guided(model, params, x, t, labels, cfg_scale, modulations)
            ts = jnp.full((x.shape[0],), t, jnp.int32)
            return model.apply({"params": params}, x, ts, labels, modulations=modulations)

        def modulations(t: jax.Array) -> Any:
            y = _with_null(model, labels) if use_guidance else labels
            return model.apply({"params": params}, jnp.full(y.shape, t, jnp.int32), y, method="modulations")

        per_step = jax.lax.map(modulations, sched.timesteps) if hoist_modulations else None
        size = model.input_size
        return denoise(predict, sched, keys, (size, size, model.in_channels), sampler, per_step)

    # Mapped, not partitioned by the compiler: a device's program depends on its own share of the batch alone, so the
    # same share gives the same bits on one device and on eight.
    rows, everywhere = PartitionSpec("batch"), PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, rows, rows, everywhere, everywhere),
        out_specs=rows,
        check_vma=False,
    )(params, labels, keys, sched, cfg_scale)


def batch_mesh() -> Mesh:
    """This process's devices in one axis, over which the batch is cut."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))


def replicated() -> NamedSharding:
    """A copy on each of this process's devices."""
    return NamedSharding(batch_mesh(), PartitionSpec())


def sample(
    model: DiT,
    params: Any,
    labels: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    num_steps: int = 250,
    sampler: str = "ddpm",
    cfg_scale: float = 1.5,
    indices: jax.typing.ArrayLike | None = None,
    hoist_modulations: bool = False,
) -> Float[Array, "B H W C"]:
    """Images (or latents) in model space for integer `labels` (B,), from dense or quantized parameters.

    Image j of the call is image `indices[j]` (by default j) of the stream `key`: the same, up to rounding, whatever
    the batch, and to the bit for the same number of images a device. The batch is cut over this process's devices,
    and padded to a multiple of them. Guidance is skipped where cfg_scale is 1.

    With `hoist_modulations` the shifts, scales and gates of all steps are computed before the first (they depend on time
    and label alone): for XL/2 in bfloat16 0.39 MB a step and row of the batch, two rows an image with guidance.

    Raises InputError for an unknown sampler, steps out of range, or labels that are not classes.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler={sampler!r}: wanted one of {', '.join(SAMPLERS)}")
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels have shape {labels.shape} and dtype {labels.dtype}; wanted integers (B,)")
    if labels.size and not (labels.min() >= 0 and labels.max() <= model.num_classes):
        raise InputError(f"labels lie in {labels.min()}..{labels.max()}; wanted 0..{model.num_classes}")
    sched = diffusion.make_schedule(num_steps)
    mesh = batch_mesh()
    count = len(labels)
    padded = -(-count // mesh.size) * mesh.size
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    label_array = jax.device_put(np.resize(labels, padded).astype(np.int32), rows)
    numbers = np.resize(np.arange(count) if indices is None else np.asarray(indices), padded)
    keys = jax.device_put(image_keys(key, numbers), rows)
    images = _sample(
        model,
        mesh,
        jax.device_put(params, everywhere),
        label_array,
        keys,
        jax.device_put(sched, everywhere),
        jnp.float32(cfg_scale),
        sampler=sampler,
        use_guidance=cfg_scale != 1.0,
        hoist_modulations=hoist_modulations,
    )
    return images[:count]


def to_uint8(images: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] to 0..255 as the reference and ADM do: 127.5 x + 128, clipped, cut off."""
    return np.clip(np.asarray(images, np.float32) * 127.5 + 128, 0, 255).astype(np.uint8)
