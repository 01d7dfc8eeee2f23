r"""Is the noise of minibatch gradients Gaussian? Asked of one quantity, across minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ..errors import InputError, TooShortError
from ..landscape.displaced import as_directions
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from .gradients import projections_so_far

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Gaussianity", "gaussianity", "gaussianity_of"]

_LEAST = 20  # values below which no test is made
_SHAPIRO = 5000  # values up to which the p-value of Shapiro and Wilk is known
_TAIL = 0.05  # part of the values, by magnitude, whose tail index is estimated


@dataclass(frozen=True)
class Gaussianity(Measurement):
    """Shape of the distribution of one or more quantities across minibatches; see :func:`gaussianity`."""

    values: np.ndarray = quantity("batch", "direction", long_name="standardised gradient along the direction")
    skewness: np.ndarray = quantity("direction", long_name="skewness")
    skewness_stderr: np.ndarray = quantity("direction", long_name="its standard error for a Gaussian")
    excess_kurtosis: np.ndarray = quantity("direction", long_name="excess kurtosis")
    excess_kurtosis_stderr: np.ndarray = quantity("direction", long_name="its standard error for a Gaussian")
    anderson_darling: np.ndarray = quantity("direction", long_name="Anderson-Darling statistic")
    anderson_darling_p: np.ndarray = quantity("direction", long_name="its p-value, mean and variance estimated")
    shapiro_p: np.ndarray = quantity("direction", long_name="p-value of Shapiro and Wilk")
    tail_index: np.ndarray = quantity("direction", long_name="tail index by Hill's estimator")
    tail_low: np.ndarray = quantity("direction", long_name="lower end of its 95% interval")
    tail_high: np.ndarray = quantity("direction", long_name="upper end of its 95% interval")
    gaussian_tail_index: float = quantity(long_name="what Hill's estimator gives for Gaussian values of this number")
    batches: int = quantity(long_name="number of minibatches")
    batch_size: int = quantity(units="samples", long_name="batch size; 1 when single samples were looked at")

    _primary = "excess_kurtosis"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Quantiles against those of a Gaussian."""
        ax = new_axes(ax)
        theory = stats.norm.ppf((np.arange(len(self.values)) + 0.5) / len(self.values))
        for i in range(min(5, self.values.shape[1])):
            ax.plot(theory, np.sort(self.values[:, i]), ".", ms=3, label=f"direction {i + 1}")
        ax.axline((0, 0), slope=1, color="0.5", lw=0.8)
        ax.set(xlabel="Gaussian quantile", ylabel="quantile of the noise")
        ax.legend()
        return ax


def gaussianity(
    problem: Problem,
    directions: Any,
    batch_size: int | None = None,
    batches: int = 1000,
    theta: Any = None,
    index: Any = None,
    seed: int = 0,
) -> Gaussianity:
    r"""Shape of the minibatch gradient's distribution along directions, across minibatches.

    One quantity at a time, over independent minibatches: a test across the parameters of one gradient, as is often
    made, mixes thousands of variances and rejects a Gaussian for that alone (Xie et al. 2021, section 3, reply to
    Simsekli et al. 2019). Each minibatch draws ``batch_size`` samples with replacement, independently, so that the
    sum of B independent terms is seen: skewness falls as :math:`B^{-1/2}` and excess kurtosis as 1/B.

    Anderson and Darling's p-value is for mean and variance estimated (Stephens 1986, table 4.9); Shapiro and Wilk's is
    from the first 5000 values. The tail index is Hill's (1975), from the largest twentieth of magnitudes, with the
    interval :math:`\alpha (1 \pm 1.96/\sqrt k)`: a Gaussian has no power-law tail and gives
    ``gaussian_tail_index`` at this number of values; a smaller index is a heavier tail, below 2 infinite variance.

    Args:
        problem: the problem.
        directions: ``[P, k]``, one direction a column (or ``[P]``, or eigenpairs).
        batch_size: samples in a minibatch; default: that of the DataLoader the problem was built from, or 1. With 1
            and ``batches=0`` each sample is looked at once.
        batches: how many minibatches, at least 20; 0 for each sample once.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        seed: of the minibatches.

    Raises:
        InputError: a size out of range, or a direction without noise. TooShortError: fewer than 20 values.

    >>> import torch
    >>> data = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(1), data)
    >>> bool(gaussianity(problem, torch.ones(1), batch_size=8).anderson_darling_p[0] > 0.001)
    True
    """
    columns = as_directions(problem, directions)
    slopes = projections_so_far(problem, columns, theta, index).double().cpu().numpy()  # [N, k]
    size = int(batch_size if batch_size is not None else problem.batch_size or 1)
    if size < 1 or batches < 0 or (batches == 0 and size != 1):
        raise InputError(f"batch_size is {size} and batches {batches}", expected="at least 1 and 20 (0 for size 1)")
    if batches:
        random = np.random.default_rng(seed)
        slopes = np.stack([slopes[random.integers(len(slopes), size=size)].mean(0) for _ in range(batches)])
    return gaussianity_of(slopes, batch_size=size)


def gaussianity_of(values: Any, batch_size: int = 1) -> Gaussianity:
    r"""The same for values already at hand: ``[n]`` or ``[n, k]`` of one or k quantities over n minibatches.

    Minibatch gradients recorded along a run may be given; they should be far enough apart to be independent.

    Raises:
        TooShortError: fewer than 20 values. InputError: not finite, or all equal.

    >>> gaussianity_of(np.random.default_rng(0).standard_t(2, size=2000)).anderson_darling_p[0] < 1e-4
    np.True_
    """
    table = np.asarray(values, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InputError(f"values have shape {table.shape}", expected="finite numbers, [n] or [n, k]")
    n = len(table)
    if n < _LEAST:
        raise TooShortError(f"{n} values for a test of their distribution", expected=f"at least {_LEAST}")
    spread = table.std(0, ddof=1)
    if (spread <= 1e-12 * (np.abs(table).max(0) + 1e-300)).any():
        where = int(np.argmin(spread))
        raise InputError(f"direction {where} has no noise: all values are equal", expected="values that scatter")
    z = (table - table.mean(0)) / spread  # [n, k]
    skew_error = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    kurtosis_error = 2 * skew_error * math.sqrt((n * n - 1) / ((n - 3) * (n + 5)))
    darling = np.array([_anderson_darling(column) for column in z.T])
    tails = np.array([_hill(column) for column in z.T])
    shape = z.shape[1:]
    return Gaussianity(
        values=z,
        skewness=stats.skew(z, bias=False),
        skewness_stderr=np.full(shape, skew_error),
        excess_kurtosis=stats.kurtosis(z, bias=False),
        excess_kurtosis_stderr=np.full(shape, kurtosis_error),
        anderson_darling=darling,
        anderson_darling_p=np.array([_darling_p(a, n) for a in darling]),
        shapiro_p=np.array([stats.shapiro(column[:_SHAPIRO]).pvalue for column in z.T]),
        tail_index=tails[:, 0],
        tail_low=tails[:, 1],
        tail_high=tails[:, 2],
        gaussian_tail_index=float(_hill(stats.norm.ppf((np.arange(n) + 0.5) / n))[0]),
        batches=n,
        batch_size=int(batch_size),
    )


def _anderson_darling(z: np.ndarray) -> float:
    """A^2 of standardised values against the normal distribution."""
    z, n = np.sort(z), len(z)
    weights = 2 * np.arange(1, n + 1) - 1
    return float(-n - (weights * (stats.norm.logcdf(z) + stats.norm.logsf(z[::-1]))).sum() / n)


def _darling_p(statistic: float, n: int) -> float:
    """Its p-value when mean and variance are estimated (D'Agostino & Stephens 1986, table 4.9)."""
    a = statistic * (1 + 0.75 / n + 2.25 / n**2)
    if a >= 0.6:
        return float(np.exp(1.2937 - 5.709 * min(a, 100.0) + 0.0186 * min(a, 100.0) ** 2)) if a < 13 else 0.0
    if a >= 0.34:
        return float(np.exp(0.9177 - 4.279 * a - 1.38 * a**2))
    if a >= 0.2:
        return float(1 - np.exp(-8.318 + 42.796 * a - 59.938 * a**2))
    return float(1 - np.exp(-13.436 + 101.14 * a - 223.73 * a**2))


def _hill(z: np.ndarray) -> tuple[float, float, float]:
    """Hill's tail index of magnitudes with its 95% interval."""
    size = np.sort(np.abs(z))[::-1]
    k = max(10, int(_TAIL * len(size)))
    logs = np.log(size[:k] / max(size[k], 1e-300))
    alpha = 1 / max(float(logs.mean()), 1e-300)
    half = 1.96 / math.sqrt(k)
    return alpha, alpha * (1 - half), alpha * (1 + half)
