"""Sampling: a trajectory that nothing observes, cut over this process's devices."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8

from vq4dit_jax.diffusion import trajectory


@functools.partial(jax.jit, static_argnames=("network", "mesh", "sampler", "hoist", "every_step"))
def run_on_devices(network, mesh, sampler, params, problem, sched, scale, initial, *, hoist, every_step):
    """`trajectory.run`'s images (or those of every step), with the batch cut over the mesh, which divides it."""

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


def to_uint8(images: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] to 0..255 as the reference and ADM do: 127.5 x + 128, clipped, cut off."""
    return np.clip(np.asarray(images, np.float32) * 127.5 + 128, 0, 255).astype(np.uint8)
