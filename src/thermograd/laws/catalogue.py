"""All laws, in the order of the sheet."""

from __future__ import annotations

from ..errors import InputError
from .anomalous_diffusion import AnomalousDiffusion
from .correlation_time import CorrelationTime
from .decoupling import Decoupling
from .fluctuation_dissipation import FluctuationDissipation
from .law import Law
from .low_dimension import LowDimension
from .noise_alignment import NoiseAlignment
from .noise_strength import NoiseStrength
from .stability import CurvatureStability, DimensionBound
from .variance_flatness import VarianceFlatness
from .velocity_variance import VelocityVariance
from .weight_variance import WeightVariance

__all__ = ["catalogue", "find"]

_LAWS: tuple[Law, ...] = (
    NoiseAlignment(),
    NoiseStrength(),
    Decoupling(),
    FluctuationDissipation(),
    LowDimension(),
    VelocityVariance(),
    WeightVariance(),
    VarianceFlatness(),
    CorrelationTime(),
    AnomalousDiffusion(),
    CurvatureStability(),
    DimensionBound(),
)


def catalogue() -> tuple[Law, ...]:
    """Every law, in the order of the sheet.

    >>> [law.name for law in catalogue()][:3]
    ['noise_alignment', 'noise_strength', 'decoupling']
    """
    return _LAWS


def find(name: str) -> Law:
    """The law of that name.

    Raises:
        InputError: there is none.

    >>> find("weight_variance").title
    'Weight variance of each Hessian mode'
    """
    for law in _LAWS:
        if law.name == name:
            return law
    raise InputError(f"there is no law {name!r}", expected=f"one of: {', '.join(law.name for law in _LAWS)}")
