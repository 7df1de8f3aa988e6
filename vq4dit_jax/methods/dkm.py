"""Differentiable k-means (DKM, Cho et al. 2022, arXiv 2108.12659) as a post-training method: init, update, finalize.

    a_pk = softmax_k(-|w_p - c_k|^2 / tau)      attention of sub-vector p over the codewords     (DKM, section 3.2)
    w^_p = sum_k a_pk c_k                       soft weight
    C, biases <- RMSprop on L_d, the block-output loss (VQ4DiT, eq 8) at the teacher's (x_t, t, cond)

The gradient of a codebook goes through the soft weight and through the attention. DKM trains the weights, too, and lets
codebooks follow them; here, where no data is, weights w are the teacher's and codebooks start from k-means.

tau is a share of the layer's mean squared distance from k-means, mean_p min_k |w_p - c_k|^2, which falls geometrically from
START to END over the run, so that the soft model ends as the hard one. At these shares the weights of codewords that are
not among the 16 nearest sum to less than 1e-3, so attention is over candidates, chosen once.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels.soft_weights import soft_weights
from vq4dit_jax.codebook.kmeans import nearest_codewords
from vq4dit_jax.diffusion.trajectory import Evaluation
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import loop, losses
from vq4dit_jax.methods.passes import Context, Report
from vq4dit_jax.methods.tune import Trainable, Tune, as_stored, initial_student, merged, slot_key
from vq4dit_jax.networks.network import Network
from vq4dit_jax.qarray import is_quantized
from vq4dit_jax.qarray.base import Transient, register, static
from vq4dit_jax.qarray.tree import Slot, flatten, map_leaves, map_slots, walk
from vq4dit_jax.qarray.vq import from_codes

START, END = 0.25, 0.01
"""Shares of the mean squared distance that tau is at the first and at the last step."""


@register
class AttentionArray(Transient):
    """A weight as attention over codewords.

    `codebook` (*stack, G, K, d) float32; `candidates` (*stack, n, O, S) int32; `weight` (*stack, O, I), what attends;
    `tau` (*stack) float32.
    """

    kind = "attention"
    codebook: Any
    candidates: Any
    weight: Any
    tau: Any
    matrix: tuple[int, int] = static()

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.codebook.shape[:-3])

    def cost(self) -> Any:
        return self.harden().cost()

    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        """The soft weight; differentiable in the codebook, also through the attention."""
        attend = attention
        for _ in self.tau.shape:
            attend = jax.vmap(attend)
        ratios = attend(self.codebook, self.candidates, self.weight, self.tau)
        weight = soft_weights(self.codebook, self.candidates, ratios)
        return weight if dtype is None else weight.astype(dtype)

    def tunable(self) -> dict[str, Array]:
        return {"codebook": self.codebook}

    def harden(self) -> Any:
        """Every sub-vector at the nearest of all codewords, packed."""
        *stack, groups, codewords, length = self.codebook.shape
        books = np.asarray(self.codebook).reshape(-1, codewords, length)
        vectors = np.asarray(self.weight).reshape(len(books), -1, length)
        codes = [nearest_codewords(v, c, 1)[0] for v, c in zip(vectors, books, strict=True)]
        return from_codes(self.codebook, np.stack(codes).reshape(*stack, self.weight.shape[-2], -1))


def attention(
    codebook: Float[Array, "G K d"],
    candidates: Int[Array, "n O S"],
    weight: Float[Array, "O I"],
    tau: Float[Array, ""],
) -> Float[Array, "n O S"]:
    """softmax_n(-|w - c_n|^2 / tau) over the candidates."""
    groups, codewords, length = codebook.shape
    first = jnp.arange(len(weight), dtype=jnp.int32) // (len(weight) // groups) * codewords
    near = codebook.reshape(-1, length)[candidates + first[None, :, None]]
    squared = jnp.square(near - weight.reshape(1, len(weight), -1, length)).sum(-1)
    return jax.nn.softmax(-squared / tau, axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from step to step. `trainable` has codebooks and biases by the names of `tune`."""

    trainable: Any
    optimizer: Any
    step: Any  # int32 ()


@dataclasses.dataclass(frozen=True)
class DKM:
    """Fields as those of `Tune`."""

    steps: int = 500
    batch: int = 16
    trajectory_steps: int = 50
    cfg_scale: float = 1.5
    num_candidates: int = 16
    learning_rate_codebooks: float = 3e-4
    learning_rate_biases: float = 3e-4
    decay: float = 0.9
    epsilon: float = 1e-8
    schedule: str = "cosine"
    remat: bool = False
    name: ClassVar[str] = "dkm"

    def __call__(self, run: Context, params: Any, key: jax.Array) -> tuple[Any, Report]:
        student = make_attentive(self, run.teacher, params)
        hard, lines = loop.run_steps(self, run, student, key)
        return map_leaves(as_stored, hard, params), loop.summary(lines)

    def init(self, student: Any) -> State:
        """State at step 0 from a tree of `make_attentive`. Trained are codebooks, and the biases beside them."""
        wide = lambda a: np.array(a, np.float32)
        slots = [slot for slot in walk(student) if is_quantized(slot.leaf)]
        tables = {slot_key(slot, "codebook"): wide(slot.leaf.codebook) for slot in slots}
        flat = flatten(student)
        names = {slot.path.rpartition("/")[0] + "/bias" for slot in slots}
        trainable = Trainable({}, tables, {name: wide(flat[name]) for name in sorted(names) if name in flat}, {})
        with jax.numpy_dtype_promotion("standard"):
            optimizer = self._optimizer().init(trainable)
        return State(jax.tree.map(jnp.asarray, trainable), optimizer, jnp.int32(0))

    def update(
        self, network: Network, state: State, student: Any, evaluation: Evaluation, new_trajectory: Any
    ) -> tuple[State, dict[str, Array]]:
        """One optimizer step; metrics are L_d of the soft model and the share that tau stands at."""
        done = state.step.astype(jnp.float32) / max(self.steps - 1, 1)
        share = START * (END / START) ** done

        def loss_fn(trainable: Trainable) -> Array:
            params = _cooled(merged(student, trainable, {}), share)
            _, blocks = network.run(params, evaluation.x, evaluation.t, evaluation.cond, blocks=True)
            return losses.block_distance(blocks, evaluation.blocks)

        l_d, grads = jax.value_and_grad(loss_fn)(state.trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
            updates, optimizer = self._optimizer().update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return State(trainable, optimizer, state.step + 1), {"l_d": l_d, "tau_share": share}

    def finalize(self, student: Any, state: State) -> Any:
        """The hard model: nearest codewords, packed; codebooks and biases in float32."""
        soft = merged(student, state.trainable, {})
        return map_leaves(lambda leaf: leaf.harden() if is_quantized(leaf) else leaf, soft)

    def _optimizer(self) -> optax.GradientTransformation:
        def rmsprop(rate: float) -> optax.GradientTransformation:
            scaled = optax.cosine_decay_schedule(rate, self.steps) if self.schedule == "cosine" else rate
            return optax.rmsprop(scaled, decay=self.decay, eps=self.epsilon, eps_in_sqrt=False)

        fixed = optax.set_to_zero()
        rates = {"tables": rmsprop(self.learning_rate_codebooks), "biases": rmsprop(self.learning_rate_biases)}
        labels = Trainable(*Trainable._fields)
        return optax.multi_transform({"logits": fixed, "kept": fixed, **rates}, labels)


def _cooled(params: Any, share: Any) -> Any:
    """The tree with every tau times `share`."""
    one = lambda slot: (
        dataclasses.replace(slot.leaf, tau=share * slot.leaf.tau) if is_quantized(slot.leaf) else slot.leaf
    )
    return map_slots(one, params)


@functools.partial(jax.jit, static_argnames="length")
def _mean_distance(codebook: Array, candidates: Array, weight: Array, length: int) -> Array:
    """Of the sub-vectors of each matrix of a stack from their nearest codewords, squared."""
    nearest = jnp.ones(candidates.shape, jnp.float32).at[..., 1:, :, :].set(0)
    return jnp.square(weight - soft_weights(codebook, candidates, nearest)).mean((-2, -1)) * length


def make_attentive(dkm: DKM, teacher: Any, kmeans: Any) -> Any:
    """The tree of `kmeans` with `AttentionArray` leaves, tau at the mean squared distance of each layer.

    Raises InputError where k-means left no error.
    """
    weights = flatten(teacher)

    def one(slot: Slot) -> Any:
        leaf = slot.leaf
        if not is_quantized(leaf):
            return leaf
        weight = jnp.asarray(np.swapaxes(np.asarray(slot.cut(weights[slot.path]), np.float32), -1, -2))
        tau = _mean_distance(leaf.codebook, leaf.candidates, weight, leaf.codebook.shape[-1])
        if not (np.asarray(tau) > 0).all():
            raise InputError(f"{slot.path}: k-means is exact there, and leaves DKM no temperature")
        return AttentionArray(leaf.codebook, leaf.candidates, weight, tau, leaf.matrix)

    return map_slots(one, initial_student(Tune(num_candidates=dkm.num_candidates), teacher, kmeans))
