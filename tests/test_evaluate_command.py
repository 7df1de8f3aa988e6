"""`python -m vq4dit_jax.evaluate`: strict JSON with its recipe on anybody's samples, or one line and exit code 2."""

import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from evaluation_cases import images, linear_classifier, needs_tfgan
from PIL import Image

from vq4dit_jax import evaluate as command
from vq4dit_jax.evaluation import compute_reference, measure, open_images, save_reference
from vq4dit_jax.evaluation.images import checksum
from vq4dit_jax.run import sources

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIGURES = ["fid", "sfid", "mind", "is", "kid", "precision", "recall", "fd768"]


@pytest.fixture
def network(monkeypatch):
    """Makes `--features=...` stand for a network that anyone can check."""

    def use(**fields):
        classifier = linear_classifier(checksum="c" * 64, **fields)
        monkeypatch.setattr(command, "load_classifier", lambda name: classifier)
        return classifier

    return use


@pytest.fixture
def here(tmp_path):
    np.savez(tmp_path / "samples.npz", images(30, seed=1))
    np.savez(tmp_path / "real.npz", images(50, seed=2))
    return tmp_path


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def run(capsys, here, *more: str, samples: str = "samples.npz", reference: str = "real.npz") -> dict:
    arguments = [str(here / samples), f"--reference={here / reference}", "--features=linear", *more]
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return strict(out)


@needs_tfgan
def test_figures_and_recipe(capsys, here, network):
    classifier = network()
    (here / "recipe.json").write_text(json.dumps({"format": 1, "num_images": 30, "sampler": "ddpm", "steps": 250}))
    result = run(capsys, here, f"--out={here / 'sub' / 'out.json'}", "--batch=7")
    expected = measure(open_images(images(30, 1)), classifier, compute_reference(images(50, 2), classifier)).figures
    renamed = {name: result[name] for name in ("fd", "sfd", "is", "kd", "precision", "recall")} | {"mind": result["md"]}
    assert renamed == pytest.approx(expected, rel=1e-5)
    assert list(result) == ["format", *FIGURES, "fd", "sfd", "md", "kd", "reasons", "num_images", "recipe"]
    lacking = {name for name in FIGURES if result[name] is None}
    assert set(result["reasons"]) == lacking == {"fid", "sfid", "mind", "kid", "fd768"}
    assert result["num_images"] == 30
    recipe = result["recipe"]
    assert recipe["samples"] == {
        "file": str(here / "samples.npz"),
        "sha256": hashlib.sha256((here / "samples.npz").read_bytes()).hexdigest(),
        "num_images": 30,
        "shape": [8, 8, 3],
    }
    assert recipe["sampling"] == {"format": 1, "num_images": 30, "sampler": "ddpm", "steps": 250}
    assert recipe["features"] == {"network": "Linear net", "layer": "pool", "width": 6, "weights_sha256": "c" * 64}
    assert recipe["reference"] == {
        "file": str(here / "real.npz"),
        "sha256": checksum(here / "real.npz"),
        "source": "50 images of real.npz",
        "num_images": 50,
        "feature_images": 50,
    }
    assert {"python", "jax", "numpy", "tensorflow-gan"} <= set(recipe["versions"])
    assert strict((here / "sub" / "out.json").read_text()) == result
    assert [p.name for p in (here / "sub").iterdir()] == ["out.json"]


@needs_tfgan
@pytest.mark.parametrize(
    "layer, logits, computed, extra",
    [
        ("pool_3", True, ["fid", "sfid", "mind", "is", "kid", "precision", "recall"], []),
        ("mixed_7", False, ["sfid", "precision", "recall", "fd768"], ["md768", "kd768"]),
    ],
)
def test_a_figure_has_the_name_that_its_features_earn(
    capsys, here, network, monkeypatch, layer, logits, computed, extra
):
    network(features=layer, logits=logits)
    monkeypatch.setattr(
        "vq4dit_jax.evaluation.tfgan.frechet_distance", lambda a, b: 1.5
    )  # of 2048 x 2048: half a minute
    result = run(capsys, here)
    assert [name for name in FIGURES if result[name] is not None] == computed
    assert [name for name in result if name not in (*FIGURES, "format", "reasons", "num_images", "recipe")] == extra
    assert set(result["reasons"]) == set(FIGURES) - set(computed)
    if layer == "mixed_7":
        assert result["reasons"]["fid"] == (
            "it is defined on Inception's pool_3 features; these are of Linear net, mixed_7"
        )
        assert "weights of its last layers are needed" in result["reasons"]["is"]


@needs_tfgan
def test_folders_of_pngs_and_the_first_n(capsys, here, network):
    network()
    folder = here / "pngs"
    folder.mkdir()
    for index, image in enumerate(images(30, seed=1)):
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    every, some = run(capsys, here, samples="pngs"), run(capsys, here, "--num-images=12", samples="pngs")
    of_file = run(capsys, here, "--num-images=12")
    assert (every["num_images"], some["num_images"]) == (30, 12)
    for name in ("fd", "sfd", "md", "kd", "is", "precision", "recall"):
        assert some[name] == of_file[name] != every[name]
    assert some["recipe"]["samples"]["sha256"] == checksum(folder)


@needs_tfgan
@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "not readable as strict JSON"),
        ('{"cfg_scale": NaN}', "NaN is no JSON number"),
        ('{"num_images": 50000}', "is of 50000 images, and the samples are 30"),
        ("\udcff", "not readable"),
    ],
)
def test_a_recipe_that_cannot_be_theirs_is_left_out_and_said_so(here, network, capsys, caplog, text, complaint):
    network()
    (here / "recipe.json").write_text(text, errors="surrogateescape")
    assert run_quietly(here) == 0
    assert strict(capsys.readouterr().out)["recipe"]["sampling"] is None
    assert complaint in caplog.text


def test_a_preview_of_latents_has_no_figures(here, network, capsys):
    network()
    (here / "recipe.json").write_text(json.dumps({"num_images": 30, "decoder": sources.PREVIEW}))
    assert run_quietly(here) == 2
    assert "linear preview of the latents; sample again with --vae" in capsys.readouterr().err


def run_quietly(here) -> int:
    return command.main([str(here / "samples.npz"), f"--reference={here / 'real.npz'}", "--features=linear"])


def test_without_tfgan_its_figures_are_null_with_the_remedy(capsys, here, network, monkeypatch):
    from vq4dit_jax.evaluation import tfgan

    network()
    tfgan.classifier_metrics.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    result = run(capsys, here)
    assert result["fd"] is result["is"] is None and result["precision"] is not None and result["md"] > 0
    assert "vq4dit-jax[tfgan]" in result["reasons"]["fd"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "SAMPLES"),
        (["none.npz", "--reference=real.npz", "--features=linear"], "none.npz: no such file or folder of images"),
        (["samples.npz", "--features=linear"], "--reference"),
        (["samples.npz", "--reference=real.npz"], "--features"),
        (["samples.npz", "--reference=none.npz", "--features=linear"], "--reference=none.npz: no such file"),
        (["samples.npz", "--reference=asset:none.npz", "--features=linear"], "none.npz"),
        (["samples.npz", "--reference=real.npz", "--features=vgg19"], "vgg19"),
        (["float.npz", "--reference=real.npz", "--features=linear"], "float.npz: arr_0 is float32"),
        (["text.npz", "--reference=real.npz", "--features=linear"], "text.npz: not readable"),
        (["samples.npz", "--reference=text.npz", "--features=linear"], "text.npz: not readable"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--num-images=31"], "it has 30"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--num-images=0"], "0 images"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--batch=0"], "--batch=0"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--batch=two"], "two"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--out=."], "--out=. is a folder"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--out=real.npz"], "is a file to read"),
        (["samples.npz", "--reference=real.npz", "--features=linear", "--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_line(capsys, here, monkeypatch, arguments, message):
    np.savez(here / "float.npz", images(9).astype(np.float32))
    (here / "text.npz").write_text("hello")
    before = sorted(here.iterdir())
    monkeypatch.chdir(here)
    if "--features=vgg19" not in arguments:
        monkeypatch.setattr(command, "load_classifier", lambda name: linear_classifier())
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(word in out for word in ("--reference", "--num-images", "fd768", "recipe.json", "examples:"))


@needs_tfgan
def test_as_a_command_of_its_own(tmp_path):
    np.savez(tmp_path / "samples.npz", np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vq4dit_jax.evaluate", tmp_path / "samples.npz",
         "--reference=asset:cifar10_reference.npz", "--features=cifar10_resnet56"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    result = strict(done.stdout)
    assert result["fd"] > 1 and result["recipe"]["reference"]["source"] == "10,000 test images (JPEG)"
    assert result["recipe"]["features"]["network"] == "CIFAR-10 ResNet-56"
    failed = subprocess.run(
        [sys.executable, "-m", "vq4dit_jax.evaluate", "none.npz", "--reference=x", "--features=y"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert failed.returncode == 2 and failed.stderr == "vq4dit: none.npz: no such file or folder of images\n"


@needs_tfgan
def test_a_reference_made_beforehand_gives_the_same_figures(capsys, here, network):
    classifier = network()
    save_reference(here / "made.npz", compute_reference(open_images(here / "real.npz"), classifier))
    fresh, made = run(capsys, here), run(capsys, here, reference="made.npz")
    for name in ("fd", "sfd", "md", "is", "kd", "precision", "recall"):
        assert fresh[name] == made[name]
    assert made["recipe"]["reference"]["num_images"] == 50
