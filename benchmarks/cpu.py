"""The built-in model's guided forward on the CPU: ours in every form, and PyTorch's, as multiples of PyTorch in float32.

    python -m benchmarks.cpu [--output=benchmarks/results/cpu_forward.json]

One call predicts the guided noise of `--images` images, which is twice as many rows of the network. The forms are called
in turn, on the same numbers and all the cores of this process, so that other work on the machine slows them all:

  dense           the parameters in float32
  packed          `quantize(params, 2)`: the blocks decode their weights in float32
  W2A8            that, by `prepare_for_inference`, with 8-bit activations
  W8A8, W4A8      the dense parameters, by `prepare_for_inference`, with 8-bit and 4-bit integers
  ViDiT-Q ...     leaves of the configs w8a8, w4a8 and w2a8 as they are sampled, with scales and centres that are not chosen yet
  torch ...       `benchmarks.gpu.torch_dit` with the same weights: float32, bfloat16, and float32 through torch.compile

W2A8, W8A8 and W4A8 have the fixed scales of the packed model's `activation_ranges`, ViDiT-Q's forms their own. Before the
first turn every form is compared with PyTorch in float32. The relative difference of its output stands in the JSON file; one
that is too large ends the run.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file

import vq4dit_jax as vq
from benchmarks import record
from benchmarks.gpu.torch_dit import DiT as TorchDiT
from configs import cifar10_w2a8, cifar10_w4a8, cifar10_w8a8
from vq4dit_jax import files
from vq4dit_jax.methods import viditq
from vq4dit_jax.networks.inference import for_sampling
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.storage import provenance

CFG_SCALE = 1.5
REFERENCE = "torch float32"
TOLERANCES = {
    **{"dense": 1e-4, "torch compiled": 1e-4, "torch bfloat16": 0.05},
    **{"W8A8": 0.05, "W4A8": 0.3, "ViDiT-Q W8A8": 0.05, "ViDiT-Q W4A8": 0.3},
}
"""Largest relative difference from PyTorch in float32. k-means at 2 bits alone is coarser: 0.5 for packed forms."""
_ASSET = "dit_cifar10.safetensors"
_VIDITQ = {"W8A8": cifar10_w8a8, "W4A8": cifar10_w4a8, "W2A8": cifar10_w2a8}

Call = Callable[[], Any]
"""Computes the guided prediction and waits until it is there: (2B, 2C, H, W) or (2B, H, W, 2C)."""


def inputs(images: int, size: int, channels: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x = [z, z] (2B, H, W, C), t (2B,), y = [labels, null] (2B,)."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((images, size, size, channels), np.float32)
    labels = rng.integers(0, classes, images)
    y = np.concatenate([labels, np.full_like(labels, classes)]).astype(np.int32)
    return np.concatenate([z, z]), np.full(2 * images, 500, np.int32), y


def our_forms(images: int) -> dict[str, Call]:
    """Ours in float32, packed, and with 8-bit activations, compiled at the first call."""
    model, params = vq.load_pretrained(str(files.asset(_ASSET)))
    packed = vq.quantize(params, 2, key=jax.random.key(0), max_iterations=10)
    ranges = vq.activation_ranges(model, packed, key=jax.random.key(1), images=8, num_steps=5)
    forms = {
        "dense": params,
        "packed": packed,
        "W2A8": vq.prepare_for_inference(packed, "int8", ranges=ranges),
        "W8A8": vq.prepare_for_inference(params, "int8", weights="int8", ranges=ranges),
        "W4A8": vq.prepare_for_inference(params, "int8", weights="int4", ranges=ranges),
    }
    for bits, config in _VIDITQ.items():
        settings = dict(config.get_config().viditq)
        rules = dit_rules(viditq.spec(settings))
        source = viditq.source(settings, as_network(model), params)
        leaves = vq.quantize(source, key=jax.random.key(0), rules=rules, max_iterations=10)
        forms[f"ViDiT-Q {bits}"] = for_sampling(model, leaves, "int8", CFG_SCALE)
    arguments = [jnp.asarray(a) for a in inputs(images, model.input_size, model.in_channels, model.num_classes)]
    run = jax.jit(lambda tree, x, t, y: model.apply({"params": tree}, x, t, y, CFG_SCALE, method="forward_with_cfg"))
    call = lambda tree: lambda: jax.block_until_ready(run(tree, *arguments))
    return {name: call(jax.device_put(tree)) for name, tree in forms.items()}


def torch_forms(images: int) -> dict[str, Call]:
    """PyTorch's network with the same weights."""
    model, _ = vq.load_pretrained(str(files.asset(_ASSET)))
    fields = dict(channels=model.in_channels, width=model.hidden_size, depth=model.depth, heads=model.num_heads)
    x, t, y = inputs(images, model.input_size, model.in_channels, model.num_classes)
    x, t, y = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), torch.from_numpy(t), torch.from_numpy(y)

    def network(dtype: torch.dtype) -> TorchDiT:
        peer = TorchDiT(model.input_size, model.patch_size, num_classes=model.num_classes, **fields)
        peer.load_state_dict(load_file(files.asset(_ASSET)))
        return peer.eval().requires_grad_(False).to(dtype)

    def call(run: Callable[..., torch.Tensor], dtype: torch.dtype) -> Call:
        own = x.to(dtype)
        return lambda: run(own, t, y, CFG_SCALE)

    wide, narrow = network(torch.float32), network(torch.bfloat16)
    return {
        REFERENCE: call(wide.forward_with_cfg, torch.float32),
        "torch bfloat16": call(narrow.forward_with_cfg, torch.bfloat16),
        "torch compiled": call(torch.compile(wide.forward_with_cfg, dynamic=False), torch.float32),
    }


def differences(calls: dict[str, Call]) -> dict[str, float]:
    """Relative L2 difference of each form's output from the reference's. Compiles the forms."""
    outputs = {}
    for name, call in calls.items():
        out = call()
        outputs[name] = out.float().numpy().transpose(0, 2, 3, 1) if isinstance(out, torch.Tensor) else np.asarray(out)
    wanted = outputs[REFERENCE]
    return {
        name: float(np.linalg.norm(out.astype(np.float32) - wanted) / np.linalg.norm(wanted))
        for name, out in outputs.items()
    }


def take_turns(calls: dict[str, Call], turns: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each call by the clock, and seconds of CPU time of this process."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    return wall, busy


def speeds(seconds: dict[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of the reference over those of each form: 2 is twice as fast as PyTorch in float32."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: median[REFERENCE] / value for name, value in median.items()}


def table(wall: dict[str, list[float]], busy: dict[str, list[float]], error: dict[str, float]) -> str:
    by_wall, by_busy = speeds(wall), speeds(busy)
    lines = [f"{'form':16}{'seconds':>10}{'speed':>8}{'by CPU time':>14}{'difference':>13}"]
    for name, values in wall.items():
        figures = f"{statistics.median(values):10.3f}{by_wall[name]:8.2f}{by_busy[name]:14.2f}{error[name]:13.1e}"
        lines.append(f"{name:16}{figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="in a call, each of two rows (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="calls of each form (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/cpu_forward.json"))
    flags = parser.parse_args()
    if jax.default_backend() != "cpu":
        sys.exit(f"benchmarks.cpu times CPUs and JAX runs on {jax.default_backend()}; set JAX_PLATFORMS=cpu")

    load = os.getloadavg()[0]
    calls = our_forms(flags.images) | torch_forms(flags.images)
    error = differences(calls)
    wrong = [name for name, value in error.items() if not value <= TOLERANCES.get(name, 0.5)]
    if wrong:
        sys.exit(f"no times, because outputs differ too much from {REFERENCE}: {', '.join(wrong)} of {error}")
    wall, busy = take_turns(calls, flags.turns)
    print(table(wall, busy, error))
    result = {
        "command": " ".join(["python -m benchmarks.cpu", *sys.argv[1:]]),
        "commit": record.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "devices": record.devices(),
        "threads": torch.get_num_threads(),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "versions": provenance.versions() | {"torch": torch.__version__},
        "rows": 2 * flags.images,
        "difference": error,
        "seconds": wall,
        "cpu_seconds": busy,
        "speed": speeds(wall),
        "speed_by_cpu_time": speeds(busy),
    }
    files.write_json(flags.output, result)


if __name__ == "__main__":
    main()
