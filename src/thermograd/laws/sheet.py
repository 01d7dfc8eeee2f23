"""The law sheet: every law held against one run, as a table, an xarray dataset, a figure, a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.padding import Padding

from ..errors import InputError, StoreError
from .law import Assumption, Comparison

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["LawSheet"]

_STYLE = {"holds": "green", "fails": "red", "not in its regime": "yellow", "undecided": "cyan"}
_WIDE = 100  # columns of a terminal from which the quantity has a column of its own
_EDGE = 3.2  # of the common axis, in tolerances
_MARK = {"holds": "✓", "fails": "✗", "not in its regime": "–", "undecided": "?"}


@dataclass(frozen=True, repr=False)
class LawSheet:
    """The comparisons of one run, in the order of the catalogue.

    ``sheet[name]`` is the :class:`Comparison` of a law; iterating yields all comparisons.
    ``print(sheet)`` shows a table; ``to_xarray``,
    ``plot`` and ``to_html`` give it in other forms.

    Args:
        comparisons: one for each law.
        facts: what the run is: model, data, hyperparameters, counts (shown at the top of the report).
    """

    comparisons: tuple[Comparison, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, law: str) -> Comparison:
        for comparison in self.comparisons:
            if comparison.law == law:
                return comparison
        names = ", ".join(c.law for c in self.comparisons)
        raise InputError(f"the sheet has no law {law!r}", expected=f"one of: {names}")

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.comparisons)

    def __len__(self) -> int:
        return len(self.comparisons)

    def __contains__(self, law: object) -> bool:
        return any(c.law == law for c in self.comparisons)

    @property
    def names(self) -> list[str]:
        """The names of the laws."""
        return [c.law for c in self.comparisons]

    @property
    def verdicts(self) -> dict[str, str]:
        """Law name to verdict."""
        return {c.law: c.verdict for c in self.comparisons}

    def table(self, quantity: bool = True) -> Table:
        """The sheet as a rich table, with or without the column that names the compared quantity."""
        from rich.table import Table

        table = Table(
            title="Law sheet",
            title_justify="left",
            caption="± measured: one standard error; ± predicted: how far off the law may be",
            caption_justify="left",
            expand=False,
        )
        table.add_column("law", overflow="fold")
        if quantity:
            table.add_column("quantity", overflow="fold")
        table.add_column("measured", justify="right", no_wrap=True)
        table.add_column("predicted", justify="right", no_wrap=True)
        table.add_column("verdict")
        for c in self.comparisons:
            law = c.definition
            mark = f"[{_STYLE[c.verdict]}]{_MARK[c.verdict]} {c.verdict}[/]"
            middle = [law.quantity] if quantity else []
            table.add_row(law.title, *middle, number(c.measured, c.stderr), expected(c), mark)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(quantity=options.max_width >= _WIDE)
        why: dict[str, list[str]] = {}
        for c in self.comparisons:
            if c.verdict == "not in its regime" and c.note:
                reason = next((_why(a) for a in c.assumptions if not a.met), c.note)
                why.setdefault(reason, []).append(c.definition.title)
        for reason, titles in why.items():
            yield Padding(
                f"[yellow]–[/] {escape(', '.join(titles))}: [dim]{escape(reason.rstrip('.'))}.[/]", (0, 0, 0, 1)
            )

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=118)
        console.print(self)
        output: StringIO = console.file  # type: ignore[assignment]
        return output.getvalue().rstrip()

    __repr__ = __str__  # in a notebook the last expression of a cell is shown by its repr

    def to_xarray(self) -> xarray.Dataset:
        """The sheet with one entry a law: measured, predicted, stderr, low, high, verdict, note."""
        import xarray

        columns = {
            name: ("law", [getattr(c, name) for c in self.comparisons])
            for name in ("measured", "predicted", "stderr", "low", "high")
        }
        text = {name: ("law", [str(getattr(c, name)) for c in self.comparisons]) for name in ("verdict", "note")}
        titles = [c.definition.title for c in self.comparisons]
        return xarray.Dataset(
            {**columns, **text, "title": ("law", titles)},
            {"law": [c.law for c in self.comparisons]},
            {"facts": json.dumps(dict(self.facts), default=str)},
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Measured minus predicted, in units of each law's tolerance, with 95% intervals."""
        from ..measurement import new_axes

        ax = new_axes(ax)
        shown = [c for c in self.comparisons if math.isfinite(c.measured)]
        for row, c in enumerate(reversed(shown)):
            middle, half = _scale(c)
            colour = {"holds": "C2", "fails": "C3", "not in its regime": "C7", "undecided": "C0"}[c.verdict]
            ends = (np.array([c.low, c.measured, c.high]) - middle) / half
            low, at, high = np.clip(ends, -_EDGE, _EDGE)  # what lies beyond is drawn at the edge
            ax.errorbar([at], [row], xerr=[[at - low], [high - at]], fmt="o", ms=5, color=colour)
        ax.axvspan(-1, 1, color="C2", alpha=0.12, lw=0)
        ax.axvline(0, color="0.5", lw=0.8)
        ax.set_yticks(range(len(shown)), [c.definition.title for c in reversed(shown)])
        ax.set(xlim=(-_EDGE - 0.3, _EDGE + 0.3), xlabel="(measured − predicted) / tolerance; the green band is the law")
        return ax

    def to_html(self, path: str | Path) -> Path:
        """Write the sheet as one self-contained page and return its path."""
        from ..report import write_html

        return write_html(self, path)

    def save(self, run: str | Path) -> None:
        """Write the sheet into the run's store (group ``laws``)."""
        from ..trajectory import write_group

        write_group(run, "laws", self.to_xarray().assign_attrs(sheet=json.dumps(self._as_json(), default=_plain)))

    def _as_json(self) -> dict[str, Any]:
        return {"facts": dict(self.facts), "comparisons": [asdict(c) for c in self.comparisons]}

    @classmethod
    def load(cls, run: str | Path) -> LawSheet:
        """Read a sheet back from a run.

        Raises:
            StoreError: the run has no law sheet yet.
        """
        from ..trajectory import open_run

        tree = open_run(run)
        if "laws" not in tree.children or "sheet" not in tree["laws"].attrs:
            raise StoreError(f"the run {run} has no law sheet yet", remedy=f"make one with `thermograd check {run}`")
        content = json.loads(tree["laws"].attrs["sheet"])
        return cls(tuple(_comparison(c) for c in content["comparisons"]), content["facts"])


def number(value: float, stderr: float = 0.0) -> str:
    """A number with its error in the last digits shown.

    >>> number(1.2345, 0.021), number(float("nan")), number(0.5)
    ('1.234 ± 0.021', '–', '0.5')
    """
    return _number(value, stderr).replace("-", "−")


def _number(value: float, stderr: float) -> str:
    if not math.isfinite(value):
        return "–"
    if not (math.isfinite(stderr) and stderr > 1e-9 * max(abs(value), 1e-3)):
        return f"{value:.4g}" if abs(value) > 1e-12 else "0"
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    if digits > 6 or abs(value) >= 1e5:
        return f"{value:.3e} ± {stderr:.1e}"
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def expected(comparison: Comparison) -> str:
    """What the law allows, in words: ``1 ± 0.1`` or ``at most 3.8``."""
    if not math.isfinite(comparison.predicted):
        return "–"
    if comparison.definition.kind == "bound":
        return f"≤ {comparison.predicted:.3g}"
    half = (comparison.band[1] - comparison.band[0]) / 2
    if not (math.isfinite(half) and 1e-4 < half < 1e4):
        text = f"{comparison.predicted:.3g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")
    else:  # digits as far as the allowed deviation gives them a meaning
        rounded = round(comparison.predicted, max(0, 1 - math.floor(math.log10(half)))) + 0.0
        text = f"{rounded:.6g} ± {half:.2g}"
    return text.replace("-", "−")


def _why(unmet: Assumption) -> str:
    return f"{unmet.name}: no" + (f" ({unmet.detail})" if unmet.detail else "")


def _scale(c: Comparison) -> tuple[float, float]:
    """Centre and half-width that place a comparison on the common axis (a bound sits at +1)."""
    if math.isfinite(c.band[0]):
        return c.predicted, (c.band[1] - c.band[0]) / 2
    return 0.0, abs(c.predicted) or 1.0


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _comparison(content: dict[str, Any]) -> Comparison:
    content = dict(content)
    content["assumptions"] = tuple(Assumption(**a) for a in content["assumptions"])
    content["band"] = tuple(content["band"])
    content["details"] = {k: np.asarray(v) if isinstance(v, list) else v for k, v in content["details"].items()}
    return Comparison(**content)
