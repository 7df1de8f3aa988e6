"""Training a DiT as pure functions on a pytree: init, update, and the loop around them that can be killed at any time."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from examples import objective
from examples.data import Dataset
from vq4dit_jax import files
from vq4dit_jax.diffusion import sampling
from vq4dit_jax.diffusion import schedule as diffusion
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods.loop import read_log
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.networks.layers import sincos_positions
from vq4dit_jax.progress import progress
from vq4dit_jax.storage import checkpoint

_LOG_EVERY = 10
_METRICS = ("loss", "mse", "vb", "grad_norm")
_ORDER, _STEPS = 0, 1
"""Streams of randomness: the order of the images, and the draws of a step."""
_FIXED = "pos_embed"
"""The position table is a parameter in checkpoints and is not trained."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """With the images and the first weights, this decides every bit of the result on a given machine.

    Attributes:
      learning_rate: the highest; it rises linearly for `warmup` steps and falls along a cosine to 0 at `steps`.
      ema: decay of the mean of the weights; this mean is the final model.
      clip: largest norm of a gradient.
      label_dropout: share of the labels that become the null label, so that guidance has both.
      dtype: of the network's computation; parameters are float32.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    ema: float
    clip: float
    dtype: str
    seed: int
    label_dropout: float = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from step to step, and the key."""

    params: Any
    ema: Any
    optimizer: Any
    key: Any  # key data: files know no typed keys
    step: Any  # int32 ()


def learning_rate(recipe: Recipe, step: Int[Array, ""]) -> Float[Array, ""]:
    now = step.astype(jnp.float32)
    rise = jnp.minimum(1.0, (now + 1) / max(recipe.warmup, 1))
    return recipe.learning_rate * rise * 0.5 * (1 + jnp.cos(jnp.pi * now / recipe.steps))


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without decay of the weights, as DiT was trained."""
    rate = lambda count: learning_rate(recipe, count)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.adamw(rate, weight_decay=0.0))


def init_params(model: DiT, key: jax.Array) -> Any:
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    label = jnp.zeros((1,), jnp.int32)
    return jax.jit(model.init)(key, x, label, label)["params"]


def init(recipe: Recipe, params: Any) -> State:
    """State at step 0. Nothing in it is shared with `params` or within itself, so that a step may take it over."""
    copy = lambda tree: jax.tree.map(lambda a: jnp.array(a, jnp.float32), tree)
    trained = {name: leaf for name, leaf in params.items() if name != _FIXED}
    return State(
        copy(trained),
        copy(trained),
        _optimizer(recipe).init(copy(trained)),
        jax.random.key_data(jax.random.key(recipe.seed)),
        jnp.int32(0),
    )


def finalize(model: DiT, state: State) -> Any:
    """The averaged weights, a whole tree of `model`'s parameters."""
    return _with_positions(model, state.ema)


def _with_positions(model: DiT, trained: Any) -> Any:
    return {**trained, _FIXED: jnp.asarray(sincos_positions(model.grid, model.hidden_size))}


def make_update(model: DiT, recipe: Recipe) -> Callable[..., tuple[State, dict[str, Array]]]:
    """update(state, images uint8 (B, S, S, C), labels int32 (B,)) -> (state, metrics), jitted; it takes the state over.

    On several devices the batch may lie in shards: the random numbers are those of one device, sums are rounded otherwise.
    """
    sched = diffusion.make_schedule(diffusion.TRAIN_STEPS)
    optimizer = _optimizer(recipe)

    def update(
        state: State, images: UInt8[Array, "B S S C"], labels: Int[Array, " B"]
    ) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), _STEPS), state.step)
        for_flips, for_noise, for_t, for_labels = jax.random.split(key, 4)
        count = images.shape[0]
        x0 = images.astype(jnp.float32) / 127.5 - 1
        flip = jax.random.bernoulli(for_flips, 0.5, (count, 1, 1, 1))
        x0 = jnp.where(flip, x0[:, :, ::-1], x0)
        noise = jax.random.normal(for_noise, x0.shape, jnp.float32)
        t = jax.random.randint(for_t, (count,), 0, diffusion.TRAIN_STEPS, jnp.int32)
        drop = jax.random.bernoulli(for_labels, recipe.label_dropout, (count,))
        y = jnp.where(drop, model.num_classes, labels)
        x_t = objective.diffuse(sched, x0, noise, t)

        def loss_fn(trained: Any) -> tuple[Array, tuple[Array, Array]]:
            output = model.apply({"params": _with_positions(model, trained)}, x_t, t, y)
            mse, vb = (part.mean() for part in objective.losses(sched, output, x0, noise, t))
            return mse + vb, (mse, vb)

        (loss, (mse, vb)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda mean, new: recipe.ema * mean + (1 - recipe.ema) * new, state.ema, params)
        metrics = {"loss": loss, "mse": mse, "vb": vb, "grad_norm": optax.tree.norm(grads)}
        return State(params, ema, opt_state, state.key, state.step + 1), metrics

    return jax.jit(update, donate_argnums=0)


def batch_indices(seed: int, step: int, batch: int, count: int) -> Int[np.ndarray, " B"]:
    """Indices of the images of step number `step`: every epoch has its own order and leaves out its incomplete last batch."""
    epoch, position = divmod(step, count // batch)
    return _order(seed, epoch, count)[position * batch : (position + 1) * batch]


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " N"]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER), epoch)
    return np.asarray(jax.random.permutation(key, count))


def train(
    model: DiT,
    recipe: Recipe,
    data: Dataset,
    params: Any,
    folder: pathlib.Path,
    log_file: pathlib.Path,
    save_every: int = 100,
) -> State:
    """Trains to the recipe's last step and returns the state, from `folder`'s checkpoint where it has one.

    Args:
      model: its `dtype` is that of the computation.
      params: the first weights, any floating type.
      folder: `step_NNNNNNN` (orbax) is written there every `save_every` steps and at the end; then the older one goes.
      log_file: one JSON line for every 10 steps: means over the steps since the line before, images_per_second.
    """
    count = len(data.images)
    if count < recipe.batch:
        raise InputError(f"--batch={recipe.batch}: there are {count} images; wanted at most as many")
    if recipe.batch % jax.local_device_count():
        raise InputError(f"--batch={recipe.batch}: wanted a multiple of the {jax.local_device_count()} devices")
    rows = NamedSharding(sampling.batch_mesh(), PartitionSpec("batch"))
    state = jax.device_put(resume(folder, init(recipe, params)), sampling.replicated())
    update, done = make_update(model, recipe), int(state.step)
    pending, since = [], time.perf_counter()
    with progress(recipe.steps, "train", "step") as bar, _open_log(log_file, done) as log:
        bar.update(done)
        bar.unpause()
        for step in range(done, recipe.steps):
            chosen = batch_indices(recipe.seed, step, recipe.batch, count)
            batch = jax.device_put((data.images[chosen], data.labels[chosen]), rows)
            state, metrics = update(state, *batch)
            pending.append(metrics)
            bar.update(1)
            save = (step + 1) % save_every == 0 or step + 1 == recipe.steps
            if save or (step + 1) % _LOG_EVERY == 0:
                means = {name: float(np.mean([m[name] for m in jax.device_get(pending)])) for name in _METRICS}
                _check_finite(means, step)
                speed = len(pending) * recipe.batch / (time.perf_counter() - since)
                line = {"step": step + 1, **means, "images_per_second": round(speed, 2)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{speed:.0f}")
                pending, since = [], time.perf_counter()
            if save:
                _save(folder, step + 1, state)
    return state


def _check_finite(means: dict[str, float], step: int) -> None:
    if not np.isfinite(means["loss"]):
        raise InputError(
            f"step {step + 1}: the loss is {means['loss']}; the last checkpoint is whole: try a new --workdir with a "
            "lower --learning-rate, a longer --warmup, or --dtype=float32"
        )


def _steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def _path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step_{step:07d}"


def resume(folder: pathlib.Path, like: State) -> State:
    """The state of the last checkpoint, or `like` where there is none."""
    steps = _steps(folder)
    return checkpoint.load_state(_path(folder, steps[-1]), like)[0] if steps else like


def _save(folder: pathlib.Path, step: int, state: State) -> None:
    """Writes the new state before the old ones go."""
    old = [number for number in _steps(folder) if number != step]
    checkpoint.save_state(_path(folder, step), state, {"step": step})
    for number in old:
        files.remove(_path(folder, number))


def _open_log(log_file: pathlib.Path, done: int) -> TextIO:
    """The log, open at its end. Kept are the lines of steps that the checkpoint has; the others are run again."""
    kept = [line for line in read_log(log_file) if line["step"] <= done]
    files.write_text(log_file, "".join(json.dumps(line) + "\n" for line in kept))
    return open(log_file, "a", encoding="utf-8")
