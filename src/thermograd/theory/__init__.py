"""Closed forms of the statistical physics of SGD: numpy and scipy in float64, one function a formula.

Where a published formula is off, both are here, both are named, and the exact one is the default. Functions are
vectorised over modes; :func:`sweep` runs any of them over hyperparameters.

- :mod:`limiting`: stationary moments, displacements, transients, the Langevin model, currents (Kunin et al. 2024)
- :mod:`sampling`: what reshuffled epochs, a fixed order, subsets and finite windows change (Kuehn & Rosenow 2023)
- :mod:`flatness`: variance and flatness (Feng & Tu 2021)
- :mod:`noise_models`: what the noise covariance is assumed to be
- :mod:`kramers`, :mod:`power_law`, :mod:`heavy_tails`, :mod:`paths`: escape (Xie et al. 2021, Mori et al. 2022)
- :mod:`first_passage`, :mod:`discrete`: exact passage times, of any Langevin equation and of discrete chains
- :mod:`stability`: how large a curvature and how many directions SGD can hold

>>> from thermograd import SGD, theory
>>> theory.limiting.stationary_moments(SGD(lr=0.1, momentum=0.9), [1.0], [1.0]).velocity.round(6)
array([5.405405])
"""

from __future__ import annotations

from . import (
    discrete,
    first_passage,
    flatness,
    heavy_tails,
    kramers,
    limiting,
    noise_models,
    paths,
    power_law,
    sampling,
    stability,
)
from .sweep import Sweep, sweep

__all__ = [
    "Sweep",
    "discrete",
    "first_passage",
    "flatness",
    "heavy_tails",
    "kramers",
    "limiting",
    "noise_models",
    "paths",
    "power_law",
    "sampling",
    "stability",
    "sweep",
]
