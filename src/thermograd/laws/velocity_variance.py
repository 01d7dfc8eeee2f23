"""Velocity variance and local displacement."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..theory import sampling
from .evidence import Evidence
from .law import Assumption, Law, Measured
from .weight_variance import mode_assumptions

__all__ = ["VelocityVariance"]


class VelocityVariance(Law):
    """The mean squared step follows from learning rate, momentum and the trace of the noise."""

    name = "velocity_variance"
    title = "Local displacement"
    statement = (
        "The squared length of one optimizer step settles at a value set by learning rate, momentum and the total "
        "gradient noise, however the loss is shaped: the weights' velocity has the variance of the noise over 1−β²."
    )
    formula = "E‖θₖ₊₁−θₖ‖² = Σᵢ 2η² sᵢ / [(1−β)(2(1+β)−ηhᵢ)] ≈ η² Tr C / (B(1−β²))"
    source = "Kunin et al. 2024 (local displacement; exact discrete form), Kühn & Rosenow 2023 (reshuffling)"
    quantity = "E‖δ‖² measured / predicted"
    tolerance = 0.1
    xlabel = "curvature hᵢ"
    ylabel = "velocity variance per mode"
    caveats = (
        "The drift of a run that still moves adds to the measured side; how much stands with the assumptions.",
        "Weights whose curvature is not decomposed enter the prediction as flat directions.",
    )
    sentences: ClassVar = {
        "holds": "The size of a single step is what the gradient noise and the hyperparameters predict.",
        "fails": "Single steps are not as large as the gradient noise predicts: the noise changes along the path, or "
        "is not what the batches suggest.",
        "undecided": "The run is too short, or the noise varies too much along it, to tell whether steps are as large "
        "as predicted.",
        "not in its regime": "The prediction needs plain SGD near a stable minimum with known batches, and weights "
        "that do not drift.",
    }

    def assumptions(self, evidence: Evidence) -> list[Assumption]:
        checks = mode_assumptions(evidence)
        if all(c.met for c in checks):
            share = evidence.drift_share
            detail = f"{max(0.0, 100 * share):.2g}% of the squared length of a step"
            checks.append(Assumption("drift is a small part of a step", share < self.tolerance / 2, detail))
        return checks

    def measure(self, evidence: Evidence) -> Measured:
        # velocities forget within a few steps, so that blocks much shorter than the windows are independent
        count = int(np.clip(len(evidence.steps) // 50, evidence.windows, 50))
        blocks = np.array([block.mean() for block in np.array_split(evidence.squared_speed, count)])
        predicted = self._total(evidence)
        error = float(blocks.std(ddof=1) / np.sqrt(count)) / predicted
        modes = evidence.velocity_variances
        details = {
            "x": evidence.curvature,
            "measured_y": modes.mean(0),
            "measured_error": modes.std(0, ddof=1) / np.sqrt(len(modes)),
        }
        note = f"Mean over {len(evidence.steps)} steps, all {evidence.problem.P} weights."
        return Measured(float(evidence.squared_speed.mean()) / predicted, error, count - 1, details, note)

    def predict(self, evidence: Evidence) -> Measured:
        predicted = sampling.velocity_variance(
            evidence.sgd, evidence.curvature, evidence.noise, drop_last=evidence.problem.drop_last
        )
        traces = evidence._noise_at_points[1]
        error = float(traces.std(ddof=1) / traces.mean() / np.sqrt(len(traces))) if len(traces) > 1 else 0.0
        return Measured(1.0, error, max(1, len(traces) - 1), {"predicted_y": predicted})

    def _total(self, evidence: Evidence) -> float:
        curvature, noise, rest = evidence.spectrum
        curved = sampling.velocity_variance(evidence.sgd, curvature, noise, drop_last=evidence.problem.drop_last).sum()
        return float(
            curved + sampling.velocity_variance(evidence.sgd, [0.0], rest, drop_last=evidence.problem.drop_last).sum()
        )
