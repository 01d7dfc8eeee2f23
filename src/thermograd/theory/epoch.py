r"""The correlation of minibatch noise between steps, for each way of drawing the minibatches.

The noise of a minibatch drawn without replacement remembers the rest of its epoch: what one batch got, the others
lack. Averaged over the phase in the epoch, its autocovariance in units of the variance of one (full) batch is

.. math::
    c(m) = A\,\delta_{m0} - \frac{(M-|m|)_+}{M\,(N/B-1)}

(Kuehn & Rosenow 2023, arXiv 2306.05300, re-derived, for any N and B; M batches an epoch). When B divides N,
:math:`A = M/(M-1)` and the sum over all lags is exactly zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import HyperparameterError
from ..hyperparameters import SGD
from .arrays import Array, as_steps

__all__ = ["EpochNoise", "epoch_noise", "noise_autocovariance", "subset_factor"]


@dataclass(frozen=True)
class EpochNoise:
    """Autocovariance of the noise: ``spike`` at lag 0 minus ``dip`` times the triangle (M - |m|)_+ / M.

    Args:
        batches: M, steps in an epoch, the short last batch counted if it is used.
        spike: A of the module's formula, in units of the variance of a full batch.
        dip: 1/(N/B - 1); zero with replacement.
        periodic: the same order every epoch, so that the noise repeats with period M.
    """

    batches: int
    spike: float
    dip: float
    periodic: bool = False

    @property
    def white(self) -> bool:
        """Whether successive steps are independent."""
        return self.dip == 0 and not self.periodic

    @property
    def total(self) -> float:
        """Sum of the autocovariance over all lags (zero for reshuffled epochs whose size B divides N)."""
        total = self.spike - self.dip * self.batches
        return 0.0 if abs(total) < 1e-12 * self.spike else total

    def at(self, lags: ArrayLike) -> Array:
        """c(m) at whole lags (any sign)."""
        m = np.abs(np.asarray(lags, dtype=np.float64))
        if self.periodic:
            return np.where(m % self.batches == 0, self.spike - self.dip, -self.dip)
        return self.spike * (m == 0) - self.dip * np.maximum(1 - m / self.batches, 0)


def epoch_noise(sgd: SGD, *, drop_last: bool = False) -> EpochNoise:
    """The correlation of minibatch noise over steps for ``sgd.sampling``.

    Args:
        sgd: hyperparameters; batch_size and dataset_size are needed unless sampling is with replacement.
        drop_last: whether a last batch shorter than B is dropped; else it is used, with its larger noise,
            as a ``DataLoader`` does by default. Of no effect when B divides N.

    Returns:
        The autocovariance in units of the variance of one full batch.

    Raises:
        HyperparameterError: sizes missing, or the batch is the whole data set (then there is no noise).

    >>> noise = epoch_noise(SGD(lr=0.1, batch_size=10, dataset_size=1000))
    >>> noise.at([0, 1, 50, 100]).round(6)
    array([ 1.      , -0.01    , -0.005051,  0.      ])
    """
    if sgd.sampling == "replacement":
        return EpochNoise(1, 1.0, 0.0)
    ratio = sgd.steps_per_epoch
    if ratio <= 1:
        raise HyperparameterError(
            "the batch is the whole data set, so minibatch noise is zero",
            expected="batch_size < dataset_size",
            remedy="use the noise-free dynamics, or sampling='replacement'",
        )
    assert sgd.batch_size is not None
    assert sgd.dataset_size is not None
    whole = int(ratio)
    rest = sgd.dataset_size - whole * sgd.batch_size
    dip, batches, variance = 1 / (ratio - 1), whole, 1.0
    if rest and not drop_last:
        batches = math.ceil(ratio)
        short = (sgd.dataset_size / rest - 1) / (ratio - 1)  # variance of the short batch over that of a full one
        variance = (whole + short) / batches
    if batches == 1:  # drop_last with fewer than two full batches: independent draws
        return EpochNoise(1, 1.0, 0.0, sgd.sampling == "shuffle-once")
    return EpochNoise(batches, variance + dip, dip, sgd.sampling == "shuffle-once")


def noise_autocovariance(sgd: SGD, lags: ArrayLike, *, drop_last: bool = False) -> Array:
    """Autocovariance of minibatch noise at these lags, in units of the variance of one batch.

    With replacement 1 at lag zero only; reshuffled: the triangle of Kuehn & Rosenow (2023), averaged over the phase;
    shuffled once: 1 at multiples of M and -1/(M - 1) elsewhere, averaged over permutations (derived here).

    Args:
        sgd: hyperparameters with batch_size and dataset_size.
        lags: steps, whole numbers >= 0, [t].
        drop_last: see :func:`epoch_noise`.

    Returns:
        [t].

    Raises:
        HyperparameterError: see :func:`epoch_noise`.

    >>> noise_autocovariance(SGD(lr=1, batch_size=5, dataset_size=20, sampling="shuffle-once"), [0, 1, 4]).round(4)
    array([ 1.    , -0.3333,  1.    ])
    """
    return epoch_noise(sgd, drop_last=drop_last).at(as_steps(lags, "lags"))


def subset_factor(sgd: SGD) -> float:
    r"""Minibatch over per-sample gradient variance without repetition inside a batch, :math:`\frac{N-B}{B(N-1)}`.

    Mori et al. (2022), Eq. 8; every batch of an epoch has it too. Batches that are such subsets but *independent of
    each other* are the scheme "replacement" of this package with this factor: white in time, smaller in size.

    Args:
        sgd: hyperparameters with batch_size and dataset_size.

    Returns:
        The factor, 1/B for N much larger than B and zero for the full batch.

    Raises:
        HyperparameterError: sizes missing, or a batch larger than the data set.

    >>> round(subset_factor(SGD(lr=0.1, batch_size=10, dataset_size=100, sampling="replacement")), 6)
    0.090909
    """
    batch, size = sgd._needed("batch_size"), sgd._needed("dataset_size")
    if batch > size:
        raise HyperparameterError(
            f"batch_size {batch} is larger than dataset_size {size}", expected="a subset no larger than the data set"
        )
    return (size - batch) / (batch * (size - 1)) if size > 1 else 0.0
