"""`vq.calibrate`: a quantized model against its full-precision teacher, without data."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vq4dit_jax.methods import passes as runner
from vq4dit_jax.methods import vq4dit
from vq4dit_jax.networks.network import Network


def default_passes(network: Network) -> tuple[runner.Pass, ...]:
    """Ours where the network tells its Linears (`Network.stacks`); else candidates, which need to know nothing of them."""
    return vq4dit.passes(vq4dit.LAYERWISE if network.stacks else vq4dit.CANDIDATES)


def calibrate(
    model: Any,
    params: Any,
    packed: Any,
    *,
    key: jax.Array,
    passes: Sequence[runner.Pass] | None = None,
    folder: str | os.PathLike | None = None,
    log_file: str | os.PathLike | None = None,
    save_every: int = 50,
    on_step: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Any:
    """The model after all passes: a tree like `packed`; with an allocation, one with other codebooks.

    Args:
      model: a `DiT`, or the `Network` that says how any other one is run.
      params: the teacher, full precision; jax or numpy arrays.
      packed: what `quantize` made of it. Tables and biases are trained in float32 and returned in their types here.
      key: of all randomness: noise, conditions, k-means of an allocation.
      passes: what is done, in order, such as `methods.vq4dit.passes(steps=100)`. None: `default_passes`.
      folder: where each pass keeps its result, and the gradient steps every `save_every`. The same call continues from it, with
        the same bits as if it had never stopped. None: nothing is written.
      log_file: one JSON line for each gradient step, see `read_log`; continued as well.
      on_step: is given each line after its step.

    Raises:
      InputError: the network does not do as `Network` says, nothing is quantized, the trees do not fit each other, the loss
        diverges, or `folder` holds a run of something else.
    """
    run = runner.begin(model, params, key, folder, log_file=log_file, save_every=save_every, on_step=on_step)
    return runner.apply(default_passes(run.network) if passes is None else passes, run, packed)[0]
