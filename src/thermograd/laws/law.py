"""What a law is: a claim with a source, a way to measure it, a prediction, and an honest comparison."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from scipy import stats

from ..errors import NonFiniteError, NotAvailableError
from ..measurement import Measurement, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .evidence import Evidence

__all__ = ["CONFIDENCE", "Assumption", "Comparison", "Law", "Measured", "Verdict", "judge"]

Verdict = Literal["holds", "fails", "not in its regime", "undecided"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Assumption:
    """One thing a law presupposes, whether it was found to be met, and the numbers behind that."""

    name: str
    met: bool
    detail: str = ""


@dataclass(frozen=True)
class Measured:
    """A measured or predicted number with its standard error and the arrays behind it.

    Args:
        value: the headline number.
        stderr: its standard error; 0 for a number without statistical error.
        dof: degrees of freedom behind the standard error (number of independent pieces minus one).
        details: arrays for the figure, by name; each a one-dimensional array or a number.
        note: what a reader should know of how it was obtained.
    """

    value: float
    stderr: float = 0.0
    dof: float = math.inf
    details: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Comparison(Measurement):
    """A law held against a run: measured and predicted number, error bar, verdict, and why.

    ``verdict`` is ``"holds"`` when the whole 95% confidence interval of the measured number lies within the law's
    tolerance of the prediction, ``"fails"`` when it lies wholly outside, ``"undecided"`` when the error bar reaches
    across, and ``"not in its regime"`` when an assumption of the law is not met.
    """

    measured: float = quantity(long_name="measured")
    predicted: float = quantity(long_name="predicted")
    stderr: float = quantity(long_name="standard error of measured minus predicted")
    verdict: Verdict = "undecided"
    note: str = ""
    law: str = ""
    low: float = quantity(long_name="lower end of the 95% interval", default=math.nan)
    high: float = quantity(long_name="upper end of the 95% interval", default=math.nan)
    band: tuple[float, float] = (-math.inf, math.inf)
    assumptions: tuple[Assumption, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the verdict is ``"holds"``."""
        return self.verdict == "holds"

    @property
    def definition(self) -> Law:
        """The law itself: statement, formula, source."""
        from .catalogue import find

        return find(self.law)

    def __str__(self) -> str:
        return f"{self.law}: {self.verdict} (measured {self.measured:.4g}, predicted {self.predicted:.4g}). {self.note}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw measured against predicted, as the law does."""
        return self.definition.plot(self, ax)


def judge(low: float, high: float, band: tuple[float, float]) -> Verdict:
    """Compare a confidence interval with the band that a law allows.

    >>> judge(0.95, 1.05, (0.9, 1.1)), judge(1.2, 1.3, (0.9, 1.1)), judge(1.0, 1.3, (0.9, 1.1))
    ('holds', 'fails', 'undecided')
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "undecided"
    if band[0] <= low and high <= band[1]:
        return "holds"
    if high < band[0] or low > band[1]:
        return "fails"
    return "undecided"


class Law(ABC):
    """A published claim about SGD that can be held against a recorded run.

    A subclass names the claim and says how to measure and predict its headline number. ``tolerance`` is how far the
    measured number may lie from the prediction for the law to count as true at the accuracy at which it was
    published; it belongs to the law, and is never adapted to a run.

    ``kind`` is ``"equal"`` (measured within ``tolerance`` of predicted), ``"ratio"`` (likewise, relative: the
    measured number is a ratio whose prediction is 1) or ``"bound"`` (measured at most predicted).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    statement: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    quantity: ClassVar[str]
    kind: ClassVar[Literal["equal", "ratio", "bound"]] = "ratio"
    tolerance: ClassVar[float] = 0.1
    caveats: ClassVar[tuple[str, ...]] = ()
    sentences: ClassVar[Mapping[str, str]]
    xlabel: ClassVar[str] = ""
    ylabel: ClassVar[str] = ""

    @abstractmethod
    def assumptions(self, evidence: Evidence) -> list[Assumption]:
        """What the law presupposes, checked on this run."""

    @abstractmethod
    def measure(self, evidence: Evidence) -> Measured:
        """The headline number as measured on the run."""

    @abstractmethod
    def predict(self, evidence: Evidence) -> Measured:
        """The headline number as the theory predicts it, from hyperparameters, curvature and noise."""

    def compare(self, evidence: Evidence) -> Comparison:
        """Measure, predict, check the assumptions, and judge."""
        assumptions = tuple(self.assumptions(evidence))
        unmet = [a for a in assumptions if not a.met]
        blocking = [a for a in unmet if a.name.startswith("needs ")]
        if blocking:  # without these there is nothing to measure
            return Comparison(
                math.nan, math.nan, math.nan, "not in its regime", _explain(unmet), self.name, assumptions=assumptions
            )
        measured, predicted = self.measure(evidence), self.predict(evidence)
        return self.verdict_on(measured, predicted, assumptions)

    def verdict_on(
        self, measured: Measured, predicted: Measured, assumptions: tuple[Assumption, ...] = ()
    ) -> Comparison:
        """The verdict on a measured and a predicted number (no run needed)."""
        for number, kind in ((measured, "measured"), (predicted, "predicted")):
            if not (math.isfinite(number.value) and math.isfinite(number.stderr)):
                raise NonFiniteError(f"the {kind} number of the law {self.name!r} is {number.value} ± {number.stderr}")
        stderr = math.hypot(measured.stderr, predicted.stderr)
        dof = min(measured.dof, predicted.dof)
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, dof) if math.isfinite(dof) else stats.norm.ppf(0.975)) * stderr
        low, high = measured.value - reach, measured.value + reach
        band = self.band(predicted.value)
        unmet = [a for a in assumptions if not a.met]
        verdict: Verdict = "not in its regime" if unmet else judge(low, high, band)
        note = " ".join(part for part in (_explain(unmet) if unmet else "", measured.note, predicted.note) if part)
        return Comparison(
            measured.value,
            predicted.value,
            stderr,
            verdict,
            note,
            self.name,
            low,
            high,
            band,
            assumptions,
            {**predicted.details, **measured.details},
        )

    def band(self, predicted: float) -> tuple[float, float]:
        """The interval of measured numbers that the law allows."""
        if self.kind == "bound":
            return (-math.inf, predicted)
        reach = self.tolerance * (abs(predicted) if self.kind == "ratio" else 1.0)
        return (predicted - reach, predicted + reach)

    def sentence(self, comparison: Comparison) -> str:
        """The verdict in one sentence for a newcomer."""
        return self.sentences[comparison.verdict]

    def plot(self, comparison: Comparison, ax: Axes | None = None) -> Axes:
        """Measured points against the prediction, from the arrays ``x``, ``measured_y`` and ``predicted_y``."""
        from ..measurement import new_axes

        details = comparison.details
        if "x" not in details or "measured_y" not in details:
            raise NotAvailableError(
                f"there is nothing to draw for {self.name!r}", remedy=f"see its note: {comparison.note}"
            )
        ax = new_axes(ax)
        draw(ax, details, self.xlabel, self.ylabel, "bound" if self.kind == "bound" else "predicted")
        return ax


def _explain(unmet: list[Assumption]) -> str:
    return "; ".join(f"{a.name}: no ({a.detail})" if a.detail else f"{a.name}: no" for a in unmet) + "."


def draw(ax: Axes, details: Mapping[str, Any], xlabel: str, ylabel: str, line: str = "predicted") -> None:
    """Log-log points (measured) and line (predicted) from a law's detail arrays."""
    x, y = np.asarray(details["x"], float), np.asarray(details["measured_y"], float)
    order = np.argsort(x)
    shown = (x > 0) & (y > 0)
    if not shown.any():
        raise NotAvailableError(
            "there is nothing to draw: no point is positive in both coordinates, as logarithmic axes need"
        )
    if "measured_error" in details:
        error = np.asarray(details["measured_error"], float)
        reach = np.vstack([np.minimum(error, 0.999 * np.abs(y)), error])[:, shown]  # keep bars off zero on a log axis
        ax.errorbar(x[shown], y[shown], reach, fmt="o", ms=4, lw=1, color="C0", label="measured")
    else:
        ax.plot(x[shown], y[shown], "o", ms=4, color="C0", label="measured")
    if "predicted_y" in details:
        predicted = np.asarray(details["predicted_y"], float)[order]
        good = (predicted > 0) & (x[order] > 0)
        ax.plot(x[order][good], predicted[good], "-", lw=1.8, color="C1", label=line)
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
