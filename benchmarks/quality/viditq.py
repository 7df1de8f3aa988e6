"""ViDiT-Q's forms on the built-in CIFAR-10 DiT beside full precision, round to nearest and VQ4DiT at 2 bits.

    python -m benchmarks.quality --config=benchmarks/quality/viditq.py --seeds=3 --workdir=DIR [--stages=quantize,sample,time]

Every form is sampled as its config has it: with 8-bit activations in the prepared form, whose products are int8. "Rounded" is
each form with activations rounded by token and weights rounded to the nearest, with no balance, centre or rotation.
Sampling as in cifar10.py, and the same noise and classes, so that rows compare with those of that table.
Costs: on two CPU cores that have nothing else to do, 20 minutes of sampling a row (of all seeds), and 2 minutes a seed for the
       integers, 8 for the codebooks.
"""

from benchmarks.quality import cifar10
from benchmarks.quality.rows import Row, Table

BARE = {"viditq.balance": False, "viditq.centre": False, "viditq.rotation": 0, "viditq.solve": False}


def get_config() -> Table:
    base = cifar10.get_config().base
    form = lambda name: f"configs/cifar10_{name}.py"
    rows = (
        Row("fp", "full precision", "fp"),
        Row("w8a8_rounded", "W8A8, rounded", "viditq", 8, config=form("w8a8"), overrides=BARE),
        Row("w8a8", "W8A8", "viditq", 8, config=form("w8a8")),
        Row("w4a8_rounded", "W4A8, rounded", "viditq", 4, 128, config=form("w4a8"), overrides=BARE),
        Row("w4a8", "W4A8", "viditq", 4, 128, config=form("w4a8")),
        Row("w4a8_mp", "W4A8, mixed", "viditq", 4, 128, config=form("w4a8_mp")),
        Row("w2a8", "W2A8: VQ4DiT's codebooks", "viditq", 2, config=form("w2a8"), overrides=cifar10.SHORTER),
        Row("ours_w2", "VQ4DiT", "vq4dit", 2, config=cifar10.OURS, overrides=cifar10.SHORTER),
    )
    return Table(base, rows)
