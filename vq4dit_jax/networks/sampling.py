"""`vq.sample`: images of a model, from dense or quantized parameters."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vq4dit_jax.diffusion.keys import image_keys
from vq4dit_jax.diffusion.samplers import sampler_for
from vq4dit_jax.diffusion.sampling import batch_mesh, run_on_devices
from vq4dit_jax.diffusion.trajectory import Problem
from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.network import as_network


def sample(
    model: Any,
    params: Any,
    cond: Any,
    *,
    key: jax.Array,
    null: Any = None,
    num_steps: int = 250,
    sampler: str | None = None,
    cfg_scale: float = 1.5,
    indices: jax.typing.ArrayLike | None = None,
    initial: jax.typing.ArrayLike | None = None,
    trajectory: bool = False,
    hoist_modulations: bool = False,
) -> Float[Array, "..."]:
    """Samples (B, *S, C) in model space.

    Args:
      model: a `DiT`, or a `Network`.
      cond: class labels (B,), or what the network's conditioning takes.
      key: root of the noise. Sample j of the call is sample `indices[j]` (by default j) of the stream `key`: the same, up to
        rounding, whatever the batch, and to the bit for the same number of samples a device. The batch is cut over this
        process's devices, and padded to a multiple of them.
      null: the null condition of guidance, as `cond`; None: the network's own.
      num_steps: 1 to 1000; of a flow at least 1.
      sampler: "ddpm", "ddim" or "dpm++"; of a flow "euler" or "heun"; None: "ddpm", of a flow "euler".
      cfg_scale: guidance, skipped where it is 1.
      initial: (B, *S, C), the noise to begin with, in place of the key's.
      trajectory: return what each step leaves, (num_steps, B, *S, C), the first step first.
      hoist_modulations: compute what depends on time and condition alone for all steps before the first: for XL/2 in bfloat16
        0.39 MB a step and row of the batch, two rows an image with guidance.

    Raises InputError for a sampler that does not fit, steps out of range, a condition that is none, or guidance without a null.
    """
    network = as_network(model)
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
    rows, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    padded = -(-count // mesh.size) * mesh.size
    fill = lambda a: jax.device_put(np.resize(np.asarray(a), (padded, *a.shape[1:])), rows)
    numbers = np.resize(np.arange(count) if indices is None else np.asarray(indices), padded)
    keys = jax.device_put(image_keys(key, numbers), rows)
    problem = Problem(keys, jax.tree.map(fill, cond), None if null is None else jax.tree.map(fill, null))
    if initial is not None:
        wanted = (count, *network.sample_shape)
        if np.shape(initial) != wanted:
            raise InputError(f"initial has shape {np.shape(initial)}; wanted {wanted}")
        initial = fill(np.asarray(initial, np.float32))
    put = lambda tree: jax.device_put(tree, everywhere)
    images = run_on_devices(
        network,
        mesh,
        chosen,
        put(params),
        problem,
        put(sched),
        np.float32(cfg_scale),
        initial,
        hoist=hoist_modulations,
        every_step=trajectory,
    )
    return images[:, :count] if trajectory else images[:count]
