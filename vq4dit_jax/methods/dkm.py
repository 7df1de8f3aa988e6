"""Differentiable k-means (DKM, Cho et al. 2022, arXiv 2108.12659) as a post-training method: init, update, finalize.

    a_pk = softmax_k(-|w_p - c_k|^2 / tau)      attention of sub-vector p over the codewords     (DKM, section 3.2)
    w^_p = sum_k a_pk c_k                       soft weight
    C, biases <- RMSprop on L_d, the block-output loss (VQ4DiT, eq 8) at the teacher's (x_t, t, y)

The gradient of a codebook goes through the soft weight and through the attention. DKM trains the weights, too, and lets
codebooks follow them; here, where no data is, weights w are the teacher's and codebooks start from k-means.

tau is a share of the layer's mean squared distance from k-means, mean_p min_k |w_p - c_k|^2, which falls geometrically from
START to END over the run, so that the soft model ends as the hard one. At these shares the weights of codewords that are
not among the 16 nearest sum to less than 1e-3, so attention is over candidates, chosen once.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels.soft_weights import soft_weights
from vq4dit_jax.codebook.kmeans import nearest_codewords
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import losses
from vq4dit_jax.methods.loop import make_student
from vq4dit_jax.methods.recipe import CANDIDATES, Recipe
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.network import Network, as_network, check
from vq4dit_jax.qarray.base import Cost, Transient, is_quantized, register
from vq4dit_jax.qarray.spec import VQSpec
from vq4dit_jax.qarray.tree import Slot, flatten, map_slots
from vq4dit_jax.qarray.vq import VQArray, from_codes

START, END = 0.25, 0.01
"""Shares of the mean squared distance that tau is at the first and at the last step."""

RECIPE = {**CANDIDATES, "num_candidates": 16}
"""Fields of `methods.Recipe` for this method. Those of ratios, regularizer and freezing are not read."""


@register
class AttentionArray(Transient):
    """A weight as attention over codewords, a leaf that `linear` takes for a kernel.

    `codebook` (*stack, G, K, d) float32; `candidates` (*stack, n, O, S) int32; `weight` (*stack, O, I), what attends;
    `tau` (*stack) float32.
    """

    kind = "attention"
    codebook: Any
    candidates: Any
    weight: Any
    tau: Any

    @property
    def matrix(self) -> tuple[int, int]:
        return tuple(self.weight.shape[-2:])

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.tau.shape)

    def decode(self, dtype: Any = None) -> Float[Array, "*stack O I"]:
        """The soft weight; differentiable in the codebook, also through the attention."""
        attend = attention
        for _ in self.tau.shape:
            attend = jax.vmap(attend)
        ratios = attend(self.codebook, self.candidates, self.weight, self.tau)
        weight = soft_weights(self.codebook, self.candidates, ratios)
        return weight if dtype is None else weight.astype(dtype)

    def cost(self) -> Cost:
        """Of the hard form with a codebook in float32."""
        *_, groups, codewords, length = self.codebook.shape
        spec, (rows, columns), layers = VQSpec(codewords, length, groups), self.matrix, math.prod(self.stack)
        return Cost(*(layers * n for n in spec.abstract((), rows, columns).cost()))

    def harden(self) -> VQArray:
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
    """All that changes from step to step. `trainable` has codebooks and biases by the paths of their leaves."""

    trainable: dict[str, dict[str, Any]]
    optimizer: Any
    step: Any  # int32 ()


def make_attentive(recipe: Recipe, teacher: Any, kmeans: Any) -> Any:
    """The tree of `kmeans` with `AttentionArray` leaves, tau at the mean squared distance of each layer."""

    kernels = flatten(teacher)

    def one(slot: Slot) -> Any:
        leaf = slot.leaf
        if not is_quantized(leaf):
            return leaf
        weight = jnp.swapaxes(jnp.asarray(slot.cut(kernels[slot.path]), jnp.float32), -1, -2)
        nearest = jnp.ones(leaf.logits.shape, jnp.float32).at[..., 1:, :, :].set(0)
        hard = soft_weights(leaf.codebook, leaf.candidates, nearest)
        tau = jnp.square(weight - hard).mean((-2, -1)) * leaf.codebook.shape[-1]
        if not (tau > 0).all():
            raise InputError(f"{slot.path}: k-means is exact there, and leaves DKM no temperature")
        return AttentionArray(leaf.codebook, leaf.candidates, weight, tau)

    return map_slots(one, make_student(recipe, teacher, kmeans))


def _flatten(student: Any) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(student, is_leaf=lambda n: isinstance(n, AttentionArray))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}, treedef


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    def rmsprop(rate: float) -> optax.GradientTransformation:
        cosine = lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / recipe.steps))
        scaled = cosine if recipe.schedule == "cosine" else rate
        return optax.rmsprop(scaled, decay=recipe.decay, eps=recipe.epsilon, eps_in_sqrt=False)

    rates = {"codebooks": recipe.learning_rate_codebooks, "biases": recipe.learning_rate_biases}
    return optax.multi_transform({name: rmsprop(rate) for name, rate in rates.items()}, {name: name for name in rates})


def init(recipe: Recipe, student: Any) -> State:
    """State at step 0 from a tree of `make_attentive`. Trained are codebooks, and the biases beside them."""
    flat, _ = _flatten(student)
    codebooks = {path: leaf.codebook for path, leaf in flat.items() if isinstance(leaf, AttentionArray)}
    layers = {path.partition("/kernel")[0] for path in codebooks}
    biases = {
        path: jnp.asarray(flat[path], jnp.float32) for path in (f"{n}/bias" for n in sorted(layers)) if path in flat
    }
    trainable = {"codebooks": codebooks, "biases": biases}
    return State(trainable, _optimizer(recipe).init(trainable), jnp.int32(0))


def _merge(student: Any, trainable: dict[str, dict[str, Any]], share: Any) -> Any:
    flat, treedef = _flatten(student)
    flat |= trainable["biases"]
    for path, codebook in trainable["codebooks"].items():
        flat[path] = dataclasses.replace(flat[path], codebook=codebook, tau=share * flat[path].tau)
    return treedef.unflatten(flat.values())


def update(
    recipe: Recipe, network: Network, state: State, student: Any, batch: trajectory.Batch
) -> tuple[State, dict[str, Array]]:
    """One optimizer step; metrics are L_d of the soft model and the share that tau stands at."""
    done = state.step.astype(jnp.float32) / max(recipe.steps - 1, 1)
    share = START * (END / START) ** done

    def loss_fn(trainable: dict[str, dict[str, Array]]) -> Array:
        _, blocks = network.apply(_merge(student, trainable, share), batch.x, batch.t, batch.y)
        return losses.block_distance(blocks, batch.blocks)

    l_d, grads = jax.value_and_grad(loss_fn)(state.trainable)
    updates, optimizer = _optimizer(recipe).update(grads, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return State(trainable, optimizer, state.step + 1), {"l_d": l_d, "tau_share": share}


def finalize(student: Any, state: State) -> Any:
    """The hard model: nearest codewords, packed; codebooks and biases in float32."""
    is_leaf = lambda node: isinstance(node, AttentionArray)
    soft = _merge(student, state.trainable, END)
    return jax.tree.map(lambda leaf: leaf.harden() if is_leaf(leaf) else leaf, soft, is_leaf=is_leaf)


def calibrate(
    model: DiT | Network, params: Any, packed: Any, *, key: jax.Array, recipe: Recipe
) -> tuple[Any, list[dict[str, float]]]:
    """(the hard model, a tree like `packed`; metrics of each step), as `methods.calibrate` but for the method.

    Raises InputError as that does, and where k-means left no error.
    """
    network = as_network(model, recipe.remat)
    check(network, params)
    sched = diffusion.make_schedule(recipe.trajectory_steps)
    student = make_attentive(recipe, params, packed)
    state = jax.tree.map(jnp.copy, init(recipe, student))
    where = trajectory.begin(network, sched, jax.random.key_data(key), jnp.int32(0), recipe.batch)

    def step(state: State, where: Any, student: Any, teacher: Any) -> tuple[State, Any, dict[str, Array]]:
        batch, where = trajectory.advance(network, teacher, sched, recipe.cfg_scale, where)
        state, metrics = update(recipe, network, state, student, batch)
        return state, where, metrics

    step = jax.jit(step, donate_argnums=0)
    log = []
    for _ in range(recipe.steps):
        state, where, metrics = step(state, where, student, params)
        log.append({name: float(value) for name, value in metrics.items()})
    return jax.tree.map(lambda new, old: new.astype(old.dtype), finalize(student, state), packed), log
