"""Straight lines through logarithms, and what their slopes are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import TooShortError

__all__ = ["PowerLaw", "bootstrap", "power_law"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """y = prefactor * x**exponent, fitted by least squares to the logarithms.

    ``stderr`` is the least-squares error of the exponent, ``correlation`` Pearson's r of the logarithms, ``decades``
    the range of x.
    """

    exponent: float
    prefactor: float
    stderr: float
    correlation: float
    decades: float


def power_law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """Fit a power law to positive points.

    Raises:
        TooShortError: fewer than three points with positive coordinates, or x does not vary.

    >>> fit = power_law([1, 2, 4, 8], [3, 12, 48, 192])
    >>> round(fit.exponent, 6), round(fit.prefactor, 6)
    (2.0, 3.0)
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
    u, v = np.log(x[good]), np.log(y[good])
    if len(u) < 3 or np.ptp(u) == 0:
        raise TooShortError(
            f"a power law cannot be fitted to {len(u)} points with positive coordinates",
            expected="at least three points of different x",
        )
    du, dv = u - u.mean(), v - v.mean()
    slope = float(du @ dv / (du @ du))
    residual = dv - slope * du
    stderr = float(np.sqrt(residual @ residual / max(1, len(u) - 2) / (du @ du)))
    spread = float(np.sqrt((du @ du) * (dv @ dv)))
    return PowerLaw(
        slope,
        float(np.exp(v.mean() - slope * u.mean())),
        stderr,
        float(du @ dv / spread) if spread > 0 else 0.0,
        float(np.ptp(u) / np.log(10)),
    )


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], resamples: NDArray[np.int64]) -> float:
    """Standard error of ``statistic(indices)`` over rows of resampled indices."""
    return float(np.std([statistic(draw) for draw in resamples], ddof=1))
