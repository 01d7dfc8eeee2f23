"""All outcomes on one page, and as a table in Markdown."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import __version__
from ..report.figure import inline_svg, svg
from ..report.style import DARK, LIGHT, css_variables
from .item import items
from .outcome import Outcome, Row

__all__ = ["number", "table", "write_gallery"]

_CLASS = {
    "reproduced": "holds",
    "reproduced with a caveat": "undecided",
    "not reproduced": "fails",
    "cannot be run here": "regime",
}
_MARK = {"reproduced": "✓", "reproduced with a caveat": "✓", "not reproduced": "✗", "cannot be run here": "–"}


def number(row: Row) -> str:
    """Ours with its error, to the digits that the error allows.

    >>> number(Row("slope", 10.234, 0.31, 5))
    '10.23 ± 0.31'
    """
    if row.stderr == 0:
        return f"{row.ours:.4g}"
    error = f"{row.stderr:.2g}"
    digits = len(error.split(".")[1]) if "." in error and "e" not in error else 0
    if "e" in error or abs(row.ours) >= 1e5:
        return f"{row.ours:.3g} ± {error}"
    return f"{row.ours:.{digits}f} ± {float(error):.{digits}f}"


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes as a Markdown table, a line for each published or exact number.

    >>> from thermograd.papers import Published
    >>> row = Row("slope", 1.0, 0.1, 5, Published(1.0, "Fig. 1", 0.2))
    >>> print(table({"mori/fig3b": Outcome((row,))}).splitlines()[2])
    | mori/fig3b | slope | 1 (Fig. 1) | – | 1.0 ± 0.1 | 5 | reproduced |
    """
    lines = ["| item | number | published | exact | ours | seeds | verdict |", "|---|---|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        if outcome.unavailable:
            lines.append(f"| {name} | – | – | – | – | – | {outcome.verdict}: {_cell(outcome.reason)} |")
        for i, row in enumerate(outcome.rows):
            published = "–" if row.published is None else f"{row.published} ({row.published.source})"
            theory = "–" if row.theory is None else f"{row.theory:.4g}"
            verdict = outcome.verdict if i == 0 else ""
            shown = [
                name if i == 0 else "",
                _cell(row.quantity),
                _cell(published),
                theory,
                number(row),
                row.seeds,
                verdict,
            ]
            lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_gallery(
    outcomes: Mapping[str, Outcome], folder: str | os.PathLike[str], command: str = "", commit: str | None = None
) -> Path:
    """Write ``index.html`` (one file), ``README.md`` and the figures as SVG.

    Args:
        outcomes: by name of the item.
        folder: where to.
        command: how they were made.
        commit: of which version; by default what git says of a source checkout.

    Returns:
        The HTML page.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, outcome in outcomes.items():
        prefix = name.replace("/", "-")
        pictures = [Markup(inline_svg(panel, f"{prefix}-{i}-", panel.title)) for i, panel in enumerate(outcome.panels)]
        for i, panel in enumerate(outcome.panels):
            (place / f"{prefix}-{i + 1}.svg").write_text(svg(panel), encoding="utf-8")
        entries.append({"item": items()[name], "outcome": outcome, "pictures": pictures, "anchor": prefix})
    facts = _facts(outcomes, command, _checked_out() if commit is None else commit)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("thermograd.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("gallery.html.j2").render(
        entries=entries, facts=facts, number=number, mark=_MARK, look=_CLASS, version=__version__,
        light=Markup(css_variables(LIGHT)), dark=Markup(css_variables(DARK)),
    )  # fmt: skip
    target = place / "index.html"
    target.write_text(page, encoding="utf-8")
    (place / "README.md").write_text(_markdown(outcomes, facts), encoding="utf-8")
    return target


def _checked_out() -> str:
    """The commit that this code is run from, where it lies in a git checkout of its own."""
    here = Path(__file__).resolve().parents[1]
    try:
        asked = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "--short", "HEAD"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found[-1] if Path(found[0]) / "src" / here.name == here else ""


def _facts(outcomes: Mapping[str, Outcome], command: str, commit: str) -> list[tuple[str, str]]:
    settings = [outcome.settings for outcome in outcomes.values() if outcome.settings]

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(s[key]) for s in settings if key in s))

    seconds = sum(float(s.get("seconds", 0)) for s in settings)
    facts: list[tuple[str, Any]] = [
        ("command", command),
        ("version", f"{__version__} {commit}".strip()),
        ("scale", all_of("scale")),
        ("seeds", f"{all_of('seeds')} (from {all_of('seed')})"),
        ("run time", f"{seconds / 60:.1f} minutes, all items added up"),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _markdown(outcomes: Mapping[str, Outcome], facts: list[tuple[str, str]]) -> str:
    lines = ["# The papers, figure by figure", "", *(f"- {name}: {value}" for name, value in facts), ""]
    lines += [table(outcomes)]
    for name, outcome in outcomes.items():
        item = items()[name]
        lines += [f"## {name}: {item.title}", "", f"{item.paper}: {item.statement}", ""]
        lines += [f"**{outcome.verdict}.** {outcome.reason}", "", outcome.note, ""]
        lines += [f"![{panel.title}]({name.replace('/', '-')}-{i + 1}.svg)" for i, panel in enumerate(outcome.panels)]
        lines.append("")
    return "\n".join(lines)
