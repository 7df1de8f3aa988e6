"""Charts as inline SVG that stretches with the page, under labels in HTML that do not.

The drawing of a chart is 1000 by 1000 units, stretched over its box with strokes of constant width; ticks and names
are spans at percentages of the box. So one chart fits a phone and a desk, its text keeps the page's size, and its
colours are the page's variables (template.html), light or dark.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from vq4dit_jax.reporting.markup import Content, Element, element

Number = float | int
Point = tuple[Number, Number]
SIZE = 1000
MOST_POINTS = 500


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: its name, its CSS class in template.html, and finite points in ascending x."""

    name: str
    css: str
    points: Sequence[Point]


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal reference line: its name, its CSS class, and its y."""

    name: str
    css: str
    y: Number


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [0, SIZE]; `log` by decades."""

    low: Number
    high: Number
    log: bool = False

    def __call__(self, value: Number) -> Number:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return SIZE * (value - low) / (high - low)

    def percent(self, value: Number) -> str:
        return f"{100 * self(value) / SIZE:.2f}%"


def line_chart(
    caption: Content,
    description: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    log: bool = False,
    y_range: tuple[Number, Number] | None = None,
    y_text: Callable[[Number], str],
    verticals: Sequence[Number] = (),
) -> Element:
    """Curves over calibration steps.

    Args:
      caption: text above the chart. description: text for screen readers in place of the drawing.
      lines: at least one with at least one point; longer ones than MOST_POINTS are thinned, extremes kept.
      levels: reference lines, named in the legend.
      log: y by decades; every y must be positive.
      y_range: (low, high) of the y axis; None: the range of all points and levels.
      y_text: writes the figure of a tick.
      verticals: x of faint vertical rules.
    """
    lines = [dataclasses.replace(line, points=thinned(line.points)) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [level.y for level in levels]
    x_scale = _widened(min(xs), max(xs))
    y_scale = _padded(min(ys), max(ys), log) if y_range is None else Scale(*y_range)

    drawing = element("svg", {"viewBox": f"0 0 {SIZE} {SIZE}", "preserveAspectRatio": "none", "aria-hidden": "true"})
    y_ticks = log_ticks(y_scale.low, y_scale.high) if log else linear_ticks(y_scale.low, y_scale.high)
    for y in y_ticks:
        drawing.append(_path("rule", [(0, SIZE - y_scale(y)), (SIZE, SIZE - y_scale(y))]))
    for x in verticals:
        drawing.append(_path("rule faint", [(x_scale(x), 0), (x_scale(x), SIZE)]))
    for level in levels:
        y = SIZE - y_scale(level.y)
        drawing.append(_path(f"level {level.css}", [(0, y), (SIZE, y)]))
    for line in lines:
        drawing.append(_path(f"line {line.css}", [(x_scale(x), SIZE - y_scale(y)) for x, y in line.points]))
    plot = element("div", {"class": "plot"}, drawing)
    for y in y_ticks:
        plot.append(element("span", {"class": "tick y", "style": f"bottom:{y_scale.percent(y)}"}, y_text(y)))
    _label_steps(plot, x_scale)
    names = [(item.name, f"key {item.css}") for item in lines]
    names += [(item.name, f"key level {item.css}") for item in levels]
    return _figure(caption, description, plot, _legend(names) if len(names) > 1 else None)


def histogram_over_time(
    caption: Content, description: str, steps: Sequence[Number], shares: Sequence[Sequence[Number]]
) -> Element:
    """A heat map: one column per recorded step, one row per bin of [0, 1]; the colour is the share, by decades.

    Args:
      steps: ascending, at least one. shares: as long as `steps`; each the bins of one step, summing to 1.
    """
    typical = steps[1] - steps[0] if len(steps) > 1 else 1.0
    edges = [*steps, steps[-1] + typical]
    x_scale = Scale(edges[0], edges[-1])
    attributes = {"viewBox": f"0 0 {SIZE} {SIZE}", "preserveAspectRatio": "none", "aria-hidden": "true"}
    drawing = element("svg", {**attributes, "shape-rendering": "crispEdges"})
    for left, right, column in zip(edges, edges[1:], shares, strict=False):
        for i, share in enumerate(column):
            if share >= 1e-3:
                x, y = round(x_scale(left)), round(SIZE - SIZE * (i + 1) / len(column))
                rectangle = {
                    "x": x,
                    "y": y,
                    "width": round(x_scale(right)) - x,  # edges are rounded, not widths: no seams between columns
                    "height": round(SIZE - SIZE * i / len(column)) - y,
                    "fill-opacity": f"{0.05 + 0.95 * (1 + math.log10(share) / 3):.2f}",
                }
                drawing.append(element("rect", rectangle))
    plot = element("div", {"class": "plot heat"}, drawing)
    for y in (0, 0.25, 0.5, 0.75, 1):
        plot.append(element("span", {"class": "tick y", "style": f"bottom:{100 * y:g}%"}, f"{y:g}"))
    _label_steps(plot, x_scale)
    ramp = element("span", {"class": "ramp"})
    legend = element(
        "p", {"class": "legend"}, element("span", None, "0.1\u202f%"), ramp, element("span", None, "100\u202f%")
    )
    return _figure(caption, description, plot, legend)


def histogram(caption: Content, description: str, shares: Sequence[Number]) -> Element:
    """Bars over equal bins of [0, 1]; `shares` sum to 1."""
    highest = max(shares)
    drawing = element("svg", {"viewBox": f"0 0 {SIZE} {SIZE}", "preserveAspectRatio": "none", "aria-hidden": "true"})
    for i, share in enumerate(shares):
        height = SIZE * share / highest
        box = {
            "x": SIZE * (i + 0.06) / len(shares),
            "y": SIZE - height,
            "width": SIZE * 0.88 / len(shares),
            "height": height,
        }
        drawing.append(element("rect", {key: f"{value:.1f}" for key, value in box.items()}))
    plot = element("div", {"class": "plot bars"}, drawing)
    plot.append(element("span", {"class": "tick y", "style": "bottom:100%"}, f"{100 * highest:.0f}\u202f%"))
    for x in (0, 0.5, 1):
        plot.append(element("span", {"class": "tick x", "style": f"left:{100 * x:g}%"}, f"{x:g}"))
    return _figure(caption, description, plot)


def stacked_bar(parts: Sequence[tuple[str, Number]], whole: Number, description: str) -> Element:
    """One horizontal bar: (CSS class, amount) side by side, as fractions of `whole`."""
    bar = element("div", {"class": "bar", "role": "img", "aria-label": description})
    for css, amount in parts:
        bar.append(element("span", {"class": css, "style": f"width:{100 * amount / whole:.3f}%"}))
    return bar


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of the points, in order: the lowest and the highest of every bucket."""
    points = list(points)
    if len(points) <= MOST_POINTS:
        return points
    buckets = MOST_POINTS // 2
    kept = []
    for i in range(buckets):
        bucket = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def linear_ticks(low: Number, high: Number, most: int = 6) -> list[Number]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]: at least two, at most about `most`."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: Number, high: Number) -> list[Number]:
    """Powers of ten within [low, high]; with their multiples by 2 and 5 where there are fewer than four; linear ticks where even
    those are fewer than two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = []
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001]
        if len(ticks) >= 4:
            break
    return ticks if len(ticks) >= 2 else linear_ticks(low, high)


def _widened(low: Number, high: Number) -> Scale:
    return Scale(low, high) if high > low else Scale(low - 0.5, high + 0.5)


def _padded(low: Number, high: Number, log: bool) -> Scale:
    """An axis for [low, high] with a margin; one that is not logarithmic starts at zero."""
    if log:
        return Scale(low / 1.4, high * 1.4, log=True)
    low, high = min(low, 0.0), max(high, 0.0)
    return Scale(low, high + 0.08 * ((high - low) or 1.0))


def _path(css: str, points: Sequence[Point]) -> Element:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if len(points) == 1:  # a line of no length with round caps is a dot
        text += " h0"
    return element("path", {"class": css, "d": f"M{text}"})


def _label_steps(plot: Element, x_scale: Scale) -> None:
    whole = [x for x in linear_ticks(x_scale.low, x_scale.high) if x == int(x)]
    for x in whole or [x_scale.low]:
        plot.append(element("span", {"class": "tick x", "style": f"left:{x_scale.percent(x)}"}, f"{x:g}"))


def _legend(names: Sequence[tuple[str, str]]) -> Element:
    legend = element("p", {"class": "legend"})
    for name, css in names:
        legend.append(element("span", None, element("i", {"class": css}), name))
    return legend


def _figure(caption: Content, description: str, plot: Element, legend: Element | None = None) -> Element:
    plot.set("role", "img")
    plot.set("aria-label", description)
    return element("figure", {"class": "chart"}, element("figcaption", None, caption), plot, legend)
