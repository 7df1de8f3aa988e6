"""Likeness of images to their originals, pair by pair, without any network: PSNR, SSIM and MS-SSIM.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (2004), "Image quality assessment: from error visibility to structural
similarity"; MS-SSIM that of Wang, Simoncelli and Bovik (2003), "Multiscale structural similarity for image quality
assessment". Both see a channel x and its original y through a Gaussian window of 11 x 11 pixels, whose weights w have the
standard deviation 1.5 and the sum 1. At a position of the window

    mu_x = sum w x    sigma_x^2 = sum w (x - mu_x)^2    sigma_xy = sum w (x - mu_x)(y - mu_y)
    l = (2 mu_x mu_y + C1) / (mu_x^2 + mu_y^2 + C1)           luminance, 2004, eq. 6
    cs = (2 sigma_xy + C2) / (sigma_x^2 + sigma_y^2 + C2)     contrast and structure, eq. 9 and 10 with C3 = C2 / 2

with C1 = (0.01 * 255)^2 and C2 = (0.03 * 255)^2. SSIM is the mean of l cs (eq. 13) over all positions at which the window lies
within the image (eq. 17), and over the three channels. All arithmetic is in float64.
"""

import concurrent.futures
import os

import numpy as np
from jaxtyping import Float64
from scipy import ndimage

from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation.images import ImageSet

# Equal images have an infinite PSNR, which strict JSON cannot hold; one value stands for all above it.
PSNR_CAP_DB = 99.0
WINDOW = 11
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, the finest first (2003, section 3.2)."""
TO_FULL_PRECISION = ("psnr_to_fp_db", "ssim_to_fp", "ms_ssim_to_fp")
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_GAUSSIAN = np.exp(-0.5 * (np.arange(-(WINDOW // 2), WINDOW // 2 + 1) / 1.5) ** 2)
_GAUSSIAN /= _GAUSSIAN.sum()
_READ_AT_ONCE = 100
_NUMBERS_AT_ONCE = 2**18  # of the images; a thread holds about ten arrays of float64 of that size


def compare(images: ImageSet, originals: ImageSet) -> tuple[dict[str, float | None], dict[str, str]]:
    """(figures by the names TO_FULL_PRECISION, reasons of those that are None).

    psnr_to_fp_db: the median over the images; ssim_to_fp, ms_ssim_to_fp: the means. InputError where the shapes differ. The
    images are read once, 100 at a time.
    """
    if images.shape != originals.shape:
        raise InputError(
            f"{images.description} have the shape {images.shape} and the full-precision ones {originals.shape};"
            " equal shapes are wanted"
        )
    _, height, width, _ = images.shape
    wide_enough = scales(height, width) > 0
    psnr, structure = [], []
    for a, b in zip(images.batches(_READ_AT_ONCE), originals.batches(_READ_AT_ONCE), strict=True):
        psnr.append(psnr_db(a, b))
        if wide_enough:
            structure.append(ssim_and_ms_ssim(a, b))
    figures: dict[str, float | None] = dict.fromkeys(TO_FULL_PRECISION)
    figures["psnr_to_fp_db"] = float(np.median(np.concatenate(psnr)))
    if not wide_enough:
        reason = f"images of {width}x{height} pixels are smaller than the window of {WINDOW}x{WINDOW}"
        return figures, dict.fromkeys(TO_FULL_PRECISION[1:], reason)
    for name, values in zip(TO_FULL_PRECISION[1:], zip(*structure, strict=True), strict=True):
        figures[name] = float(np.concatenate(values).mean())
    return figures, {}


def psnr_db(images: np.ndarray, originals: np.ndarray) -> Float64[np.ndarray, " N"]:
    """Peak signal-to-noise ratio of each image, 10 log10(255^2 / mean squared difference) dB, at most PSNR_CAP_DB.

    Args:
      images, originals: uint8 (N, H, W, 3), of equal shapes.
    """
    _check_pair(images, originals)
    # One image at a time: float copies of all of them could be eight times their size.
    mse = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(images, originals, strict=True)]
    floor = 255.0**2 / 10 ** (PSNR_CAP_DB / 10)
    return 10 * np.log10(255.0**2 / np.maximum(np.array(mse, np.float64), floor))


def ssim(images: np.ndarray, originals: np.ndarray) -> Float64[np.ndarray, " N"]:
    """SSIM of each image, from -1 to 1, which equal images have. Symmetric.

    Args:
      images, originals: uint8 (N, H, W, 3), of equal shapes, H, W >= 11; InputError otherwise.
    """
    return ssim_and_ms_ssim(images, originals)[0]


def ms_ssim(images: np.ndarray, originals: np.ndarray) -> Float64[np.ndarray, " N"]:
    """MS-SSIM of each image, from 0 to 1, which equal images have. Symmetric.

    With M scales of the exponents e_1, ..., e_M it is, for each channel (2003, eq. 7, means over positions within the factors),

        max(0, mean l_M cs_M)^e_M * prod_{j < M} max(0, mean cs_j)^e_j

    and the mean over the channels. Scale j + 1 has half the pixels of scale j along each side: means of 2 x 2 pixels, an odd last
    row or column doubled. The window must fit the smallest scale, so five scales need 176 pixels a side. Smaller images have the
    first `scales(H, W)` of them, with the exponents divided by their sum: 32 x 32 pixels two, with the exponents 0.136 and
    0.864. Figures of other sizes than 176 and more compare only with those of as many scales.

    Args:
      images, originals: uint8 (N, H, W, 3), of equal shapes, H, W >= 11; InputError otherwise.
    """
    return ssim_and_ms_ssim(images, originals)[1]


def ssim_and_ms_ssim(
    images: np.ndarray, originals: np.ndarray
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Both of each image in the time of the second, in the memory of a few images for each core; see `ssim` and `ms_ssim`."""
    _check_pair(images, originals)
    count = scales(*images.shape[1:3])
    if not count:
        raise InputError(f"images are {images.shape}; at least {WINDOW} x {WINDOW} pixels are wanted")
    exponents = np.array(MS_SSIM_WEIGHTS[:count])
    exponents /= exponents.sum()
    step = max(1, _NUMBERS_AT_ONCE // images[0].size)
    pairs = ((images[i : i + step], originals[i : i + step]) for i in range(0, len(images), step))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        parts = list(threads.map(lambda pair: _of_a_few(*pair, exponents), pairs))
    single, multi = zip(*parts, strict=True)
    return np.concatenate(single), np.concatenate(multi)


def _of_a_few(
    images: np.ndarray, originals: np.ndarray, exponents: Float64[np.ndarray, " scales"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    x, y = images.astype(np.float64), originals.astype(np.float64)
    whole, structure = _means(x, y)
    single, product = whole.mean(axis=1), 1.0
    for exponent in exponents[:-1]:
        product = product * np.maximum(structure, 0.0) ** exponent
        x, y = _halve(x), _halve(y)
        whole, structure = _means(x, y)
    return single, (product * np.maximum(whole, 0.0) ** exponents[-1]).mean(axis=1)


def scales(height: int, width: int) -> int:
    """Number of scales that MS-SSIM has on images of this size: 5 from 11 * 2^4 = 176 pixels a side, 0 below 11."""
    return sum(min(height, width) >= WINDOW * 2**j for j in range(len(MS_SSIM_WEIGHTS)))


def _means(
    x: Float64[np.ndarray, "n H W C"], y: Float64[np.ndarray, "n H W C"]
) -> tuple[Float64[np.ndarray, "n C"], Float64[np.ndarray, "n C"]]:
    """Means over positions of (l cs, cs)."""
    mu_x, mu_y, squares, product = map(_blur, (x, y, x * x + y * y, x * y))
    means, mu_product = mu_x * mu_x + mu_y * mu_y, mu_x * mu_y
    structure = (2 * (product - mu_product) + _C2) / (squares - means + _C2)
    luminance = (2 * mu_product + _C1) / (means + _C1)
    return (luminance * structure).mean(axis=(1, 2)), structure.mean(axis=(1, 2))


def _blur(x: Float64[np.ndarray, "n H W C"]) -> Float64[np.ndarray, "n h w C"]:
    """Means under the window, where it lies within the image: h = H - 10, w = W - 10."""
    edge = WINDOW // 2
    x = ndimage.correlate1d(x, _GAUSSIAN, axis=1)[:, edge:-edge]
    return ndimage.correlate1d(x, _GAUSSIAN, axis=2)[:, :, edge:-edge]


def _halve(x: Float64[np.ndarray, "n H W C"]) -> Float64[np.ndarray, "n h w C"]:
    """Means of 2 x 2 pixels: h = ceil(H / 2), w = ceil(W / 2)."""
    n, height, width, channels = x.shape
    x = np.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return x.reshape(n, (height + 1) // 2, 2, (width + 1) // 2, 2, channels).mean(axis=(2, 4))


def _check_pair(images: np.ndarray, originals: np.ndarray) -> None:
    if images.shape != originals.shape or images.dtype != np.uint8 or originals.dtype != np.uint8:
        raise InputError(
            f"images are {images.dtype} {images.shape} and the full-precision ones {originals.dtype} {originals.shape};"
            " uint8 of equal shapes is wanted"
        )
