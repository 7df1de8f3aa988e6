"""Metrics against scipy, brute force and closed forms; figures that cannot be computed; reference files."""

import importlib.util
import json
import logging
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from PIL import Image
from scipy.spatial.distance import cdist

from vq4dit_jax import evaluation
from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.evaluation import (
    Classifier,
    Moments,
    evaluate,
    frechet_distance,
    inception_score,
    metrics,
    moments,
    precision_and_recall,
    precision_recall,
    reference,
    tfgan,
)
from vq4dit_jax.files import asset

needs_tfgan = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tensorflow", "tensorflow_probability", "tensorflow_gan")),
    reason="needs TF-GAN: the extra 'tfgan' is not installed",
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def correlated(seed: int, count: int, width: int) -> np.ndarray:
    generator = rng(seed)
    mixing = generator.normal(size=(width, width)) / np.sqrt(width)
    return generator.normal(size=(count, width)) @ mixing + generator.normal(size=(1, width))


def linear_classifier(name: str = "linear") -> Classifier:
    """A network anyone can check: features are fixed projections of the pixels."""
    weights = rng(5).normal(size=(8 * 8 * 3, 6 + 9 + 4)) / 255

    def apply(images):
        outputs = (images.reshape(len(images), -1) @ weights).astype(np.float32)
        return {"pool": outputs[:, :6], "spatial": outputs[:, 6:15], "logits": outputs[:, 15:]}

    return Classifier(name, apply, title="Linear net")


def images(count: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def real() -> evaluation.ReferenceStatistics:
    return reference.compute_reference(images(50, seed=99), linear_classifier(), "50 images of noise")


# Frechet distance


@needs_tfgan
@pytest.mark.parametrize("count, other_count, width", [(200, 300, 16), (2000, 500, 64), (7, 5, 1)])
def test_frechet_distance_agrees_with_scipy(count, other_count, width):
    a, b = correlated(1, count, width), correlated(2, other_count, width)
    (mu_a, sigma_a), (mu_b, sigma_b) = ((x.mean(0), np.atleast_2d(np.cov(x.T))) for x in (a, b))
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    expected = np.square(mu_a - mu_b).sum() + np.trace(sigma_a + sigma_b - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, Moments(mu_b, sigma_b)) == pytest.approx(expected, rel=1e-8)


@needs_tfgan
def test_frechet_distance_with_fewer_images_than_features():
    """The covariance is singular: compared with the eigenvalues of a^T b, of the centred and scaled data."""
    a, b = correlated(1, 40, 100), correlated(2, 500, 100)
    root_a, root_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    # tr (A^T A B^T B)^(1/2) is the nuclear norm of B A^T
    trace = np.square(root_a).sum() + np.square(root_b).sum() - 2 * np.linalg.norm(root_b @ root_a.T, ord="nuc")
    expected = np.square(a.mean(0) - b.mean(0)).sum() + trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, moments(b)) == pytest.approx(expected, rel=1e-5)


@needs_tfgan
def test_frechet_distance_of_moved_and_scaled_features():
    x = correlated(3, 400, 10)
    spread = np.cov(x.T).trace()
    assert abs(frechet_distance(x, x)) < 1e-9 * spread
    v = rng().normal(size=(1, 10))
    assert frechet_distance(x + v, x) == pytest.approx(np.square(v).sum(), rel=1e-6)
    centred = x - x.mean(axis=0, keepdims=True)
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * spread, rel=1e-6)


@needs_tfgan
def test_frechet_distance_is_symmetric_and_ignores_order():
    a, b = correlated(1, 300, 12), correlated(2, 200, 12)
    value = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-8)
    assert frechet_distance(rng().permutation(a), rng(1).permutation(b)) == pytest.approx(value, rel=1e-8)
    assert frechet_distance(a.astype(np.float32), b) == pytest.approx(value, rel=1e-5)


# Inception-score analogue


@needs_tfgan
def test_inception_score_of_uniform_and_of_balanced_certain_logits():
    assert inception_score(np.zeros((30, 10))) == pytest.approx(1.0, abs=1e-12)
    assert inception_score(100.0 * np.eye(10)[np.arange(30) % 10]) == pytest.approx(10.0, rel=1e-9)
    assert inception_score(100.0 * np.eye(10)[np.zeros(30, int)]) == pytest.approx(1.0, rel=1e-9)


@needs_tfgan
def test_inception_score_agrees_with_scipy():
    logits = rng().normal(scale=3, size=(100, 7)).astype(np.float32)
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    expected = np.exp(scipy.special.rel_entr(p, p.mean(axis=0, keepdims=True)).sum(axis=1).mean())
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)
    assert inception_score(rng().permutation(logits)) == pytest.approx(expected, rel=1e-9)


# Precision and recall


def brute_force(real_features: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    def share_inside(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]
        return float(np.mean((cdist(points, centres) <= radii[None, :]).any(axis=1)))

    return share_inside(generated, real_features), share_inside(real_features, generated)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    width=st.integers(1, 8),
    k=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_precision_and_recall_agree_with_brute_force(seed, counts, width, k, offset):
    a = rng(seed).normal(size=(counts[0], width)) + offset
    b = 1.3 * rng(seed + 1).normal(size=(counts[1], width)) + offset
    assert precision_and_recall(a, b, neighbours=k) == brute_force(a, b, k)


@pytest.mark.parametrize("elements", [1, 70, 1000])
def test_precision_and_recall_do_not_depend_on_blocks_and_order(monkeypatch, elements):
    a, b = rng(1).normal(size=(60, 5)), 1.3 * rng(2).normal(size=(40, 5))
    expected = brute_force(a, b, 3)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    monkeypatch.setattr(precision_recall, "_BLOCK_ELEMENTS", elements)
    assert precision_and_recall(a, b) == expected
    assert precision_and_recall(b, a) == expected[::-1]
    assert precision_and_recall(rng().permutation(a), rng(1).permutation(b)) == expected


def test_precision_and_recall_of_equal_and_of_distant_sets():
    a = correlated(1, 50, 64).astype(np.float32)
    assert precision_and_recall(a, a) == (1.0, 1.0)
    repeated = np.repeat(a[:5], 4, axis=0)  # all radii are zero
    assert precision_and_recall(repeated, repeated) == (1.0, 1.0)
    assert precision_and_recall(a, a + 100) == (0.0, 0.0)


# PSNR


def test_psnr_is_that_of_the_formula():
    a, b = images(20, seed=1), images(20, seed=2)
    difference = a.astype(float).reshape(20, -1) - b.reshape(20, -1)
    expected = 20 * np.log10(255 / np.sqrt((difference**2).mean(axis=1)))
    np.testing.assert_allclose(metrics.psnr_db(a, b), expected, rtol=1e-12)
    np.testing.assert_array_equal(metrics.psnr_db(a, a), 99.0)
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    assert metrics.psnr_db(grey, grey + np.uint8(1))[0] == pytest.approx(48.1308, abs=1e-4)


@pytest.mark.parametrize("other", [images(3), images(4).astype(np.float32)])
def test_psnr_refuses_images_that_do_not_match(other):
    with pytest.raises(InputError, match="equal shapes"):
        metrics.psnr_db(images(4), other)


# evaluate

KEYS = ["fd", "sfd", "is", "precision", "recall", "psnr_to_fp_db", "num_images", "features"]


@needs_tfgan
def test_evaluate_is_its_parts(real):
    generated, originals = images(20, seed=1), images(20, seed=2)
    result = evaluate(generated, linear_classifier(), real, originals)
    outputs = linear_classifier().apply(generated)
    precision, recall = precision_and_recall(real.features, outputs["pool"])
    real_outputs = linear_classifier().apply(images(50, seed=99))
    assert list(result) == KEYS
    assert result == {
        "fd": pytest.approx(frechet_distance(outputs["pool"], real_outputs["pool"]), rel=1e-6),
        "sfd": pytest.approx(frechet_distance(outputs["spatial"], real_outputs["spatial"]), rel=1e-4),
        "is": pytest.approx(inception_score(outputs["logits"]), rel=1e-6),
        "precision": precision,
        "recall": recall,
        "psnr_to_fp_db": pytest.approx(np.median(metrics.psnr_db(generated, originals))),
        "num_images": 20,
        "features": "Linear net pool (6) against 50 images of noise",
    }


@needs_tfgan
@pytest.mark.parametrize("count, missing", [(1, KEYS[:5]), (2, KEYS[3:5]), (3, KEYS[3:5]), (4, [])])
def test_what_too_few_images_cannot_tell_is_none(real, count, missing):
    result = evaluate(images(count), linear_classifier(), real)
    assert [name for name in KEYS if result[name] is None] == [*missing, "psnr_to_fp_db"]
    json.dumps(result, allow_nan=False)


@needs_tfgan
def test_a_network_that_gives_nan_or_no_logits(real):
    sound = linear_classifier()

    def with_nan(batch):
        return {name: np.full_like(value, np.nan) for name, value in sound.apply(batch).items()}

    broken = Classifier("linear", with_nan, title="Broken net")
    result = evaluate(images(9), broken, real, images(9))
    assert all(result[name] is None for name in KEYS[:5])
    assert result["psnr_to_fp_db"] == 99.0
    json.dumps(result, allow_nan=False)

    def without_logits(batch):
        outputs = sound.apply(batch)
        del outputs["logits"]
        return outputs

    result = evaluate(images(9), Classifier("linear", without_logits, title="No logits"), real)
    assert result["is"] is None and result["fd"] is not None


def test_without_tfgan_its_figures_are_none_and_the_log_says_how_to_get_it(real, monkeypatch, caplog):
    tfgan._classifier_metrics.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # what `import` finds where a package is not installed
    with pytest.raises(MissingExtraError, match=r"vq4dit-jax\[tfgan\]"):
        inception_score(np.zeros((2, 2)))
    with caplog.at_level(logging.WARNING, logger="absl"):
        result = evaluate(images(9), linear_classifier(), real)
    assert [name for name in KEYS if result[name] is None] == ["fd", "sfd", "is", "psnr_to_fp_db"]
    assert "vq4dit-jax[tfgan]" in caplog.text


def test_evaluate_refuses_what_does_not_belong_together(real):
    with pytest.raises(InputError, match="'other'"):
        evaluate(images(9), linear_classifier("other"), real)
    for bad in (images(9).astype(np.float32), images(0), images(9)[0], images(9)[..., :1]):
        with pytest.raises(InputError, match=r"uint8 \(N, H, W, 3\)"):
            evaluate(bad, linear_classifier(), real)


# Feature networks


def test_all_batches_have_one_shape_and_do_not_change_the_features():
    sound, shapes = linear_classifier(), set()

    def apply(batch):
        shapes.add(batch.shape)
        return sound.apply(batch)

    outputs = evaluation.extract_features(Classifier("linear", apply, title="Linear net"), images(11), batch_size=4)
    assert shapes == {(4, 8, 8, 3)}
    for name, value in sound.apply(images(11)).items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-6)


def test_classifier_by_name():
    assert evaluation.load_classifier("cifar10_resnet56") is evaluation.load_classifier("cifar10_resnet56")
    with pytest.raises(InputError, match="there are: cifar10_resnet56"):
        evaluation.load_classifier("vgg")


# Reference statistics


def test_reference_survives_saving(real, tmp_path):
    evaluation.save_reference(tmp_path / "a.npz", real)
    loaded = evaluation.load_reference(tmp_path / "a.npz")
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(real, name))
        assert getattr(loaded, name).dtype == (np.float16 if name == "features" else np.float64)
    assert (loaded.count, loaded.classifier, loaded.source) == (50, "linear", "50 images of noise")
    assert loaded.checksum == real.checksum
    evaluation.save_reference(tmp_path / "b.npz", loaded)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_moments_agree_with_numpy():
    x = correlated(0, 30, 4).astype(np.float32)
    mu, sigma = moments(x)
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.T.astype(np.float64)), rtol=1e-12)
    assert mu.dtype == sigma.dtype == np.float64


def test_features_beyond_float16_are_kept_in_float32():
    sound = linear_classifier()

    def large(batch):
        return {name: 1e6 * value for name, value in sound.apply(batch).items()}

    statistics = reference.compute_reference(images(9), Classifier("large", large, title="Large"), "noise")
    assert statistics.features.dtype == np.float32


def damaged(path, **changes):
    arrays = dict(np.load(path)) | changes
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-200]), "not readable"),
        (lambda p: p.write_bytes(b""), "not readable"),
        (lambda p: p.write_text("hello"), "not readable"),
        (lambda p: np.savez(p, arr_0=np.zeros(3)), "not reference statistics of format 1"),
        (lambda p: np.savez(p, mu=np.array([print], object)), "not readable"),
        (lambda p: np.save(p, np.zeros(3)) or p.with_suffix(".npz.npy").rename(p), "not readable"),
        (lambda p: damaged(p, format=np.asarray(2)), "not reference statistics of format 1"),
        (lambda p: damaged(p, mu=np.zeros(6)), "checksum"),
        (lambda p: damaged(p, mu=np.zeros(5)), "checksum"),
        (lambda p: damaged(p, source=np.asarray("other images")), "checksum"),
    ],
)
def test_damaged_reference_is_refused(real, tmp_path, damage, message):
    path = tmp_path / "reference.npz"
    evaluation.save_reference(path, real)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        evaluation.load_reference(path)
    assert str(path) in str(caught.value)


def test_shipped_reference():
    shipped = evaluation.load_reference(asset("cifar10_reference.npz"))
    assert (shipped.count, shipped.classifier) == (10_000, "cifar10_resnet56")
    assert shipped.source == "10,000 test images (JPEG)"
    assert shipped.sigma.shape == (64, 64) and shipped.sigma_s.shape == (448, 448)
    mu, sigma = moments(shipped.features)
    np.testing.assert_allclose(mu, shipped.mu, rtol=1e-4)
    np.testing.assert_allclose(sigma, shipped.sigma, atol=1e-3 * np.abs(sigma).max())
    assert asset("cifar10_reference.npz").stat().st_size < 2.5e6


# The command


@pytest.fixture
def folder(tmp_path):
    for index, image in enumerate(rng().integers(0, 256, (6, 32, 32, 3), np.uint8)):
        path = tmp_path / "dogs" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "dogs"


def test_command_makes_reference_statistics_of_a_folder(folder, tmp_path, capsys):
    reference.main([str(folder), str(tmp_path / "out.npz")])
    made = evaluation.load_reference(tmp_path / "out.npz")
    assert made.source == "6 dogs images (PNG)" and made.checksum in capsys.readouterr().out
    stored = reference.read_images(reference.find_images(folder))
    np.testing.assert_array_equal(stored, rng().integers(0, 256, (6, 32, 32, 3), np.uint8)[[0, 2, 4, 1, 3, 5]])
    outputs = evaluation.extract_features(evaluation.load_classifier("cifar10_resnet56"), stored)
    np.testing.assert_allclose(made.mu, outputs["pool"].astype(np.float64).mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "0/0.png").write_bytes(b"no image"), "0/0.png: not readable as an image"),
        (lambda f: Image.new("RGB", (16, 8)).save(f / "1/1.png"), "1/1.png: 16x8 pixels"),
        (lambda f: f.rename(f.with_name("cats")), "no such folder"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "no images in it"),
        (lambda f: [p.unlink() for p in f.rglob("[1-9].png")], "at least 2"),
    ],
)
def test_command_refuses_bad_folders_in_one_line(folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    with pytest.raises(SystemExit) as caught:
        reference.main([str(folder), str(tmp_path / "out.npz")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


# Other processes


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    code = "import sys, vq4dit_jax.evaluation; print({'tensorflow', 'torch', 'tensorflow_gan'} & set(sys.modules))"
    result = run_python(code)
    assert (result.stdout, result.stderr, result.returncode) == ("set()\n", "", 0)


@needs_tfgan
def test_tensorflow_says_nothing_and_takes_no_accelerator():
    code = """
import numpy as np
from vq4dit_jax.evaluation import inception_score
print(inception_score(np.zeros((4, 2))))
import tensorflow
print(tensorflow.config.get_visible_devices("GPU"))
"""
    result = run_python(code)
    assert (result.stdout, result.stderr, result.returncode) == ("1.0\n[]\n", "", 0)
