"""Frechet distance against bits per weight as one SVG: a line for each method, a level for full precision."""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from benchmarks.quality import worth
from vq4dit_jax.reporting.charts import Scale, linear_ticks, log_ticks
from vq4dit_jax.reporting.markup import Element, element, number

_WIDTH, _HEIGHT = 900, 520
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 50, 610, 460
"""Edges of the plot; the legend is to its right."""
# Mostly Okabe and Ito's colours, which people who see few colours can tell apart; markers differ too. The last method of a
# table is VQ4DiT: it has the first colour, and is drawn on top.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00", "#777777", "#000000")
_MARKERS = ("circle", "square", "diamond", "triangle")


def svg(result: dict[str, Any]) -> str | None:
    """The drawing; None while no quantized row has a distance."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        # Rows that change one choice all have the bits of their form, and are in the table alone.
        if row["method"] != "fp" and row["pooled"]["fd"] and not worth.form_of(row, result["rows"]):
            lines.setdefault(row["label"], []).append((row["size"]["bits_per_quantized_weight"], row["pooled"]["fd"]))
    if not lines:
        return None
    exact = next((row["pooled"]["fd"] for row in result["rows"] if row["method"] == "fp"), None)
    points = [point for line in lines.values() for point in line]
    distances = [y for _, y in points] + ([exact] if exact else [])
    x_scale = Scale(min(0.75, *(x for x, _ in points)), max(x for x, _ in points) + 0.25)
    y_scale = Scale(min(distances) / 1.2, max(distances) * 1.2, log=True)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (_RIGHT - _LEFT) * x_scale(x) / 1000, _BOTTOM - (_BOTTOM - _TOP) * y_scale(y) / 1000

    title = f"Frechet distance of {result['images']:,} images against bits per quantized weight"
    drawing = element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
            "font-family": "Helvetica, Arial, sans-serif",
            "font-size": 13,
            "fill": "#222",
        },
        element("title", None, title),
        element("rect", {"width": _WIDTH, "height": _HEIGHT, "fill": "#fff"}),
        _text(_LEFT, 28, title, weight="bold"),
    )
    for y in log_ticks(y_scale.low, y_scale.high):
        _, at = place(x_scale.low, y)
        drawing.append(_rule((_LEFT, at), (_RIGHT, at)))
        drawing.append(_text(_LEFT - 8, at + 4, number(y, 2), anchor="end"))
    for x in linear_ticks(x_scale.low, x_scale.high, most=8):
        at, _ = place(x, y_scale.low)
        drawing.append(_rule((at, _TOP), (at, _BOTTOM)))
        drawing.append(_text(at, _BOTTOM + 20, f"{x:g}", anchor="middle"))
    drawing.append(
        _text((_LEFT + _RIGHT) / 2, _BOTTOM + 44, "bits per quantized weight, all overhead counted", anchor="middle")
    )
    styles = {
        label: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, label in enumerate(reversed(lines))
    }
    for label, line in lines.items():
        drawing.extend(_line([place(*point) for point in sorted(line)], *styles[label]))
    legend_y = _TOP + 10
    for label, style in styles.items():
        drawing.extend(_line([(_RIGHT + 20, legend_y), (_RIGHT + 44, legend_y)], *style))
        drawing.append(_text(_RIGHT + 54, legend_y + 4, label))
        legend_y += 24
    if exact:
        _, at = place(x_scale.low, exact)
        for start, stop, y in ((_LEFT, _RIGHT, at), (_RIGHT + 20, _RIGHT + 44, legend_y)):
            drawing.append(_rule((start, y), (stop, y), stroke="#222", dash="6 5"))
        drawing.append(_text(_RIGHT + 54, legend_y + 4, f"full precision ({number(exact, 3)})"))
    return ElementTree.tostring(drawing, encoding="unicode") + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> Element:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "font-weight": weight}
    return element("text", attributes, text)


def _rule(start: Sequence[float], stop: Sequence[float], stroke: str = "#ddd", dash: str = "none") -> Element:
    attributes = {name: f"{value:.1f}" for name, value in zip(("x1", "y1", "x2", "y2"), (*start, *stop))}
    return element("line", {**attributes, "stroke": stroke, "stroke-dasharray": dash})


def _line(points: Sequence[tuple[float, float]], colour: str, marker: str) -> list[Element]:
    """The curve and its markers."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    out = [element("polyline", {"points": path, "fill": "none", "stroke": colour, "stroke-width": 2})]
    for x, y in points:
        if marker == "circle":
            out.append(element("circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": 4.5, "fill": colour}))
            continue
        corners = {
            "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
            "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
            "triangle": ((0, -6), (5.5, 4.5), (-5.5, 4.5)),
        }[marker]
        shape = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        out.append(element("polygon", {"points": shape, "fill": colour}))
    return out
