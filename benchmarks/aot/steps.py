"""Sampler steps of prepared networks as programs: functions of shapes, made without a network's weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import selector
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.inference import WEIGHTS, prepare_for_inference
from vq4dit_jax.qarray.operand import OperandSpec
from vq4dit_jax.qarray.rules import BITS
from vq4dit_jax.qarray.tree import random_params
from vq4dit_jax.qarray.vq import from_codes

_S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Form:
    """How a network is prepared, as the arguments of `prepare_for_inference`; `weights` None: codebooks of 2 bits.

    `rotation`: with ViDiT-Q's operands, which are balanced, centred, and rotated in groups of so many inputs (0: not rotated);
    with `ranges` proj's are rotated where values are made, so that its leaf has no rotation.
    """

    activations: str | None = None
    weights: str | None = None
    ranges: bool = False
    rotation: int | None = None

    def __str__(self) -> str:
        bits = {None: "2", "int8": "8", "int4": "4"}[self.weights]
        if self.activations is None:
            return f"W{bits}"
        operand = "" if self.rotation is None else f", balanced, rotation {self.rotation}"
        return f"W{bits}A8 {self.activations}{', ranges' if self.ranges else ''}{operand}"


FORMS = tuple(
    Form(activations, weights, ranges)
    for activations, weights in ((None, None), ("int8", None), ("e4m3", None), ("int8", "int8"), ("int8", "int4"))
    for ranges in ((False, True) if activations else (False,))
)
"""All that `prepare_for_inference` makes of leaves without operands."""


def stacked(one: Any, axis: int, copies: int) -> Any:
    """Shapes of a tree whose arrays are `copies` times as long in `axis`."""
    longer = lambda a: _S((*a.shape[:axis], a.shape[axis] * copies, *a.shape[axis + 1 :]), a.dtype)
    return jax.tree.map(longer, one)


def prepared_shapes(model: DiT, form: Form, bits: float | int = 2) -> Any:
    """Shapes of a prepared tree of `model`, made from one layer of random weights."""
    one = model.clone(depth=1)
    x = jnp.zeros((2, model.input_size, model.input_size, model.in_channels))
    labels = jnp.zeros(2, jnp.int32)
    shapes = jax.eval_shape(lambda: one.init(jax.random.key(0), x, labels, labels)["params"])
    params = random_params(shapes, jax.random.key(1))

    def quantize(path: Any, leaf: jax.Array) -> Any:
        name = jax.tree_util.keystr(path)
        if "blocks" not in name or "kernel" not in name:
            return leaf
        if form.rotation is not None:
            rotation = 0 if form.ranges and "proj" in name else form.rotation
            return _balanced(leaf, form, rotation, scaled="adaLN" not in name)
        if form.weights is not None:
            return leaf
        codewords, length = BITS[bits]
        _, columns, rows = leaf.shape
        groups = 3 if "qkv" in name else 1
        codes = np.zeros((1, rows, columns // length), np.uint8)
        return from_codes(jnp.zeros((1, groups, codewords, length), jnp.float32), codes)

    ranges = {"attn/proj": np.ones(1), "mlp/fc2": np.ones(1)} if form.ranges else None
    params = jax.tree_util.tree_map_with_path(quantize, params)
    weights = form.weights if form.rotation is None else None
    prepared = prepare_for_inference(params, form.activations, weights=weights, ranges=ranges)
    blocks = prepared["blocks"]
    # adaLN's layers are one stack of many rows, which read the same operand; scales by group have their rows in the third axis.
    own = jax.tree.map(lambda a: _S(a.shape, a.dtype), blocks.modulation.operand)
    rows = dataclasses.replace(blocks.modulation, operand=None)
    modulation = dataclasses.replace(stacked(rows, 1, model.depth), operand=own)
    if form.weights == "int4":
        scales = stacked(blocks.modulation.weights.scales, 2, model.depth)
        modulation = dataclasses.replace(modulation, weights=dataclasses.replace(modulation.weights, scales=scales))
    rest = {name: stacked(getattr(blocks, name), 0, model.depth) for name in ("qkv", "proj", "fc1", "fc2")}
    scale = None if blocks.attention_scale is None else _S((model.depth,), jnp.float32)
    kept = jax.tree.map(lambda a: _S(a.shape, a.dtype), {k: v for k, v in prepared.items() if k != "blocks"})
    return {**kept, "blocks": dataclasses.replace(blocks, modulation=modulation, attention_scale=scale, **rest)}


def _balanced(kernel: jax.Array, form: Form, rotation: int, scaled: bool) -> Any:
    """The leaf of a kernel (1, I, O), with a scale, if wanted, a centre and a rotation that do something."""
    weight = np.asarray(kernel, np.float32).swapaxes(1, 2)
    spec = OperandSpec(WEIGHTS[form.weights], rotation=rotation, scaled=scaled, centred=True)
    scale = np.linspace(0.5, 2, weight.shape[-1], dtype=np.float32)[None]
    return spec.balanced(weight, scale, scale - 1, jax.random.key(0))


def step(model: DiT, batch: int, facts: selector.Facts) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """A sampler step with guidance, 2 * batch rows, as it is traced for a device: (function, shapes behind the parameters)."""
    schedule = diffusion.make_schedule(50)

    def fn(params: Any, x: jax.Array, y: jax.Array, i: jax.Array, noise: jax.Array) -> jax.Array:
        t = jnp.full((2 * batch,), schedule.timesteps[i], jnp.int32)
        with selector.assume(facts):
            both = jnp.concatenate([x, x])
            out = model.apply({"params": params}, both, t, y, 1.5, method="forward_with_cfg")
        return diffusion.ddpm_step(schedule, i, x, out[:batch], noise)

    image = _S((batch, model.input_size, model.input_size, model.in_channels), jnp.float32)
    return fn, (image, _S((2 * batch,), jnp.int32), _S((), jnp.int32), image)


def steps(
    model: DiT, batch: int, facts: selector.Facts, forms: Sequence[Form]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step of each form side by side in one program, with one tree of what is outside the blocks: (function, shapes).

    XLA compiles what forms have in common once: half the time of as many programs.
    """
    one, shapes = step(model, batch, facts)
    trees = [shapes_of(model, form) for form in forms]

    def fn(outside: Any, blocks: Any, *rest: Any) -> list[jax.Array]:
        return [one({**outside, "blocks": own}, *rest) for own in blocks]

    outside = {name: leaf for name, leaf in trees[0].items() if name != "blocks"}
    return fn, (outside, [tree["blocks"] for tree in trees], *shapes)


@functools.cache
def shapes_of(model: DiT, form: Form) -> Any:
    """`prepared_shapes`, once for each pair."""
    return prepared_shapes(model, form)
