"""Zero-data, block-wise calibration as three pure functions: init, update, finalize (VQ4DiT, section 3.2 to 3.4).

    r = softmax(z)                          ratios of the n candidates of each sub-vector       (eq 6)
    W_hat = sum_n r_n C[a_n]                                                                    (eq 7)
    L = lambda_d L_d + lambda_r L_r                                                             (eq 8 to 10)
    z, C, biases <- RMSprop on L at the teacher's (x_t, t, y)
    sub-vectors with max r > threshold are frozen to that candidate

The teacher and the student are the same function; only the leaves of their trees differ.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion.trajectory import Batch
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses
from vq4dit_jax.methods.recipe import Recipe
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray.parts import from_parts, parts_of
from vq4dit_jax.qarray.soft import SoftVQArray
from vq4dit_jax.qarray.tree import densify, flatten, unflatten

_FROZEN_ENOUGH = 0.99
"""Share of a layer's sub-vectors that must be frozen before its codebooks train, in the released form."""


class Trainable(NamedTuple):
    """What the optimizer moves; the field names are its labels. Keys are '/'-joined paths.

    A leaf of one candidate has no choice, and hence no logits here: their gradients would cost a gather over all its weights.
    """

    logits: dict[str, Float[Array, "*stack n O S"]]
    codebooks: dict[str, Float[Array, "*stack G K d"]]
    biases: dict[str, Float[Array, "*stack O"]]
    kept: dict[str, Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from step to step; what resumes a run, with the trajectory beside it."""

    trainable: Any  # Trainable
    frozen: Any  # path -> bool (*stack, O, S), where there are logits
    optimizer: Any
    regularizer_floor: Any  # float32 (); minimum of the released regularizer in this trajectory
    step: Any  # int32 ()


def _is_soft(node: Any) -> bool:
    return isinstance(node, SoftVQArray)


def _flatten(params: Any) -> dict[str, Any]:
    """Paths to leaves; those in parts are numbered."""
    flat = {}
    for path, leaf in flatten(params).items():
        for i, (start, part) in enumerate(parts_of(leaf)):
            flat[path if start is None else f"{path}#{i}"] = part
    return flat


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, list[Any]] = {}
    for path, leaf in flat.items():
        whole.setdefault(path.partition("#")[0], []).append(leaf)
    return unflatten({path: from_parts(parts) for path, parts in whole.items()})


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Adam; or RMSprop as in torch, which the paper's rates were chosen with: epsilon is added to the root, not under it.
    (Under the root it would swallow gradients of single ratios, some 1e-6 and less.)"""

    def cosine(count: Int[Array, ""]) -> Float[Array, ""]:
        return 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / recipe.steps))

    def one(rate: float, schedule: str) -> optax.GradientTransformation:
        scaled = (lambda count: rate * cosine(count)) if schedule == "cosine" else rate
        if recipe.optimizer == "adam":
            return optax.adam(scaled, b1=0.9, b2=recipe.decay, eps=recipe.epsilon)
        return optax.rmsprop(scaled, decay=recipe.decay, eps=recipe.epsilon, eps_in_sqrt=False)

    return optax.multi_transform(
        {
            "logits": one(recipe.learning_rate_ratios, "constant"),
            "codebooks": one(recipe.learning_rate_codebooks, recipe.schedule),
            "biases": one(recipe.learning_rate_biases, recipe.schedule),
            "kept": one(recipe.learning_rate_tuned, recipe.schedule),
        },
        Trainable(*Trainable._fields),
    )


def init(recipe: Recipe, student: Any) -> State:
    """State at step 0 from a tree with `SoftVQArray` leaves (`vq.soften`)."""
    flat = _flatten(student)
    soft = {path: leaf for path, leaf in flat.items() if _is_soft(leaf)}
    if not soft:
        raise InputError(
            "no parameter is quantized, so there is nothing to calibrate; give quantize() a rule with a VQSpec"
        )
    layers = {path.partition("#")[0].rpartition("/")[0] for path in soft}
    biases = {
        f"{layer}/bias": jnp.asarray(flat[f"{layer}/bias"], jnp.float32) for layer in layers if f"{layer}/bias" in flat
    }
    choosing = {path: leaf for path, leaf in soft.items() if leaf.num_candidates > 1}
    trainable = Trainable(
        {path: leaf.logits for path, leaf in choosing.items()},
        {path: leaf.codebook for path, leaf in soft.items()},
        biases,
        {
            path: jnp.asarray(leaf, jnp.float32)
            for path, leaf in flat.items()
            if path not in soft and path not in biases and re.fullmatch(recipe.tuned, path)
        },
    )
    return State(
        trainable,
        {path: leaf.frozen for path, leaf in choosing.items()},
        _optimizer(recipe).init(trainable),
        jnp.float32(jnp.inf),
        jnp.int32(0),
    )


def merge(student: Any, state: State) -> dict[str, Any]:
    """The student's tree with the state's codebooks, logits, masks and biases in place."""
    return _merge(student, state.trainable, state.frozen)


def _merge(student: Any, trainable: Trainable, frozen: dict[str, Array]) -> dict[str, Any]:
    flat = dict(_flatten(student))
    flat.update(trainable.biases | trainable.kept)
    for path, codebook in trainable.codebooks.items():
        flat[path] = dataclasses.replace(flat[path], codebook=codebook)
    for path, logits in trainable.logits.items():
        flat[path] = dataclasses.replace(flat[path], logits=logits, frozen=frozen[path])
    return _unflatten(flat)


def _threshold(recipe: Recipe, step: Int[Array, ""]) -> Float[Array, ""]:
    """Freezing threshold at `step`: constant, then falling linearly to 1/n between `freeze_from` and `freeze_by`."""
    if recipe.freeze_from >= 1:
        return jnp.float32(recipe.freeze_threshold)
    start, stop = recipe.freeze_from * recipe.steps, max(recipe.freeze_by * recipe.steps, 1)
    done = jnp.clip((step.astype(jnp.float32) + 1 - start) / max(stop - start, 1), 0, 1)
    return recipe.freeze_threshold + done * (1 / recipe.num_candidates - recipe.freeze_threshold)


def update(
    recipe: Recipe, network: Network, state: State, student: Any, batch: Batch, new_trajectory: Bool[Array, ""]
) -> tuple[State, dict]:
    """One optimizer step. `student` gives what does not change (candidates, kept parameters); `new_trajectory` is true
    at the first step of one, where the released regularizer forgets its minimum.

    Metrics are scalars but for `ratio_histogram`: 20 counts of the first candidate's ratio over [0, 1].
    """
    sched = diffusion.make_schedule(recipe.trajectory_steps)
    floor = jnp.where(new_trajectory, jnp.inf, state.regularizer_floor)

    def loss_fn(trainable: Trainable) -> tuple[Array, tuple]:
        params = _merge(student, trainable, state.frozen)
        leaves = [leaf for leaf in _flatten(params).values() if _is_soft(leaf)]
        output, blocks = network.apply(densify(params), batch.x, batch.t, batch.y)
        l_d = losses.block_distance(blocks, batch.blocks)
        l_s, l_c = losses.step_distance(network, sched, batch, output, recipe.cfg_scale)
        if recipe.regularizer == "paper":
            l_r, weight = losses.paper_regularizer(leaves), 1.0
        else:
            l_r = losses.released_regularizer(leaves)
            weight = jnp.where(l_r > floor, 1.0, 0.0)
        loss = recipe.lambda_d * l_d + recipe.lambda_s * (l_s + l_c) + recipe.lambda_r * weight * l_r
        return loss, (l_d, l_s, l_c, l_r)

    (loss, (l_d, l_s, l_c, l_r)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
    if recipe.codebook_training == "after_freezing":
        grads = grads._replace(
            codebooks={
                path: jnp.where(_settled(state.frozen[path], g.ndim), g, 0) if path in state.frozen else g
                for path, g in grads.codebooks.items()
            }
        )
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power
        updates, optimizer = _optimizer(recipe).update(grads, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)

    threshold = _threshold(recipe, state.step)
    leaves = _flatten(student)
    fixed = sum(leaves[path].num_subvectors for path in trainable.codebooks if path not in state.frozen)
    frozen, histogram = {}, jnp.zeros(20, jnp.int32).at[-1].set(fixed)
    for path, mask in state.frozen.items():
        axis = mask.ndim - 2
        ratios = jax.nn.softmax(trainable.logits[path], axis)
        frozen[path] = mask | (ratios.max(axis) >= threshold)
        first = ratios.take(0, axis).reshape(-1)
        # In integers: counts in float32 stop at 2^24.
        histogram += jnp.bincount(jnp.clip((20 * first).astype(jnp.int32), 0, 19), length=20)
    decided = sum((mask.sum(dtype=jnp.float32) for mask in frozen.values()), jnp.float32(fixed))
    metrics = {
        "loss": loss,
        "l_d": l_d,
        "l_s": l_s,
        "l_c": l_c,
        "l_r": l_r,
        "frozen_fraction": decided / (fixed + sum(mask.size for mask in frozen.values())),
        "ratio_histogram": histogram,
    }
    return State(trainable, frozen, optimizer, jnp.minimum(floor, l_r), state.step + 1), metrics


def _settled(frozen: Bool[Array, "*stack O S"], ndim: int) -> Bool[Array, "..."]:
    """Per layer, broadcastable to its codebook: whether enough sub-vectors are frozen."""
    settled = frozen.mean((-2, -1), dtype=jnp.float32) > _FROZEN_ENOUGH
    return settled.reshape(settled.shape + (1,) * (ndim - settled.ndim))


def finalize(student: Any, state: State) -> dict[str, Any]:
    """The hard model: argmax of the ratios, packed; codebooks and biases in float32 (step 9 of the method)."""
    return jax.tree.map(lambda leaf: leaf.harden() if _is_soft(leaf) else leaf, merge(student, state), is_leaf=_is_soft)
