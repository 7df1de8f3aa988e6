"""What the load stage looks at, so that nothing is refused after hours: the config against the model that it names."""

import math
from typing import Any

import jax
import numpy as np

from vq4dit_jax.diffusion.samplers import sampler_for
from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import allocate, mixed
from vq4dit_jax.networks import inference
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.qarray.parts import split_runs
from vq4dit_jax.qarray.rules import abstract_quantized
from vq4dit_jax.qarray.tree import block_path, matrices, sizes
from vq4dit_jax.run import config as configs


def check(config: Any, model: Any, teacher: Any) -> None:
    """Raises InputError, naming the key, where a later stage would refuse this config for this model."""
    network = as_network(model)
    try:
        sampler_for(network.process, config.sample.sampler or None)
        cond = network.conditioning.choose(config.sample.labels, jax.random.key(0), np.arange(1))
    except InputError as error:
        raise InputError(f"--config.sample.{error}") from None
    for section in ("calibration", "sample"):
        if config[section].cfg_scale != 1.0 and not network.conditioning.guidable:
            try:
                network.conditioning.null(teacher, cond)
            except InputError as error:
                raise InputError(f"--config.{section}.{error}") from None
    prefixes = network.prefixes or None
    shapes = abstract_quantized(teacher, configs.rules(config), prefixes, config.quantize.codebook_dtype)
    # Zeros of these shapes that take no memory.
    packed = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), shapes)
    if config.calibration.allocation != "given":
        _check_budget(config, network, packed)
    if config.quantize.method == "viditq" and config.viditq.budget:
        own = config.viditq
        least = mixed.least_budget(packed, own.mixed_bits)
        if least > own.budget:
            raise InputError(
                f"--config.viditq.budget={own.budget:g} bits a weight: the least that {min(own.mixed_bits)} bits take with their "
                f"scales is {math.ceil(least * 1000) / 1000:g}; give more, or other --config.viditq.mixed_bits"
            )
    _check_activations(config.sample.activations, packed)


def _check_budget(config: Any, network: Any, packed: Any) -> None:
    """Says whether `allocate.spread` of these layers will have room enough, and what else to give."""
    layers = [
        allocate.Layer(block_path(path, block, network.prefixes), *leaf.matrix, leaf.spec(), 1.0)
        for path, block, leaf in matrices(packed)
        if allocate.is_allocated(leaf)
    ]
    together = config.calibration.allocation == "roles"
    least = allocate.least_budget(layers, sizes(packed).assignment_bytes, together)
    if least > config.calibration.budget:
        raise InputError(
            f"--config.calibration.budget={config.calibration.budget:g}: the codes and codebooks of these layers take more "
            f"with the fewest bits that there are; wanted {math.ceil(least * 1000) / 1000:g} or more"
        )


def _check_activations(activations: str, packed: Any) -> None:
    """The kernels have a form for these shapes: that of one block of each kind is made."""
    if activations == "float32":
        return
    kind, ranges = None, None
    if activations != "bfloat16":
        kind, ranges = activations, {name: np.ones(1, np.float32) for name in ("attn/proj", "mlp/fc2")}
    for run in split_runs(packed["blocks"]):
        try:
            inference.prepare_for_inference({"blocks": jax.tree.map(lambda a: a[:1], run)}, kind, ranges=ranges)
        except InputError as error:
            raise InputError(
                f"--config.sample.activations={activations}: {error}; wanted float32, or other rules"
            ) from None
