"""What each part of ViDiT-Q gives, and what we add to it, on the built-in model: one part after the other.

    python -m benchmarks.quality --config=benchmarks/quality/viditq_ablations.py --seeds=3 --workdir=DIR

As the paper's table 5 (dynamic, + scale, + rotation, + both, + mixed by MSE, + mixed by groups); the weights solved and the
centre are ours. Activations have 8 bits and a scale for each token; what one scale for a whole tensor does is in
docs/methods.md. Compare PSNR to full precision, L_d and the noise error: for a Frechet distance 300 images are too few.
Costs: two to five minutes a row and seed on two CPU cores.
"""

from benchmarks.quality import ablations
from benchmarks.quality.rows import Row, Table

PARTS = {
    "dynamic": dict(balance=False, centre=False, rotation=0, solve=False),
    "scale": dict(centre=False, rotation=0, solve=False),
    "rotation": dict(balance=False, centre=False, solve=False),
    "both": dict(centre=False, solve=False),
    "both, solved": dict(centre=False),
    "both, centred, solved": {},
}
MIXED = {
    "mixed by MSE": dict(budget=4.0, mixed_error="prediction"),
    "mixed by the step": dict(budget=4.0),
    "mixed by groups": dict(budget=4.0, mixed_by="roles"),
}
"""Of W4A8 alone: what is spread is 4.0 bits a weight."""


def get_config() -> Table:
    rows = [Row("fp", "full precision", "fp")]
    for form, bits, group, parts in (("w8a8", 8, None, PARTS), ("w4a8", 4, 128, {**PARTS, **MIXED})):
        for name, settings in parts.items():
            own = {f"viditq.{key}": value for key, value in settings.items()}
            folder = f"{form}_{name.replace(', ', '_').replace(' ', '_')}"
            config = f"configs/cifar10_{form}.py"
            rows.append(Row(folder, f"{form.upper()}: {name}", "viditq", bits, group, config, own))
    return Table(ablations.get_config().base, tuple(rows))
