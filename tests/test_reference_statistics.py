"""Reference statistics: our files, and what other people have; the command that makes them."""

import dataclasses

import numpy as np
import pytest
from evaluation_cases import correlated, images, linear_classifier, needs_tfgan, rng
from PIL import Image

from vq4dit_jax import evaluation
from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation import (
    Classifier,
    compute_reference,
    load_reference,
    measure,
    moments,
    open_images,
    open_reference,
    real_images,
    reference,
    save_reference,
)
from vq4dit_jax.files import asset

ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features")


@pytest.fixture(scope="module")
def real() -> evaluation.ReferenceStatistics:
    return compute_reference(images(50, seed=99), linear_classifier(), "50 images of noise")


def same(a: evaluation.ReferenceStatistics, b: evaluation.ReferenceStatistics) -> bool:
    def equal(x, y):
        return x is y is None or (x.dtype == y.dtype and np.array_equal(x, y))

    return all(equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


# Computed


def test_it_is_the_moments_and_the_features(real):
    outputs = linear_classifier().apply(images(50, seed=99))
    for name, expected in zip(("mu", "sigma"), moments(outputs["pool"])):
        np.testing.assert_array_equal(getattr(real, name), expected)
    for name, expected in zip(("mu_s", "sigma_s"), moments(outputs["spatial"])):
        np.testing.assert_allclose(getattr(real, name), expected, rtol=1e-6)
    np.testing.assert_array_equal(real.features, outputs["pool"].astype(np.float16))
    assert real.count == 50


def test_features_are_kept_of_a_fixed_random_part_of_many_images(monkeypatch):
    monkeypatch.setattr(real_images, "KEPT_FEATURES", 20)
    found = compute_reference(images(50), linear_classifier())
    every = linear_classifier().apply(images(50))["pool"].astype(np.float16)
    kept = [next(i for i in range(50) if np.array_equal(every[i], row)) for row in found.features]
    assert len(set(kept)) == 20 and kept == sorted(kept) and kept != list(range(20))
    assert found.count == 50
    np.testing.assert_allclose(found.mu, every.astype(np.float64).mean(0), atol=1e-3)
    assert same(found, compute_reference(images(50), linear_classifier(), batch_size=50))


def test_features_beyond_float16_are_kept_in_float32():
    sound = linear_classifier()

    def large(batch):
        return {name: 1e6 * value for name, value in sound.apply(batch).items()}

    statistics = compute_reference(images(9), Classifier("large", large, title="Large"), "noise")
    assert statistics.features.dtype == np.float32


# Our files


def test_reference_survives_saving(real, tmp_path):
    save_reference(tmp_path / "a.npz", real)
    loaded = load_reference(tmp_path / "a.npz")
    assert same(loaded, real) and loaded.features.dtype == np.float16
    assert (loaded.count, loaded.classifier, loaded.source) == (50, "linear", "50 images of noise")
    assert loaded.checksum == real.checksum
    save_reference(tmp_path / "b.npz", loaded)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_reference_with_gaps_survives_saving(real, tmp_path):
    gaps = dataclasses.replace(
        real, mu_s=None, sigma_s=None, features=None, count=None, weights="w", missing={"x": "y"}
    )
    save_reference(tmp_path / "a.npz", gaps)
    loaded = load_reference(tmp_path / "a.npz")
    assert same(loaded, gaps) and (loaded.count, loaded.weights) == (None, "w")
    assert set(loaded.missing) == {"mu_s", "sigma_s", "features"} and "a.npz" in loaded.missing["features"]


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
        (lambda p: np.savez(p, arr_0=np.zeros(3)), "not reference statistics of format 2"),
        (lambda p: np.savez(p, mu=np.array([print], object)), "pickled Python objects"),
        (lambda p: np.save(p, np.zeros(3)) or p.with_suffix(".npz.npy").rename(p), "not readable"),
        (lambda p: damaged(p, format=np.asarray(3)), "not reference statistics of format 2"),
        (lambda p: damaged(p, format=np.asarray("two")), "not reference statistics of format 2"),
        (lambda p: damaged(p, mu=np.zeros(6)), "checksum"),
        (lambda p: damaged(p, mu=np.zeros(5)), "checksum"),
        (lambda p: damaged(p, source=np.asarray("other images")), "checksum"),
    ],
)
def test_damaged_reference_is_refused(real, tmp_path, damage, message):
    path = tmp_path / "reference.npz"
    save_reference(path, real)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        load_reference(path)
    assert str(path) in str(caught.value)


def test_shipped_reference_is_of_format_1():
    shipped = load_reference(asset("cifar10_reference.npz"))
    assert (shipped.count, shipped.classifier, shipped.weights) == (10_000, "cifar10_resnet56", "")
    assert shipped.source == "10,000 test images (JPEG)"
    assert shipped.sigma.shape == (64, 64) and shipped.sigma_s.shape == (448, 448)
    mu, sigma = moments(shipped.features)
    np.testing.assert_allclose(mu, shipped.mu, rtol=1e-4)
    np.testing.assert_allclose(sigma, shipped.sigma, atol=1e-3 * np.abs(sigma).max())
    assert asset("cifar10_reference.npz").stat().st_size < 2.5e6


# What other people have


def inception(layer: str = "pool_3") -> Classifier:
    return linear_classifier(f"inception {layer}", features=layer)


def published(width: int = 2048, spatial_width: int = 2023, **extra) -> dict[str, np.ndarray]:
    """As in ADM's files."""
    mu, sigma = moments(correlated(1, 40, width))
    mu_s, sigma_s = moments(correlated(2, 40, spatial_width).astype(np.float32))
    return {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, **extra}


@pytest.fixture(scope="module")
def adm() -> dict[str, np.ndarray]:
    return published(arr_0=images(12, seed=3))


def written(folder, arrays):
    np.savez(folder / "VIRTUAL.npz", **arrays)
    return folder / "VIRTUAL.npz"


@pytest.mark.parametrize("kind", ["folder", "images.npz", "ours.npz"])
def test_every_form_of_the_same_images_gives_the_same_statistics(real, tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for index, image in enumerate(images(50, seed=99)):
            Image.fromarray(image).save(path / f"{index:02d}.png")
    elif kind == "images.npz":
        np.savez_compressed(path, images(50, seed=99))
    else:
        save_reference(path, real)
    found = open_reference(path, linear_classifier())
    assert same(found, real) and found.count == 50
    descriptions = {"folder": "50 folder images (PNG)", "images.npz": "50 images of images.npz"}
    assert found.source == descriptions.get(kind, real.source)
    assert open_reference(path, linear_classifier(), source="mine").source == "mine"


def test_adms_file_gives_its_moments_and_the_features_of_its_images(adm, tmp_path):
    found = open_reference(written(tmp_path, adm), inception())
    for name in ARRAYS[:4]:
        np.testing.assert_array_equal(getattr(found, name), adm[name])
    expected = compute_reference(adm["arr_0"], inception()).features
    np.testing.assert_array_equal(found.features, expected)
    assert found.count is None and len(found.features) == 12 and not found.missing
    assert found.source == "mu, mu_s as in VIRTUAL.npz; the rest of its 12 images"


def test_moments_without_images_leave_out_what_needs_features(adm, tmp_path):
    del (held := dict(adm))["arr_0"]
    found = open_reference(written(tmp_path, held), inception())
    np.testing.assert_array_equal(found.sigma_s, adm["sigma_s"])
    assert found.features is None and set(found.missing) == {"features"}
    assert "no images" in found.missing["features"] and found.source == "VIRTUAL.npz"


def test_pytorch_fids_file_gives_the_fid_alone(adm, tmp_path):
    path = written(tmp_path, {name: adm[name] for name in ("mu", "sigma")})
    found = open_reference(path, inception())
    assert found.moments is not None and found.spatial_moments is None
    assert found.missing["mu_s"] == "VIRTUAL.npz has no mu_s"


def test_moments_of_2048_features_are_never_compared_with_768(adm, tmp_path):
    """What is of another width comes from the images in the file, the spatial moments are the same network's."""
    found = open_reference(written(tmp_path, adm), inception("mixed_7"))
    expected = compute_reference(adm["arr_0"], inception("mixed_7"))
    np.testing.assert_array_equal(found.mu, expected.mu)
    np.testing.assert_array_equal(found.sigma, expected.sigma)
    np.testing.assert_array_equal(found.mu_s, adm["mu_s"])
    assert found.count == 12 and found.source == "mu_s as in VIRTUAL.npz; the rest of its 12 images"
    del (held := dict(adm))["arr_0"]
    found = open_reference(written(tmp_path, held), inception("mixed_7"))
    assert found.mu is found.features is None and found.spatial_moments is not None
    assert found.missing["mu"] == "mu of VIRTUAL.npz has 2048 features, Linear net mixed_7 768"
    del held["mu_s"]
    with pytest.raises(InputError, match="has 2048 features, Linear net mixed_7 768.*evaluation.reference"):
        open_reference(written(tmp_path, held), inception("mixed_7"))


def test_moments_of_inception_are_no_other_networks(adm, tmp_path):
    found = open_reference(written(tmp_path, adm), linear_classifier())
    assert same(found, compute_reference(adm["arr_0"], linear_classifier()))
    assert (found.count, found.source) == (12, "12 images of VIRTUAL.npz")
    with pytest.raises(InputError, match="mu of VIRTUAL.npz is of Inception features, not of Linear net's"):
        open_reference(written(tmp_path, {n: adm[n] for n in ARRAYS[:4]}), linear_classifier())


@needs_tfgan
def test_published_moments_give_figures_and_reasons(tmp_path):
    """Narrow stand-ins for Inception's widths: TF-GAN's decompositions of 2048 x 2048 take a quarter of a minute each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(real_images._INCEPTION_WIDTHS, "pool", 6)
        patch.setattr(real_images, "_SPATIAL_WIDTH", 9)
        outputs = linear_classifier().apply(images(50, seed=99))
        (mu, sigma), (mu_s, sigma_s) = moments(outputs["pool"]), moments(outputs["spatial"])
        path = written(tmp_path, dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s))
        reference = open_reference(path, linear_classifier())
    found = measure(open_images(images(20)), linear_classifier(), reference)
    assert list(found.reasons) == ["mind", "kd", "precision", "recall"]
    expected = measure(
        open_images(images(20)), linear_classifier(), compute_reference(images(50, 99), linear_classifier())
    )
    assert found.figures["fd"] == pytest.approx(expected.figures["fd"], rel=1e-9)
    assert found.figures["sfd"] == pytest.approx(expected.figures["sfd"], rel=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sigma=None), "it has mu and no sigma"),
        (dict(mu=np.zeros((2, 2048))), r"mu is float64 \(2, 2048\)"),
        (dict(sigma=np.zeros((2048, 3))), r"sigma float64 \(2048, 3\)"),
        (dict(mu=np.zeros(2048, int)), "mu is int64"),
        (dict(mu=np.full(2048, np.nan)), "not finite"),
        (dict(sigma=np.triu(np.ones((2048, 2048)))), "not symmetric"),
        (dict(mu=np.array([print] * 2048, object)), "pickled Python objects"),
        (dict(arr_0=images(9).astype(np.float32)), "float32"),
    ],
)
def test_damaged_moments_are_refused(tmp_path, change, message):
    arrays = dict(mu=np.zeros(2048), sigma=np.eye(2048)) | change
    path = written(tmp_path, {name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(InputError, match=message) as caught:
        open_reference(path, inception())
    assert "VIRTUAL.npz" in str(caught.value)


def test_what_is_no_reference_is_refused(real, tmp_path):
    with pytest.raises(InputError, match="holds a, b"):
        open_reference(written(tmp_path, dict(a=np.zeros(2), b=np.zeros(2))), linear_classifier())
    with pytest.raises(InputError, match="no such reference"):
        open_reference(tmp_path / "none.npz", linear_classifier())
    with pytest.raises(InputError, match="not readable"):
        (tmp_path / "text.npz").write_text("text")
        open_reference(tmp_path / "text.npz", linear_classifier())
    with pytest.raises(InputError, match="made with the classifier 'linear', not with 'other'"):
        save_reference(tmp_path / "ours.npz", real)
        open_reference(tmp_path / "ours.npz", linear_classifier("other"))


# The command


@pytest.fixture
def folder(tmp_path):
    for index, image in enumerate(rng().integers(0, 256, (6, 32, 32, 3), np.uint8)):
        path = tmp_path / "dogs" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "dogs"


def test_command_makes_reference_statistics_of_a_folder_and_of_a_file(folder, tmp_path, capsys):
    assert reference.main([str(folder), str(tmp_path / "out.npz"), "--batch=4"]) == 0
    made = load_reference(tmp_path / "out.npz")
    assert made.source == "6 dogs images (PNG)" and made.checksum in capsys.readouterr().out
    stored = np.concatenate(list(open_images(folder).batches(10)))
    np.testing.assert_array_equal(stored, rng().integers(0, 256, (6, 32, 32, 3), np.uint8)[[0, 2, 4, 1, 3, 5]])
    outputs = evaluation.extract_features(evaluation.load_classifier("cifar10_resnet56"), stored)
    np.testing.assert_allclose(made.mu, outputs["pool"].astype(np.float64).mean(0), rtol=1e-6)
    np.savez(tmp_path / "dogs.npz", stored)
    assert reference.main([str(tmp_path / "dogs.npz"), str(tmp_path / "b.npz"), "--source=Dogs", "--batch=4"]) == 0
    again = load_reference(tmp_path / "b.npz")
    assert same(again, made) and again.source == "Dogs"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "0/0.png").write_bytes(b"no image"), "0/0.png: not readable as an image"),
        (lambda f: Image.new("RGB", (16, 8)).save(f / "1/1.png"), "1/1.png: 16x8 pixels"),
        (lambda f: f.rename(f.with_name("cats")), "no such reference file or folder"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "no images in it"),
        (lambda f: [p.unlink() for p in f.rglob("[1-9].png")], "at least 2"),
    ],
)
def test_command_refuses_bad_folders_in_one_line(folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    assert reference.main([str(folder), str(tmp_path / "out.npz")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_command_neither_replaces_folders_nor_what_it_reads(folder, tmp_path, capsys):
    np.savez(tmp_path / "dogs.npz", images(3))
    for arguments, message in (
        ([str(folder), str(tmp_path)], "is a folder"),
        ([str(tmp_path / "dogs.npz"), str(tmp_path / "dogs.npz")], "is the file to read"),
        ([str(folder), str(tmp_path / "out.npz"), "--batch=0"], "--batch=0"),
        ([str(folder), str(tmp_path / "out.npz"), "--classifier=vgg"], "vgg"),
        ([str(folder)], "OUT.npz"),
    ):
        assert reference.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (tmp_path / "dogs.npz").exists() and folder.is_dir()
