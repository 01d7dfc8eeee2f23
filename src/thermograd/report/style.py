"""How every figure and page looks: one palette for light and dark, one matplotlib style.

The colours are kept here and nowhere else, so that their contrast can be checked. Figures are drawn in the light
colours; on a page each one is then replaced by a CSS variable (see :mod:`thermograd.report.figure`), so that the same
figure follows the reader's colour scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["DARK", "FIGURE_COLOURS", "LIGHT", "RC", "VERDICT_CLASS", "css_variables", "figure_style"]

LIGHT: dict[str, str] = {
    "page": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1e23",
    "muted": "#565e69",
    "rule": "#d3d7dd",
    "edge": "#7b838e",  # borders that carry meaning: 3:1 against the page
    "link": "#0b57c2",
    "holds": "#14642c",
    "holds-back": "#e0f3e5",
    "fails": "#a1161c",
    "fails-back": "#fde6e6",
    "regime": "#744700",
    "regime-back": "#fcefd6",
    "undecided": "#1b4c8f",
    "undecided-back": "#e2edfb",
    "figure-0": "#1f6bbd",
    "figure-1": "#b9500a",
    "figure-2": "#2a7a3b",
    "figure-3": "#c22b2e",
    "figure-4": "#7549ba",
    "figure-5": "#7f5138",
    "figure-6": "#b03480",
    "figure-7": "#656c76",
    "figure-8": "#6b6b14",
    "figure-9": "#0d737d",
    "figure-grid": "#e2e5e9",
}
DARK: dict[str, str] = {
    "page": "#14171b",
    "panel": "#1e2227",
    "ink": "#e7e9ec",
    "muted": "#a8b0ba",
    "rule": "#3a4048",
    "edge": "#78818d",
    "link": "#86b9ff",
    "holds": "#86dca0",
    "holds-back": "#15331f",
    "fails": "#ffa6a1",
    "fails-back": "#451c1d",
    "regime": "#f3c974",
    "regime-back": "#3b2e10",
    "undecided": "#a5caff",
    "undecided-back": "#182f4d",
    "figure-0": "#6db2ff",
    "figure-1": "#ffa456",
    "figure-2": "#76d08f",
    "figure-3": "#ff8a85",
    "figure-4": "#c5a6ff",
    "figure-5": "#d3aa92",
    "figure-6": "#f6a0d3",
    "figure-7": "#a8b0ba",
    "figure-8": "#d2d172",
    "figure-9": "#67d2de",
    "figure-grid": "#2c3138",
}
VERDICT_CLASS = {"holds": "holds", "fails": "fails", "not in its regime": "regime", "undecided": "undecided"}

# The order is matplotlib's own (C0 blue, C1 orange, C2 green, C3 red, ..., C7 grey), which figures rely on.
FIGURE_COLOURS = tuple(LIGHT[f"figure-{i}"] for i in range(10))

FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]  # Verdana has the metrics of DejaVu: what fits here fits there

RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # what matplotlib measures text with; the page says FONTS
    "font.size": 11.5,
    "axes.labelsize": 11.5,
    "axes.titlesize": 12,
    "axes.titleweight": "regular",
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.3,
    "mathtext.fontset": "dejavusans",
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["edge"],
    "xtick.color": LIGHT["edge"],
    "ytick.color": LIGHT["edge"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "grid.color": LIGHT["figure-grid"],
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "lines.solid_capstyle": "round",
    "errorbar.capsize": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72,  # one figure unit is one CSS pixel
    "savefig.dpi": 72,
    "svg.fonttype": "none",  # text stays text: searchable, small, and scales with the page
    "svg.hashsalt": "thermograd",  # same figure, same bytes
    "path.simplify": True,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw matplotlib figures in thermograd's style inside this context.

    >>> import matplotlib
    >>> with figure_style():
    ...     matplotlib.rcParams["axes.grid"]
    True
    """
    import matplotlib
    from cycler import cycler

    settings: Any = {**RC, "axes.prop_cycle": cycler(color=FIGURE_COLOURS)}
    with matplotlib.rc_context(settings):
        yield


def css_variables(palette: dict[str, str]) -> str:
    """A palette as CSS custom properties.

    >>> css_variables({"ink": "#000000", "page": "#ffffff"})
    '--ink: #000000; --page: #ffffff;'
    """
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())
