"""Figures as SVG: clean, deterministic, in the reader's colours, with labels that can be read."""

from __future__ import annotations

import base64
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes

from thermograd.errors import InputError, NotAvailableError
from thermograd.laws.law import Comparison
from thermograd.laws.sheet import LawSheet
from thermograd.report import svg
from thermograd.report.figure import _power, _thin_labels, inline_svg
from thermograd.report.style import DARK, LIGHT

NS = "{http://www.w3.org/2000/svg}"


class Drawing:
    """Something with a plot method."""

    def __init__(self, *colours: str, points: int = 20, label: str = "x"):
        self.colours, self.points, self.label = colours or ("C0",), points, label

    def plot(self, ax: Axes | None = None) -> Axes:
        assert ax is not None
        x = np.linspace(1, 2.5, self.points)
        for power, colour in enumerate(self.colours, start=1):
            ax.plot(x, x**power, "o", color=colour)
        ax.set(xlabel=self.label, xscale="log")
        return ax


def test_an_svg_file_is_valid_and_stands_alone(comparisons: dict[str, Comparison], sheet: LawSheet) -> None:
    for drawable, size in ((comparisons["toy_variance"], ("300", "225")), (sheet, ("300", "210"))):
        text = svg(drawable, width=300)
        root = ET.fromstring(text)
        assert root.tag == f"{NS}svg"
        assert (root.get("width"), root.get("height")) == size
        assert "prefers-color-scheme: dark" in text
        assert DARK["ink"] in text
        assert text.count("http") == 1  # the namespace
        assert svg(drawable, width=300) == text


def test_the_picture_of_a_sheet_tells_verdicts_in_words(sheet: LawSheet) -> None:
    words = "".join(ET.fromstring(svg(sheet)).itertext())
    for comparison in sheet:
        if np.isfinite(comparison.measured):
            assert comparison.definition.title in words
            assert comparison.verdict in words
    assert "not in its regime" not in words  # the toy out of its regime has no number, so no row


def test_a_figure_in_a_page_takes_the_pages_colours() -> None:
    text = inline_svg(Drawing("C0", "C3", "black", "0.5", "tab:red", "#12ab34"), "a-", "what it shows")
    used = {m.lower() for m in re.findall(r"#[0-9a-fA-F]{6}\b", text)}
    assert used == {"#12ab34"}  # a colour of the figure's own stays
    assert {"var(--figure-0)", "var(--figure-3)", "var(--muted)", "currentColor"} <= set(
        re.findall(r"var\(--[\w-]+\)|currentColor", text)
    )
    assert 'role="img"' in text
    assert 'aria-label="what it shows"' in text
    assert "xmlns" not in text
    assert "<style" not in text  # a style element would reach the whole page


def test_ids_carry_their_prefix() -> None:
    one, two = (inline_svg(Drawing(), prefix, "") for prefix in ("a-", "b-"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"#(a-[\w-]+)", one)) == ids[0]


def test_an_image_in_a_figure_keeps_its_data() -> None:
    class Coloured:
        def plot(self, ax: Axes | None = None) -> Axes:
            assert ax is not None
            ax.figure.colorbar(ax.pcolormesh(np.arange(4.0).reshape(2, 2)), ax=ax)
            return ax

    found = re.findall(r'href="([^"]*)"', inline_svg(Coloured(), "map-", "A map."))
    images = [target for target in found if not target.startswith("#map-")]
    assert len(images) == 1
    kind, data = images[0].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode("".join(data.split())).startswith(b"\x89PNG")


def test_many_points_stay_small() -> None:
    sizes = [len(inline_svg(Drawing(points=n), "", "")) for n in (1000, 3000)]
    assert (sizes[1] - sizes[0]) / 2000 < 60  # bytes a point


def test_subscripts_in_labels() -> None:
    root = ET.fromstring(inline_svg(Drawing(label="curvature H_ii of <h>"), "", ""))
    label = next(t for t in root.iter("text") if "curvature" in "".join(t.itertext()))
    assert next(t.text for t in label.iter("tspan")) == "ii"
    assert "".join(label.itertext()) == "curvature Hii of <h>"


def test_long_labels_are_wrapped() -> None:
    words = "variance of the weights in windows of ten epochs with a straight line removed from each"
    root = ET.fromstring(inline_svg(Drawing(label=words), "", ""))
    lines = ["".join(t.itertext()) for t in root.iter("text") if "".join(t.itertext()) in words]
    lines = [line for line in lines if len(line) > 5]
    assert len(lines) >= 2
    assert " ".join(lines) == words


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        (r"$\mathdefault{10^{-3}}$", "10⁻³"),
        (r"$\mathdefault{10^{0}}$", "1"),
        (r"$\mathdefault{2\times10^{1}}$", "20"),
        (r"$\mathdefault{-7\times10^{-1}}$", "-0.7"),
        (r"$\mathdefault{10^{5}}$", "10⁵"),
        (r"$\mathdefault{5\times10^{-12}}$", "5×10⁻¹²"),
        (r"$\mathdefault{3\times10^{0}}$", "3"),
        ("0.5", "0.5"),
    ],
)
def test_powers_of_ten_are_text(label: str, plain: str) -> None:
    assert _power(label) == plain


def test_tick_labels_do_not_overlap() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5, 1.5), dpi=72)
    ax = figure.add_subplot()
    ax.set(xscale="log", xlim=(0.9, 9), yscale="log", ylim=(1e-9, 1))
    figure.draw_without_rendering()
    for axis, horizontal in ((ax.xaxis, True), (ax.yaxis, False)):
        shown = [t.label1 for t in axis.get_major_ticks() + axis.get_minor_ticks() if t.label1.get_text()]
        before = len(shown)
        _thin_labels(axis, horizontal=horizontal)
        shown = [label for label in shown if label.get_visible()]
        boxes = [label.get_window_extent() for label in shown]
        spans = sorted((b.x0, b.x1) if horizontal else (b.y0, b.y1) for b in boxes)
        assert 2 <= len(spans) <= before
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_what_cannot_be_drawn_is_refused(comparisons: dict[str, Comparison]) -> None:
    with pytest.raises(InputError, match="cannot be drawn"):
        svg(3.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="size"):
        svg(Drawing(), width=-1)
    with pytest.raises(NotAvailableError, match="nothing to draw"):
        svg(comparisons["toy_absent"])


def test_light_and_dark_name_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)  # a colour stands for one part, so that it can be replaced
