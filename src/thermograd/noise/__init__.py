"""The noise of minibatch gradients at a point in weight space: covariance, strength, and what it goes along with.

>>> import thermograd as tg, torch
>>> X = torch.tensor([[1.0], [3.0]])
>>> problem = tg.Problem(torch.nn.Linear(1, 1, bias=False), lambda output, target: output.sum(), (X, X))
>>> tg.noise.strength(problem).value
1.0
"""

from __future__ import annotations

from .alignment import Alignment, alignment
from .covariance import (
    Covariance,
    CovarianceSpectrum,
    covariance,
    covariance_eigenpairs,
    covariance_spectrum,
    second_moment,
)
from .decoupling import Decoupling, decoupling
from .directions import BlockCovariance, DirectionalVariance, in_basis, in_directions
from .ensemble import MinibatchLosses, minibatch_losses
from .epoch import EpochAutocovariance, epoch_autocovariance
from .gaussianity import Gaussianity, gaussianity, gaussianity_of
from .gradients import projections
from .online import OnlineNoiseScale, OnlineScale
from .strength import NoiseScale, Strength, StrengthAlong, noise_scale, strength, strength_along

__all__ = [
    "Alignment",
    "BlockCovariance",
    "Covariance",
    "CovarianceSpectrum",
    "Decoupling",
    "DirectionalVariance",
    "EpochAutocovariance",
    "Gaussianity",
    "MinibatchLosses",
    "NoiseScale",
    "OnlineNoiseScale",
    "OnlineScale",
    "Strength",
    "StrengthAlong",
    "alignment",
    "covariance",
    "covariance_eigenpairs",
    "covariance_spectrum",
    "decoupling",
    "epoch_autocovariance",
    "gaussianity",
    "gaussianity_of",
    "in_basis",
    "in_directions",
    "minibatch_losses",
    "noise_scale",
    "projections",
    "second_moment",
    "strength",
    "strength_along",
]
