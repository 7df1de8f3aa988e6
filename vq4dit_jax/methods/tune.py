"""Zero-data, block-wise calibration as three pure functions: init, update, finalize (VQ4DiT, section 3.2 to 3.4).

    r = softmax(z)                          ratios of the n candidates of each sub-vector       (eq 6)
    W_hat = sum_n r_n C[a_n]                                                                    (eq 7)
    L = lambda_d L_d + lambda_s (L_s + L_c) + lambda_r L_r                                      (eq 8 to 10, and `losses`)
    z, tables, biases <- optimizer on L at the teacher's (x_t, t, cond)
    sub-vectors with max r > threshold are frozen to that candidate

What can move is what a leaf says (`QuantizedArray.tunable`): codebooks of packed leaves, codebooks and logits of soft ones.
"""

import dataclasses
import functools
import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vq4dit_jax.diffusion.trajectory import Evaluation
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import loop, losses
from vq4dit_jax.methods.passes import Context, Report
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray import is_quantized
from vq4dit_jax.qarray.tree import Slot, dense_shapes, flatten, map_leaves, map_slots, walk

_FROZEN_ENOUGH = 0.99
"""Share of a layer's sub-vectors that must be frozen before its codebooks train, in the released form."""
_BINS = 20
_CHOICES = {
    "ratio_start": ("uniform", "distance"),
    "regularizer": ("paper", "released"),
    "codebook_training": ("together", "after_freezing"),
    "schedule": ("constant", "cosine"),
    "optimizer": ("adam", "rmsprop"),
}


class Trainable(NamedTuple):
    """What the optimizer moves; the field names are its labels. Keys are those of `slot_key`, float32 arrays.

    A leaf of one candidate has no logits: their gradients would cost a gather over all its weights.
    """

    logits: dict[str, Float[Array, "*stack n O S"]]
    tables: dict[str, Float[Array, "..."]]
    biases: dict[str, Float[Array, "*stack O"]]
    kept: dict[str, Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from step to step."""

    trainable: Any  # Trainable
    frozen: Any  # key -> bool (*stack, O, S), where there are logits
    optimizer: Any
    regularizer_floor: Any  # float32 (); minimum of the released regularizer in this trajectory
    step: Any  # int32 ()


@dataclasses.dataclass(frozen=True)
class Tune:
    """Trains tables and biases of a quantized model, and the choice among candidates where there are several.

    Attributes:
      steps: optimizer steps in all; one for each evaluation of the teacher's trajectories.
      batch: images of a trajectory; with guidance the networks see 2 * batch rows.
      trajectory_steps: steps of the process' sampler from noise to image; a new trajectory starts with new noise and conditions.
      cfg_scale: guidance of the teacher's trajectory.
      num_candidates: n, codewords that each sub-vector chooses among (eq 5); 1: the assignments that it is given stay.
      ratio_start: "uniform" r = 1/n (paper), or "distance" r proportional to 1/distance (released code).
      regularizer: "paper" sum_n (1 - |2r - 1|) averaged over sub-vectors (eq 9), or "released" n * mean r(1 - r) over
        those not yet frozen, averaged over layers, and only on steps where it is above its minimum of that trajectory.
      lambda_d, lambda_r: weights of L_d and L_r (eq 10).
      lambda_s: weight of L_s + L_c, what is left in the image of the error of the sampler's next step (`losses.step_distance`).
      tuned: a regular expression; parameters that are not quantized and whose paths match it whole are trained, too.
      learning_rate_ratios, learning_rate_codebooks, learning_rate_biases, learning_rate_tuned: of the optimizer.
      optimizer: "adam", or "rmsprop" as in the paper.
      decay, epsilon: of the mean of squared gradients, and what is added to its root.
      schedule: "constant", or "cosine" to 0 at the last step, for all but ratios.
      freeze_threshold: a sub-vector whose largest ratio passes it is frozen to that candidate.
      freeze_from, freeze_by: fractions of the run between which the threshold falls to 1/n, so that from `freeze_by` on every
        assignment is hard and the rest of the run tunes the very model that is saved. Both 1 for a constant threshold.
      codebook_training: "together" from the first step (paper), or "after_freezing": a layer's codebooks only once 99 %
        of its sub-vectors are frozen (released code).
      remat: recompute each block in the backward pass instead of keeping what is inside it: a third more time, and memory for
        one block instead of all. (In a network of your own, wrap its blocks in `flax.linen.remat`.)
    """

    steps: int = 500
    batch: int = 16
    trajectory_steps: int = 50
    cfg_scale: float = 1.5
    num_candidates: int = 2
    ratio_start: str = "distance"
    regularizer: str = "paper"
    lambda_d: float = 1.0
    lambda_r: float = 0.0
    lambda_s: float = 0.0
    tuned: str = ""
    learning_rate_ratios: float = 1e-2
    learning_rate_codebooks: float = 3e-4
    learning_rate_biases: float = 3e-4
    learning_rate_tuned: float = 1e-5
    optimizer: str = "rmsprop"
    decay: float = 0.9
    epsilon: float = 1e-8
    schedule: str = "cosine"
    freeze_threshold: float = 0.99
    freeze_from: float = 0.1
    freeze_by: float = 0.5
    codebook_training: str = "together"
    remat: bool = False
    name: ClassVar[str] = "tune"

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"calibration.{name}={getattr(self, name)!r}: wanted one of {', '.join(allowed)}")
        for name in ("steps", "batch", "trajectory_steps", "num_candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"calibration.{name}={getattr(self, name)}: wanted at least 1")
        if not 0 <= self.freeze_from <= self.freeze_by <= 1:
            raise InputError(
                f"calibration.freeze_from={self.freeze_from}, freeze_by={self.freeze_by}: wanted 0 <= from <= by <= 1"
            )
        try:
            re.compile(self.tuned)
        except re.error as error:
            raise InputError(f"calibration.tuned={self.tuned!r} is no regular expression: {error}") from None

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        student = initial_student(self, run.teacher, params)
        hard, lines = loop.run_steps(self, run, student, key)
        return map_leaves(as_stored, hard, params), loop.summary(lines)

    # The three functions of a gradient method ---------------------------------------------------------------------

    def init(self, student: Any) -> State:
        return init(self, student)

    def update(
        self, network: Network, state: State, student: Any, evaluation: Evaluation, new_trajectory: Bool[Array, ""]
    ) -> tuple[State, dict[str, Array]]:
        return update(self, network, state, student, evaluation, new_trajectory)

    def finalize(self, student: Any, state: State) -> Any:
        return finalize(student, state)


def as_stored(new: Any, old: Any) -> Any:
    """A leaf in the types of another of the same kind and shapes."""
    return jax.tree.map(lambda a, b: jax.device_put(np.asarray(a).astype(b.dtype)), new, old)


def initial_student(tune: Tune, teacher: Any, packed: Any) -> dict[str, Any]:
    """The tree of `packed` with leaves in the form that gradients train; candidates come from the teacher's weights."""
    weights, shapes = flatten(teacher), dense_shapes(packed)
    if alone := sorted(set(weights) ^ set(shapes)):
        raise InputError(
            f"the quantized tree is not that of the teacher: {alone[0]} is in one of them alone; quantize the very "
            "parameters that are given as the teacher"
        )
    for path, shape in shapes.items():
        if shape != weights[path].shape:
            raise InputError(
                f"{path} stands for weights {shape}, the teacher's are {weights[path].shape}; quantize the very "
                "parameters that are given as the teacher"
            )

    def one(slot: Slot) -> Any:
        if not is_quantized(slot.leaf):
            return slot.leaf
        if tune.num_candidates == 1:  # the weight is not read
            return slot.leaf.soften(None, 1, tune.ratio_start)
        weight = np.swapaxes(np.asarray(slot.cut(weights[slot.path]), np.float32), -1, -2)
        return slot.leaf.soften(weight, tune.num_candidates, tune.ratio_start)

    return map_slots(one, packed)


def slot_key(slot: Slot, name: str = "") -> str:
    """The name of a slot (or of one of its arrays) in the optimizer's dicts."""
    part = "" if slot.start is None else f"#{slot.start}"
    return f"{slot.path}{part}" + (f":{name}" if name else "")


def _optimizer(tune: Tune) -> optax.GradientTransformation:
    """Adam; or RMSprop as in torch, which the paper's rates were chosen with: epsilon is added to the root, not under it.
    (Under the root it would swallow gradients of single ratios, some 1e-6 and less.)"""

    def one(rate: float, schedule: str) -> optax.GradientTransformation:
        scaled = optax.cosine_decay_schedule(rate, tune.steps) if schedule == "cosine" else rate
        if tune.optimizer == "adam":
            return optax.adam(scaled, b1=0.9, b2=tune.decay, eps=tune.epsilon)
        return optax.rmsprop(scaled, decay=tune.decay, eps=tune.epsilon, eps_in_sqrt=False)

    return optax.multi_transform(
        {
            "logits": one(tune.learning_rate_ratios, "constant"),
            "tables": one(tune.learning_rate_codebooks, tune.schedule),
            "biases": one(tune.learning_rate_biases, tune.schedule),
            "kept": one(tune.learning_rate_tuned, tune.schedule),
        },
        Trainable(*Trainable._fields),
    )


def init(tune: Tune, student: Any) -> State:
    """State at step 0 from a tree of `initial_student`. Raises InputError where nothing is quantized."""
    slots = list(walk(student))
    quantized = [slot for slot in slots if is_quantized(slot.leaf)]
    if not quantized:
        raise InputError(
            "no parameter is quantized, so there is nothing to calibrate; give quantize() a rule with a spec"
        )
    wide = lambda a: np.array(a, np.float32)
    logits, tables, frozen = {}, {}, {}
    for slot in quantized:
        for name, array in slot.leaf.tunable().items():
            (logits if name == "logits" else tables)[slot_key(slot, name)] = wide(array)
            if name == "logits":
                frozen[slot_key(slot)] = np.array(slot.leaf.frozen)
    layers = {slot.path.rpartition("/")[0] for slot in quantized}
    flat = {slot.path: slot.leaf for slot in slots if not is_quantized(slot.leaf) and slot.start is None}
    biases = {f"{layer}/bias": wide(flat[f"{layer}/bias"]) for layer in layers if f"{layer}/bias" in flat}
    kept = {path: wide(a) for path, a in flat.items() if path not in biases and re.fullmatch(tune.tuned, path)}
    trainable = Trainable(logits, tables, biases, kept)
    return _start(tune, trainable, frozen)


@functools.partial(jax.jit, static_argnames="tune")
def _start(tune: Tune, trainable: Trainable, frozen: Any) -> State:
    with jax.numpy_dtype_promotion("standard"):
        return State(trainable, frozen, _optimizer(tune).init(trainable), jnp.float32(jnp.inf), jnp.int32(0))


def merge(student: Any, state: State) -> dict[str, Any]:
    """The student's tree with the state's tables, logits, masks and biases in place."""
    return merged(student, state.trainable, state.frozen)


def merged(student: Any, trainable: Trainable, frozen: dict[str, Array]) -> dict[str, Any]:
    """The student's tree with these arrays in place."""
    moved = trainable.logits | trainable.tables
    others = trainable.biases | trainable.kept

    def one(slot: Slot) -> Any:
        if not is_quantized(slot.leaf):
            return others.get(slot.path, slot.leaf) if slot.start is None else slot.leaf
        own = {name: moved[slot_key(slot, name)] for name in slot.leaf.tunable()}
        if slot_key(slot) in frozen:
            own["frozen"] = frozen[slot_key(slot)]
        return slot.leaf.with_tuned(own)

    return map_slots(one, student)


def _threshold(tune: Tune, step: Int[Array, ""]) -> Float[Array, ""]:
    """Freezing threshold at `step`: constant, then falling linearly to 1/n between `freeze_from` and `freeze_by`."""
    if tune.freeze_from >= 1:
        return jnp.float32(tune.freeze_threshold)
    start, stop = tune.freeze_from * tune.steps, max(tune.freeze_by * tune.steps, 1)
    done = jnp.clip((step.astype(jnp.float32) + 1 - start) / max(stop - start, 1), 0, 1)
    return tune.freeze_threshold + done * (1 / tune.num_candidates - tune.freeze_threshold)


def update(
    tune: Tune, network: Network, state: State, student: Any, evaluation: Evaluation, new_trajectory: Bool[Array, ""]
) -> tuple[State, dict[str, Array]]:
    """One optimizer step. `student` gives what does not change (candidates, kept parameters); `new_trajectory` is true
    at the first step of one, where the released regularizer forgets its minimum.

    Metrics are scalars but for `ratio_histogram`: 20 counts of the first candidate's ratio over [0, 1].
    """
    sched = network.process.schedule(tune.trajectory_steps)
    floor = jnp.where(new_trajectory, jnp.inf, state.regularizer_floor)

    def loss_fn(trainable: Trainable) -> tuple[Array, tuple]:
        params = merged(student, trainable, state.frozen)
        soft = [slot.leaf for slot in walk(params) if is_quantized(slot.leaf) and slot.leaf.kind == "soft"]
        output, blocks = network.run(params, evaluation.x, evaluation.t, evaluation.cond, blocks=True)
        zero = jnp.float32(0.0)
        l_d = zero if blocks is None else losses.block_distance(blocks, evaluation.blocks)
        l_s, l_c = losses.step_distance(network, sched, evaluation, output, tune.cfg_scale)
        if not any(leaf.num_candidates > 1 for leaf in soft):
            l_r, weight = zero, 1.0
        elif tune.regularizer == "paper":
            l_r, weight = losses.paper_regularizer(soft), 1.0
        else:
            l_r = losses.released_regularizer([leaf for leaf in soft if leaf.num_candidates > 1])
            weight = jnp.where(l_r > floor, 1.0, 0.0)
        loss = tune.lambda_d * l_d + tune.lambda_s * (l_s + l_c) + tune.lambda_r * weight * l_r
        return loss, (l_d, l_s, l_c, l_r)

    (loss, (l_d, l_s, l_c, l_r)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
    if tune.codebook_training == "after_freezing":
        settled = {key: _settled(mask) for key, mask in state.frozen.items()}
        tables = {}
        for name, g in grads.tables.items():
            own = settled.get(name.rpartition(":")[0])
            tables[name] = g if own is None else jnp.where(own.reshape(own.shape + (1,) * (g.ndim - own.ndim)), g, 0)
        grads = grads._replace(tables=tables)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, optimizer = _optimizer(tune).update(grads, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)

    threshold = _threshold(tune, state.step)
    fixed = sum(
        slot.leaf.num_subvectors
        for slot in walk(student)
        if is_quantized(slot.leaf) and slot.leaf.kind == "soft" and slot_key(slot) not in state.frozen
    )
    frozen, histogram = {}, jnp.zeros(_BINS, jnp.int32).at[-1].set(fixed)
    for key, mask in state.frozen.items():
        axis = mask.ndim - 2
        ratios = jax.nn.softmax(trainable.logits[f"{key}:logits"], axis)
        frozen[key] = mask | (ratios.max(axis) >= threshold)
        histogram += histogram_of(ratios.take(0, axis))
    decided = sum((mask.sum(dtype=jnp.float32) for mask in frozen.values()), jnp.float32(fixed))
    metrics = {
        "loss": loss,
        "l_d": l_d,
        "l_s": l_s,
        "l_c": l_c,
        "l_r": l_r,
        "frozen_fraction": decided / max(1, fixed + sum(mask.size for mask in frozen.values())),
        "ratio_histogram": histogram,
    }
    return State(trainable, frozen, optimizer, jnp.minimum(floor, l_r), state.step + 1), metrics


def histogram_of(ratios: Float[Array, "..."]) -> Int[Array, " 20"]:
    """Counts of ratios in equal bins of [0, 1], in integers: float32 would stop at 16,777,216."""
    bins = jnp.clip((ratios.reshape(-1) * _BINS).astype(jnp.int32), 0, _BINS - 1)
    return jnp.zeros(_BINS, jnp.int32).at[bins].add(1)


def _settled(frozen: Bool[Array, "*stack O S"]) -> Bool[Array, "*stack"]:
    """Per layer, whether enough sub-vectors are frozen."""
    return frozen.mean((-2, -1), dtype=jnp.float32) > _FROZEN_ENOUGH


def finalize(student: Any, state: State) -> dict[str, Any]:
    """The hard model: argmax of the ratios, packed; tables and biases in float32 (step 9 of the method)."""
    return map_leaves(lambda leaf: leaf.harden() if is_quantized(leaf) else leaf, merge(student, state))
