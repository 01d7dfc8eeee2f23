"""The law sheet as one self-contained HTML page, for one run or several side by side."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..errors import InputError, NotAvailableError
from ..laws.law import Comparison, Law
from ..laws.sheet import LawSheet, expected, number
from ..progress import bar
from .figure import SUBSCRIPT, inline_svg
from .style import DARK, LIGHT, VERDICT_CLASS, css_variables

__all__ = ["compare_html", "render_compare", "render_html", "write_html"]

_MARK = {"holds": "✓", "fails": "✗", "not in its regime": "–", "undecided": "?"}
_PHRASE = {
    "holds": ("holds", "hold"),
    "fails": ("fails", "fail"),
    "not in its regime": ("is not in its regime", "are not in their regime"),
    "undecided": ("is undecided", "are undecided"),
}
_LABEL = {
    "P": "weights P",
    "N": "samples N",
    "B": "batch size B",
    "T": "recorded steps T",
    "lr": "learning rate",
    "sgd": "SGD",
    "thermograd": "thermograd version",
    "version": "thermograd version",
}
_NARROW_SPACE = "\u202f"


@dataclass(frozen=True)
class Figure:
    """A drawn figure, or the reason there is none."""

    svg: Markup | None
    reason: str = ""


@dataclass(frozen=True)
class Strip:
    """Where the measured number and its interval lie against the band a law allows, in CSS pixels of a small chart.

    The allowed band runs from ``band_low`` to ``band_high``; what lies beyond the chart is drawn at its edge.
    """

    value: float
    low: float
    high: float
    band_low: float
    band_high: float
    centre: float | None

    WIDTH = 132
    HALF = 22.0  # pixels for one half-width of the band


@dataclass(frozen=True)
class Entry:
    """One law held against one run, ready to be shown."""

    comparison: Comparison
    law: Law
    anchor: str
    measured: str
    predicted: str
    interval: str
    mark: str
    verdict_class: str
    sentence: str
    strip: Strip | None
    figure: Figure


def render_html(sheet: LawSheet, *, title: str | None = None) -> str:
    """The law sheet as one self-contained HTML page.

    The page needs no network and no script. It opens with what was measured and the sheet as a table, then has a
    section for each law: statement, formula, source, figure, numbers, verdict, assumptions, caveats.

    Args:
        sheet: the comparisons and the facts of the run.
        title: the page's title; default ``sheet.facts["title"]``, else "Law sheet".

    Returns:
        The page. The same sheet gives the same page.

    >>> page = render_html(LawSheet((), {"model": "MLP", "P": 1210}))
    >>> "1\u202f210" in page, "http" in page
    (True, False)
    """
    _must_be_sheet(sheet, "sheet")
    with bar("drawing figures", total=len(sheet)) as progress:
        entries = [_entry(comparison, "", progress) for comparison in sheet]
    return _render(
        "sheet.html.j2",
        title=title or str(sheet.facts.get("title") or "Law sheet"),
        facts=fact_rows(sheet.facts),
        summary=summary(sheet),
        entries=entries,
        counts=_counts(sheet),
    )


def write_html(sheet: LawSheet, path: str | Path, *, title: str | None = None) -> Path:
    """Write the law sheet as one self-contained HTML page.

    Args:
        sheet: the comparisons and the facts of the run.
        path: where to write; a folder gets ``report.html``; missing parents are made.
        title: the page's title; default ``sheet.facts["title"]``, else "Law sheet".

    Returns:
        The path of the file.

    Raises:
        InputError: the file cannot be written.

    >>> import tempfile
    >>> write_html(LawSheet(()), tempfile.mkdtemp()).name
    'report.html'
    """
    return _write(render_html(sheet, title=title), path)


def render_compare(sheets: Mapping[str, LawSheet], *, title: str | None = None) -> str:
    """Several runs side by side in one self-contained page: a column a run, a row a law.

    Args:
        sheets: run names to their sheets; a law that a run lacks is left empty.
        title: the page's title; default says how many runs.

    Raises:
        InputError: there is no sheet.

    >>> "Two seeds" in render_compare({"a": LawSheet(()), "b": LawSheet(())}, title="Two seeds")
    True
    """
    if not isinstance(sheets, Mapping) or not sheets:
        raise InputError("there is no run to compare", expected="a mapping from run names to law sheets")
    for name, sheet in sheets.items():
        _must_be_sheet(sheet, f"sheets[{name!r}]")
    runs = list(sheets)
    laws = list(dict.fromkeys(c.law for sheet in sheets.values() for c in sheet))
    rows = []
    with bar("drawing figures", total=sum(map(len, sheets.values()))) as progress:
        for law in laws:
            cells = [
                _entry(sheet[law], f"run-{i}-", progress) if law in sheet else None
                for i, sheet in enumerate(sheets.values(), start=1)
            ]
            rows.append((next(cell for cell in cells if cell is not None), cells))
    shared, differing = _split_facts({run: fact_rows(sheet.facts) for run, sheet in sheets.items()})
    return _render(
        "compare.html.j2",
        title=title or f"Law sheets of {len(runs)} run{'s' if len(runs) != 1 else ''}",
        runs=runs,
        summaries=[summary(sheet) for sheet in sheets.values()],
        shared=shared,
        differing=differing,
        rows=rows,
    )


def compare_html(sheets: Mapping[str, LawSheet], path: str | Path, *, title: str | None = None) -> Path:
    """Write several runs side by side as one self-contained HTML page (see :func:`render_compare`).

    Args:
        sheets: run names to their sheets.
        path: where to write; a folder gets ``report.html``; missing parents are made.
        title: the page's title.

    Returns:
        The path of the file.

    Raises:
        InputError: there is no sheet, or the file cannot be written.

    >>> import tempfile
    >>> compare_html({"a": LawSheet(()), "b": LawSheet(())}, tempfile.mkdtemp()).name
    'report.html'
    """
    return _write(render_compare(sheets, title=title), path)


def summary(sheet: LawSheet) -> str:
    """The sheet in one line.

    >>> summary(LawSheet(()))
    'No law was checked.'
    """
    counts = _counts(sheet)
    parts = [f"{n} {_PHRASE[verdict][n != 1]}" for verdict, n in counts.items() if n]
    if not parts:
        return "No law was checked."
    said = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"Of {len(sheet)} laws, {said}." if len(sheet) != 1 else f"The law {said[2:]}."


def fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as pairs of a readable label and a readable value; nested mappings are flattened.

    >>> fact_rows({"P": 12345, "sgd": {"lr": 0.1, "momentum": 0.9}, "seeds": [0, 1], "note": None})
    [('weights P', '12\u202f345'), ('learning rate', '0.1'), ('momentum', '0.9'), ('seeds', '0, 1'), ('note', '–')]
    """
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows.extend(fact_rows(value))
        elif name != "title":
            rows.append((_LABEL.get(name, str(name).replace("_", " ")), _readable(value)))
    return rows


def typeset(text: str) -> Markup:
    """Escape plain text and set its single-letter subscripts and its exponents.

    >>> print(typeset("C_ii < H_ii^γ, F^(−ψ), minibatch_loss"))
    C<sub>ii</sub> &lt; H<sub>ii</sub><sup>γ</sup>, F<sup>−ψ</sup>, minibatch_loss
    """
    escaped = str(escape(text))
    escaped = SUBSCRIPT.sub(r"\1<sub>\2</sub>", escaped)
    return Markup(re.sub(r"(?<=[\w>)|‖])\^(?:\(([^()]{1,12})\)|([−-]?[^\W_]{1,3}))", _superscript, escaped))


def _superscript(match: re.Match[str]) -> str:
    return f"<sup>{match[1] or match[2]}</sup>"


def _readable(value: Any) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", _NARROW_SPACE) if abs(value) >= 1000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(_readable(v) for v in value) or "–"
    return str(value)


def _counts(sheet: LawSheet) -> dict[str, int]:
    counts = Counter(sheet.verdicts.values())
    return {verdict: counts[verdict] for verdict in _PHRASE}


def _must_be_sheet(value: Any, name: str) -> None:
    if not isinstance(value, LawSheet):
        raise InputError(f"{name} is a {type(value).__name__}", expected="a LawSheet, as thermograd.check returns")


def _entry(comparison: Comparison, prefix: str, progress: bar) -> Entry:
    progress.advance()
    law = comparison.definition
    anchor = "law-" + re.sub(r"[^a-z0-9]+", "-", law.name.lower()).strip("-")
    measured, predicted = number(comparison.measured, comparison.stderr), expected(comparison)
    label = (
        f"{law.title}. {law.quantity}: measured {measured}, the law says {predicted}. Verdict: {comparison.verdict}."
    )
    return Entry(
        comparison=comparison,
        law=law,
        anchor=anchor,
        measured=measured,
        predicted=predicted,
        interval=_interval(comparison),
        mark=_MARK[comparison.verdict],
        verdict_class=VERDICT_CLASS[comparison.verdict],
        sentence=law.sentence(comparison),
        strip=_strip(comparison),
        figure=_figure(comparison, f"{prefix}{anchor}-", label),
    )


def _figure(comparison: Comparison, prefix: str, label: str) -> Figure:
    try:
        return Figure(Markup(inline_svg(comparison, prefix, label)))
    except NotAvailableError as error:
        return Figure(None, comparison.note or error.what)


def _interval(comparison: Comparison) -> str:
    low, high = comparison.low, comparison.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return "none: the number has no statistical error"
    digits = 1 - math.floor(math.log10(high - low))
    if not -5 < digits <= 6:
        return f"{low:.4g} to {high:.4g}".replace("-", "−")
    return f"{low:.{max(0, digits)}f} to {high:.{max(0, digits)}f}".replace("-", "−")


def _strip(comparison: Comparison) -> Strip | None:
    """Positions on a scale where the law's band has half-width one; None when a number is missing."""
    low, high = comparison.band
    centre: float | None
    if math.isfinite(low) and math.isfinite(high):
        middle, half = (low + high) / 2, (high - low) / 2
        centre = comparison.predicted
    elif math.isfinite(high):  # a bound: zero at the left edge, the bound where that of a band would be
        half = abs(high) / (1 + (Strip.WIDTH / 2 - 5) / Strip.HALF)
        middle, centre = high - half, None
    else:
        return None
    numbers = (comparison.measured, comparison.low, comparison.high)
    if not (half > 0 and all(map(math.isfinite, numbers))):
        return None

    def at(value: float) -> float:
        reach = (Strip.WIDTH / 2 - 5) / Strip.HALF
        return round(Strip.WIDTH / 2 + Strip.HALF * max(-reach, min(reach, (value - middle) / half)), 1)

    measured, low_end, high_end = (at(v) for v in numbers)
    band_low = at(low) if math.isfinite(low) else 0.0
    return Strip(measured, low_end, high_end, band_low, at(high), None if centre is None else at(centre))


def _split_facts(
    facts: Mapping[str, Iterable[tuple[str, str]]],
) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Facts that are the same in all runs, and those that differ with one value a run."""
    tables = [dict(rows) for rows in facts.values()]
    names = list(dict.fromkeys(name for table in tables for name in table))
    shared, differing = [], []
    for name in names:
        values = [table.get(name, "–") for table in tables]
        if len(set(values)) == 1:
            shared.append((name, values[0]))
        else:
            differing.append((name, values))
    return shared, differing


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("thermograd.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = typeset
    return environment


def _render(template: str, **content: Any) -> str:
    from .. import __version__

    return (
        _environment()
        .get_template(template)
        .render(
            version=__version__,
            light=Markup(css_variables(LIGHT)),
            dark=Markup(css_variables(DARK)),
            strip_width=Strip.WIDTH,
            **content,
        )
    )


def _write(page: str, path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", remedy="give a path that can be written") from error
    return path
