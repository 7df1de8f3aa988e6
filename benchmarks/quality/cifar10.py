"""The built-in CIFAR-10 DiT: full precision, the baselines, the published forms, and VQ4DiT, 4 bits to 1 bit.

Rows that calibrate have 500 steps of batch 16. VQ4DiT has 325, so that its time with the solution of the layers is no longer.
Sampling: DDPM in 50 steps, guidance 1.5, 5,100 images a row. "paper's form" is the method as the paper describes it, "released
form" as its authors' code does it.
Costs: on two CPU cores that have nothing else to do, 25 minutes of sampling a row (of all seeds), 14 hours for all 32;
       and the calibrations, 7 minutes a seed.
"""

from benchmarks.quality.rows import Row, Table
from vq4dit_jax.methods.vq4dit import CANDIDATES, CODEBOOKS_ONLY
from vq4dit_jax.run.config import cifar10

OURS = "configs/cifar10_w2.py"
OURS_FINE = "configs/cifar10_w3.py"
PAPER = "configs/paper/cifar10_w2.py"
RELEASED = "configs/released/cifar10_w2.py"
PQF = {f"calibration.{name}": value for name, value in CODEBOOKS_ONLY.items()}
DKM = {f"calibration.{name}": value for name, value in {**CANDIDATES, "num_candidates": 16}.items()}
SHORTER = {"calibration.steps": 325}
WHOLE = {**SHORTER, "calibration.budget": 1.0}  # codebooks within the bits; the default allows them 5 % more


def get_config() -> Table:
    base = cifar10()
    base.calibration.steps = 500
    base.calibration.batch = 16
    base.sample.num_images = 5100
    base.sample.steps = 50
    base.sample.batch = 10  # two cores are fastest with two virtual devices of 8 to 16 images each
    rows = [Row("fp", "full precision", "fp")]
    rows += [Row(f"rtn_w{b}_g64", "round to nearest, groups of 64", "rtn", b, group=64) for b in (4, 3, 2)]
    rows += [Row(f"rtn_w{b}_channel", "round to nearest, per channel", "rtn", b) for b in (4, 3, 2)]
    rows += [Row(f"gptq_w{b}_g64", "GPTQ, groups of 64", "gptq", b, group=64) for b in (4, 3, 2)]
    rows += [Row(f"kmeans_w{b}", "k-means", "kmeans", b, config=OURS) for b in (4, 3, 2)]
    rows += [
        Row(f"pqf_w{b}", "k-means, codebooks tuned (PQF)", "vq4dit", b, config=OURS, overrides=PQF) for b in (4, 3, 2)
    ]
    rows += [Row(f"dkm_w{b}", "differentiable k-means (DKM)", "dkm", b, config=OURS, overrides=DKM) for b in (4, 3, 2)]
    rows += [Row(f"released_w{b}", "released form", "vq4dit", b, config=RELEASED) for b in (4, 3, 2)]
    rows += [Row(f"paper_w{b}", "paper's form", "vq4dit", b, config=PAPER) for b in (4, 3, 2)]
    rows += [
        Row(f"{name}_w{b:g}".replace(".", "p"), "VQ4DiT", "vq4dit", b, config=config, overrides=overrides)
        for name, b, config, overrides in (
            ("ours", 4, OURS_FINE, SHORTER),
            ("ours", 3, OURS_FINE, SHORTER),
            ("whole", 3, OURS_FINE, WHOLE),
            ("ours", 2, OURS, SHORTER),
            ("ours", 1.5, OURS, SHORTER),
            ("whole", 1.5, OURS, WHOLE),
            ("ours", 1, OURS, SHORTER),
        )
    ]
    return Table(base.lock(), tuple(rows))
