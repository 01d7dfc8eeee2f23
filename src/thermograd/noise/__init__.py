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
    BlockCovariance,
    Covariance,
    DirectionalVariance,
    covariance,
    covariance_eigenpairs,
    in_basis,
    in_directions,
    second_moment,
)
from .decoupling import Decoupling, decoupling
from .ensemble import MinibatchLosses, minibatch_losses
from .gradients import projections
from .strength import NoiseScale, Strength, StrengthAlong, noise_scale, strength, strength_along

__all__ = [
    "Alignment",
    "BlockCovariance",
    "Covariance",
    "Decoupling",
    "DirectionalVariance",
    "MinibatchLosses",
    "NoiseScale",
    "Strength",
    "StrengthAlong",
    "alignment",
    "covariance",
    "covariance_eigenpairs",
    "decoupling",
    "in_basis",
    "in_directions",
    "minibatch_losses",
    "noise_scale",
    "projections",
    "second_moment",
    "strength",
    "strength_along",
]
