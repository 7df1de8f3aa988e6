"""What a network says of itself: how it is run, what it is made of, which process it was trained for.

Everything that quantizes, calibrates or samples takes a `Network`; `as_network` makes one of a module that has a `network`
method, such as `DiT`. The full-precision teacher and the quantized student are the same network with other leaves.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from vq4dit_jax.diffusion.guidance import Guidance
from vq4dit_jax.diffusion.keys import image_keys
from vq4dit_jax.diffusion.process import Process
from vq4dit_jax.diffusion.trajectory import Problem
from vq4dit_jax.errors import InputError
from vq4dit_jax.qarray import is_quantized
from vq4dit_jax.qarray.tree import at_time


class Role(NamedTuple):
    """Linears that do the same in every block of a stack.

    Attributes:
      pattern: a regular expression that matches the whole path of the kernel inside its stack, such as "mlp/fc[12]/kernel".
      reads: "tokens", "conditioning" (time and what the image is conditioned on, alike for all its tokens) or "text".
      group: "self", "cross", "temporal", "mlp" or "conditioning": the part of the network that it belongs to.
      codebooks: equal groups of output rows that have a codebook each, 3 for a fused qkv.
      values: where its Linear reads what attention made of values, the path inside the stack of the kernel whose last outputs
        they are; then `pattern` is a path too. "" elsewhere.
    """

    pattern: str
    reads: str = "tokens"
    group: str = "mlp"
    codebooks: int = 1
    values: str = ""


class Stack(NamedTuple):
    """Equal blocks whose parameters lead with an axis over them: `path` of the tree, its `length`, the roles in it, and the heads
    of its attention (0: not told)."""

    path: str
    length: int
    roles: tuple[Role, ...] = ()
    heads: int = 0


class Prediction(NamedTuple):
    """`output` (R, *S, C), or 2C channels with a learned variance after the prediction; `blocks`, a tree of arrays, each one
    block's output or a stack of equal blocks', or None where the network does not return them."""

    output: Any
    blocks: Any = None


class OutputLayer(NamedTuple):
    """The last Linear of a network with a learned variance: where it stands, and how images are cut into its rows.

    Attributes:
      path: of the Linear, with `kernel` (I, p*p*2C) and `bias`; of a patch's pixels each has C columns for the prediction and
        then C for the variance.
      patch: p; a token is a patch of p x p pixels, row after row.
    """

    path: str
    patch: int

    def tokens(self, image: Float[Array, "B H W C"]) -> Float[Array, "N F"]:
        """The rows (N, p*p*C) of all patches, N = B * T."""
        batch, height, width, channels = image.shape
        p = self.patch
        a = image.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return a.reshape(-1, p * p * channels)


@dataclasses.dataclass(frozen=True)
class Network:
    """A denoising network, ours or anybody's.

    Attributes:
      apply: (params, x (R, *S, C) float32, t (R,), cond) -> (output, blocks), a `Prediction` or a pair like it; pure and without
        dropout. t is an integer 0..999, or of a flow a float in [0, 1].
      sample_shape: (*S, C) of one sample in model space: (H, W, C), or (T, H, W, C) of a video.
      conditioning: what `cond` is, see `conditioning`.
      process: what is predicted, and on which path.
      guidance: which channels are guided.
      stacks: stacked blocks and the roles of their Linears; () where they are not told.
      predict: `apply` without blocks, where that is cheaper.
      hoist: (params, t, cond) -> a tree that depends on t and cond alone, which `predict` takes as a fifth argument.
      output_layer: of a network with a learned variance whose last Linear may make room for the error of the mean.
    """

    apply: Callable[..., Any]
    sample_shape: tuple[int, ...]
    conditioning: Any
    process: Process = Process()
    guidance: Guidance = Guidance()
    stacks: tuple[Stack, ...] = ()
    predict: Callable[..., Any] | None = None
    hoist: Callable[..., Any] | None = None
    output_layer: OutputLayer | None = None

    def run(
        self, params: Any, x: Array, t: Array, cond: Any, blocks: bool = False, hoisted: Any = None
    ) -> tuple[Array, Any]:
        """(output, blocks or None) of R rows, which are of one time where leaves depend on it."""
        params = at_time(params, lambda: self.process.done(t[0]))
        if blocks or self.predict is None:
            output, seen = self.apply(params, x, t, cond)
            return output, seen if blocks else None
        return self.predict(params, x, t, cond, hoisted), None

    def images(self, rows: int, cfg_scale: float) -> int:
        """How many images `rows` rows of an evaluation are of; guidance doubles them, unless cfg_scale is 1."""
        return rows if cfg_scale == 1.0 else rows // 2

    def combine(self, output: Float[Array, "R *S F"], cfg_scale: float) -> Float[Array, "B *S F"]:
        """The guided output of an evaluation's rows."""
        return output if cfg_scale == 1.0 else self.guidance.combine(output, cfg_scale, self.sample_shape[-1])

    def prediction(self, output: Float[Array, "R *S F"], cfg_scale: float) -> Float[Array, "B *S C"]:
        """The guided prediction, without the learned variance."""
        return self.combine(output, cfg_scale)[..., : self.sample_shape[-1]]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Paths under which leaves lead with an axis over blocks."""
        return tuple(stack.path for stack in self.stacks)

    def role(self, path: str) -> Role | None:
        """The role of the kernel at a leaf's path, such as "blocks/mlp/fc1/kernel"; None where it has none."""
        for stack in self.stacks:
            if path.startswith(stack.path + "/"):
                inside = path[len(stack.path) + 1 :]
                return next((role for role in stack.roles if re.fullmatch(role.pattern, inside)), None)
        return None

    def reads_conditioning(self, path: str) -> bool:
        """Whether the kernel at this path reads time and condition alone."""
        role = self.role(path)
        return role is not None and role.reads == "conditioning"


def problem(network: Network, params: Any, keys: Shaped[PRNGKeyArray, " B"], cfg_scale: float) -> Problem:
    """What a trajectory of these images is of: conditions drawn from their keys, and the null where cfg_scale is not 1."""
    cond = network.conditioning.draw(keys)
    return Problem(keys, cond, None if cfg_scale == 1.0 else network.conditioning.null(params, cond))


@functools.partial(jax.jit, static_argnames=("network", "images", "cfg_scale"))
def random_problem(network: Network, params: Any, key: jax.Array, *, images: int, cfg_scale: float) -> Problem:
    """`problem` of the first `images` images of the stream `key`."""
    return problem(network, params, image_keys(key, jnp.arange(images, dtype=jnp.uint32)), cfg_scale)


def as_network(model: Any, remat: bool = False) -> Network:
    """A `Network` as it is; of a module its own description. `remat` recomputes each block in the backward pass.

    Raises InputError for `remat` with a network that is no module of ours, and for what is neither.
    """
    if isinstance(model, Network):
        if remat:
            raise InputError(
                "remat=True is for the networks of this library; in a network of your own wrap the blocks in flax.linen.remat"
            )
        return model
    if not hasattr(model, "network"):
        raise InputError(
            f"model is a {type(model).__name__}; wanted a DiT, or a vq4dit_jax.Network that says how it is run"
        )
    return (model.clone(remat=True) if remat else model).network()


def check(network: Network, params: Any) -> None:
    """Runs `apply` on shapes alone; InputError, in one line, where it fails or returns something else."""
    shape, rows = network.sample_shape, 2
    if len(shape) not in (3, 4) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"sample_shape={shape}: wanted (H, W, C) or (T, H, W, C), positive integers")
    x = jax.ShapeDtypeStruct((rows, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct((rows,), jnp.float32 if network.process.is_flow else jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    cond = jax.eval_shape(network.conditioning.draw, keys)
    try:
        found = jax.eval_shape(network.apply, params, x, t, cond)
    except Exception as error:  # whatever the user's function raises
        what = next(iter(str(error).strip().splitlines()), "")
        packed = any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
        remedy = "let it call dequantize(params) first" if packed else f"is sample_shape={shape} what it takes?"
        raise InputError(
            f"apply(params, x, t, cond) fails on {'quantized' if packed else 'the'} params and x {x.shape}, t {t.shape}; "
            f"{remedy} ({type(error).__name__}: {what})"
        ) from error
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], jax.ShapeDtypeStruct)):
        raise InputError(f"apply returns {_spell(found)}; wanted a pair (output, block outputs)")
    output, blocks = found
    channels = shape[-1]
    if output.shape not in {(*x.shape[:-1], channels), (*x.shape[:-1], 2 * channels)}:
        raise InputError(
            f"apply returns an output {output.shape} for x {x.shape}; wanted {x.shape}, the prediction, "
            f"or {2 * channels} channels with a learned variance"
        )
    leaves = jax.tree.leaves(blocks)
    if blocks is not None and not (leaves and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)):
        raise InputError(
            f"apply returns {_spell(blocks)} as block outputs; wanted a list of floating arrays, one of each block, or None"
        )


def _spell(shapes: Any) -> str:
    """The kind of a tree and the shapes of its first leaves."""
    leaves = jax.tree.leaves(shapes)
    listed = ", ".join(f"{leaf.dtype}{leaf.shape}" for leaf in leaves[:4]) + (", ..." if len(leaves) > 4 else "")
    return listed if isinstance(shapes, jax.ShapeDtypeStruct) else f"a {type(shapes).__name__} of {listed or 'nothing'}"
