"""The error that 8-bit activations add to 2-bit weights, on the built-in model after calibration.

    python -m benchmarks.w2a8_error --run=runs/cifar10_w2 [--output=benchmarks/results/w2a8_error.json]

Relative L2 differences of guided noise predictions, means over held-out trajectories (16 images, 10 DDPM steps, guidance
1.5), to three references, each on its own trajectory: full precision; the packed 2-bit model in float32; and the same in
bfloat16. The last difference is the effect of the 8 bits alone. On any device: the arithmetic is that of the
kernels (8-bit products, 32-bit sums), through XLA where no kernel runs.
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vq4dit_jax as vq
from benchmarks import record
from vq4dit_jax import files
from vq4dit_jax.diffusion import trajectory
from vq4dit_jax.methods import losses
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.storage import provenance

CFG_SCALE, IMAGES, STEPS = 1.5, 16, 10
Form = tuple[vq.DiT, Any]
"""A model and its parameters."""


def forms(model: vq.DiT, teacher: Any, packed: Any) -> dict[str, Form]:
    """The packed model and its prepared forms; dense bfloat16, W8A8 and W4A8 of the teacher beside them."""
    ranges = vq.activation_ranges(model, packed, key=jax.random.key(11), cfg_scale=CFG_SCALE)
    dense_ranges = vq.activation_ranges(model, teacher, key=jax.random.key(11), weights="int8", cfg_scale=CFG_SCALE)
    prepare = functools.partial(vq.prepare_for_inference, packed)
    integers = functools.partial(vq.prepare_for_inference, teacher, "int8", ranges=dense_ranges)
    return {
        "W2 float32": (model, packed),
        "W2 bf16": (model, prepare()),
        "W2A8 int8, all scales by token": (model, prepare("int8")),
        "W2A8 int8": (model, prepare("int8", ranges=ranges)),
        "W2A8 e4m3": (model, prepare("e4m3", ranges=ranges)),
        "dense bf16": (model.clone(dtype=jnp.bfloat16), teacher),
        "W8A8 int8": (model, integers(weights="int8")),
        "W4A8 int8": (model, integers(weights="int4")),
    }


def differences(reference: Form, others: dict[str, Form], key: jax.Array) -> dict[str, float]:
    """Mean relative L2 difference of the guided noise prediction to the reference, on the reference's trajectory."""
    model, params = reference
    measures = {
        name: jax.jit(functools.partial(losses.agreement, as_network(other), cfg_scale=CFG_SCALE))
        for name, (other, _) in others.items()
    }
    found: dict[str, list[float]] = {name: [] for name in others}
    for batch in trajectory.batches(as_network(model), params, STEPS, key=key, images=IMAGES, cfg_scale=CFG_SCALE):
        for name, (_, other) in others.items():
            found[name].append(float(measures[name](other, batch)[1]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.w2a8_error", description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/cifar10_w2", help="a finished run of configs/cifar10_w2.py")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    flags = parser.parse_args()
    model, teacher = vq.load_pretrained(str(files.asset("dit_cifar10.safetensors")))
    _, packed, _ = vq.load_quantized(f"{flags.run}/quantized")
    every = forms(model, teacher, packed)
    two_bits = {name: form for name, form in every.items() if name.startswith("W2")}
    references = {
        "full precision": ((model, teacher), every),
        "W2 float32": (every["W2 float32"], two_bits),
        "W2 bf16": (every["W2 bf16"], two_bits),
    }
    columns = {
        name: differences(reference, others, jax.random.key(i))
        for i, (name, (reference, others)) in enumerate(references.items(), start=5)
    }
    print(f"{'difference to':32}", *(f"{name:>16}" for name in columns))
    for name in every:
        cells = (f"{100 * column[name]:.3f} %" if name in column else "" for column in columns.values())
        print(f"{name:32}", *(f"{cell:>16}" for cell in cells))
    if flags.output:
        figures = {
            "command": f"python -m benchmarks.w2a8_error --run={flags.run}",
            "commit": record.commit(),
            "date": time.strftime("%Y-%m-%d"),
            "devices": provenance.devices(),
            "versions": provenance.versions(),
            "run": provenance.digest(packed),
            "difference_to": columns,
        }
        files.write_json(flags.output, figures)


if __name__ == "__main__":
    main()
