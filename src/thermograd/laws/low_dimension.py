"""Low-dimensional drift and diffusion of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .evidence import Evidence
from .law import Assumption, Comparison, Law, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LowDimension"]

_LEAST_WEIGHTS = 30
_FEWEST_FRACTION = 0.1


class LowDimension(Law):
    """The fluctuations of the weights live in few of their dimensions."""

    name = "low_dimension"
    title = "Low-dimensional drift-diffusion"
    statement = (
        "Seen through principal components the path of the weights is a drift along one direction and diffusion in "
        "few others: with the drift left out, 90% of the variance lies in a small part of the dimensions."
    )
    formula = "n₉₀ / P ≪ 1   (n₉₀: principal directions that hold 90% of the variance; here n₉₀/P ≤ 0.1)"
    source = "Feng & Tu 2021, Fig. 1 (35 of 2500); random-walk null: Antognini & Sohl-Dickstein 2018"
    quantity = "n₉₀ / P, held out"
    kind = "bound"
    xlabel = "rank of the principal direction"
    ylabel = "variance"
    caveats = (
        "Directions come from one half of the record and variances from the other: any random walk looks "
        "low-dimensional to components fitted to itself (90% in about 14).",
        "Variance outside the directions that were found counts as spread over all the others.",
    )
    sentences: ClassVar = {
        "holds": "Although the network has many weights, their motion happens in a few directions.",
        "fails": "The motion is spread over many directions; a few principal components do not describe it.",
        "undecided": "The record is too short to count the directions in which the weights move.",
        "not in its regime": "The problem has too few weights, or the record too few steps, for the question to have "
        "a meaning.",
    }

    def assumptions(self, evidence: Evidence) -> list[Assumption]:
        weights, rows = evidence.path.P, evidence.path.T
        return [
            Assumption(f"needs {_LEAST_WEIGHTS} weights", weights >= _LEAST_WEIGHTS, f"{weights} weights"),
            Assumption("needs 200 recorded steps", rows >= 200, f"{rows} steps"),
        ]

    def measure(self, evidence: Evidence) -> Measured:
        from .. import trajectory

        rows = min(evidence.path.T, 4000)
        whole = trajectory.select(evidence.path, rows)
        counts, found = [], None
        for half in (whole.rows(0, rows // 2), whole.rows(rows // 2, rows)):  # two estimates give the error bar
            found = trajectory.pca(half)
            counts.append(_n90(found.variance[1:], found.total_variance - found.variance[0], whole.P - 1))
        assert found is not None
        fraction = np.array(counts) / evidence.problem.P
        variance = found.variance[1:]
        inside = found.variance_in_sample[1:]
        null = found.random_walk[1:]
        note = (
            f"n₉₀ = {counts[0]:.0f} and {counts[1]:.0f} of {evidence.problem.P} in two halves of the last {rows} "
            f"steps, first component left out; drift index of the first component {found.drift_index:.2f} "
            f"(1 is pure drift)."
        )
        details = {
            "x": np.arange(2, len(variance) + 2),
            "measured_y": variance,
            "in_sample_y": inside,
            "null_y": null * inside.sum() / null.sum(),
        }
        error = float(fraction.std(ddof=1) / np.sqrt(len(fraction)))
        return Measured(float(fraction.mean()), error, note=note, details=details)

    def predict(self, evidence: Evidence) -> Measured:
        return Measured(_FEWEST_FRACTION)

    def plot(self, comparison: Comparison, ax: Axes | None = None) -> Axes:
        """Held-out and in-sample variance against rank, with the random-walk null."""
        ax = super().plot(comparison, ax)
        details = comparison.details
        ax.lines[0].set_label("held out")
        ax.plot(details["x"], details["in_sample_y"], "-", lw=1.2, color="C2", label="in-sample")
        ax.plot(details["x"], details["null_y"], "--", lw=1.2, color="C7", label="random walk")
        ax.legend(frameon=False)
        return ax


def _n90(variance: np.ndarray, total: float, weights: int) -> float:
    """Directions that hold 90% of the variance; what no direction holds is spread over the remaining weights."""
    ordered = np.sort(variance)[::-1]
    goal = 0.9 * max(total, ordered.sum())
    reached = np.cumsum(ordered)
    if reached[-1] >= goal:
        return float(np.searchsorted(reached, goal) + 1)
    rest = max(total - reached[-1], 0.0)
    return len(ordered) + (goal - reached[-1]) / rest * (weights - len(ordered)) if rest > 0 else float(len(ordered))
