"""`vq.sample`: images of a model, from dense or quantized parameters."""

from typing import Any

import jax
from jaxtyping import Array, Float

from vq4dit_jax.diffusion.sampling import sample_network
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
    return sample_network(
        as_network(model),
        params,
        cond,
        key=key,
        null=null,
        num_steps=num_steps,
        sampler=sampler,
        cfg_scale=cfg_scale,
        indices=indices,
        initial=initial,
        every_step=trajectory,
        hoist=hoist_modulations,
    )
