"""The parts of the report on results: headline, pictures, quality, size."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vq4dit_jax.reporting import charts
from vq4dit_jax.reporting.markup import (
    DASH,
    Content,
    Element,
    Figures,
    count,
    css_of,
    element,
    figure,
    fixed,
    hidden,
    integer,
    mebibytes,
    models_of,
    note,
    number,
    percent,
    pick,
    section,
    table,
    title_of,
)

BAND = 4  # seeds side by side, as many as a phone shows
MOST_SEEDS = 24
MOST_PIXELS = 2**19  # shown of one model: eight pictures of 256x256
LOSSLESS_WIDTH = 64  # wider pictures are stored as WebP, about a tenth of the bytes, and shown larger


def headline(title: str, metrics: Figures) -> Element:
    """Title, model, and the three most important figures."""
    model, size, quality = (metrics.get(key) or {} for key in ("model", "size", "quality"))
    parameters, quantized = figure(model.get("parameters")), figure(model.get("quantized_parameters"))
    about = [str(model["variant"])] if model.get("variant") else []
    if parameters:
        about.append(f"{count(parameters)} parameters")
        if quantized is not None:
            about.append(f"{percent(quantized / parameters)} of them quantized")
    head = element("header", None, element("p", {"class": "kind"}, "VQ4DiT · post-training vector quantization"))
    head.append(element("h1", None, title))
    if about:
        head.append(element("p", {"class": "about"}, " · ".join(about)))
    head.append(
        element("div", {"class": "tiles"}, _size_tile(size), _bits_tile(size, quantized), _quality_tile(quality))
    )
    return head


def _size_tile(size: Figures) -> Element:
    before, after = figure(size.get("fp32_bytes")), figure(size.get("quantized_bytes"))
    tile = _tile(
        "Size on disk", f"{before / after:.1f}×" if before and after else DASH, "smaller" if before and after else None
    )
    bars = element("dl", {"class": "mini"})
    for name, css, value in (("fp32", "fp", before), ("Quantized", "vq4dit", after)):
        _mini_bar(bars, name, css, value, before, mebibytes(value))
    tile.extend(
        [bars, note("The packed model as it lies on disk: codes, codebooks, and the layers that are not quantized.")]
    )
    return tile


def _bits_tile(size: Figures, quantized: float | None) -> Element:
    tile = _tile("Bits per quantized weight", fixed(size.get("bits_per_quantized_weight"), 2), "of 32")
    if quantized:
        parts = [("Assignments", "assignment_bytes"), ("Codebooks", "codebook_bytes")]
        bits = [
            (name, None if figure(size.get(key)) is None else 8 * figure(size[key]) / quantized) for name, key in parts
        ]
        whole = sum(value or 0.0 for _, value in bits)
        bars = element("dl", {"class": "mini"})
        for (name, value), css in zip(bits, ("vq4dit", "books"), strict=True):
            _mini_bar(bars, name, css, value, whole, fixed(value, 2))
        tile.extend([bars, note("Packed codes, and the codebooks spread over the weights that share them.")])
    return tile


def _quality_tile(quality: Figures) -> Element:
    models = models_of({"quality": quality})
    distances = {name: figure(pick(quality, name, "fd")) for name in models}
    values = [*distances.values()]
    full, first, final = values[0], values[min(1, len(values) - 1)], values[-1]
    tile = _tile("Fréchet distance", number(final), "lower is better" if final is not None else None)
    bars = element("dl", {"class": "mini"})
    highest = max((value for value in distances.values() if value is not None), default=None)
    for name, value in distances.items():
        _mini_bar(bars, title_of(name), css_of(name, models), value, highest, number(value))
    tile.append(bars)
    if len(models) > 2 and None not in (full, first, final) and first > full:
        closed = (first - final) / (first - full)
        tile.append(note(f"Calibration closes {percent(closed, 0)} of the gap to full precision."))
    return tile


def _tile(name: str, value: str, unit: str | None) -> Element:
    unit_element = element("small", None, unit) if unit else None
    return element(
        "section",
        {"class": "tile"},
        element("h2", None, name),
        element("p", {"class": "big"}, value, " ", unit_element),
    )


def _mini_bar(bars: Element, name: str, css: str, value: float | None, whole: float | None, text: str) -> None:
    fill = (
        element("i", {"class": css, "style": f"width:{100 * max(value, 0) / whole:.2f}%"})
        if value is not None and whole
        else None
    )
    bars.extend([element("dt", None, name), element("dd", None, element("b", None, fill), text)])


def pictures(images: dict[str, np.ndarray], labels: Sequence[str]) -> Element:
    """The same seeds from every model, in bands of BAND seeds."""
    images = {name: np.asarray(batch) for name, batch in images.items() if batch is not None and len(batch)}
    if not images:
        return section("samples", "Samples", note("No pictures were sampled in this run."))
    total = min(len(batch) for batch in images.values())
    _, height, width, _ = next(iter(images.values())).shape
    shown = min(total, MOST_SEEDS, max(BAND, MOST_PIXELS // (height * width)))
    text = f"Every column starts from the same noise and the same class. {width}×{height} pixels."
    if shown < total:
        text += f" The first {shown} of {total} seeds; the others are in the folder samples/."
    bands = element("div", {"class": "bands" if width <= LOSSLESS_WIDTH else "bands large"})
    for start in range(0, shown, BAND):
        columns = range(start, min(start + BAND, shown))
        names: list[Content] = [hidden("Model")]
        names += [str(labels[i]) if i < len(labels) else f"sample {i}" for i in columns]
        blank = [None] * (BAND - len(columns))
        rows = []
        for name, batch in images.items():
            alternatives = [f"{title_of(name)}, seed {i}: {names[i - start + 1]}" for i in columns]
            row = [_picture(batch[i], text) for i, text in zip(columns, alternatives, strict=True)]
            rows.append([title_of(name), *row, *blank])
        caption = f"Seeds {columns[0]} to {columns[-1]}"
        bands.append(table(hidden(caption), names + blank, rows, css="pictures"))
    return section(
        "samples", "Same seeds, three models" if len(images) == 3 else "Same seeds, all models", note(text), bands
    )


def _picture(pixels: np.ndarray, alternative: str) -> Element:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    small = image.width <= LOSSLESS_WIDTH
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="WEBP", quality=88)
    source = f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    size = {"width": image.width, "height": image.height}
    return element("img", {"src": source, "alt": alternative, **size, **({"class": "pixels"} if small else {})})


QUALITY = (  # key, name, better is, text
    ("fd", "Fréchet distance", min, number),
    ("sfd", "Spatial Fréchet distance", min, number),
    ("mind", "Monge distance", min, number),
    ("is", "Inception score", max, number),
    ("precision", "Precision", max, lambda v: fixed(v, 3)),
    ("recall", "Recall", max, lambda v: fixed(v, 3)),
    ("psnr_to_fp_db", "PSNR to full precision, dB", max, lambda v: fixed(v, 1)),
    ("ssim_to_fp", "SSIM to full precision", max, lambda v: fixed(v, 4)),
    ("ms_ssim_to_fp", "MS-SSIM to full precision", max, lambda v: fixed(v, 4)),
    ("num_images", "Pictures", None, integer),
)


def quality(metrics: Figures) -> Element:
    """Figures of merit: a column per model, the best of the quantized ones marked."""
    by_model = {name: pick(metrics, "quality", name) or {} for name in models_of(metrics)}
    features = list(dict.fromkeys(str(q["features"]) for q in by_model.values() if q.get("features")))
    inception = bool(features) and all("inception" in name.lower() for name in features)
    rows = []
    for key, name, better, text in QUALITY:
        if key == "is" and not inception:
            name = "Inception-score analogue"
        values = {model: figure(q.get(key)) for model, q in by_model.items()}
        full, *quantized = by_model
        known = [values[model] for model in quantized if values[model] is not None]
        best = better(known) if better and len(set(known)) > 1 else None
        cells = []
        for model, value in values.items():
            marked = best is not None and model != full and value == best
            cells.append(element("strong", None, text(value)) if marked else text(value))
        arrow = {min: "\u00a0↓", max: "\u00a0↑", None: ""}[better]
        rows.append([element("span", None, name, arrow), *cells])
    where = f"Features: {'; '.join(features)}." if features else "No features were named."
    caption = f"{where} ↓ lower is better, ↑ higher is better; the best of the quantized models is bold."
    warning = (
        "Inception features: comparable with a published FID or MIND (here the Monge distance) only where that one comes "
        "from the same layer, the same reference statistics and the same number of pictures."
        if inception
        else "This is not FID: FID is a Fréchet distance of Inception features, and MIND a Monge distance of them. Compare "
        "these figures only with each other and with others made from the same features, reference pictures and number of "
        "samples."
    )
    return section(
        "quality",
        "Quality",
        table(caption, [hidden("Measure"), *map(title_of, by_model)], rows, css="figures"),
        note(warning),
    )


def size(metrics: Figures) -> Element:
    """Bytes by part of the model."""
    s = metrics.get("size") or {}
    before, after = figure(s.get("fp32_bytes")), figure(s.get("quantized_bytes"))
    parts = [
        ("Assignments", "vq4dit", figure(s.get("assignment_bytes"))),
        ("Codebooks", "books", figure(s.get("codebook_bytes"))),
        ("Everything else: biases, embedders, final layer", "other", figure(s.get("other_bytes"))),
    ]
    known = [value for *_, value in parts if value is not None]
    if after is not None and known and after > sum(known):
        parts.append(("File format", "format", after - sum(known)))
    part = section("size", "Size")
    if before and after:
        amounts = [(css, value) for _, css, value in parts if value]
        pair = (
            ("fp32, to scale", [("fp", before)], before),
            ("Quantized, to scale", amounts, before),
            ("Quantized, enlarged", amounts, after),
        )
        for name, bar, whole in pair:
            row = charts.stacked_bar(
                bar, max(whole, sum(v for _, v in bar)), f"{name}: {mebibytes(sum(v for _, v in bar))}"
            )
            part.append(element("div", {"class": "labelled"}, element("span", None, name), row))

    def row(name: Content, value: float | None, css: str | None) -> list[Content]:
        key = element("i", {"class": f"key {css}"}) if css else None
        return [
            element("span", None, key, name),
            integer(value),
            mebibytes(value),
            percent(value / before) if value is not None and before else DASH,
        ]

    rows = [
        row("fp32 weights", before, "fp"),
        row("Quantized, on disk", after, None),
        *(row(name, value, css) for name, css, value in parts),
    ]
    bits = fixed(s.get("bits_per_quantized_weight"), 3)
    caption = f"{bits} bits per quantized weight, codebooks included."
    part.append(table(caption, [hidden("Part"), "Bytes", "Size", "Of fp32"], rows, css="figures"))
    return part
