"""Figures as SVG: drawn by matplotlib, cleaned so that many of them can live in one page in any colour scheme."""

from __future__ import annotations

import io
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from ..laws.sheet import LawSheet
from .style import DARK, FONTS, LIGHT, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["SUBSCRIPT", "figure_svg", "inline_svg", "svg"]

WIDTH = 340.0  # CSS pixels: about one phone wide, so that the text of a figure stays as large as the page's
_SVG = "http://www.w3.org/2000/svg"
_NAMESPACE = re.compile(r"^\{[^}]*\}")
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"font: (?P<look>(?:(?:italic|oblique|bold|\d{3}) )*)(?P<size>[\d.]+px) [^;]*")
_POWER = re.compile(r"\$\\mathdefault\{(?P<sign>[-−]?)(?:(?P<times>[\d.]+)\\times)?10\^\{(?P<power>[-−]?\d+)\}\}\$")
SUBSCRIPT = re.compile(
    r"(?<![A-Za-z0-9_])([^\W\d_])_([A-Za-zα-ω]{1,3}|[0-9]{1,2})(?![A-Za-z0-9_])"
)  # H_ii, but not minibatch_loss
_SUPERSCRIPT = str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Drawable(Protocol):
    """Anything with ``plot(ax)``: a measurement, a comparison, a law sheet."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw on ``ax`` and return it."""
        ...


def svg(drawable: Drawable, width: float | None = None, height: float | None = None) -> str:
    """A measurement, comparison or law sheet as an SVG file that stands alone.

    The picture has its own background and follows the reader's colour scheme, so that it is legible wherever it is
    placed (a README, a slide, a notebook). The same object gives the same bytes.

    Args:
        drawable: anything with ``plot(ax)``.
        width: CSS pixels; default 720 for a sheet, 480 for anything else.
        height: CSS pixels; default: what the rows of a sheet need, or three quarters of the width.

    Returns:
        The SVG document.

    Raises:
        InputError: ``drawable`` cannot be drawn, or the size is not positive.
        NotAvailableError: there is nothing to draw.

    >>> import numpy as np
    >>> from thermograd.laws.sheet import LawSheet
    >>> svg(LawSheet(()), width=300).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    True
    """
    if not callable(getattr(drawable, "plot", None)):
        raise InputError(f"{type(drawable).__name__} cannot be drawn", expected="an object with plot(ax)")
    if width is None:
        width = 720.0 if isinstance(drawable, LawSheet) else 480.0
    if height is None:
        height = 60.0 + 30.0 * max(2, len(drawable)) if isinstance(drawable, LawSheet) else 0.75 * width
    if not (width > 0 and height > 0):
        raise InputError(f"the size is {width} x {height}", expected="positive numbers of pixels")
    root = _clean(_render(drawable, width, height, margin=10.0), "")
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    _recolour(root, lambda part: LIGHT[part])
    root.insert(
        0, ET.Element("rect", {"width": "100%", "height": "100%", "rx": "8", "style": f"fill: {LIGHT['page']}"})
    )
    style = ET.Element("style")
    style.text = _dark_rules(root)
    root.insert(0, style)
    return _text(root).replace("<svg ", f'<svg xmlns="{_SVG}" ', 1) + "\n"


def inline_svg(drawable: Drawable, prefix: str, label: str, *, width: float = WIDTH) -> str:
    """A figure to be placed inside an HTML page that defines the palette's CSS variables.

    Args:
        drawable: anything with ``plot(ax)``.
        prefix: put before every id, so that several figures in one page do not clash.
        label: what the figure shows, for those who do not see it.
        width: CSS pixels at which text has its natural size; the figure scales with its container.

    Returns:
        An ``<svg>`` element without namespace declarations.

    Raises:
        NotAvailableError: there is nothing to draw.
    """
    root = _clean(_render(drawable, width, 0.76 * width), prefix)
    _recolour(root, lambda part: "currentColor" if part == "ink" else f"var(--{part})")
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("width", "100%")
    return _text(root)


def figure_svg(figure: Figure) -> str:
    """What matplotlib writes for a figure, without metadata or dates."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()  # the canvas is used directly because savefig draws everything twice
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def _render(drawable: Drawable, width: float, height: float, margin: float = 3.0) -> str:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with figure_style():
        layout = ConstrainedLayoutEngine(w_pad=margin / 72, h_pad=margin / 72)
        figure = Figure(figsize=(width / 72, height / 72), layout=layout)
        ax = drawable.plot(figure.add_subplot())
        if isinstance(drawable, LawSheet):
            _name_verdicts(ax, drawable)
        for ax in figure.axes:
            _tidy(ax, width, height)
        layout.execute(figure)
        for ax in figure.axes:
            _thin_labels(ax.xaxis, horizontal=True)
            _thin_labels(ax.yaxis, horizontal=False)
        figure.set_layout_engine("none")  # once is enough
        return figure_svg(figure)


def _name_verdicts(ax: Axes, sheet: LawSheet) -> None:
    """Write each law's verdict at the right end of its row, so that it is not told by colour alone."""
    verdict_of = {comparison.definition.title: comparison.verdict for comparison in sheet}
    names = [verdict_of.get(label.get_text(), "") for label in ax.get_yticklabels()]
    right = ax.secondary_yaxis("right")
    right.set_yticks(ax.get_yticks(), names)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def _tidy(ax: Axes, width: float, height: float) -> None:
    """Powers of ten as plain text, labels wrapped that are longer than their axis."""
    from matplotlib.ticker import LogFormatterSciNotation

    for axis, room in ((ax.xaxis, width - 50), (ax.yaxis, height - 45)):
        if isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
            axis.set_major_formatter(_powers(LogFormatterSciNotation))
            axis.set_minor_formatter(_powers(LogFormatterSciNotation))
        text = axis.label.get_text()
        if "$" not in text:  # a line break inside mathematics would break it
            lines = textwrap.wrap(text, max(12, int(room / 6.2)), break_long_words=False)
            axis.label.set_text("\n".join(lines))


def _powers(base: type) -> Any:
    """A logarithmic tick formatter that writes ``10⁻³`` as text instead of as a formula of many pieces."""

    class Powers(base):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return _power(super().__call__(x, pos))

    return Powers()


def _power(label: str) -> str:
    r"""``$\mathdefault{2\times10^{-3}}$`` as ``2×10⁻³``, near one as ``0.2``; any other label as it is."""
    match = _POWER.fullmatch(label)
    if match is None:
        return label
    power = int(match["power"].replace("−", "-"))
    if -1 <= power <= 2:
        return match["sign"] + f"{float(match['times'] or 1) * 10.0**power:g}"
    times = f"{match['times']}×" if match["times"] else ""
    return f"{match['sign']}{times}10{str(power).translate(_SUPERSCRIPT)}"


def _thin_labels(axis: Axis, *, horizontal: bool) -> None:
    """Hide tick labels that would run into one drawn before; major ticks come first."""
    taken: list[tuple[float, float]] = []
    for ticks in (axis.get_major_ticks(), axis.get_minor_ticks()):
        for tick in ticks:
            label = tick.label1
            if not (label.get_visible() and label.get_text()):
                continue
            box = label.get_window_extent()
            low, high = (box.x0, box.x1) if horizontal else (box.y0, box.y1)
            gap = 6.0 if horizontal else 0.0
            if any(low < b + gap and high > a - gap for a, b in taken):
                label.set_visible(False)
            else:
                taken.append((low, high))


def _clean(document: str, prefix: str) -> ET.Element:
    """Matplotlib's SVG without namespaces, global styles, unused ids, repeated styles and needless digits."""
    root = ET.fromstring(document)
    referenced = set(_REFERENCE.findall(document)) | set(re.findall(r'href="#([^"]+)"', document))
    for element in root.iter():
        _clean_element(element, prefix, referenced)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):  # "*{...}" would reach the whole page
                parent.remove(child)
    for _ in range(2):
        _drop_empty(root)
    for parent in root.iter():
        _hoist_style(parent)
    for text in list(root.iter("text")):
        _set_subscripts(text)
    viewbox = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update(
        {"viewBox": viewbox, "font-family": ", ".join(f"'{f}'" if " " in f else f for f in FONTS),
         "stroke-linejoin": "round", "stroke-linecap": "butt"}
    )  # fmt: skip
    return root


def _clean_element(element: ET.Element, prefix: str, referenced: set[str]) -> None:
    element.tag = _NAMESPACE.sub("", element.tag)
    element.tail = None
    if element.tag not in ("text", "tspan", "style"):
        element.text = None
    attributes = {_NAMESPACE.sub("", name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            if value not in referenced:
                continue
            value = prefix + value
        elif name == "href" and value.startswith("#"):  # an image (a colour bar) carries its data here
            value = f"#{prefix}{value[1:]}"
        elif name in ("d", "x", "y", "transform"):
            value = _round(value)
        elif name == "style":
            value = _FONT.sub(_font, re.sub(r"; font-family: [^;]*", "", value))
        element.set(name, _REFERENCE.sub(rf"url(#{prefix}\1)", value))


def _font(match: re.Match[str]) -> str:
    parts = [f"font-size: {match['size']}"]
    for word in match["look"].split():
        parts.append(f"font-style: {word}" if word in ("italic", "oblique") else f"font-weight: {word}")
    return "; ".join(parts)


def _round(value: str) -> str:
    if "scale" not in value and "matrix" not in value:
        value = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(value.split())


def _drop_empty(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("g", "defs") and len(child) == 0:
                parent.remove(child)


def _hoist_style(parent: ET.Element) -> None:
    """Move a style that all of many children share to their group: a scatter of thousands is half the size."""
    children = list(parent)
    styles = {child.get("style", "") for child in children}
    if (
        parent.tag != "g"
        or len(children) < 2
        or len(styles) != 1
        or "opacity" in (shared := styles.pop())
        or not shared
    ):
        return
    for child in children:
        del child.attrib["style"]
    own = parent.get("style")
    parent.set("style", f"{own}; {shared}" if own else shared)


def _set_subscripts(text: ET.Element) -> None:
    """Lower what follows an underscore after a single letter, in a text without pieces of its own."""
    words = text.text or ""
    if len(text) or not SUBSCRIPT.search(words):
        return
    pieces = SUBSCRIPT.split(words)  # plain, letter, subscript, plain, letter, subscript, ..., plain
    text.text = pieces[0] + pieces[1]
    for i in range(2, len(pieces), 3):
        below = ET.SubElement(text, "tspan", {"dy": "0.25em", "style": "font-size: 75%"})
        below.text = pieces[i]
        after = ET.SubElement(text, "tspan", {"dy": "-0.19em"})  # 0.25 of three quarters
        after.text = "".join(pieces[i + 1 : i + 3]) or "\u200b"  # the line is raised again even at its end


def _recolour(root: ET.Element, value_of: Callable[[str], str]) -> None:
    """Replace every colour that plays a part of the palette by ``value_of(part)``."""

    def replace(match: re.Match[str]) -> str:
        part = _part(match[0].lower())
        return match[0] if part is None else value_of(part)

    root.set("style", f"fill: {LIGHT['ink']}")  # matplotlib leaves black unsaid, and so to be inherited
    for element in root.iter():
        for name in ("style", "fill", "stroke"):
            if name in element.attrib:
                element.set(name, _HEX.sub(replace, element.attrib[name]))


@cache
def _part(colour: str) -> str | None:
    """The part of the palette that a colour plays; greys are text, faint text or rules; others stay as they are."""
    from matplotlib.colors import TABLEAU_COLORS

    for name, value in LIGHT.items():
        if colour == value and (name.startswith("figure-") or name in ("ink", "edge")):
            return name
    tableau = [str(value).lower() for value in TABLEAU_COLORS.values()]  # "tab:blue" and the like, named outright
    if colour in tableau:
        return f"figure-{tableau.index(colour)}"
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    if not red == green == blue:
        return None
    return "ink" if red < 64 else "muted" if red < 160 else "page" if red == 255 else "rule"


def _dark_rules(root: ET.Element) -> str:
    """CSS for a picture that stands alone: every colour of the palette in use, replaced in the dark."""
    rules = []
    for name, colour in LIGHT.items():
        for attribute in ("fill", "stroke"):
            if any(f"{attribute}: {colour}" in element.get("style", "") for element in root.iter()):
                rules.append(f"[style*='{attribute}: {colour}'] {{ {attribute}: {DARK[name]} !important }}")
    return "@media (prefers-color-scheme: dark) { " + " ".join(rules) + " }"


def _text(root: ET.Element) -> str:
    return ET.tostring(root, encoding="unicode")
