"""What 8-bit activations add to the error of 2-bit weights, on the built-in model after calibration.

    python -m benchmarks.w2a8_error --run=runs/cifar10_w2 [--output=benchmarks/results/w2a8_error.json]

Two figures for each form, means over a held-out trajectory (16 images, 10 DDPM steps, guidance 1.5) of the relative L2
difference of guided noise predictions: to full precision, on the teacher's trajectory; and to the packed 2-bit model in
float32, on that model's own. The second is what the form itself does. On any device; the arithmetic is that of the
kernels (8-bit products, 32-bit sums), through XLA where no kernel runs.
"""

import argparse
import pathlib
import time

import jax

import vq4dit_jax as vq
from benchmarks import record
from vq4dit_jax import files, provenance
from vq4dit_jax.calibration import held_out_agreement

CFG_SCALE = 1.5


def forms(model: vq.DiT, teacher: dict, packed: dict) -> dict[str, dict]:
    """Parameters by name: the packed model, and its prepared forms; W8A8 and W4A8 of the teacher beside them."""
    ranges = vq.activation_ranges(model, packed, key=jax.random.key(11), cfg_scale=CFG_SCALE)
    dense_ranges = vq.activation_ranges(model, teacher, key=jax.random.key(11), weights="int8", cfg_scale=CFG_SCALE)
    prepare = vq.prepare_for_inference
    return {
        "W2 bf16": prepare(packed),
        "W2A8 int8, scales by token": prepare(packed, "int8"),
        "W2A8 int8": prepare(packed, "int8", ranges=ranges),
        "W2A8 e4m3": prepare(packed, "e4m3", ranges=ranges),
        "W8A8 int8": prepare(teacher, "int8", weights="int8", ranges=dense_ranges),
        "W4A8 int8": prepare(teacher, "int8", weights="int4", ranges=dense_ranges),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/cifar10_w2", help="a finished run of configs/cifar10_w2.py")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    flags = parser.parse_args()
    model, teacher = vq.load_pretrained(str(files.asset("dit_cifar10.safetensors")))
    _, packed, _ = vq.load_quantized(f"{flags.run}/quantized")
    students = forms(model, teacher, packed)
    to_teacher = held_out_agreement(model, teacher, {"W2 float32": packed, **students}, CFG_SCALE, jax.random.key(5))
    of_weights = {name: params for name, params in students.items() if name.startswith("W2")}
    to_packed = held_out_agreement(model, packed, of_weights, CFG_SCALE, jax.random.key(6))
    rows = {
        name: {
            "error_to_full_precision": error,
            "error_to_w2_float32": to_packed[name][1] if name in to_packed else None,
        }
        for name, (_, error) in to_teacher.items()
    }
    for name, row in rows.items():
        print(f"{name:28}", *(f"{key} {'-' if v is None else f'{100 * v:.3f} %'}   " for key, v in row.items()))
    if flags.output:
        figures = {
            "command": f"python -m benchmarks.w2a8_error --run={flags.run}",
            "commit": record.commit(),
            "date": time.strftime("%Y-%m-%d"),
            "devices": provenance.devices(),
            "versions": provenance.versions(),
            "rows": rows,
        }
        files.write_json(flags.output, figures)


if __name__ == "__main__":
    main()
