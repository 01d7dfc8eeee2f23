r"""What the weights do along Hessian modes under each way of drawing minibatches.

Exact in discrete time for a quadratic loss with additive noise, at any learning rate, momentum (heavy ball,
Nesterov, dampened) and weight decay. Every result is a positive sum over the structure function
:math:`D(m)=E(\theta_{k+m}-\theta_k)^2` under white noise (:mod:`~thermograd.theory.mode`), so none loses digits where
the curvature vanishes. ``noise_variance`` is always the variance of the *minibatch* gradient along the mode
(for a full batch, finite-population factor included), [n].

Batches without repetition inside a batch but independent of each other ("subsets") have the time statistics of
``sampling="replacement"`` and the variance of an epoch's batch: use that scheme with :func:`subset_factor`. Note that
``SGD.minibatch_factor`` with ``sampling="replacement"`` is 1/B, samples drawn with repetition.

Source: Kuehn & Rosenow 2023 (arXiv 2306.05300), re-derived and extended to Nesterov, dampening, fixed order, short
last batches and finite windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..hyperparameters import SGD
from .arrays import Array, as_steps
from .epoch import EpochNoise, epoch_noise, noise_autocovariance, subset_factor
from .mode import Mode, advance, mode
from .scaling import (
    asymptotic_correlation_time,
    asymptotic_variance,
    asymptotic_velocity_variance,
    crossover_curvature,
    detrended_scaling_form,
    flat_window_variance,
    floor_curvature,
    measured_floor,
    multiplicative_floor,
    scaling_form,
)
from .window import weight_variance_window, window_weights

__all__ = [
    "asymptotic_correlation_time",
    "asymptotic_variance",
    "asymptotic_velocity_variance",
    "autocovariance",
    "correlation_time",
    "crossover_curvature",
    "detrended_scaling_form",
    "epoch_noise",
    "flat_window_variance",
    "floor_curvature",
    "mean_squared_displacement",
    "measured_floor",
    "multiplicative_floor",
    "noise_autocovariance",
    "scaling_form",
    "subset_factor",
    "velocity_variance",
    "weight_variance",
    "weight_variance_window",
    "window_weights",
]


def weight_variance(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike, *, drop_last: bool = False) -> Array:
    r"""Stationary variance of the weights along each mode, exact for the sampling scheme in ``sgd.sampling``.

    With replacement :math:`R(0)`; reshuffled (Kuehn & Rosenow 2023, exact form, any momentum)

    .. math:: \sigma^2 = \sum_{m=1}^{M-1} \frac{M-m}{M(M-1)} D(m)
        \;\to\; \Big(\frac{\eta}{1-\beta}\Big)^2 s\,\frac{M+1}{6} \quad (h \to 0,\ \beta = 0),

    shuffled once :math:`\sigma^2 = \frac{s}{M-1}\sum_{j=1}^{M-1}|H(2\pi j/M)|^2` around the mean of the cycle,
    averaged over permutations.

    Args:
        sgd: hyperparameters with batch_size and dataset_size (not needed with replacement).
        curvature: Hessian eigenvalues without weight decay, [n]; zero is allowed without replacement.
        noise_variance: variance of the minibatch gradient, [n].
        drop_last: whether a short last batch is dropped (see :func:`~thermograd.theory.epoch.epoch_noise`).

    Returns:
        [n], in squared weights.

    Raises:
        UnstableError: a mode diverges, or has zero curvature and noise that does not cancel over an epoch.
        NonFiniteError: NaN or infinity given.

    >>> sgd = SGD(lr=0.1, batch_size=10, dataset_size=1000)
    >>> weight_variance(sgd, [0.0, 1.0], 1.0) / (0.1**2 * 101 / 6)
    array([1.        , 0.26149968])
    """
    return autocovariance(sgd, curvature, noise_variance, [0], drop_last=drop_last)[0]


def velocity_variance(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike, *, drop_last: bool = False) -> Array:
    r"""Stationary variance of the velocity :math:`v_k=(\theta_k-\theta_{k-1})/\eta` for the sampling scheme, [n].

    :math:`D_c(1)/\eta^2` with :math:`D_c` the structure function under the scheme's noise; about
    :math:`s/(1-\beta^2)` for every scheme (Kuehn & Rosenow 2023).

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n]; zero is allowed.
        noise_variance: variance of the minibatch gradient, [n].
        drop_last: whether a short last batch is dropped.

    Returns:
        [n], in squared gradients.

    Raises:
        UnstableError: a mode diverges.

    >>> velocity_variance(SGD(lr=0.1, momentum=0.9, sampling="replacement"), [1.0], 1.0).round(6)
    array([5.405405])
    """
    return mean_squared_displacement(sgd, curvature, noise_variance, [1], drop_last=drop_last)[0] / sgd.lr**2


def correlation_time(sgd: SGD, curvature: ArrayLike, *, drop_last: bool = False) -> Array:
    r"""Correlation time :math:`\tau = 2\sigma^2_\theta/(\eta^2\sigma^2_v)` of each mode in steps, [n].

    Kuehn & Rosenow (2023): :math:`(1+\beta)/(\eta h)` in sharp modes and
    :math:`\frac{M+1}{3}\frac{1+\beta}{1-\beta}` in flat ones when epochs are reshuffled.

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n].
        drop_last: whether a short last batch is dropped.

    Returns:
        [n], in optimizer steps.

    Raises:
        UnstableError: a mode diverges or has no stationary variance.

    >>> correlation_time(SGD(lr=0.1, batch_size=10, dataset_size=1000), [0.001]).round(1)
    array([33.6])
    """
    variance = weight_variance(sgd, curvature, 1.0, drop_last=drop_last)
    return 2 * variance / mean_squared_displacement(sgd, curvature, 1.0, [1], drop_last=drop_last)[0]


def autocovariance(
    sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike, lags: ArrayLike, *, drop_last: bool = False
) -> Array:
    r"""Stationary autocovariance :math:`R_c(m)=E\,\theta_k\theta_{k+m}` about the mean, for the sampling scheme.

    :math:`R_c(m) = R(0)\sum_j c(j) - \tfrac12\sum_j c(j) D(m-j)`, with c the noise autocovariance and D the
    structure function under white noise. Averaged over the phase in the epoch (and over permutations).

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n].
        noise_variance: variance of the minibatch gradient, [n].
        lags: optimizer steps, whole numbers >= 0, [t].
        drop_last: whether a short last batch is dropped.

    Returns:
        [t, n], in squared weights.

    Raises:
        UnstableError: a mode diverges or has no stationary variance.

    >>> sgd = SGD(lr=0.5, sampling="replacement")
    >>> autocovariance(sgd, [0.5], 1.0, [0, 1]).ravel().round(4)
    array([0.5714, 0.4286])
    """
    noise = epoch_noise(sgd, drop_last=drop_last)
    unbounded = noise.periodic or noise.total == 0
    filters = mode(sgd, curvature, noise_variance, bounded=not unbounded)
    steps = as_steps(lags, "lags")
    if noise.periodic:
        return _line_sum(filters, noise, steps, displacement=False)
    if noise.white:
        return filters.variance - filters.structure_at(steps)[0] / 2
    return _epoch_autocovariance(filters, noise, steps)


def mean_squared_displacement(
    sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike, steps: ArrayLike, *, drop_last: bool = False
) -> Array:
    r"""Mean-squared displacement :math:`E(\theta_{k+m}-\theta_k)^2` from stationarity, for the sampling scheme.

    :math:`D_c(m)=\sum_j c(j)\,[D(m-j)-D(j)]`; finite at zero curvature for every scheme.

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n]; zero is allowed.
        noise_variance: variance of the minibatch gradient, [n].
        steps: lags m in optimizer steps, [t].
        drop_last: whether a short last batch is dropped.

    Returns:
        [t, n], in squared weights.

    Raises:
        UnstableError: a mode diverges.

    >>> sgd = SGD(lr=0.1, momentum=0.9, sampling="replacement")
    >>> mean_squared_displacement(sgd, [1.0], 1.0, [7]).round(6)
    array([[1.38735]])
    """
    noise = epoch_noise(sgd, drop_last=drop_last)
    filters = mode(sgd, curvature, noise_variance, bounded=False)
    lags = as_steps(steps)
    if noise.periodic:
        return _line_sum(filters, noise, lags, displacement=True)
    if noise.white:
        return filters.structure_at(lags)[0]
    return _epoch_displacement(filters, noise, lags)


def _epoch_sum(filters: Mode, noise: EpochNoise, lags: NDArray[np.int64]) -> Array:
    """sum_j c(j) D(m - j), [t, n]: the triangle is a second difference of the double sum G of D."""
    size, count = noise.batches, len(lags)
    wanted = np.concatenate([lags, lags + size, np.abs(lags - size)])
    structure, double = filters.structure_at(wanted)  # [3t, n] each
    here, after, before = double[:count], double[count : 2 * count], double[2 * count :]
    return noise.spike * structure[:count] - noise.dip / size * (after - 2 * here + before)


def _epoch_autocovariance(filters: Mode, noise: EpochNoise, lags: NDArray[np.int64]) -> Array:
    """R_c(m): the sum up to one epoch, then the free decay, which does not cancel."""
    size = noise.batches
    base = filters.variance * noise.total if noise.total else np.zeros_like(filters.pull)
    near = base - _epoch_sum(filters, noise, np.minimum(lags, size)) / 2
    far = lags > size
    if not far.any():
        return near
    seeds = base - _epoch_sum(filters, noise, np.array([size, size + 1])) / 2  # [2, n]
    n = filters.pull.size
    step = np.zeros((n, 2, 2))
    step[:, 0, 1] = 1
    step[:, 1, 0], step[:, 1, 1] = -filters.feedback, filters.sum_of_poles
    near[far] = advance(step, seeds.T.copy(), lags[far] - size)[:, :, 0]
    return near


def _epoch_displacement(filters: Mode, noise: EpochNoise, lags: NDArray[np.int64]) -> Array:
    sums = _epoch_sum(filters, noise, np.concatenate([np.zeros(1, dtype=np.int64), lags]))
    return sums[1:] - sums[0]


def _line_sum(filters: Mode, noise: EpochNoise, lags: NDArray[np.int64], *, displacement: bool) -> Array:
    """Periodic noise: a sum over its M - 1 spectral lines (the zeroth, a constant offset, does not move)."""
    out = np.zeros((len(lags), filters.pull.size))  # [t, n]
    line = np.arange(1, noise.batches)
    for block in np.array_split(line, max(1, line.size * filters.pull.size // 4_000_000)):
        power = filters.transfer(2 * np.pi * block / noise.batches)  # [f, n]
        angle = 2 * np.pi * ((lags[:, None] * block) % noise.batches) / noise.batches  # [t, f]
        out += (4 * np.sin(angle / 2) ** 2 if displacement else np.cos(angle)) @ power
    return noise.spike / noise.batches * filters.noise * out
