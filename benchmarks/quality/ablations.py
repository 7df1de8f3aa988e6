"""The worth of each choice of the method, at 2 bits on the built-in model, one choice changed at a time.

    python -m benchmarks.quality --config=benchmarks/quality/ablations.py --seeds=3 --workdir=DIR

`VQ4DiT` is the default of the configs; `soft` trains soft assignments, with the rates and the schedule of
`methods.vq4dit.CANDIDATES`. Compare PSNR to full precision, L_d and the noise error: for a Frechet distance 300 images are too
few.
Costs: 200 steps of batch 8 and 100 images a seed: about three minutes a row and seed on two CPU cores.
"""

from benchmarks.quality.rows import Row, Table
from vq4dit_jax.methods.vq4dit import CANDIDATES
from vq4dit_jax.run.config import cifar10

OURS = "configs/cifar10_w2.py"
SOFT = {f"calibration.{name}": value for name, value in CANDIDATES.items()}
# Written out, because the committed rows were made from these very words.
WITHOUT_ADALN = (
    (r"blocks/\d+/adaLN_modulation/1/kernel", ()),
    (r"blocks/\d+/attn/qkv/kernel", (256, 4, 3)),
    (r"blocks/\d+/(attn/proj|mlp/fc[12]|adaLN_modulation/1)/kernel", (256, 4, 1)),
    (r"blocks/\d+/.*bias", ()),
    (r"(pos_embed|[xty]_embedder/.*|final_layer/.*)", ()),
)
CHANGES = {
    "soft": {
        "n1": {"num_candidates": 1},
        "n3": {"num_candidates": 3},
        "n4": {"num_candidates": 4},
        "uniform_start": {"ratio_start": "uniform"},
        "paper_regularizer": {"lambda_r": 0.1},
        "released_regularizer": {"regularizer": "released", "lambda_r": 0.5},
        "heavy_regularizer": {"lambda_r": 1.0},
        "never_forced": {"freeze_from": 1.0, "freeze_by": 1.0},
        "forced_late": {"freeze_by": 0.9},
        "two_phases": {"codebook_training": "after_freezing"},
        "no_guidance": {"cfg_scale": 1.0},
        "guidance_4": {"cfg_scale": 4.0},
        "100_steps": {"steps": 100},
        "400_steps": {"steps": 400},
        "batch_2": {"batch": 2},
        "batch_32": {"batch": 32},
        "without_adaln": {"rules": WITHOUT_ADALN},
    },
    "ours": {
        "no_steps": {"steps": 1},
        "given_bits": {"allocation": "given"},
        "roles": {"allocation": "roles"},
        "no_step_loss": {"lambda_s": 0.0, "variance": False},
        "blocks_only": {"tuned": "", "variance": False},
        "constant_rates": {"schedule": "constant"},
    },
}


def get_config() -> Table:
    base = cifar10()
    base.calibration.steps = 200
    base.calibration.batch = 8
    base.sample.num_images = 300
    base.sample.steps = 50
    base.sample.batch = 10
    rows = [Row("fp", "full precision", "fp"), Row("kmeans", "k-means", "kmeans", 2, config=OURS)]
    for form, title, fields in (("soft", "soft", SOFT), ("ours", "VQ4DiT", {})):
        rows.append(Row(form, title, "vq4dit", 2, config=OURS, overrides=fields))
        for name, changes in CHANGES[form].items():
            own = {f"calibration.{key}": value for key, value in changes.items() if key != "rules"}
            own |= {f"quantize.{key}": value for key, value in changes.items() if key == "rules"}
            label = f"{title}: {name.replace('_', ' ')}"
            rows.append(Row(f"{form}_{name}", label, "vq4dit", 2, config=OURS, overrides=fields | own))
    return Table(base.lock(), tuple(rows))
