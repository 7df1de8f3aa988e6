"""HTML as element trees (escaped and balanced by construction), and numbers as people read them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from vq4dit_jax.methods import method

Element = ElementTree.Element
Content = Element | str | None

Figures = dict[str, Any]

_DEFAULT = ("fp", "kmeans", "vq4dit")
DASH = "—"  # stands for a figure that was not computed


def element(tag: str, attributes: dict[str, Any] | None = None, *children: Content) -> Element:
    """An element with its attributes and children; strings become text, None is left out."""
    node = Element(tag, {key: str(value) for key, value in (attributes or {}).items()})
    for child in children:
        if isinstance(child, Element):
            node.append(child)
        elif child is not None and len(node):
            node[-1].tail = (node[-1].tail or "") + child
        elif child is not None:
            node.text = (node.text or "") + child
    return node


def table(caption: Content, head: Sequence[Content], rows: Iterable[Sequence[Content]], css: str = "") -> Element:
    """A table whose first column holds row headers. A cell may be content or a finished <td>; None is an empty one."""
    body = element("tbody")
    for first, *cells in rows:
        row = element("tr", None, element("th", {"scope": "row"}, first))
        row.extend(c if isinstance(c, Element) and c.tag == "td" else element("td", None, c) for c in cells)
        body.append(row)
    node = element("table", {"class": css} if css else None, element("caption", None, caption))
    if head:
        titles = (element("td") if title is None else element("th", {"scope": "col"}, title) for title in head)
        node.append(element("thead", None, element("tr", None, *titles)))
    node.append(body)
    return node


def section(anchor: str, title: str, *children: Element) -> Element:
    return element(
        "section",
        {"id": anchor, "aria-labelledby": f"{anchor}-title"},
        element("h2", {"id": f"{anchor}-title"}, title),
        *children,
    )


def hidden(text: str) -> Element:
    """Only for screen readers."""
    return element("span", {"class": "hidden"}, text)


def note(text: str) -> Element:
    return element("p", {"class": "note"}, text)


def render(node: Element) -> str:
    """HTML text. Characters that UTF-8 cannot hold (undecodable bytes of a command line) become question marks."""
    return ElementTree.tostring(node, encoding="unicode", method="html").encode("utf-8", "replace").decode("utf-8")


def figure(value: Any) -> float | None:
    """`value` as a float; None where it is None, a NaN or an infinity."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def pick(tree: Any, *keys: str) -> Any:
    """tree[key][key]..., None where the path ends early."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits: 0.00224, 17.4, 2.24×10⁻⁴."""
    value = figure(value)
    if value is None:
        return DASH
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    exponent = int(exponent)
    if value == 0:
        return "0"
    if -4 < exponent < 6:
        return f"{value:.{max(digits - 1 - exponent, 0)}f}"
    return f"{mantissa}×10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def fixed(value: Any, decimals: int) -> str:
    value = figure(value)
    return DASH if value is None else f"{value:.{decimals}f}"


def integer(value: Any) -> str:
    value = figure(value)
    return DASH if value is None else f"{round(value):,}".replace(",", "\u202f")


def percent(value: Any, decimals: int = 1) -> str:
    value = figure(value)
    return DASH if value is None else f"{100 * value:.{decimals}f}\u202f%"


def mebibytes(value: Any) -> str:
    """Bytes in MiB, or in KiB below a tenth of one."""
    value = figure(value)
    if value is None:
        return DASH
    return f"{value / 2**20:.2f}\u202fMiB" if value >= 0.1 * 2**20 else f"{value / 2**10:.1f}\u202fKiB"


def count(value: Any) -> str:
    """9.83 M, 675 M, 4.2 k: parameters in a headline."""
    value = figure(value)
    if value is None:
        return DASH
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(value / size)}\u202f{suffix}"
    return f"{value:.0f}"


def duration(seconds: Any) -> str:
    """0.8 s, 42 s, 5 min 12 s, 3 h 07 min."""
    value = figure(seconds)
    if value is None:
        return DASH
    if value < 9.95:
        return f"{value:.1f}\u202fs"
    whole = round(value)
    if whole < 60:
        return f"{whole}\u202fs"
    if whole < 3600:
        return f"{whole // 60}\u202fmin\u00a0{whole % 60:02d}\u202fs"
    minutes = round(value / 60)
    return f"{minutes // 60}\u202fh\u00a0{minutes % 60:02d}\u202fmin"


def title_of(model: str) -> str:
    """The title of a model, by its name in the metrics, as a heading has it."""
    title = method.title(model)
    return title if title.startswith("k-") else title[:1].upper() + title[1:]


def models_of(metrics: Figures) -> list[str]:
    """The models of a run, full precision first and the final one last."""
    return list(metrics.get("quality") or _DEFAULT)


def css_of(model: str, models: Sequence[str]) -> str:
    """The CSS class of a model's colour: full precision, intermediate, or final."""
    return {models[0]: "fp", models[-1]: "vq4dit"}.get(model, "kmeans")
