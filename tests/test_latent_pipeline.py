"""The XL/2 configs from end to end with small random weights: VAE, Inception, all rows of the table, two widths in one."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models import SOFT
from safetensors.numpy import save_file

from convert.inception import expected_shapes, graph_name
from vq4dit_jax import main as command
from vq4dit_jax.evaluation import tfgan
from vq4dit_jax.methods import agreement as assess
from vq4dit_jax.networks.vae import AutoencoderKL

pytestmark = pytest.mark.once

SMALL = (
    *SOFT,
    "--config.model.random_init=True", "--config.model.variant=DiT-S/2", "--config.model.depth=1", "--config.model.input_size=4",
    "--config.calibration.steps=2", "--config.calibration.batch=2", "--config.calibration.trajectory_steps=3",
    "--config.quantize.kmeans_iterations=2", "--config.sample.num_images=5", "--config.sample.batch=3",
    "--config.sample.steps=2", "--config.sample.more_steps=(3,)", "--config.sample.grid_images=5",
)  # fmt: skip
STEPS = (2, 3)


def _vae(folder):
    """A diffusers folder of a VAE that takes 4x4 latents to 32x32 pixels."""
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: vae.init(jax.random.key(0), x), x)["params"]
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        *modules, name = path.split("/")
        numbered = [m.rpartition("_") for m in modules]
        modules = [f"{stem}.{n}" if n.isdecimal() else m for m, (stem, _, n) in zip(modules, numbered, strict=True)]
        value = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1], dtype=np.float32))
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim]
        parameter = ".".join([*modules, "bias" if name == "bias" else "weight"])
        tensors[parameter] = np.ascontiguousarray(value.transpose(axes))
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 2}))
    return folder


def _inception(file):
    """Complete random weights of the FID network."""
    rng, arrays = np.random.default_rng(0), {}
    for path, shapes in expected_shapes(True).items():
        key, kernel = graph_name(path).replace("/", "_"), rng.standard_normal(shapes["kernel"], np.float32)
        name = "kernel" if key == "softmax" else "kernel_hwio"
        arrays[f"{key}/{name}"] = kernel * np.float32(np.sqrt(2 / np.prod(kernel.shape[:-1])))
        arrays[f"{key}/bias"] = np.zeros(shapes["bias"], np.float32)
    np.savez(file, **arrays)
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A 3-bit run, and a 2-bit run beside it, with a VAE, Inception and real images of noise.

    The distances are those of the means alone: TF-GAN's roots of 2048 x 2048 matrices take 15 s each, and
    tests/test_evaluation.py has them.
    """
    pytest.importorskip("tensorflow", reason="FID comes from TF-GAN")

    def distance_of_means(a, b):
        return float(np.square(a.mu - b.mu).sum())

    folder = tmp_path_factory.mktemp("latent")
    vae, inception = _vae(folder / "vae"), _inception(folder / "inception.npz")
    np.savez(folder / "real.npz", np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), np.uint8))
    measured = (
        f"--config.model.vae={vae}",
        f"--config.evaluation.classifier={inception}",
        f"--config.evaluation.reference={folder / 'real.npz'}",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfgan, "frechet_distance", distance_of_means)
        patch.setattr(assess, "HELD_OUT_IMAGES", 2)
        patch.setattr(assess, "HELD_OUT_STEPS", 2)
        for bits, beside in ((3, ()), (2, (f"--config.beside={folder / 'w3'}",))):
            config = f"--config=configs/xl2_256_w{bits}.py"
            assert command.main([config, f"--workdir={folder / f'w{bits}'}", *SMALL, *measured, *beside]) == 0
    return folder


def test_pictures_are_decoded_latents(runs):
    with np.load(runs / "w2" / "samples" / "vq4dit.npz") as file:
        assert file["arr_0"].shape == (5, 32, 32, 3) and file["arr_0"].std() > 1


def test_every_figure_is_computed_and_named(runs):
    quality = json.loads((runs / "w2" / "metrics.json").read_text())["quality"]
    for name in ("fp", "kmeans", "vq4dit"):
        figures = [quality[name][key] for key in ("fd", "sfd", "mind", "is", "precision", "recall")]
        assert None not in figures and np.isfinite(figures).all()
        assert "pool_3 (2048)" in quality[name]["features"] and set(quality[name]) == {
            "fd", "sfd", "mind", "is", "precision", "recall", "psnr_to_fp_db", "ssim_to_fp", "ms_ssim_to_fp", "num_images",
            "features",
        }  # fmt: skip


def test_the_table_has_full_precision_beside_both_widths_at_all_steps(runs):
    rows = json.loads((runs / "w2" / "table.json").read_text())
    text = (runs / "w2" / "table.md").read_text()
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][4] == "FID ↓"
    assert [(line[0], line[1]) for line in lines[2:]] == [
        (str(steps), method) for steps in STEPS[::-1] for method in ("full precision", "VQ4DiT", "VQ4DiT")
    ]
    widths = sorted({row["bits"] for row in rows})
    assert len(widths) == 3 and widths[0] < widths[1] < widths[2] == 32
    html = (runs / "w2" / "report.html").read_text()
    assert "Quality by time steps and bits" in html and html.count('<th scope="row">3</th>') == 3


def test_full_precision_samples_are_made_once(runs):
    """The second run takes those of the first: the same file, or the same bytes where it cannot be linked."""
    for name in ("fp.npz", "fp_3.npz"):
        first, second = runs / "w3" / "samples" / name, runs / "w2" / "samples" / name
        assert os.path.samefile(first, second) or first.read_bytes() == second.read_bytes()
    rows = json.loads((runs / "w2" / "table.json").read_text())
    full = [row for row in rows if row["bits"] == 32]
    for steps in STEPS:
        mine, theirs = (row for row in full if row["steps"] == steps)
        assert mine["fd"] == theirs["fd"]


def test_random_weights_download_nothing_and_quality_is_null_with_the_reason(tmp_path):
    """The configs name an official VAE, network and statistics; a run for timing does without."""
    workdir = tmp_path / "w"
    assert command.main(["--config=configs/xl2_256_w2.py", f"--workdir={workdir}", *SMALL]) == 0
    quality = json.loads((workdir / "metrics.json").read_text())["quality"]
    assert quality["vq4dit"]["fd"] is None and quality["vq4dit"]["features"].startswith("none")
    assert quality["vq4dit"]["psnr_to_fp_db"] is not None
    assert "no VAE" in (workdir / "table.md").read_text()


def test_what_is_missing_is_said_before_the_work(capsys, tmp_path):
    for argument, words in (
        ("--config.model.vae=nowhere_vae", "nowhere_vae: no such file"),
        ("--config.evaluation.classifier=nowhere.pth", "nowhere.pth"),
        ("--config.evaluation.reference=nowhere.npz", "nowhere.npz"),
        ("--config.beside=nowhere", "--config.beside=nowhere"),
        ("--config.sample.more_steps=(2,)", "more_steps"),
    ):
        real = (
            f"--config.evaluation.classifier={_inception(tmp_path / 'i.npz')}",
            f"--config.evaluation.reference={__file__}",
        )
        workdir = tmp_path / "new"
        code = command.main(["--config=configs/xl2_256_w2.py", f"--workdir={workdir}", *SMALL, *real, argument])
        err = capsys.readouterr().err
        assert code == 2 and words in err and err.count("\n") == 1, err
        assert not (workdir / "calibration").exists()
