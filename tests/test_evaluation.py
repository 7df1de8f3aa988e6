"""Metrics against scipy, scikit-learn, brute force, closed forms and TF-GAN called directly; figures that have no value."""

import dataclasses
import importlib
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
from evaluation_cases import correlated, images, linear_classifier, needs_tfgan, rng
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel

from vq4dit_jax import evaluation
from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.evaluation import (
    Classifier,
    Moments,
    compute_reference,
    evaluate,
    evaluate_with_reasons,
    frechet_distance,
    inception_score,
    kernel_distance,
    measure,
    moments,
    monge_distance,
    open_images,
    precision_and_recall,
    precision_recall,
    psnr_db,
    tfgan,
)


@pytest.fixture(scope="module")
def real() -> evaluation.ReferenceStatistics:
    return compute_reference(images(50, seed=99), linear_classifier(), "50 images of noise")


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


@needs_tfgan
@pytest.mark.parametrize("count", [3, 20, 21, 60])
def test_streamed_score_is_the_mean_over_splits_whatever_the_batches(monkeypatch, count):
    monkeypatch.setattr(tfgan, "IS_SPLIT", 20)
    logits = rng().normal(scale=3, size=(count, 7)).astype(np.float32)
    expected = np.mean([inception_score(logits[i : i + 20]) for i in range(0, count, 20)])
    for batch in (1, 7, 20, 100):
        score = tfgan.StreamingInceptionScore()
        for i in range(0, count, batch):
            score.update(logits[i : i + batch])
        assert score.result() == pytest.approx(expected, rel=1e-13)


# Kernel distance


def unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy with the U-statistic, by scikit-learn's polynomial kernel."""

    def mean_off_diagonal(x):
        kernel = polynomial_kernel(x, degree=3, gamma=1 / x.shape[1], coef0=1)
        return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))

    cross = polynomial_kernel(a, b, degree=3, gamma=1 / a.shape[1], coef0=1).mean()
    return mean_off_diagonal(a) + mean_off_diagonal(b) - 2 * cross


@needs_tfgan
@pytest.mark.parametrize("count, other_count, width", [(2, 2, 3), (100, 300, 16), (1024, 900, 8)])
def test_kernel_distance_of_one_block_agrees_with_scikit_learn(count, other_count, width):
    a, b = correlated(1, count, width), correlated(2, other_count, width)
    assert kernel_distance(a, b) == pytest.approx(unbiased_mmd(a, b), rel=1e-9)
    assert kernel_distance(a.astype(np.float32), b.astype(np.float16)) == pytest.approx(unbiased_mmd(a, b), rel=1e-2)


@needs_tfgan
def test_kernel_distance_of_several_blocks_is_their_mean_and_does_not_mind_sorted_features():
    a, b = correlated(1, 2100, 4), correlated(1, 2100, 4) + 0.1  # three blocks of 700
    a = a[np.argsort(a[:, 0])]
    shuffled = [x[np.random.default_rng(0).permutation(2100)] for x in (a, b)]
    expected = np.mean([unbiased_mmd(x, y) for x, y in zip(*(np.split(s, 3) for s in shuffled))])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(a, b) == pytest.approx(unbiased_mmd(a, b), rel=0.5)
    in_order = np.mean([unbiased_mmd(x, y) for x, y in zip(np.split(a, 3), np.split(b, 3))])
    assert abs(in_order - unbiased_mmd(a, b)) > 10 * abs(kernel_distance(a, b) - unbiased_mmd(a, b))


@pytest.mark.parametrize(
    "n, m, defined",
    [(2, 2, True), (1, 2, False), (2, 1, False), (0, 0, False), (4, 1025, True), (3, 1025, False), (10, 50_000, False)],
)
def test_where_the_kernel_distance_is_defined(n, m, defined):
    assert tfgan.kernel_distance_is_defined(n, m) is defined


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


@pytest.mark.parametrize("block", [1, 7, 45, 60])
def test_precision_and_recall_do_not_depend_on_blocks_and_order(monkeypatch, block):
    a, b = rng(1).normal(size=(60, 5)), 1.3 * rng(2).normal(size=(40, 5))
    expected = brute_force(a, b, 3)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    monkeypatch.setattr(precision_recall, "_BLOCK", block)
    assert precision_and_recall(a, b) == expected
    assert precision_and_recall(b, a) == expected[::-1]
    assert precision_and_recall(rng().permutation(a), rng(1).permutation(b)) == expected


def test_precision_and_recall_of_equal_and_of_distant_sets():
    a = correlated(1, 50, 64).astype(np.float32)
    assert precision_and_recall(a, a) == (1.0, 1.0)
    repeated = np.repeat(a[:5], 4, axis=0)  # all radii are zero
    assert precision_and_recall(repeated, repeated) == (1.0, 1.0)
    assert precision_and_recall(a, a + 100) == (0.0, 0.0)


# evaluate

OF_FEATURES = ["fd", "sfd", "mind", "is", "precision", "recall"]
OF_PAIRS = ["psnr_to_fp_db", "ssim_to_fp", "ms_ssim_to_fp"]
KEYS = [*OF_FEATURES, *OF_PAIRS, "num_images", "features"]


def missing(result: dict) -> list[str]:
    return [name for name in KEYS if result[name] is None]


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
        "mind": monge_distance(outputs["pool"], real.features),
        "is": pytest.approx(inception_score(outputs["logits"]), rel=1e-6),
        "precision": precision,
        "recall": recall,
        "psnr_to_fp_db": pytest.approx(np.median(psnr_db(generated, originals))),
        "ssim_to_fp": None,  # of 8 x 8 pixels
        "ms_ssim_to_fp": None,
        "num_images": 20,
        "features": "Linear net pool (6) against 50 images of noise",
    }


@needs_tfgan
@pytest.mark.parametrize(
    "count, lacking",
    [
        (1, ["fd", "sfd", "is", "precision", "recall"]),
        (2, ["precision", "recall"]),
        (3, ["precision", "recall"]),
        (4, []),
    ],
)
def test_what_too_few_images_cannot_tell_is_none(real, count, lacking):
    result = evaluate(images(count), linear_classifier(), real)
    assert missing(result) == [*lacking, *OF_PAIRS]
    json.dumps(result, allow_nan=False)


@needs_tfgan
def test_a_network_that_gives_nan_or_no_logits(real):
    sound = linear_classifier()

    def with_nan(batch):
        return {name: np.full_like(value, np.nan) for name, value in sound.apply(batch).items()}

    broken = Classifier("linear", with_nan, title="Broken net")
    result = evaluate(images(9), broken, real, images(9))
    assert missing(result) == [*OF_FEATURES, *OF_PAIRS[1:]]
    assert result["psnr_to_fp_db"] == 99.0
    json.dumps(result, allow_nan=False)

    def without_logits(batch):
        outputs = sound.apply(batch)
        del outputs["logits"]
        return outputs

    result = evaluate(images(9), Classifier("linear", without_logits, title="No logits"), real)
    assert result["is"] is None and result["fd"] is not None


def test_without_tfgan_its_figures_are_none_and_the_log_says_how_to_get_it(real, monkeypatch, caplog):
    tfgan.classifier_metrics.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # what `import` finds where a package is not installed
    with pytest.raises(MissingExtraError, match=r"vq4dit-jax\[tfgan\]"):
        inception_score(np.zeros((2, 2)))
    with caplog.at_level(logging.WARNING, logger="absl"):
        result = evaluate(images(9), linear_classifier(), real)
    assert missing(result) == ["fd", "sfd", "is", *OF_PAIRS]
    assert "vq4dit-jax[tfgan]" in caplog.text


def test_evaluate_refuses_what_does_not_belong_together(real):
    with pytest.raises(InputError, match="'other'"):
        evaluate(images(9), linear_classifier("other"), real)
    for bad in (images(9).astype(np.float32), images(0), images(9)[0], images(9)[..., :1]):
        with pytest.raises(InputError, match=r"uint8 \(N, H, W, 3\)"):
            evaluate(bad, linear_classifier(), real)


@needs_tfgan
def test_figures_are_those_of_tfgan_called_with_our_network_as_classifier_fn(real):
    """FID, sFID, IS and KID by TF-GAN's functions of images, from pixels to figure, against ours."""
    classifier, generated, originals = linear_classifier(), images(20, seed=1), images(50, seed=99)
    reference = compute_reference(originals, classifier)
    ours = measure(open_images(generated), classifier, reference, batch_size=7).figures
    tensorflow, theirs = importlib.import_module("tensorflow"), tfgan.classifier_metrics()
    pool, spatial, logits = (tfgan.classifier_fn(classifier, name) for name in ("pool", "spatial", "logits"))
    a, b = (tensorflow.convert_to_tensor(x.astype(np.float32)) for x in (originals, generated))
    with tfgan._quiet():
        assert ours["fd"] == pytest.approx(float(theirs.frechet_classifier_distance(a, b, pool)), rel=1e-4)
        assert ours["sfd"] == pytest.approx(float(theirs.frechet_classifier_distance(a, b, spatial)), rel=1e-4)
        assert ours["is"] == pytest.approx(float(theirs.classifier_score(b, logits)), rel=1e-5)
        kernel = float(theirs.kernel_classifier_distance(a, b, pool, dtype=tensorflow.float64))
    assert ours["kd"] == pytest.approx(kernel, abs=1e-2 * abs(kernel))  # the reference's features are float16


@needs_tfgan
def test_a_set_against_itself():
    reference = compute_reference(images(50), linear_classifier(), "themselves")
    figures = measure(open_images(images(50)), linear_classifier(), reference).figures
    assert abs(figures["fd"]) < 1e-6 and abs(figures["sfd"]) < 1e-4
    assert figures["precision"] == figures["recall"] == 1.0
    assert figures["mind"] < 1e-3  # the reference's features are float16


@needs_tfgan
def test_batches_do_not_change_the_figures(real):
    found = [measure(open_images(images(50)), linear_classifier(), real, batch_size=b) for b in (1, 7, 50, 64)]
    for other in found[1:]:
        assert other.figures == pytest.approx(found[0].figures, rel=1e-6)  # numpy's matrix product, by its shape


@needs_tfgan
def test_files_and_folders_of_images_are_evaluated_as_arrays_are(real, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images(450, seed=1))
    np.savez(tmp_path / "b.npz", images(450, seed=2))
    in_memory = evaluate(images(450, seed=1), linear_classifier(), real, images(450, seed=2))
    assert evaluate(tmp_path / "a.npz", linear_classifier(), real, str(tmp_path / "b.npz")) == in_memory
    with pytest.raises(InputError, match=r"\(450, 8, 8, 3\).*\(3, 8, 8, 3\)"):
        evaluate(tmp_path / "a.npz", None, None, images(3))


@needs_tfgan
@pytest.mark.parametrize(
    "part, figures, reason",
    [
        ("features", ["mind", "kd", "precision", "recall"], "no features"),
        ("mu", ["fd"], "no mu"),
        ("mu_s", ["sfd"], "no mu_s"),
    ],
)
def test_what_the_reference_lacks_is_none_with_the_reason(real, part, figures, reason):
    found = measure(open_images(images(9)), linear_classifier(), dataclasses.replace(real, **{part: None}))
    assert [name for name, value in found.figures.items() if value is None] == figures == list(found.reasons)
    assert all(text == f"the reference has {reason}" for text in found.reasons.values())


@needs_tfgan
def test_every_none_has_its_reason_and_the_log_says_it(real, caplog):
    found = measure(open_images(images(3)), linear_classifier(logits=False), real)
    assert found.reasons == {
        "is": "Linear net has no logits here: weights of its last layers are needed",
        "precision": "3 images and 50 real ones are too few for 3 nearest neighbours",
        "recall": "3 images and 50 real ones are too few for 3 nearest neighbours",
    }
    with caplog.at_level(logging.WARNING, logger="absl"):
        evaluate(images(3), linear_classifier(logits=False), real)
    assert "is of 3 images not computed: Linear net has no logits" in caplog.text
    assert "precision, recall of 3 images not computed: 3 images and 50 real ones" in caplog.text


def test_reasons_of_what_is_not_computed_at_all():
    figures, reasons = evaluate_with_reasons(images(3), None, None)
    assert figures == dict.fromkeys([*OF_FEATURES, *OF_PAIRS]) | {"num_images": 3, "features": "none"}
    assert set(reasons) == {*OF_FEATURES, *OF_PAIRS} and reasons["fd"] == "there is no feature network"
    figures, reasons = evaluate_with_reasons(images(3), None, None, images(3))
    assert figures["psnr_to_fp_db"] == 99.0 and set(reasons) == {*OF_FEATURES, *OF_PAIRS[1:]}
    assert reasons["ssim_to_fp"] == "images of 8x8 pixels are smaller than the window of 11x11"
    wide = rng().integers(0, 256, (3, 11, 32, 3), np.uint8)
    figures, reasons = evaluate_with_reasons(wide, None, None, wide)
    assert [figures[name] for name in OF_PAIRS] == [99.0, 1.0, 1.0] and set(reasons) == set(OF_FEATURES)


def test_a_reference_of_other_weights_or_width_is_refused(real):
    other = dataclasses.replace(real, weights="a" * 64)
    with pytest.raises(InputError, match="other weights of 'linear'.*evaluation.reference"):
        measure(open_images(images(9)), linear_classifier(checksum="b" * 64), other)
    wide = dataclasses.replace(real, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(InputError, match="mu has 7 features, and Linear net has 6"):
        measure(open_images(images(9)), linear_classifier(), wide)


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
