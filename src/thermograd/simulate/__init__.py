"""Replicas by the thousand: minibatch SGD on solvable problems, Langevin equations, first passages.

Kernels are compiled by numba once and cached on disk. Each replica draws from its own generator, keyed by
(seed, replica), so the numbers are the same for any number of threads.

>>> import numpy as np
>>> from thermograd import SGD, simulate
>>> sgd = SGD(lr=0.1, batch_size=1, dataset_size=2, sampling="replacement")
>>> simulate.quadratic_sgd(sgd, [1.0], np.array([[-1.0], [1.0]]), steps=5, replicas=3).position.shape
(3, 6, 1)
"""

from __future__ import annotations

from .ensemble import Ensemble
from .first_passage import FirstPassage, first_passage, linear_regression_first_passage
from .langevin import Trajectories, langevin
from .minibatch import linear_regression_sgd, quadratic_sgd
from .potentials import POTENTIALS, Potential

__all__ = [
    "POTENTIALS",
    "Ensemble",
    "FirstPassage",
    "Potential",
    "Trajectories",
    "first_passage",
    "langevin",
    "linear_regression_first_passage",
    "linear_regression_sgd",
    "quadratic_sgd",
]
