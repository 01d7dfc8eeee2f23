"""Stability: the largest curvature against the learning rate, and the number of sharp directions."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .evidence import Evidence
from .law import Assumption, Law, Measured

__all__ = ["CurvatureStability", "DimensionBound"]


class CurvatureStability(Law):
    """The largest Hessian eigenvalue stays below 2(1+beta)/eta."""

    name = "curvature_stability"
    title = "Stability of the sharpest direction"
    statement = (
        "Training can settle only where no direction is too steep for the learning rate: the largest curvature, "
        "weight decay included, must stay below 2(1+β)/η."
    )
    formula = "η (h_max + λ) / (2(1+β)) ≤ 1"
    source = "Heavy-ball stability (Polyak 1964); Kunin et al. 2024"
    quantity = "η(h_max+λ) / 2(1+β)"
    kind = "bound"
    xlabel = "rank"
    ylabel = "η(h+λ)/2(1+β)"
    caveats = ("A bound for the full gradient; minibatch noise makes training unstable somewhat earlier.",)
    sentences: ClassVar = {
        "holds": "The learning rate is small enough for the steepest direction of the valley.",
        "fails": "The steepest direction is too steep for this learning rate: the weights cannot rest here.",
        "undecided": "The largest curvature is known too poorly to tell whether the learning rate is stable.",
        "not in its regime": "The bound is that of SGD with momentum.",
    }

    def assumptions(self, evidence: Evidence) -> list[Assumption]:
        return [a for a in evidence.requires_sgd() if a.name in ("needs SGD", "needs one learning rate")]

    def measure(self, evidence: Evidence) -> Measured:
        sgd = evidence.sgd
        values = evidence.pairs.eigenvalues.cpu().numpy() + sgd.weight_decay
        scaled = values * sgd.lr * (1 - sgd.dampening) / (2 * (1 + sgd.momentum))
        residual = float(evidence.pairs.residuals[0]) * abs(scaled[0])
        positive = scaled[scaled > 0]
        note = f"Largest curvature {values[0]:.4g}, bound {2 * (1 + sgd.momentum) / sgd.lr:.4g}."
        details = {"x": np.arange(1, len(positive) + 1), "measured_y": positive, "predicted_y": np.ones(len(positive))}
        return Measured(float(scaled[0]), residual, details=details, note=note)

    def predict(self, evidence: Evidence) -> Measured:
        sgd = evidence.sgd
        return Measured(1 / (1 + 2 * sgd.momentum) if sgd.nesterov else 1.0)


class DimensionBound(Law):
    """The number of sharp directions stays below what noise proportional to the loss allows."""

    name = "dimension_bound"
    title = "Number of sharp directions"
    statement = (
        "When the noise is proportional to the loss, a valley with too many sharp directions cannot hold the weights: "
        "the effective number of outlier eigenvalues must stay below a bound set by batch size, learning rate and "
        "sharpness."
    )
    formula = "n < n_c = 2(B/(η h_max) + 1),  n = Tr H²/h_max²,  η → η/(1−β)"
    source = "Mori et al. 2022, Eq. (16); effective number re-derived for unequal eigenvalues"
    quantity = "n / n_c"
    kind = "bound"
    xlabel = "number of modes counted"
    ylabel = "n = Tr H²/h_max²"
    caveats = (
        "Rests on noise proportional to the loss (see that law).",
        "n counts unequal eigenvalues by Tr H²/h_max²; the participation ratio and the entropy, also given, "
        "over-count.",
    )
    sentences: ClassVar = {
        "holds": "The valley has few enough sharp directions to hold the weights at this noise level.",
        "fails": "The valley has so many sharp directions that noise proportional to the loss would throw the weights "
        "out.",
        "undecided": "The number of sharp directions is known too poorly.",
        "not in its regime": "The bound is that of SGD with a known batch size in a valley of positive curvature.",
    }

    def assumptions(self, evidence: Evidence) -> list[Assumption]:
        checks = [a for a in evidence.requires_sgd() if "every step" not in a.name]
        if all(c.met for c in checks):
            checks.append(Assumption("needs a curved direction", len(evidence.curvature) > 0))
        return checks

    def measure(self, evidence: Evidence) -> Measured:
        from .. import landscape

        curvature = evidence.curvature
        found = landscape.effective_dimension(curvature)
        effective = found.stable_rank
        critical = self._critical(evidence)
        note = (
            f"n = {effective:.2f} of the {len(curvature)} sharpest modes (participation ratio "
            f"{found.participation_ratio:.1f}, entropy {found.entropy:.1f}), n_c = {critical:.3g}."
        )
        rank = np.arange(1, len(curvature) + 1)
        running = np.cumsum(curvature**2) / curvature[0] ** 2
        details = {"x": rank, "measured_y": running, "predicted_y": np.full(len(rank), critical)}
        return Measured(effective / critical, note=note, details=details)

    def predict(self, evidence: Evidence) -> Measured:
        return Measured(1.0)

    def _critical(self, evidence: Evidence) -> float:
        sgd = evidence.sgd
        return 2 * (1 / (sgd.minibatch_factor * sgd.effective_lr * float(evidence.curvature[0])) + 1)
