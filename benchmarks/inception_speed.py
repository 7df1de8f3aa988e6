"""Images/s of feature extraction with the FID network: ours against PyTorch's with the same weights, in one run.

    python -m benchmarks.inception_speed ../shared/data/inception/inception_2015_12_05_bnfolded_to_mixed_8.npz

The competitors take turns, on the same uint8 images and all the cores of this process, to the features of mixed_7:

  ours            vq4dit_jax.evaluation.load_inception(FILE)(images)
  pytorch-fid     its way: batches of 50, no_grad, eval, F.interpolate to 299, convolution, batch norm and relu as three
                  operations. The weights of FILE have batch norm folded in, so each convolution has here a batch norm that
                  only adds the bias (mean 0, variance 1 - eps, scale 1): the same operations on other numbers.
  torch, tuned    the same network with that batch norm folded into the convolution again, channels_last

A first check shows that all compute the same, on images of 299 x 299 pixels, where no resizing comes between (pytorch-fid
resizes with half-pixel centres, unlike the network's authors).
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util

from benchmarks import record
from benchmarks.torch_inception import TorchInception
from convert.inception import expected_shapes, torch_name
from convert.inception import load_inception as load_weights
from vq4dit_jax import files
from vq4dit_jax.evaluation import classifiers
from vq4dit_jax.storage import provenance

_BATCH = 50


def torch_network(file: pathlib.Path, folded: bool) -> TorchInception:
    """Up to mixed_7, with the weights of `file`."""
    network = TorchInception(complete=False).eval()
    params = traverse_util.flatten_dict(load_weights(file))
    for layer in expected_shapes(complete=False):
        module, bias = network.get_submodule(torch_name(layer)), torch.from_numpy(params[*layer, "bias"])
        module.conv.weight.data = torch.from_numpy(params[*layer, "kernel"].transpose(3, 2, 0, 1).copy())
        if folded:
            module.conv.bias, module.bn = torch.nn.Parameter(bias), torch.nn.Identity()
        else:
            module.bn.running_var.fill_(1 - module.bn.eps)
            module.bn.bias.data = bias
    return network.to(memory_format=torch.channels_last) if folded else network


@torch.no_grad()
def torch_features(network: TorchInception, images: np.ndarray) -> np.ndarray:
    batches = []
    for start in range(0, len(images), _BATCH):
        x = torch.from_numpy(images[start : start + _BATCH]).permute(0, 3, 1, 2).contiguous().float() / 256
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        batches.append(network(2 * x - 1)["mixed_7"].numpy())  # (x - 128) / 128, as ours
    return np.concatenate(batches)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inception_speed", description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=pathlib.Path, help="any file that load_inception reads")
    parser.add_argument("--images", type=int, default=100, help="in a turn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="their height and width (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    flags = parser.parse_args()

    ours = classifiers.load_inception(flags.weights)
    plain, tuned = (torch_network(flags.weights, folded) for folded in (False, True))
    competitors = {
        "ours": lambda images: ours(images)["mixed_7"],
        "pytorch-fid": lambda images: torch_features(plain, images),
        "torch, tuned": lambda images: torch_features(tuned, images),
    }
    random = np.random.default_rng(0)
    full = random.integers(0, 256, (8, 299, 299, 3), dtype=np.uint8)
    features = {name: run(full) for name, run in competitors.items()}
    error = {
        name: float(np.linalg.norm(values - features["ours"]) / np.linalg.norm(values))
        for name, values in features.items()
        if name != "ours"
    }
    print(f"relative difference of features from ours: {error}")
    if max(error.values()) > 1e-4:
        sys.exit("the competitors do not compute the same features; no timing is worth anything")

    images = random.integers(0, 256, (flags.images, flags.size, flags.size, 3), dtype=np.uint8)
    speeds = {name: [] for name in competitors}
    cpu_ms = {name: [] for name in competitors}
    load = os.getloadavg()[0]  # over the number of cores it says that others were running too
    for run in competitors.values():
        run(images[:_BATCH])
    for turn in range(flags.rounds):
        for name, run in competitors.items():
            wall, busy = time.perf_counter(), time.process_time()
            run(images)
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            speeds[name].append(len(images) / wall)
            cpu_ms[name].append(1000 * busy / len(images))
            figures = f"{speeds[name][-1]:.2f} images/s, {cpu_ms[name][-1]:.0f} ms of CPU an image"
            print(f"{turn + 1}/{flags.rounds} {name}: {figures}", flush=True)

    median = {name: statistics.median(values) for name, values in speeds.items()}
    cpu = {name: statistics.median(values) for name, values in cpu_ms.items()}
    result = {
        "command": " ".join(["python -m benchmarks.inception_speed", *sys.argv[1:]]),
        "commit": record.commit(),
        "devices": provenance.devices(),
        "threads": torch.get_num_threads(),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "versions": provenance.versions() | {"torch": torch.__version__},
        "weights": ours.checksum,
        "batch": {"ours": ours.batch_size, "torch": _BATCH},
        "relative_difference": error,
        "images_per_s": speeds,
        "cpu_ms_per_image": cpu_ms,
        "median_images_per_s": median,
        "ratio_of_medians": {name: median["ours"] / median[name] for name in median if name != "ours"},
        "ratio_of_cpu_medians": {name: cpu[name] / cpu["ours"] for name in cpu if name != "ours"},
    }
    print(
        json.dumps(
            {name: result[name] for name in ("median_images_per_s", "ratio_of_medians", "ratio_of_cpu_medians")},
            indent=1,
        )
    )
    if flags.output:
        files.write_json(flags.output, result)


if __name__ == "__main__":
    main()
