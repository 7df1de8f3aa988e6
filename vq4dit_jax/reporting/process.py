"""The parts of the report on the run: calibration, ratios, layers, time, recipe."""

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from vq4dit_jax.reporting import charts
from vq4dit_jax.reporting.markup import (
    DASH,
    Element,
    Figures,
    duration,
    element,
    figure,
    fixed,
    hidden,
    integer,
    note,
    number,
    percent,
    section,
    table,
)

MOST_RULES = 25  # trajectories marked in a chart
MOST_HISTOGRAMS = 100

_STAGES = {"kmeans": "k-means"}
"""Titles of stages whose names are not words."""


def calibration(metrics: Figures, train_log: Sequence[Figures]) -> Element:
    """Loss curves, and the figures on a held-out trajectory."""
    c = metrics.get("calibration") or {}
    part = section("calibration", "Calibration")
    loss = _points(train_log, "l_d", lambda v: v > 0)
    if loss:
        levels = [("k-means, held out", "kmeans", "kmeans_l_d"), ("final hard model, held out", "vq4dit", "hard_l_d")]
        references = [
            charts.Level(name, css, figure(c[key])) for name, css, key in levels if (figure(c.get(key)) or 0) > 0
        ]
        lines = [charts.Line("each step", "raw", loss)]
        means = _trajectory_means(train_log)
        if len(means) > 1:
            lines.append(charts.Line("mean of a trajectory", "vq4dit", means))
        starts = _trajectory_starts(train_log)
        chart = charts.line_chart(
            element("span", None, element("b", None, "Distillation loss ", _loss("d")), ", log scale"),
            f"Distillation loss over {len(loss)} steps, from {number(loss[0][1])} to {number(loss[-1][1])}.",
            lines,
            references,
            log=True,
            y_text=lambda v: number(v, 1),
            verticals=starts if len(starts) <= MOST_RULES else (),
        )
        part.append(chart)
    pair = element("div", {"class": "two"})
    regularizer, frozen = _points(train_log, "l_r"), _points(train_log, "frozen_fraction")
    if regularizer:
        title = element("b", None, "Regularizer ", _loss("r"))
        description = f"Ratio regularizer, from {number(regularizer[0][1])} to {number(regularizer[-1][1])}."
        pair.append(
            charts.line_chart(
                title, description, [charts.Line("each step", "vq4dit", regularizer)], y_text="{:g}".format
            )
        )
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
    text = note("" if train_log else "No calibration step was logged. ")
    if seconds:
        text = note(
            f"{integer(len(seconds))} steps in {duration(sum(seconds))}, "
            f"{number(statistics.median(seconds))} s for the median step. "
        )
    if len(_trajectory_starts(train_log)) in range(1, MOST_RULES + 1):
        text.text += "A dotted rule: a new trajectory begins. "
    if figure(c.get("steps")):
        frozen = f" {number(c.get('l_r_last'))}, {percent(c.get('frozen_fraction'))} of the sub-vectors frozen."
        last = [_loss("d"), f" {number(c.get('l_d_last'))}, ", _loss("r"), frozen]
        text.append(element("span", None, f"At the end, after {integer(c['steps'])} steps: ", *last))
    return text


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
    return table(caption, [hidden("Measure"), "k-means", "VQ4DiT, hard", "Lower by"], held_out, css="figures")


def ratios(train_log: Sequence[Figures]) -> Element:
    """The ratios of the first candidates over the run, which end at 0 or 1; or a note that there was no choice."""
    recorded = []
    for line in train_log:
        counts = [figure(v) or 0.0 for v in line.get("ratio_histogram") or ()]
        if sum(counts) > 0 and figure(line.get("step")) is not None:
            recorded.append((figure(line["step"]), [v / sum(counts) for v in counts]))
    title = "Ratios of the first candidate"
    if not recorded:
        return section("ratios", title, note("No ratio histogram was recorded."))
    if all(shares[-1] == 1 for _, shares in recorded):
        why = "No sub-vector had a choice: assignments were solved before the first step, and every ratio is 1 throughout."
        last = charts.histogram(element("b", None, "All steps"), "Ratios: all in the highest bin.", recorded[-1][1])
        return section("ratios", title, note(why), element("div", {"class": "three"}, last))
    if len(recorded) > MOST_HISTOGRAMS:
        last = len(recorded) - 1
        recorded = [recorded[round(i * last / (MOST_HISTOGRAMS - 1))] for i in range(MOST_HISTOGRAMS)]
    steps, shares = zip(*recorded, strict=True)
    part = section(
        "ratios",
        title,
        note(
            "Each sub-vector is a mixture of its nearest codewords. Its ratio r for the nearest one goes to 1 where "
            "that one stays, and to 0 where another is better."
        ),
        charts.histogram_over_time(
            element(
                "span",
                None,
                element("b", None, "Share of sub-vectors at ratio r"),
                " over calibration steps; colour by decades, blank below 0.1\u202f%",
            ),
            f"Histogram of ratios at {len(steps)} steps from {steps[0]:g} to {steps[-1]:g}.",
            steps,
            shares,
        ),
    )
    chosen = sorted({0, (len(steps) - 1) // 2, len(steps) - 1})
    row = element("div", {"class": "three"})
    for i in chosen:
        ends = f"{percent(shares[i][0])} in the lowest bin, {percent(shares[i][-1])} in the highest"
        row.append(
            charts.histogram(
                element("b", None, f"Step {steps[i]:g}"), f"Ratios at step {steps[i]:g}: {ends}.", shares[i]
            )
        )
    part.append(row)
    return part


def layer_errors(layers: Sequence[Figures]) -> Element:
    """Heat maps of the weight error, before and after calibration, and the codebooks and bits of each kind of layer."""
    part = section("layers", "Layers")
    if not layers:
        part.append(note("No layer was quantized."))
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
        pair.append(
            table(caption, [element("abbr", {"title": "block"}, "Block"), *map(_breakable, roles)], rows, css="heat")
        )
    explanation = (
        f"‖W − Ŵ‖ / ‖W‖ of every quantized kernel, one colour scale for both ({number(low)} to {number(high)}). "
        "k-means minimizes this error; calibration minimizes the error of the block outputs instead, and may raise it."
    )
    part.extend([note(explanation), pair, _storage_table(layers)])
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
        stored = str(layer.get("kind", "vq"))
        kind = (str(layer.get("role")), _shape(layer), stored, *keys, fixed(layer.get("bits"), 3))
        kinds.setdefault(kind, []).append(int(layer["block"]))
    rows = [[_breakable(role), _ranges(blocks), *rest] for (role, *rest), blocks in kinds.items()]
    caption = (
        "What the layers are stored in. Kind vq: K codewords of d weights, a codebook for each of G groups of output rows. "
        "Bits per weight count codes and tables."
    )
    body = table(caption, ["Role", "Blocks", "O×I", "Kind", "K", "d", "G", "Bits"], rows, css="figures")
    return element(
        "div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Storage of the layers"}, body
    )


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
    part = section("time", "Time")
    if not known:
        part.append(note("No stage was timed."))
        return part
    longest = max(known)
    rows = []
    for name, value in stages.items():
        bar = charts.stacked_bar([("vq4dit", value or 0)], longest or 1.0, f"{name}: {duration(value)}")
        rows.append([_STAGES.get(name) or name.capitalize(), duration(value), element("td", {"class": "wide"}, bar)])
    part.append(table(f"{duration(sum(known))} in all.", ["Stage", "Time", hidden("Bar")], rows, css="figures times"))
    return part


def recipe(metrics: Figures, config: Figures, command: str) -> Element:
    """Everything that is needed to repeat the run."""
    names = {"cfg_scale": "Guidance scale", "steps": "Sampling steps"}
    rows = []
    for key, value in (metrics.get("recipe") or {}).items():
        for path, leaf in _leaves(value, key):
            name = names.get(path) or path.replace("versions.", "", 1).replace("_", " ")
            rows.append([name if path.startswith("versions.") else name[:1].upper() + name[1:], _plain(leaf)])
    part = section("recipe", "Recipe")
    if rows:
        part.append(table("What the figures above were made with.", (), rows, css="plain"))
    flags = [[f"config.{path}", _plain(leaf)] for path, leaf in _leaves(config, "")]
    if flags:
        settings = table(
            "Every setting can be given as a flag: --config.section.key=value.",
            ["Setting", "Value"],
            flags,
            css="plain code",
        )
        part.append(
            element("details", None, element("summary", None, f"Full configuration, {len(flags)} settings"), settings)
        )
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
    return (
        DASH
        if value is None or value == ""
        else ", ".join(map(str, value))
        if isinstance(value, list | tuple)
        else str(value)
    )


def _loss(index: str) -> Element:
    return element("span", None, "L", element("sub", None, index))


def _points(
    log: Sequence[Figures], key: str, wanted: Callable[[float], bool] = lambda value: True
) -> list[charts.Point]:
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
    starts = [figure(b.get("step")) for a, b in pairs if a.get("trajectory") != b.get("trajectory")]
    return [step for step in starts if step is not None]
