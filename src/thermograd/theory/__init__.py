"""Closed forms of the statistical physics of SGD: numpy and scipy in float64, one function a formula.

Where a published formula is off, both are here, both are named, and the exact one is the default.

>>> from thermograd import SGD, theory
>>> theory.limiting.stationary_moments(SGD(lr=0.1, momentum=0.9), [1.0], [1.0]).velocity.round(6)
array([5.405405])
"""

from __future__ import annotations

from . import discrete, first_passage, flatness, kramers, limiting, power_law, sampling, stability

__all__ = ["discrete", "first_passage", "flatness", "kramers", "limiting", "power_law", "sampling", "stability"]
