"""What ViDiT-Q's forms leave of the built-in model's noise prediction, with an ablation of what each part of the method gives.

    python -m benchmarks.viditq_error [--forms=w4a8.*] [--output=benchmarks/results/viditq_error.json]

Held out: a trajectory of full precision (16 images, 10 DDPM steps, guidance 1.5) that no pass has seen. qkv, proj, fc1, fc2 and
adaLN of every block are quantized; bits count codes, scales, centres and padding. Two CPU cores take a minute a form.
"""

import argparse
import pathlib
import re
import time
from typing import Any

import jax

import vq4dit_jax as vq
from benchmarks import record
from vq4dit_jax import files, methods
from vq4dit_jax.methods import viditq
from vq4dit_jax.methods.kmeans import KMeans
from vq4dit_jax.networks.network import as_network
from vq4dit_jax.networks.rules import dit_rules
from vq4dit_jax.storage import provenance

CFG_SCALE = 1.5
_BARE = dict(balance=False, centre=False, rotation=0, solve=False)
_W4 = dict(weight_bits=4.0, weight_group=128)
FORMS: dict[str, dict[str, Any]] = {
    "w8a8, dynamic": _BARE,
    "w8a8, + scale": {**_BARE, "balance": True},
    "w8a8, + rotation": {**_BARE, "rotation": -1},
    "w8a8, + both": {**_BARE, "balance": True, "rotation": -1},
    "w8a8, + centre": {**_BARE, "balance": True, "rotation": -1, "centre": True},
    "w8a8": {},
    "w8a8, no rotation": {"rotation": 0},
    "w4a8, dynamic": {**_BARE, **_W4},
    "w4a8, + both": {**_BARE, **_W4, "balance": True, "rotation": -1},
    "w4a8, + both, solved": {**_W4, "centre": False},
    "w4a8": _W4,
    "w4a8, no rotation": {**_W4, "rotation": 0},
    "w4a8-mp": {**_W4, "budget": 4.0},
    "w6a6": dict(weight_bits=6.0, activation_bits=6, activation_grid="asymmetric"),
    "w6a6, mixed": dict(weight_bits=6.0, activation_budget=6.0),
    "w4a4": dict(
        weight_bits=4.0, weight_group=64, weight_grid="asymmetric", activation_bits=4, activation_grid="clipped"
    ),
}
"""Name -> settings of `methods.viditq`."""


def made(model: Any, teacher: Any, settings: dict[str, Any], seed: int) -> Any:
    """The model of these settings."""
    teacher = viditq.source(settings, as_network(model), teacher)
    run = methods.begin(model, teacher, jax.random.key(seed))
    first = KMeans(rules=dit_rules(viditq.spec(settings)))
    return methods.apply((first, *viditq.passes(settings, {"batch": 16})), run, teacher)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=".*", help="a regular expression of names (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default="benchmarks/results/viditq_error.json")
    flags = parser.parse_args()
    model, teacher = vq.load_pretrained("asset:dit_cifar10.safetensors")
    result = files.read_json(flags.output) if flags.output.exists() else {"forms": {}}
    for name, settings in FORMS.items():
        if not re.fullmatch(flags.forms, name):
            continue
        begun = time.perf_counter()
        student = made(model, teacher, settings, flags.seed)
        seconds = time.perf_counter() - begun
        found = methods.held_out_agreement(model, teacher, {name: student}, CFG_SCALE, jax.random.key(9))
        l_d, noise_error = found[name]
        size = vq.sizes(student)
        result["forms"][name] = {
            "settings": settings,
            "noise_error": noise_error,
            "l_d": l_d,
            "bits_per_quantized_weight": size.bits_per_quantized_weight,
            "seconds": round(seconds, 1),
        }
        result |= {"seed": flags.seed, "commit": record.commit(), "devices": record.devices()}
        result["versions"] = provenance.versions()
        files.write_json(flags.output, result)
        bits = size.bits_per_quantized_weight
        print(
            f"{name:24} noise error {noise_error:.4f}, L_d {l_d:.2e}, {bits:.3f} bits a weight, {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
