"""What calibration knows of a network: a function that also returns its blocks' outputs, and three sizes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vq4dit_jax.errors import InputError
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.qarray.base import is_quantized


@dataclasses.dataclass(frozen=True)
class Network:
    """A class-conditional noise-prediction network, ours or anybody's. The teacher and the student are the same
    network; only the leaves of their parameter trees differ.

    Attributes:
      apply: (params, x (R, H, W, C) float32, t (R,) int32 in 0..999, y (R,) int32) -> (output, blocks), pure and
        without dropout. `output` is the noise prediction (R, H, W, C), or (R, H, W, 2C) with a learned variance after
        it. `blocks` is what L_d compares: a pytree of arrays, each one block's output or a stack of equal blocks'.
      sample_shape: (H, W, C) of one sample in model space.
      num_classes: y is a class 0..num_classes-1, or num_classes, the null label of classifier-free guidance.
      guided_channels: guidance acts on the first so many channels of the noise prediction; None: on all C.
    """

    apply: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
    sample_shape: tuple[int, ...]
    num_classes: int
    guided_channels: int | None = None

    def guide(self, output: Float[Array, "R H W F"], cfg_scale: Any) -> Float[Array, "B H W F"]:
        """eps_null + s (eps_label - eps_null) from R = 2B outputs, B with labels and B with the null label.

        What is not guided (other channels, the variance) is that of the labelled half.
        """
        channels = self.guided_channels or self.sample_shape[-1]
        label, null = jnp.split(output, 2)
        eps = null[..., :channels] + jnp.asarray(cfg_scale, output.dtype) * (label - null)[..., :channels]
        return jnp.concatenate([eps, label[..., channels:]], axis=-1)

    def rows(
        self, x: Float[Array, "B H W C"], t: Int[Array, ""], labels: Int[Array, " B"]
    ) -> tuple[Float[Array, "R H W C"], Int[Array, " R"], Int[Array, " R"]]:
        """(x, t, y) of the R = 2B rows that guidance needs: B with their labels, then the same B with the null label."""
        y = jnp.concatenate([labels, jnp.full_like(labels, self.num_classes)])
        return jnp.concatenate([x, x]), jnp.full(y.shape, t, jnp.int32), y

    def predict(
        self, params: Any, x: Float[Array, "B H W C"], t: Int[Array, ""], labels: Int[Array, " B"], cfg_scale: Any
    ) -> Float[Array, "B H W F"]:
        """The guided output at one time step, as `sampling.denoise` wants it."""
        return self.guide(self.apply(params, *self.rows(x, t, labels))[0], cfg_scale)


def as_network(model: DiT | Network, remat: bool = False) -> Network:
    """A `Network` as it is; of a `DiT`, one that returns its blocks' outputs and guides as the reference does (three of
    four latent channels). `remat` recomputes each block in the backward pass.

    Raises InputError for `remat` with a network that is no DiT.
    """
    if isinstance(model, Network):
        if remat:
            raise InputError(
                "recipe.remat=True is for a DiT; in a network of your own wrap the blocks in flax.linen.remat"
            )
        return model
    model = model.clone(remat=remat)

    def apply(params: Any, x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        return model.apply({"params": params}, x, t, y, return_blocks=True)

    channels = model.in_channels
    shape = (model.input_size, model.input_size, channels)
    return Network(apply, shape, model.num_classes, 3 if channels == 4 else channels)


def check(network: Network, params: Any) -> None:
    """Runs `apply` on shapes alone; InputError, in one line, where it fails or returns something else."""
    shape, rows = network.sample_shape, 2
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"sample_shape={shape}: wanted (H, W, C), three positive integers")
    if network.num_classes < 1:
        raise InputError(f"num_classes={network.num_classes}: wanted at least 1; a network without classes ignores y")
    x, label = jax.ShapeDtypeStruct((rows, *shape), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    try:
        found = jax.eval_shape(network.apply, params, x, label, label)
    except Exception as error:  # whatever the user's function raises
        what = next(iter(str(error).strip().splitlines()), "")
        packed = any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
        remedy = "let it call dequantize(params) first" if packed else f"is sample_shape={shape} what it takes?"
        raise InputError(
            f"apply(params, x, t, y) fails on {'quantized' if packed else 'the'} params and x {x.shape}, t and y "
            f"{label.shape}; {remedy} ({type(error).__name__}: {what})"
        ) from error
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], jax.ShapeDtypeStruct)):
        raise InputError(f"apply returns {_spell(found)}; wanted a pair (output, block outputs)")
    output, blocks = found
    channels = shape[-1]
    if output.shape not in {(*x.shape[:3], channels), (*x.shape[:3], 2 * channels)}:
        raise InputError(
            f"apply returns an output {output.shape} for x {x.shape}; wanted {x.shape}, the noise prediction, "
            f"or {2 * channels} channels with a learned variance"
        )
    leaves = jax.tree.leaves(blocks)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise InputError(
            f"apply returns {_spell(blocks)} as block outputs; wanted a list of floating arrays, one of each block"
        )


def _spell(shapes: Any) -> str:
    """The kind of a tree and the shapes of its first leaves."""
    leaves = jax.tree.leaves(shapes)
    listed = ", ".join(f"{leaf.dtype}{leaf.shape}" for leaf in leaves[:4]) + (", ..." if len(leaves) > 4 else "")
    return listed if isinstance(shapes, jax.ShapeDtypeStruct) else f"a {type(shapes).__name__} of {listed or 'nothing'}"
