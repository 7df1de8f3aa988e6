"""PSNR by its formula; SSIM and MS-SSIM by what they are defined to be, and against scikit-image and TensorFlow."""

import importlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from evaluation_cases import images, needs_tfgan, rng
from hypothesis.extra.numpy import arrays

from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation import ms_ssim, open_images, psnr_db, similarity, ssim, tfgan

PAIRS = st.sampled_from([(1, 11, 11, 3), (2, 13, 30, 3), (1, 45, 23, 3)]).flatmap(
    lambda shape: st.tuples(*[arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.integers(0, 255))] * 2)
)


def noisy(shape: tuple[int, ...], deviation: float) -> tuple[np.ndarray, np.ndarray]:
    original = rng(1).integers(0, 256, shape, np.uint8)
    return np.clip(original + rng(2).normal(0, deviation, shape), 0, 255).astype(np.uint8), original


# PSNR


def test_psnr_is_that_of_the_formula():
    a, b = images(20, seed=1), images(20, seed=2)
    difference = a.astype(float).reshape(20, -1) - b.reshape(20, -1)
    expected = 20 * np.log10(255 / np.sqrt((difference**2).mean(axis=1)))
    np.testing.assert_allclose(psnr_db(a, b), expected, rtol=1e-12)
    np.testing.assert_array_equal(psnr_db(a, a), 99.0)
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    assert psnr_db(grey, grey + np.uint8(1))[0] == pytest.approx(48.1308, abs=1e-4)


# SSIM and MS-SSIM


@hypothesis.given(PAIRS)
@hypothesis.settings(deadline=None, max_examples=30)
def test_they_are_symmetric_bounded_and_1_of_equal_images(pair):
    a, b = pair
    for measure, least in (ssim, -1.0), (ms_ssim, 0.0):
        assert (measure(a, a) == 1.0).all()
        found = measure(a, b)
        np.testing.assert_array_equal(found, measure(b, a))
        assert (found >= least - 1e-12).all() and (found <= 1.0 + 1e-12).all()


@hypothesis.given(mean=st.integers(0, 200), shift=st.integers(1, 55))
@hypothesis.settings(deadline=None)
def test_of_two_grey_images_only_the_luminance_differs(mean, shift):
    """Without contrast in either, cs is 1, and l depends on the two means (2004, eq. 6)."""
    a, b = (np.full((1, 40, 40, 3), level, np.uint8) for level in (mean, mean + shift))
    c1 = 2.55**2
    luminance = (2 * mean * (mean + shift) + c1) / (mean**2 + (mean + shift) ** 2 + c1)
    assert ssim(a, b) == pytest.approx(luminance, rel=1e-12) and luminance < 1
    assert similarity.scales(40, 40) == 2
    # The coarsest scale alone has the luminance.
    assert ms_ssim(a, b) == pytest.approx(luminance ** (0.2856 / (0.0448 + 0.2856)), rel=1e-12)


def test_a_shift_of_a_whole_image_leaves_contrast_and_structure():
    original = rng().integers(0, 200, (2, 32, 32, 3)).astype(np.float64)
    whole, structure = similarity._means(original + 50, original)
    np.testing.assert_allclose(structure, 1.0, rtol=1e-12)
    assert (whole < 0.99).all()


def test_an_inverted_image_has_the_opposite_structure():
    """sigma_xy = -sigma_x sigma_y: negative SSIM, and MS-SSIM is cut off at 0."""
    original = (255 * (np.indices((1, 64, 64, 3)).sum(axis=0) // 2 % 2)).astype(np.uint8)
    assert ssim(255 - original, original) < -0.9
    assert ms_ssim(255 - original, original) == 0.0


def test_more_noise_is_less_alike():
    for measure in ssim, ms_ssim:
        found = [measure(*noisy((4, 48, 48, 3), deviation)).mean() for deviation in (2, 8, 32, 128)]
        assert 1 > found[0] > found[1] > found[2] > found[3]


def pattern(height: int, width: int, slope: int) -> np.ndarray:
    """uint8 (H, W, 3), the same with any generator of random numbers."""
    i, j, channel = np.indices((height, width, 3))
    return ((i * i * slope + 5 * j * (channel + 1) + i * j) % 256).astype(np.uint8)


@pytest.mark.parametrize(
    "height, width, other, mixed",
    [
        (11, 11, 0.7522715047358695, 0.9792580972802636),
        (32, 32, -0.01925347362861571, 0.9147200605095853),
        (45, 37, 0.002561003330101218, 0.9195104829381954),
        (64, 180, -0.002355217937188237, 0.9217017588984854),
    ],
)
def test_ssim_is_that_of_scikit_image(height, width, other, mixed):
    """Values of scikit-image 0.26.0: `structural_similarity(a, b, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1, data_range=255)`.
    """
    a, b = pattern(height, width, 1), pattern(height, width, 2)
    mixture = (a.astype(int) * 3 // 4 + b // 4).astype(np.uint8)
    np.testing.assert_allclose(ssim(np.stack([a, a]), np.stack([b, mixture])), [other, mixed], rtol=0, atol=1e-13)


@needs_tfgan
@pytest.mark.parametrize("size, count", [((11, 40), 1), ((32, 32), 2), ((45, 61), 3), ((176, 179), 5), ((190, 200), 5)])
def test_both_are_those_of_tensorflow(size, count):
    """`tf.image.ssim` and `tf.image.ssim_multiscale`, in float32; odd sizes are halved alike."""
    tfgan.classifier_metrics()
    image = importlib.import_module("tensorflow").image
    assert similarity.scales(*size) == count
    exponents = np.array(similarity.MS_SSIM_WEIGHTS[:count])
    for deviation in (5, 40):
        a, b = noisy((3, *size, 3), deviation)
        np.testing.assert_allclose(ssim(a, b), image.ssim(a, b, 255).numpy(), atol=1e-4)
        theirs = image.ssim_multiscale(a, b, 255, power_factors=tuple(exponents / exponents.sum())).numpy()
        np.testing.assert_allclose(ms_ssim(a, b), theirs, atol=1e-4)


def test_the_number_of_scales_by_the_size():
    """The window fits the smallest one."""
    assert [similarity.scales(n, 1000) for n in (10, 11, 21, 22, 32, 43, 44, 87, 88, 175, 176, 4096)] == [
        0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5
    ]  # fmt: skip
    assert similarity.scales(1000, 10) == 0


def test_one_scale_is_ssim():
    a, b = noisy((2, 21, 21, 3), 20)
    np.testing.assert_allclose(ms_ssim(a, b), ssim(a, b), rtol=0.01)  # the cut-off is of the channels
    assert (ssim(a, b) > 0.5).all()


def test_how_many_are_computed_at_once_changes_nothing(monkeypatch):
    a, b = noisy((7, 23, 30, 3), 10)
    expected = similarity.ssim_and_ms_ssim(a, b)
    monkeypatch.setattr(similarity, "_NUMBERS_AT_ONCE", 3 * a[0].size)
    np.testing.assert_array_equal(similarity.ssim_and_ms_ssim(a, b), expected)
    one_by_one = [similarity.ssim_and_ms_ssim(a[i : i + 1], b[i : i + 1]) for i in range(7)]
    np.testing.assert_array_equal(np.concatenate(one_by_one, axis=1), expected)


# The figures of two sets


def test_a_set_has_the_median_psnr_and_the_mean_ssim():
    a, b = noisy((205, 24, 24, 3), 12)
    figures, reasons = similarity.compare(open_images(a), open_images(b))
    assert list(figures) == list(similarity.TO_FULL_PRECISION) and not reasons
    assert figures == {
        "psnr_to_fp_db": pytest.approx(np.median(psnr_db(a, b)), rel=1e-12),
        "ssim_to_fp": pytest.approx(ssim(a, b).mean(), rel=1e-12),
        "ms_ssim_to_fp": pytest.approx(ms_ssim(a, b).mean(), rel=1e-12),
    }


def test_images_below_the_window_have_a_psnr_alone():
    figures, reasons = similarity.compare(open_images(images(3)), open_images(images(3)))
    assert figures == {"psnr_to_fp_db": 99.0, "ssim_to_fp": None, "ms_ssim_to_fp": None}
    assert set(reasons) == {"ssim_to_fp", "ms_ssim_to_fp"}
    with pytest.raises(InputError, match="at least 11 x 11 pixels"):
        ssim(images(3), images(3))


@pytest.mark.parametrize("measure", [psnr_db, ssim, ms_ssim])
@pytest.mark.parametrize("other", [images(3), images(4).astype(np.float32)])
def test_images_that_do_not_match_are_refused(measure, other):
    with pytest.raises(InputError, match="equal shapes"):
        measure(images(4), other)
