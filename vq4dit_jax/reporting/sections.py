"""The parts of the report, in order of appearance: each takes plain data and returns one element."""

import base64
import io
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vq4dit_jax.reporting import charts
from vq4dit_jax.reporting.markup import (
    DASH,
    Content,
    Element,
    count,
    duration,
    element,
    figure,
    fixed,
    integer,
    mebibytes,
    number,
    percent,
    pick,
    table,
)

MODELS = {"fp": "Full precision", "kmeans": "k-means", "vq4dit": "VQ4DiT"}
BAND = 4  # seeds side by side: what a phone shows
MOST_SEEDS = 24
MOST_PIXELS = 2**19  # shown of one model: eight pictures of 256x256
LOSSLESS_WIDTH = 64  # wider pictures are stored as WebP, about a tenth of the bytes, and shown larger

MOST_RULES = 25  # trajectories marked in a chart

Figures = dict[str, Any]


def headline(title: str, metrics: Figures) -> Element:
    """Title, model, and the three figures a reader wants."""
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
    head.append(element("div", {"class": "tiles"}, _size_tile(size), _bits_tile(size, quantized), _quality_tile(quality)))
    return head


def _size_tile(size: Figures) -> Element:
    before, after = figure(size.get("fp32_bytes")), figure(size.get("quantized_bytes"))
    tile = _tile("Size on disk", f"{before / after:.1f}×" if before and after else DASH, "smaller" if before and after else None)
    bars = element("dl", {"class": "mini"})
    for name, css, value in (("fp32", "fp", before), ("Quantized", "vq4dit", after)):
        _mini_bar(bars, name, css, value, before, mebibytes(value))
    tile.extend([bars, _note("The packed model as it lies on disk: codes, codebooks, and the layers that are not quantized.")])
    return tile


def _bits_tile(size: Figures, quantized: float | None) -> Element:
    tile = _tile("Bits per quantized weight", fixed(size.get("bits_per_quantized_weight"), 2), "of 32")
    if quantized:
        parts = [("Assignments", "assignment_bytes"), ("Codebooks", "codebook_bytes")]
        bits = [(name, None if figure(size.get(key)) is None else 8 * figure(size[key]) / quantized) for name, key in parts]
        whole = sum(value or 0 for _, value in bits)
        bars = element("dl", {"class": "mini"})
        for (name, value), css in zip(bits, ("vq4dit", "books"), strict=True):
            _mini_bar(bars, name, css, value, whole, fixed(value, 2))
        tile.extend([bars, _note("Packed codes, and the codebooks spread over the weights that share them.")])
    return tile


def _quality_tile(quality: Figures) -> Element:
    distances = {name: figure(pick(quality, name, "fd")) for name in MODELS}
    fp, kmeans, vq4dit = distances.values()
    tile = _tile("Fréchet distance", number(vq4dit), "lower is better" if vq4dit is not None else None)
    bars = element("dl", {"class": "mini"})
    highest = max((value for value in distances.values() if value is not None), default=None)
    for name, value in distances.items():
        _mini_bar(bars, MODELS[name], name, value, highest, number(value))
    tile.append(bars)
    if None not in (fp, kmeans, vq4dit) and kmeans > fp:
        closed = (kmeans - vq4dit) / (kmeans - fp)
        tile.append(_note(f"Calibration closes {percent(closed, 0)} of the gap to full precision."))
    return tile


def _tile(name: str, value: str, unit: str | None) -> Element:
    unit_element = element("small", None, unit) if unit else None
    return element("section", {"class": "tile"}, element("h2", None, name), element("p", {"class": "big"}, value, " ", unit_element))


def _mini_bar(bars: Element, name: str, css: str, value: float | None, whole: float | None, text: str) -> None:
    fill = element("i", {"class": css, "style": f"width:{100 * max(value, 0) / whole:.2f}%"}) if value is not None and whole else None
    bars.extend([element("dt", None, name), element("dd", None, element("b", None, fill), text)])


def pictures(images: dict[str, np.ndarray], labels: Sequence[str]) -> Element:
    """The same seeds from every model, in bands of BAND seeds."""
    images = {name: np.asarray(batch) for name, batch in images.items() if batch is not None and len(batch)}
    if not images:
        return _section("samples", "Samples", _note("No pictures were sampled in this run."))
    total = min(len(batch) for batch in images.values())
    _, height, width, _ = next(iter(images.values())).shape
    shown = min(total, MOST_SEEDS, max(BAND, MOST_PIXELS // (height * width)))
    text = f"Every column starts from the same noise and the same class. {width}×{height} pixels."
    if shown < total:
        text += f" The first {shown} of {total} seeds; the others are in the folder samples/."
    bands = element("div", {"class": "bands" if width <= LOSSLESS_WIDTH else "bands large"})
    for start in range(0, shown, BAND):
        columns = range(start, min(start + BAND, shown))
        names: list[Content] = [_hidden("Model")]
        names += [str(labels[i]) if i < len(labels) else f"sample {i}" for i in columns]
        blank = [None] * (BAND - len(columns))
        rows = []
        for name, batch in images.items():
            alternatives = [f"{MODELS.get(name, name)}, seed {i}: {names[i - start + 1]}" for i in columns]
            row = [_picture(batch[i], text) for i, text in zip(columns, alternatives, strict=True)]
            rows.append([MODELS.get(name, name), *row, *blank])
        caption = f"Seeds {columns[0]} to {columns[-1]}"
        bands.append(table(_hidden(caption), names + blank, rows, css="pictures"))
    return _section("samples", "Same seeds, three models" if len(images) == 3 else "Samples", _note(text), bands)


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
    ("is", "Inception score", max, number),
    ("precision", "Precision", max, lambda v: fixed(v, 3)),
    ("recall", "Recall", max, lambda v: fixed(v, 3)),
    ("psnr_to_fp_db", "PSNR to full precision, dB", max, lambda v: fixed(v, 1)),
    ("num_images", "Pictures", None, integer),
)


def quality(metrics: Figures) -> Element:
    """Figures of merit: a column per model, the better of the two quantized ones marked."""
    by_model = {name: pick(metrics, "quality", name) or {} for name in MODELS}
    features = list(dict.fromkeys(str(q["features"]) for q in by_model.values() if q.get("features")))
    inception = bool(features) and all("inception" in name.lower() for name in features)
    rows = []
    for key, name, better, text in QUALITY:
        if key == "is" and not inception:
            name = "Inception-score analogue"
        values = {model: figure(q.get(key)) for model, q in by_model.items()}
        pair = [values[model] for model in ("kmeans", "vq4dit") if values[model] is not None]
        best = better(pair) if better and len(pair) == 2 and pair[0] != pair[1] else None
        cells = []
        for model, value in values.items():
            marked = best is not None and model != "fp" and value == best
            cells.append(element("strong", None, text(value)) if marked else text(value))
        arrow = {min: " ↓", max: " ↑", None: ""}[better]
        rows.append([element("span", None, name, arrow), *cells])
    where = f"Features: {'; '.join(features)}." if features else "No features were named."
    caption = f"{where} ↓ lower is better, ↑ higher is better; the better of the two quantized models is bold."
    note = (
        "Inception features: comparable with a published FID only where that one comes from the same layer, the same reference "
        "statistics and the same number of pictures."
        if inception
        else "This is not FID: FID is a Fréchet distance of Inception features. Compare these figures only with each other "
        "and with others made from the same features, reference pictures and number of samples."
    )
    return _section("quality", "Quality", table(caption, [_hidden("Measure"), *MODELS.values()], rows, css="figures"), _note(note))


def calibration(metrics: Figures, train_log: Sequence[Figures]) -> Element:
    """Loss curves, and the figures on a held-out trajectory."""
    c = metrics.get("calibration") or {}
    part = _section("calibration", "Calibration")
    loss = _points(train_log, "l_d", lambda v: v > 0)
    if loss:
        levels = [("k-means, held out", "kmeans", "kmeans_l_d"), ("final hard model, held out", "vq4dit", "hard_l_d")]
        references = [charts.Level(name, css, figure(c[key])) for name, css, key in levels if (figure(c.get(key)) or 0) > 0]
        lines = [charts.Line("each step", "raw", loss)]
        means = _trajectory_means(train_log)
        if len(means) > 1:
            lines.append(charts.Line("mean of a trajectory", "vq4dit", means))
        starts = _trajectory_starts(train_log)
        chart = charts.line_chart(
            element("span", None, element("b", None, "Distillation loss ", _loss("d")), ", log scale"),
            f"Distillation loss over {len(loss)} calibration steps, from {number(loss[0][1])} to {number(loss[-1][1])}.",
            lines,
            references,
            log=True,
            y_text=_power,
            verticals=starts if len(starts) <= MOST_RULES else (),
        )
        part.append(chart)
    pair = element("div", {"class": "two"})
    regularizer, frozen = _points(train_log, "l_r"), _points(train_log, "frozen_fraction")
    if regularizer:
        title = element("b", None, "Regularizer ", _loss("r"))
        description = f"Ratio regularizer, from {number(regularizer[0][1])} to {number(regularizer[-1][1])}."
        pair.append(charts.line_chart(title, description, [charts.Line("each step", "vq4dit", regularizer)], y_text="{:g}".format))
    if frozen:
        pair.append(
            charts.line_chart(
                element("b", None, "Sub-vectors frozen"),
                f"Fraction of sub-vectors whose assignment is final: {percent(frozen[-1][1])} at the end.",
                [charts.Line("each step", "vq4dit", frozen)],
                y_range=(0, 1),
                y_text=lambda v: f"{100 * v:.0f}\u202f%",
            )
        )
    if len(pair):
        part.append(pair)
    part.extend([_pace(c, train_log), _calibration_table(c)])
    return part


def _pace(c: Figures, train_log: Sequence[Figures]) -> Element:
    seconds = [y for _, y in _points(train_log, "seconds")]
    note = _note("" if train_log else "No calibration step was logged. ")
    if seconds:
        note = _note(f"{integer(len(seconds))} steps in {duration(sum(seconds))}, {number(statistics.median(seconds))} s for the median step. ")
    if len(_trajectory_starts(train_log)) in range(1, MOST_RULES + 1):
        note.text += "A dotted rule: a new trajectory begins. "
    if figure(c.get("steps")):
        frozen = f" {number(c.get('l_r_last'))}, {percent(c.get('frozen_fraction'))} of the sub-vectors frozen."
        last = [_loss("d"), f" {number(c.get('l_d_last'))}, ", _loss("r"), frozen]
        note.append(element("span", None, f"At the end, after {integer(c['steps'])} steps: ", *last))
    return note


def _calibration_table(c: Figures) -> Element:
    def times_lower(before: str, after: str) -> str:
        before, after = figure(c.get(before)), figure(c.get(after))
        return f"{number(before / after)}×" if before and after else DASH

    held_out = [
        [
            element("span", None, _loss("d"), ", mean over blocks of the block-output MSE"),
            *(number(c.get(key)) for key in ("kmeans_l_d", "hard_l_d")),
            times_lower("kmeans_l_d", "hard_l_d"),
        ],
        [
            "Relative L2 error of the guided noise prediction",
            *(number(c.get(key)) for key in ("kmeans_eps_error", "hard_eps_error")),
            times_lower("kmeans_eps_error", "hard_eps_error"),
        ],
    ]
    caption = "On a fresh teacher trajectory that calibration has not seen."
    return table(caption, [_hidden("Measure"), "k-means", "VQ4DiT, hard", "Lower by"], held_out, css="figures")


def ratios(train_log: Sequence[Figures]) -> Element:
    """How the ratios of the first candidates leave the middle and settle at 0 or 1."""
    recorded = []
    for line in train_log:
        counts = [figure(v) or 0.0 for v in line.get("ratio_histogram") or ()]
        if sum(counts) > 0 and figure(line.get("step")) is not None:
            recorded.append((figure(line["step"]), [v / sum(counts) for v in counts]))
    title = "Ratios of the first candidate"
    if not recorded:
        return _section("ratios", title, _note("No ratio histogram was recorded."))
    most = 100
    if len(recorded) > most:
        recorded = [recorded[round(i * (len(recorded) - 1) / (most - 1))] for i in range(most)]
    steps, shares = zip(*recorded, strict=True)
    part = _section(
        "ratios",
        title,
        _note("Each sub-vector is a mixture of its nearest codewords. Its ratio r for the nearest one goes to 1 where that one stays, and to 0 where another is better."),
        charts.histogram_over_time(
            element("span", None, element("b", None, "Share of sub-vectors at ratio r"), " over calibration steps; colour by decades, blank below 0.1\u202f%"),
            f"Histogram of ratios at {len(steps)} steps from {steps[0]:g} to {steps[-1]:g}.",
            steps,
            shares,
        ),
    )
    chosen = sorted({0, (len(steps) - 1) // 2, len(steps) - 1})
    row = element("div", {"class": "three"})
    for i in chosen:
        ends = f"{percent(shares[i][0])} in the lowest bin, {percent(shares[i][-1])} in the highest"
        row.append(charts.histogram(element("b", None, f"Step {steps[i]:g}"), f"Ratios at step {steps[i]:g}: {ends}.", shares[i]))
    part.append(row)
    return part


def size(metrics: Figures) -> Element:
    """Where the bytes are."""
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
    part = _section("size", "Size")
    if before and after:
        amounts = [(css, value) for _, css, value in parts if value]
        pair = (("fp32, to scale", [("fp", before)], before), ("Quantized, to scale", amounts, before), ("Quantized, enlarged", amounts, after))
        for name, bar, whole in pair:
            row = charts.stacked_bar(bar, max(whole, sum(v for _, v in bar)), f"{name}: {mebibytes(sum(v for _, v in bar))}")
            part.append(element("div", {"class": "labelled"}, element("span", None, name), row))

    def row(name: Content, value: float | None, css: str | None) -> list[Content]:
        key = element("i", {"class": f"key {css}"}) if css else None
        return [element("span", None, key, name), integer(value), mebibytes(value), percent(value / before) if value is not None and before else DASH]

    rows = [row("fp32 weights", before, "fp"), row("Quantized, on disk", after, None), *(row(name, value, css) for name, css, value in parts)]
    bits = fixed(s.get("bits_per_quantized_weight"), 3)
    caption = f"{bits} bits per quantized weight, codebooks included."
    part.append(table(caption, [_hidden("Part"), "Bytes", "Size", "Of fp32"], rows, css="figures"))
    return part


def layer_errors(layers: Sequence[Figures]) -> Element:
    """Heat maps of the weight error, before and after calibration, and what each kind of layer is stored in."""
    part = _section("layers", "Layers")
    if not layers:
        part.append(_note("No layer was quantized."))
        return part
    roles = list(dict.fromkeys(str(layer.get("role")) for layer in layers))
    blocks = sorted({int(layer["block"]) for layer in layers})
    cells = {(int(layer["block"]), str(layer.get("role"))): layer for layer in layers}
    errors = [figure(layer.get(key)) for layer in layers for key in ("kmeans_error", "final_error")]
    errors = [e for e in errors if e is not None]
    low, high = min(errors, default=0.0), max(errors, default=1.0)
    pair = element("div", {"class": "two"})
    for key, name in (("kmeans_error", "k-means"), ("final_error", "after calibration")):
        rows = []
        for block in blocks:
            rows.append([str(block), *(_heat_cell(cells.get((block, role)), key, low, high) for role in roles)])
        caption = element("span", None, "Relative weight error, ", element("b", None, name))
        pair.append(table(caption, [element("abbr", {"title": "block"}, "Block"), *map(_breakable, roles)], rows, css="heat"))
    note = (
        f"‖W − Ŵ‖ / ‖W‖ of every quantized kernel, one colour scale for both ({number(low)} to {number(high)}). k-means minimizes this "
        "error; calibration minimizes the error of the block outputs instead, and may raise it."
    )
    part.extend([_note(note), pair, _storage_table(layers)])
    return part


def _heat_cell(layer: Figures | None, key: str, low: float, high: float) -> Element:
    value = figure(layer.get(key)) if layer else None
    if value is None:
        return element("td", None, DASH)
    heat = (value - low) / (high - low) if high > low else 0.5
    hint = f"{layer.get('path')}: {number(value)}, {_shape(layer)}, {fixed(layer.get('bits'), 3)} bits"
    return element("td", {"style": f"--heat:{100 * heat:.0f}%", "title": hint}, fixed(value, 3))


def _storage_table(layers: Sequence[Figures]) -> Element:
    order = {role: i for i, role in enumerate(dict.fromkeys(str(layer.get("role")) for layer in layers))}
    kinds: dict[tuple, list[int]] = {}
    for layer in sorted(layers, key=lambda layer: order[str(layer.get("role"))]):
        keys = (integer(layer.get("codewords")), integer(layer.get("subvector")), integer(layer.get("groups")))
        kind = (str(layer.get("role")), _shape(layer), *keys, fixed(layer.get("bits"), 3))
        kinds.setdefault(kind, []).append(int(layer["block"]))
    rows = [[_breakable(role), _ranges(blocks), *rest] for (role, *rest), blocks in kinds.items()]
    caption = "What the layers are stored in: K codewords of d weights, a codebook for each of G groups of output rows; bits per weight with the codebooks."
    body = table(caption, ["Role", "Blocks", "O×I", "K", "d", "G", "Bits"], rows, css="figures")
    return element("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Storage of the layers"}, body)


def _shape(layer: Figures) -> str:
    return "×".join(str(n) for n in layer.get("shape") or ()) or DASH


def _breakable(role: str) -> Element:
    """A role that may break after its slashes and underscores."""
    first, *words = re.split("(?<=[/_])", role)
    return element("span", None, first, *(part for word in words for part in (element("wbr"), word)))


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 5, 7-9."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def time(metrics: Figures) -> Element:
    """Seconds per stage."""
    stages = {str(name): figure(value) for name, value in (metrics.get("time_s") or {}).items()}
    known = [value for value in stages.values() if value is not None]
    part = _section("time", "Time")
    if not known:
        part.append(_note("No stage was timed."))
        return part
    longest = max(known)
    rows = []
    for name, value in stages.items():
        bar = charts.stacked_bar([("vq4dit", value or 0)], longest or 1.0, f"{name}: {duration(value)}")
        rows.append([MODELS.get(name) or name.capitalize(), duration(value), element("td", {"class": "wide"}, bar)])
    part.append(table(f"{duration(sum(known))} in all.", ["Stage", "Time", _hidden("Bar")], rows, css="figures times"))
    return part


def recipe(metrics: Figures, config: Figures, command: str) -> Element:
    """All it takes to do it again."""
    names = {"cfg_scale": "Guidance scale", "steps": "Sampling steps"}
    rows = []
    for key, value in (metrics.get("recipe") or {}).items():
        for path, leaf in _leaves(value, key):
            name = names.get(path) or path.replace("versions.", "", 1).replace("_", " ")
            rows.append([name if path.startswith("versions.") else name[:1].upper() + name[1:], _plain(leaf)])
    part = _section("recipe", "Recipe")
    if rows:
        part.append(table("What the figures above were made with.", (), rows, css="plain"))
    flags = [[f"config.{path}", _plain(leaf)] for path, leaf in _leaves(config, "")]
    if flags:
        settings = table("Every setting can be given as a flag: --config.section.key=value.", ["Setting", "Value"], flags, css="plain code")
        part.append(element("details", None, element("summary", None, f"Full configuration, {len(flags)} settings"), settings))
    if command:
        part.append(element("h3", None, "To make this page again"))
        words = (element("span", None, word) if word.strip() else word for word in re.split(r"(\s+)", command))
        part.append(element("pre", {"tabindex": "0"}, element("code", None, *words)))
    return part


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(path, value)] if path else []
    return [leaf for key, child in value.items() for leaf in _leaves(child, f"{path}.{key}" if path else str(key))]


def _plain(value: Any) -> str:
    return DASH if value is None or value == "" else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _section(anchor: str, title: str, *children: Element) -> Element:
    return element("section", {"id": anchor, "aria-labelledby": f"{anchor}-title"}, element("h2", {"id": f"{anchor}-title"}, title), *children)


def _loss(index: str) -> Element:
    return element("span", None, "L", element("sub", None, index))


def _hidden(text: str) -> Element:
    """Only for screen readers."""
    return element("span", {"class": "hidden"}, text)


def _note(text: str) -> Element:
    return element("p", {"class": "note"}, text)


def _points(log: Sequence[Figures], key: str, wanted=lambda value: True) -> list[charts.Point]:
    pairs = ((figure(line.get("step")), figure(line.get(key))) for line in log)
    return [(x, y) for x, y in pairs if x is not None and y is not None and wanted(y)]


def _trajectory_means(log: Sequence[Figures]) -> list[charts.Point]:
    groups: dict[Any, list[charts.Point]] = {}
    for line in log:
        for point in _points([line], "l_d", lambda v: v > 0):
            groups.setdefault(line.get("trajectory"), []).append(point)
    return [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups.values()]


def _trajectory_starts(log: Sequence[Figures]) -> list[float]:
    pairs = zip(log, log[1:], strict=False)
    return [b["step"] for a, b in pairs if a.get("trajectory") != b.get("trajectory") and figure(b.get("step")) is not None]


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    if -3 <= exponent <= 3:
        return f"{value:g}"
    return number(float(f"{factor}e{exponent}"), 1)
