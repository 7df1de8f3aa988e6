"""Sampling: a trajectory that nothing observes, cut over this process's devices."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.diffusion.keys import image_keys
from vq4dit_jax.diffusion.samplers import sampler_for
from vq4dit_jax.errors import InputError


@functools.partial(jax.jit, static_argnames=("network", "mesh", "sampler", "hoist", "every_step"))
def _sample(network, mesh, sampler, params, problem, sched, scale, initial, *, hoist, every_step):
    def on_one_device(params, problem, sched, scale, initial):
        how = dict(hoist=hoist, initial=initial, every_step=every_step)
        return trajectory.run(network, sampler, sched, params, problem, scale, **how)[0]

    # Mapped, not partitioned by the compiler: a device's program depends on its own share of the batch alone, so the
    # same share gives the same bits on one device and on eight.
    rows, everywhere = PartitionSpec("batch"), PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, rows, everywhere, everywhere, rows),
        out_specs=PartitionSpec(None, "batch") if every_step else rows,
        check_vma=False,
    )(params, problem, sched, scale, initial)


def batch_mesh() -> Mesh:
    """This process's devices in one axis, over which the batch is cut."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))


def replicated() -> NamedSharding:
    """A copy on each of this process's devices."""
    return NamedSharding(batch_mesh(), PartitionSpec())


def sample_network(
    network: Any,
    params: Any,
    cond: Any,
    *,
    key: jax.Array,
    null: Any = None,
    num_steps: int = 250,
    sampler: str | None = None,
    cfg_scale: float = 1.5,
    indices: jax.typing.ArrayLike | None = None,
    initial: Any = None,
    every_step: bool = False,
    hoist: bool = False,
) -> Float[Array, "..."]:
    """Samples in model space; `networks.sampling.sample` is the public form and says what the arguments are."""
    chosen = sampler_for(network.process, sampler)
    cond = network.conditioning.check(cond)
    count = jax.tree.leaves(cond)[0].shape[0] if jax.tree.leaves(cond) else len(indices)
    if cfg_scale == 1.0:
        null = None
    elif null is None:
        null = network.conditioning.null(params, cond)
    else:
        null = network.conditioning.check(null)
    sched = network.process.schedule(num_steps)
    mesh = batch_mesh()
    padded = -(-count // mesh.size) * mesh.size
    rows, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    fill = lambda a: jax.device_put(np.resize(np.asarray(a), (padded, *a.shape[1:])), rows)
    numbers = np.resize(np.arange(count) if indices is None else np.asarray(indices), padded)
    keys = jax.device_put(image_keys(key, numbers), rows)
    problem = trajectory.Problem(keys, jax.tree.map(fill, cond), None if null is None else jax.tree.map(fill, null))
    if initial is not None:
        wanted = (count, *network.sample_shape)
        if np.shape(initial) != wanted:
            raise InputError(f"initial has shape {np.shape(initial)}; wanted {wanted}")
        initial = fill(np.asarray(initial, np.float32))
    put = lambda tree: jax.device_put(tree, everywhere)
    images = _sample(
        network,
        mesh,
        chosen,
        put(params),
        problem,
        put(sched),
        np.float32(cfg_scale),
        initial,
        hoist=hoist,
        every_step=every_step,
    )
    return images[:, :count] if every_step else images[:count]


def to_uint8(images: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] to 0..255 as the reference and ADM do: 127.5 x + 128, clipped, cut off."""
    return np.clip(np.asarray(images, np.float32) * 127.5 + 128, 0, 255).astype(np.uint8)
