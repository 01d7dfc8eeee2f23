"""The law sheet as a page and as a picture.

>>> import thermograd as tg
>>> page = tg.report.render_html(tg.laws.LawSheet(()))
>>> page.startswith("<!DOCTYPE html>")
True
"""

from __future__ import annotations

from .figure import svg
from .page import compare_html, render_compare, render_html, write_html
from .prediction_page import prediction_html, render_prediction
from .style import figure_style

__all__ = [
    "compare_html",
    "figure_style",
    "prediction_html",
    "render_compare",
    "render_html",
    "render_prediction",
    "svg",
    "write_html",
]
