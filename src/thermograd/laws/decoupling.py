"""Decoupling of the loss from the sensitivity of the output."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..errors import NotAvailableError
from .evidence import Evidence
from .law import Assumption, Law, Measured

__all__ = ["Decoupling"]


class Decoupling(Law):
    """A sample's error and the sensitivity of its output to the weights are uncorrelated."""

    name = "decoupling"
    title = "Decoupling"
    statement = (
        "How wrong the network is on a sample and how strongly its output on that sample reacts to the weights are "
        "independent, so the noise covariance is that of the average error and the average sensitivity."
    )
    formula = "⟨Jᵀ r rᵀ J⟩ = ⟨Jᵀ ⟨r rᵀ⟩ J⟩   (J = ∂f/∂θ, r = ∂ℓ/∂f; squared loss: ⟨ℓ ∇f∇fᵀ⟩ = L ⟨∇f∇fᵀ⟩)"
    source = "Mori et al. 2022, Eq. (7), Fig. 1; written for any loss"
    quantity = "trace, coupled / decoupled"
    tolerance = 0.1
    xlabel = "eigenvalue if decoupled"
    ylabel = "eigenvalue of the noise"
    caveats = (
        "The published test is that the two spectra look alike on a logarithmic axis; the ratio of traces asked here "
        "is stricter, and the factor it finds enters the escape exponent.",
    )
    sentences: ClassVar = {
        "holds": "Samples that the network gets wrong are no more sensitive than others, so the noise covariance "
        "splits into loss times curvature as the theory assumes.",
        "fails": "Samples that the network gets wrong are also unusually sensitive (or insensitive) to the weights, so "
        "the noise is not simply loss times curvature.",
        "undecided": "The number of samples is too small to tell whether error and sensitivity are independent.",
        "not in its regime": "The law needs a network with outputs; a plain function of the weights has none.",
    }

    def assumptions(self, evidence: Evidence) -> list[Assumption]:
        has_output = evidence.problem.model is not None
        return [Assumption("needs a network output", has_output, "" if has_output else "built from a function")]

    def measure(self, evidence: Evidence) -> Measured:
        from ..noise import decoupling

        if evidence.problem.model is None:
            raise NotAvailableError("a problem made from a function has no network output")
        found = decoupling(evidence.problem, theta=evidence.centre, index=evidence.samples, seed=evidence.seed)
        coupled = np.asarray(found.eigenvalues, dtype=float)
        decoupled = np.asarray(found.decoupled_eigenvalues, dtype=float)
        count = min(len(coupled), len(decoupled))
        note = (
            f"Over the top {count} eigenvalues the two spectra differ by a median factor of "
            f"{np.exp(found.spectrum_distance):.2f}; correlation of a sample's loss with its sensitivity "
            f"{found.correlation:.2f} ± {found.correlation_stderr:.2f}."
        )
        details = {
            "x": decoupled[:count],
            "measured_y": coupled[:count],
            "predicted_y": decoupled[:count],
        }
        return Measured(found.ratio, found.stderr, details=details, note=note)

    def predict(self, evidence: Evidence) -> Measured:
        return Measured(1.0)
