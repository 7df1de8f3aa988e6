"""Pictures of many samples: plain grids, and the same seeds side by side for several models."""

import math
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vq4dit_jax.errors import InputError
from vq4dit_jax.files import atomic_path

GAP = 4  # pixels between pictures and around them
BAND = 12  # most seeds side by side in a comparison
BACKGROUND = 255
INK = (28, 33, 39)


def write_grid(path: str | os.PathLike, images: np.ndarray, columns: int, scale: int | None = None) -> None:
    """Writes pictures as one PNG, row by row, GAP pixels apart on white.

    Args:
      images: uint8 (N, H, W, 3), N >= 1.
      columns: pictures in a row, >= 1; the last row may be shorter.
      scale: every pixel becomes scale x scale pixels (nearest neighbour: no new colours). Left out, the smallest
        that makes a picture 96 pixels wide, so that 32x32 samples can be seen and 256x256 ones stay as they are.

    Raises:
      InputError: wrong dtype or shape, or columns or scale below 1.
    """
    images = _checked("images", images)
    if columns < 1:
        raise InputError(f"columns={columns}: a grid needs at least one column")
    columns = min(columns, len(images))
    canvas = _tiled(_enlarged(images, scale), columns)
    with atomic_path(path) as partial:
        Image.fromarray(canvas).save(partial, format="PNG", optimize=True)


def write_comparison(path: str | os.PathLike, rows: dict[str, np.ndarray], labels: list[str] | None = None) -> None:
    """Writes the samples of several models from the same seeds as one PNG.

    One row per model with its name at the left, one column per seed with the class name on top; more than BAND
    seeds are wrapped into bands of equal length below each other.

    Args:
      rows: name of a model -> uint8 (N, H, W, 3); the same N, H, W for all, column i from the same seed.
      labels: class name of each column, N of them; a name too long for its column is cut. None: no names.

    Raises:
      InputError: no rows, wrong dtype or shape, shapes that differ, a count of labels that is not N.
    """
    if not rows:
        raise InputError("rows={}: a comparison needs the pictures of at least one model")
    rows = {name: _checked(f"rows[{name!r}]", images) for name, images in rows.items()}
    shapes = {name: images.shape for name, images in rows.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"rows: pictures of the same seeds must have one shape, found {shapes}")
    count = len(next(iter(rows.values())))
    if labels is not None and len(labels) != count:
        raise InputError(f"labels: found {len(labels)} names for {count} columns; give one for each, or None")

    rows = {name: _enlarged(images, None) for name, images in rows.items()}
    _, height, width, _ = next(iter(rows.values())).shape
    font = ImageFont.load_default(size=min(max(width // 7, 13), 22))
    line = math.ceil(1.6 * font.size)
    margin = max(math.ceil(font.getlength(name)) for name in rows) + 3 * GAP
    bands = math.ceil(count / BAND)
    columns = math.ceil(count / bands)
    top = line if labels is not None else 0
    band_height = top + len(rows) * (height + GAP) + GAP
    canvas = Image.new(
        "RGB", (margin + columns * (width + GAP), bands * band_height + (bands - 1) * line // 2), (BACKGROUND,) * 3
    )
    draw = ImageDraw.Draw(canvas)
    for i in range(count):
        band, column = divmod(i, columns)
        x = margin + column * (width + GAP)
        y = band * (band_height + line // 2)
        if labels is not None:
            draw.text(
                (x + width // 2, y + line // 2), _fitted(labels[i], font, width), fill=INK, font=font, anchor="mm"
            )
        for row, images in enumerate(rows.values()):
            canvas.paste(Image.fromarray(images[i]), (x, y + top + row * (height + GAP)))
    for band in range(bands):
        for row, name in enumerate(rows):
            y = band * (band_height + line // 2) + top + row * (height + GAP) + height // 2
            draw.text((margin - 2 * GAP, y), name, fill=INK, font=font, anchor="rm")
    with atomic_path(path) as partial:
        canvas.save(partial, format="PNG", optimize=True)


def _checked(name: str, images: np.ndarray) -> UInt8[np.ndarray, "N H W 3"]:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise InputError(f"{name}: found {images.dtype} {images.shape}, wanted uint8 (N, H, W, 3) with nothing empty")
    return images


def _enlarged(images: UInt8[np.ndarray, "N H W 3"], scale: int | None) -> UInt8[np.ndarray, "N H2 W2 3"]:
    if scale is None:
        scale = math.ceil(96 / images.shape[2])
    if scale < 1:
        raise InputError(f"scale={scale}: a picture can be enlarged by 1, 2, 3 ... times")
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _tiled(images: UInt8[np.ndarray, "N H W 3"], columns: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3)
    canvas = np.full(shape, BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        y = GAP + i // columns * (height + GAP)
        x = GAP + i % columns * (width + GAP)
        canvas[y : y + height, x : x + width] = image
    return canvas


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut and marked with "..." where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
