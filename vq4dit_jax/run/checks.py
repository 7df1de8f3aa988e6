"""What the load stage looks at, so that nothing is refused after hours: the config against the model that it names."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vq4dit_jax.errors import InputError
from vq4dit_jax.methods import allocate
from vq4dit_jax.networks import inference
from vq4dit_jax.networks.dit import DiT
from vq4dit_jax.qarray import quantization
from vq4dit_jax.qarray.quantization import VQSpec
from vq4dit_jax.qarray.stack import split_runs
from vq4dit_jax.run import config as configs
from vq4dit_jax.run import generation


def check(config: Any, model: DiT, teacher: Any) -> None:
    """Raises InputError, naming the key, where a later stage would refuse this config for this model."""
    try:
        generation.class_labels(config.sample.labels, jax.random.key(0), np.arange(1), model.num_classes)
    except InputError as error:
        raise InputError(f"--config.sample.{error}") from None
    shapes = quantization.abstract_quantized(
        teacher, configs.rules(config), codebook_dtype=config.quantize.codebook_dtype
    )
    # Zeros of these shapes that take no memory.
    packed = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), shapes)
    if config.calibration.allocation != "given":
        _check_budget(config, packed)
    _check_activations(config.sample.activations, packed)


def _check_budget(config: Any, packed: Any) -> None:
    """Says whether `allocate.spread` of these layers will have room enough, and what else to give."""
    codes = 8 * quantization.sizes(packed).assignment_bytes
    least = _least_bits(
        packed,
        8 * jnp.dtype(config.quantize.codebook_dtype).itemsize,
        together=config.calibration.allocation == "roles",
    )
    if least > int(config.calibration.budget * codes):
        wanted = math.ceil(least / codes * 1000) / 1000
        raise InputError(
            f"--config.calibration.budget={config.calibration.budget:g}: the codes and codebooks of these layers take more "
            f"with the fewest bits that there are; wanted {wanted:g} or more"
        )


def _least_bits(packed: Any, codebook_bits: int, together: bool) -> int:
    """The fewest bits that the layers can have, where the blocks of a role share a spec if `together`."""
    roles: dict[str, list[allocate.Layer]] = {}
    for path, block, leaf in quantization.matrices(packed):
        name = path if together else quantization.block_path(path, block)
        spec = VQSpec(leaf.num_codewords, leaf.subvector_length, leaf.num_groups)
        roles.setdefault(name, []).append(allocate.Layer(name, *leaf.shape, spec, 1.0))
    total = 0
    for role in roles.values():
        common = set.intersection(*(set(layer.menu()) for layer in role))
        total += min(sum(layer.bits(spec, codebook_bits) for layer in role) for spec in common)
    return total


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
