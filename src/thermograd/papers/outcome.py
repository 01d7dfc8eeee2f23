"""What a reproduction found: numbers beside the published ones, the curves of its figure, and a verdict in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import stdtrit

from ..errors import InputError, NonFiniteError
from ..measurement import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Outcome", "Panel", "Published", "Row", "Series", "Verdict", "between_seeds", "row_of"]

Verdict = Literal["reproduced", "reproduced with a caveat", "not reproduced", "cannot be run here"]
_CONFIDENCE = 0.975  # one-sided: that a number just at the edge of its tolerance is not called a different one


@dataclass(frozen=True)
class Published:
    """A number as a paper gives it.

    Args:
        value: the number; for a bound, the bound.
        source: paper, figure or equation.
        tolerance: how far a reproduction may lie off and still be called the same: the accuracy to which the claim
            is made or can be read, fixed beforehand.
        kind: ``"equal"``, or ``"at least"`` or ``"at most"`` for a statement of size.
    """

    value: float
    source: str
    tolerance: float
    kind: Literal["equal", "at least", "at most"] = "equal"

    def __str__(self) -> str:
        sign = {"equal": "", "at least": "≥ ", "at most": "≤ "}[self.kind]
        return f"{sign}{self.value:.4g}"

    def distance(self, value: float) -> float:
        """How far a value lies beyond what was published; 0 where a bound is kept."""
        off = value - self.value
        if self.kind == "equal":
            return abs(off)
        return max(0.0, -off if self.kind == "at least" else off)


@dataclass(frozen=True)
class Row:
    """One number of ours, with its error bar, beside the published one and beside what theory says.

    Args:
        quantity: what it is, in words.
        ours: as measured here.
        stderr: its standard error, between seeds unless the item says otherwise.
        seeds: how many independent seeds are behind it.
        published: the paper's number; None where the paper gives none.
        theory: what an exact calculation says for this very protocol, if there is one.
        decides: whether the item stands or falls with this row; a published row that does not decide and differs
            makes a caveat.
    """

    quantity: str
    ours: float
    stderr: float
    seeds: int
    published: Published | None = None
    theory: float | None = None
    decides: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ours) and math.isfinite(self.stderr) and self.stderr >= 0):
            raise NonFiniteError(f"{self.quantity}: {self.ours} ± {self.stderr}")

    @property
    def margin(self) -> float:
        """By how much ours may lie beyond a tolerance: its standard error times Student's quantile for so few seeds."""
        freedom = self.seeds - 1 if self.seeds > 1 else np.inf  # a single seed's error comes from elsewhere
        return float(stdtrit(freedom, _CONFIDENCE)) * self.stderr

    @property
    def agrees(self) -> bool | None:
        """Whether ours is the published number within its tolerance and our error; None without one."""
        if self.published is None:
            return None
        return self.published.distance(self.ours) <= self.published.tolerance + self.margin

    @property
    def undecided(self) -> bool:
        """Whether ours lies beyond the tolerance, but by no more than its error."""
        return bool(self.agrees) and self.published.distance(self.ours) > self.published.tolerance  # type: ignore[union-attr]


@dataclass(frozen=True)
class Series:
    """One curve of a panel: points with error bars, or a line; curves of one ``colour`` belong together."""

    label: str
    x: Any  # [n]
    y: Any  # [n]
    error: Any = None  # [n]
    style: Literal["points", "line", "dashed", "steps"] = "points"
    colour: int | None = None

    def __post_init__(self) -> None:
        for name in ("x", "y", "error"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, [float(v) for v in np.asarray(value, float).ravel()])
        if len(self.x) != len(self.y) or (self.error is not None and len(self.error) != len(self.x)):
            raise InputError(f"{self.label}: {len(self.x)} x and {len(self.y)} y", expected="as many of each")


@dataclass(frozen=True)
class Panel:
    """One set of axes with its curves."""

    title: str
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]
    xscale: Literal["linear", "log"] = "linear"
    yscale: Literal["linear", "log"] = "linear"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curves, points filled and lines in the colour of what they belong to."""
        ax = new_axes(ax)
        drawn: dict[str, Any] = {}
        for i, curve in enumerate(self.series):
            colour = f"C{(i if curve.colour is None else curve.colour) % 10}"
            if curve.style == "points":
                drawn[curve.label] = ax.errorbar(curve.x, curve.y, curve.error, fmt="o", ms=4, lw=1, color=colour)
            else:
                look: dict[str, Any] = {"line": {}, "dashed": {"ls": "--"}, "steps": {"drawstyle": "steps-mid"}}
                drawn[curve.label] = ax.plot(curve.x, curve.y, color=colour, lw=1.5, **look[curve.style])[0]
        ax.set(xscale=self.xscale, yscale=self.yscale, xlabel=self.xlabel, ylabel=self.ylabel, title=self.title)
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            if axis.get_scale() == "log" and high > 15 * low:  # numbers between the powers of ten would overlap
                axis.set_minor_formatter("")
        _frame(ax, [value for curve in self.series if curve.style == "points" for value in curve.y])
        drawn.pop("", None)
        drawn = _together(drawn)
        if drawn:
            many = len(drawn) > 5
            ax.legend(drawn.values(), drawn, frameon=False, fontsize="x-small" if many else "small")
        return ax


def _frame(ax: Axes, measured: Sequence[float]) -> None:
    """Keep what was measured in sight of lines that leave it by decades; plain numbers along less than a decade."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    if ax.get_xscale() == "linear":  # few enough that none has to be left out for running into its neighbour
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))

    positive = [value for value in measured if value > 0]
    if ax.get_yscale() == "log" and positive:
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, min(positive) / 100), min(high, max(positive) * 100))
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() == "log" and high < 10 * low:
            axis.set_major_locator(MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")


def _together(drawn: dict[str, Any]) -> dict[str, Any]:
    """One entry in place of more than six numbered ones, "run 1 to 15", which nobody tells apart."""
    numbered: dict[str, list[str]] = {}
    for label in drawn:
        kind, _, number = label.rpartition(" ")
        if kind and number.isdigit():
            numbered.setdefault(kind, []).append(label)
    entries = dict(drawn)
    for labels in numbered.values():
        if len(labels) > 6:
            last = labels[-1].rpartition(" ")[2]
            entries = {
                f"{name} to {last}" if name == labels[0] else name: mark
                for name, mark in entries.items()
                if name not in labels[1:]
            }
    return entries


@dataclass(frozen=True)
class Outcome:
    """What an item found.

    Args:
        rows: the numbers.
        panels: the figure.
        caveats: what a reader must know that qualifies the result, each a sentence; found by measurement.
        note: the protocol as it was run, in a few sentences.
        unavailable: why it cannot be run here, empty otherwise.
        settings: what it was run with: scale, seeds, seconds.
    """

    rows: tuple[Row, ...] = ()
    panels: tuple[Panel, ...] = ()
    caveats: tuple[str, ...] = ()
    note: str = ""
    unavailable: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def differing(self) -> tuple[Row, ...]:
        """Rows that are not as published."""
        return tuple(row for row in self.rows if row.agrees is False)

    @property
    def verdict(self) -> Verdict:
        """The item's result in words.

        ``not reproduced`` when a deciding row differs from the published number by more than its tolerance and our
        error (Student's 95% interval, as wide as so few seeds ask for); ``reproduced with a caveat`` when only other
        rows differ, when a row lies beyond its tolerance by no more than the error, so that more seeds would have to
        decide, or when something qualifies the result; else ``reproduced``.
        """
        if self.unavailable:
            return "cannot be run here"
        if any(row.decides for row in self.differing):
            return "not reproduced"
        qualified = self.differing or self.caveats or any(row.undecided for row in self.rows)
        return "reproduced with a caveat" if qualified else "reproduced"

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, in a sentence or two."""
        if self.unavailable:
            return self.unavailable
        off = [f"{row.quantity}: {row.ours:.3g} ± {row.stderr:.2g}, not {row.published}" for row in self.differing]
        agreed = [row for row in self.rows if row.agrees]
        parts = ["; ".join(off) + "." if off else ""]
        if not off and agreed:
            parts.append(f"{len(agreed)} of {len(agreed)} published numbers are met.")
        elif agreed:
            parts.append(f"{len(agreed)} of {len(agreed) + len(off)} published numbers are met.")
        open_rows = [f"{row.quantity}: {row.ours:.3g} ± {row.stderr:.2g}" for row in self.rows if row.undecided]
        if open_rows:
            parts.append(f"Beyond the tolerance by less than the error, so undecided: {'; '.join(open_rows)}.")
        return " ".join([*(p for p in parts if p), *self.caveats])

    def to_json(self) -> str:
        """As text, to be read by :meth:`from_json`."""
        return json.dumps(asdict(self), allow_nan=True, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Read what :meth:`to_json` wrote.

        >>> row = Row("slope", 1.0, 0.1, 5, Published(1.0, "Fig. 1", 0.2))
        >>> Outcome.from_json(Outcome((row,)).to_json()).verdict
        'reproduced'
        """
        raw = json.loads(text)
        rows = tuple(
            Row(**{**row, "published": Published(**row["published"]) if row["published"] else None})
            for row in raw.pop("rows")
        )
        panels = tuple(
            Panel(**{**panel, "series": tuple(Series(**s) for s in panel["series"])}) for panel in raw.pop("panels")
        )
        return cls(rows, panels, tuple(raw.pop("caveats")), **raw)


def between_seeds(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean over seeds and its standard error.

    Raises:
        InputError: fewer than two seeds, so that there is no error bar.

    >>> between_seeds([1.0, 3.0])
    (2.0, 1.0)
    """
    array = np.asarray(values, float)
    if array.size < 2:
        raise InputError(f"{array.size} seed(s)", expected="two or more, for an error bar")
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size))


def row_of(quantity: str, values: Any, published: Published | None = None, theory: Any = None, **more: Any) -> Row:
    """The row of a number measured with each seed, and of what theory says with each, if it does.

    >>> row_of("slope", [1.0, 3.0], theory=[2.0, 2.5])
    Row(quantity='slope', ours=2.0, stderr=1.0, seeds=2, published=None, theory=2.25, decides=True)
    """
    mean, error = between_seeds(np.asarray(values, float))
    exact = None if theory is None else float(np.mean(theory))
    return Row(quantity, mean, error, len(values), published, exact, **more)
