"""The few statistics the noise measurements share: resampling weights and straight lines in logarithms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError, TooShortError

__all__ = ["PowerLaw", "bootstrap_weights", "correlation", "power_law", "slopes"]


@dataclass(frozen=True)
class PowerLaw:
    """y = prefactor * x^exponent by least squares of logarithms, with the standard error of the exponent."""

    exponent: float
    stderr: float
    prefactor: float
    correlation: float


def power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Ordinary least squares of log y on log x.

    Args:
        x: positive numbers ``[n]``.
        y: positive numbers ``[n]``.

    Raises:
        TooShortError: fewer than three points.
        InputError: numbers that are not positive and finite, or all x equal.

    >>> fit = power_law(np.array([1.0, 2.0, 4.0]), np.array([3.0, 12.0, 48.0]))
    >>> round(fit.exponent, 12), round(fit.prefactor, 12)
    (2.0, 3.0)
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3:
        raise TooShortError(f"{len(x)} points for a power law", expected="at least 3")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise InputError("a power law is fitted to numbers that are not positive", expected="positive finite numbers")
    u, v = np.log(x), np.log(y)
    du, dv = u - u.mean(), v - v.mean()
    spread = float(du @ du)
    if spread <= 1e-24 * max(1.0, float(u @ u)):
        raise InputError("all x of a power law are equal", expected="points at different x")
    exponent = float(du @ dv) / spread
    residual = dv - exponent * du
    stderr = float(np.sqrt(residual @ residual / (len(x) - 2) / spread))
    return PowerLaw(exponent, stderr, float(np.exp(v.mean() - exponent * u.mean())), correlation(u, v))


def slopes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Least-squares slopes of each row of ``v`` [r, n] on ``u`` [n]: [r]."""
    du = u - u.mean()
    return (v - v.mean(1, keepdims=True)) @ du / (du @ du)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; zero when either is constant, as a constant goes along with nothing.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    """
    dx, dy = x - x.mean(), y - y.mean()
    size = np.sqrt((dx @ dx) * (dy @ dy))
    rounding = 1e-24 * (x @ x) * (y @ y)
    return float(np.clip(dx @ dy / size, -1, 1)) if size**2 > rounding else 0.0


def bootstrap_weights(samples: int, resamples: int, seed: int) -> np.ndarray:
    """How often each sample occurs in each resampling with replacement, over the sample count: [resamples, samples].

    >>> bootstrap_weights(5, 2, seed=0).sum(1)
    array([1., 1.])
    """
    random = np.random.default_rng(seed)
    return random.multinomial(samples, np.full(samples, 1 / samples), size=resamples) / samples
