r"""Power-law escape: SGD whose noise strength is proportional to the loss (Mori et al. 2022, arXiv 2105.09557).

Noise covariance :math:`\Sigma=\frac{2L}{B}H^*`, time :math:`t=\eta k`, Ito. The minimum has loss :math:`L^*` and
outlier curvatures :math:`h`. Momentum enters as :math:`\eta\to\eta/(1-\beta)`. Weight decay and the correlation of
noise over an epoch are outside the theory. The density and the asymptotic slopes are exact for *that* equation; what
real minibatches do differs where a docstring says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import gammaln

from ..errors import DataError, UnstableError
from ..hyperparameters import SGD
from .arrays import Array, finite
from .first_passage import _log_double_integral, _panel_nodes

__all__ = [
    "asymptotic_slope",
    "critical_dimension",
    "effective_dimension",
    "escape_rate",
    "inverse_noise",
    "log_escape_rate",
    "mean_first_passage_time",
    "mean_first_passage_time_asymptotic",
    "stationary_exponent",
    "stationary_exponent_discrete",
    "tail_index",
    "two_curvature_slope",
]


def inverse_noise(sgd: SGD, curvature: ArrayLike) -> Array:
    r"""The one number of the theory, :math:`B(1-\beta)/(\eta h)`, same shape as ``curvature``.

    Raises:
        UnstableError: a curvature that is not positive.

    >>> float(inverse_noise(SGD(lr=0.1, batch_size=1), 1.0).round(6))
    10.0
    """
    h = finite(curvature, "curvature")
    if np.any(h <= 0):
        raise UnstableError(f"the curvature is {h.min():g}", expected="a curvature > 0 at the minimum")
    return sgd._needed("batch_size") / (sgd.effective_lr * h)


def stationary_exponent(sgd: SGD, curvature: ArrayLike) -> Array:
    r"""Exponent of the stationary density :math:`P\sim L^{-\phi}`, :math:`\phi=1+\frac{B}{\eta h}` (Mori 2022, Eq. 17).

    Exact for the Ito equation when the outlier curvatures are equal. Discrete minibatches show
    :func:`stationary_exponent_discrete`.

    Args:
        sgd: hyperparameters with a batch size.
        curvature: h at the minimum, > 0, any shape.

    Returns:
        phi, same shape.

    Raises:
        UnstableError: a curvature that is not positive.

    >>> float(stationary_exponent(SGD(lr=0.1, batch_size=10), 1.0).round(6))
    101.0
    """
    return 1 + inverse_noise(sgd, curvature)


def stationary_exponent_discrete(sgd: SGD, curvature: ArrayLike) -> Array:
    r"""Exponent that the core of the density shows at finite learning rate, :math:`\frac{B}{\eta h}-\frac{B-1}{2}`.

    Derived by matching the exact variance of minibatch SGD on Gaussian linear regression; within 2% of simulation for
    :math:`\eta\le1, B\le20`. Not the index of the far tail.

    Args:
        sgd: hyperparameters with a batch size.
        curvature: h at the minimum, > 0, any shape.

    Returns:
        phi, same shape.

    Raises:
        UnstableError: a curvature that is not positive.

    >>> float(stationary_exponent_discrete(SGD(lr=1.0, batch_size=10), 1.0).round(6))
    5.5
    """
    return inverse_noise(sgd, curvature) - (sgd._needed("batch_size") - 1) / 2


def tail_index(sgd: SGD, curvature: ArrayLike, dimension: ArrayLike) -> Array:
    r"""Index of the radial tail, :math:`P(r>R)\sim R^{-(2\phi-n)}`, of the Ito equation (from Mori 2022, Eq. 17).

    >>> float(tail_index(SGD(lr=0.1, batch_size=1), 1.0, 2).round(6))
    20.0
    """
    return 2 * stationary_exponent(sgd, curvature) - finite(dimension, "dimension")


def critical_dimension(sgd: SGD, curvature: ArrayLike) -> Array:
    r"""Largest number of outlier directions of a stable minimum, :math:`n_c=2(\frac{B}{\eta h}+1)` (Mori 2022, Eq. 16).

    From normalisability of the Ito density; the mean-square bound of discrete SGD is
    :func:`thermograd.theory.stability.largest_dimension`.

    Args:
        sgd: hyperparameters with a batch size.
        curvature: h along the escape direction, > 0, any shape.

    Returns:
        n_c, same shape.

    Raises:
        UnstableError: a curvature that is not positive.

    >>> float(critical_dimension(SGD(lr=0.1, batch_size=1), 1.0).round(6))
    22.0
    """
    return 2 * (inverse_noise(sgd, curvature) + 1)


def asymptotic_slope(sgd: SGD, curvature: ArrayLike, dimension: ArrayLike) -> Array:
    r"""Slope of log escape time on log loss ratio >> 1, :math:`\frac{B}{\eta h}+1-\frac n2` (Mori 2022, Eq. 15).

    >>> asymptotic_slope(SGD(lr=0.1, batch_size=1), 1.0, [1, 10]).round(6)
    array([10.5,  6. ])
    """
    return inverse_noise(sgd, curvature) + 1 - finite(dimension, "dimension") / 2


def effective_dimension(curvature: ArrayLike) -> float:
    r"""Number of directions that count in the slope for unequal curvatures, :math:`\mathrm{Tr}H^2/h_{max}^2`.

    A rule of thumb (derived numerically from the exact tail exponent); the participation ratio over-counts.

    Args:
        curvature: outlier eigenvalues, [n].

    Returns:
        Between 1 and n.

    Raises:
        UnstableError: no positive curvature.

    >>> effective_dimension([1.0, 1.0, 0.5])
    2.25
    """
    h = finite(curvature, "curvature")
    if h.size == 0 or h.max() <= 0:
        raise UnstableError("no curvature is positive", expected="a positive outlier eigenvalue")
    return float((h**2).sum() / h.max() ** 2)


def two_curvature_slope(sgd: SGD, curvature: ArrayLike, *, nodes: int = 96) -> float:
    r"""Exact slope of log first-passage time on log loss ratio >> 1 for two unequal curvatures.

    Far out :math:`dz_i=-h_iz_idt+\sqrt{(\eta/B)h_i\,z^THz}\,dW_i` is scale free: the slope is k/2, k > 0 the root of
    :math:`\Lambda(k)=0`, Lambda the principal eigenvalue of the generator on :math:`r^kg(\phi)` (derived; Fourier
    collocation). Written :math:`\frac{B}{\eta h_{max}}+1-\frac{n}{2}` it defines the effective number n of directions:
    2 for equal curvatures, about :math:`\mathrm{Tr}H^2/h_{max}^2` otherwise (:func:`effective_dimension`).

    Args:
        sgd: hyperparameters with a batch size.
        curvature: the two eigenvalues, > 0.
        nodes: of the collocation.

    Returns:
        The slope.

    Raises:
        UnstableError: a curvature that is not positive.
        DataError: not two curvatures.

    >>> round(two_curvature_slope(SGD(lr=0.2, batch_size=1), [1.0, 1.0]), 6)  # B/(eta h) + 1 - 2/2
    5.0
    """
    a = float(inverse_noise(sgd, curvature).min())  # B / (eta h_max)
    h = finite(curvature, "curvature")
    if h.shape != (2,):
        raise DataError(f"curvature has shape {h.shape}", expected="two eigenvalues")
    h1, h2 = h / h.max()
    angle = np.pi * np.arange(nodes) / nodes  # g has period pi
    c, s = np.cos(angle), np.sin(angle)
    wave = 2j * np.fft.fftfreq(nodes, 1 / nodes)
    eye = np.fft.fft(np.eye(nodes), axis=0)
    first = np.fft.ifft(wave[:, None] * eye, axis=0).real
    second = np.fft.ifft(wave[:, None] ** 2 * eye, axis=0).real
    q = h1 * c**2 + h2 * s**2

    def growth(k: float) -> float:
        xx = np.diag(c**2 * k * (k - 1) + s**2 * k) - (2 * s * c * (k - 1))[:, None] * first + (s**2)[:, None] * second
        yy = np.diag(s**2 * k * (k - 1) + c**2 * k) + (2 * s * c * (k - 1))[:, None] * first + (c**2)[:, None] * second
        drift = np.diag(q * k) + ((h2 - h1) * s * c)[:, None] * first
        return float(np.linalg.eigvals(-drift + (q / (2 * a))[:, None] * (h1 * xx + h2 * yy)).real.max())

    top = 2 * (a + 1)  # n = 0; one direction alone gives n = 1
    return float(brentq(growth, 0.4 * (top - 2), top, rtol=1e-10)) / 2


def log_escape_rate(
    sgd: SGD,
    minimum_curvature: ArrayLike,
    saddle_curvature: ArrayLike,
    minimum_loss: float,
    saddle_loss: float,
) -> float:
    """Natural logarithm of :func:`escape_rate`, with the same arguments and errors.

    >>> round(log_escape_rate(SGD(lr=0.1, batch_size=10), 2.0, -1.0, 0.05, 0.3), 2)
    -91.98
    """
    bottom = np.atleast_1d(finite(minimum_curvature, "minimum_curvature"))
    top = np.atleast_1d(finite(saddle_curvature, "saddle_curvature"))
    low, high = (float(finite(x, "loss")) for x in (minimum_loss, saddle_loss))
    if bottom.shape != top.shape or np.count_nonzero(top < 0) != 1 or np.any(top == 0):
        raise DataError(
            f"minimum_curvature has shape {bottom.shape}, saddle_curvature is {top}",
            expected="the same directions in the same order, exactly one of them negative at the saddle",
        )
    if not 0 < low < high:
        raise DataError(
            f"the losses are {low:g} at the minimum and {high:g} at the saddle",
            expected="0 < minimum_loss < saddle_loss",
            remedy="a minimum of zero loss has no noise and is never left: add the loss floor",
        )
    escape = int(np.argmin(top))
    slope = asymptotic_slope(sgd, bottom, len(bottom))[escape]
    determinants = (np.log(bottom).sum() - np.log(np.abs(top)).sum()) / 2
    overdamped = np.log((1 - sgd.dampening) / (1 - sgd.momentum))  # time is t = eta k; momentum runs it faster
    return float(overdamped + np.log(-top[escape] / (2 * np.pi)) + determinants - slope * np.log(high / low))


def escape_rate(
    sgd: SGD,
    minimum_curvature: ArrayLike,
    saddle_curvature: ArrayLike,
    minimum_loss: float,
    saddle_loss: float,
) -> float:
    r"""Escape rate over a saddle, per unit of t (Mori et al. 2022, Eq. 15), prefactor included.

    .. math:: \kappa=\frac{|h_e^s|}{2\pi}\sqrt{\frac{\det H^*}{|\det H^s|}}
        \Big[\frac{L^s}{L^*}\Big]^{-(B/(\eta h_e^*)+1-n/2)}

    Checked against quadrature in one dimension: within 3% at B/(eta h) = 8. Steps to escape: 1/(kappa eta).

    Args:
        sgd: hyperparameters with a batch size.
        minimum_curvature: outlier curvatures at the minimum, [n] or a number.
        saddle_curvature: curvatures at the saddle along the same directions, exactly one negative, [n].
        minimum_loss: L* > 0.
        saddle_loss: loss at the saddle, > L*.

    Returns:
        The rate.

    Raises:
        DataError: directions or losses that make no sense.
        UnstableError: a curvature at the minimum that is not positive.

    >>> round(escape_rate(SGD(lr=0.5, batch_size=2), 2.0, -1.0, 0.05, 0.3), 5)
    0.00255
    """
    return float(np.exp(log_escape_rate(sgd, minimum_curvature, saddle_curvature, minimum_loss, saddle_loss)))


def _thresholds(loss_ratio: ArrayLike) -> Array:
    ratio = np.atleast_1d(finite(loss_ratio, "loss_ratio"))
    if np.any(ratio <= 1):
        raise DataError(
            f"a threshold is {ratio.min():g} times the loss at the minimum",
            expected="loss ratios > 1: the walker starts at the minimum",
        )
    return ratio


def mean_first_passage_time(sgd: SGD, curvature: float, loss_ratio: ArrayLike, dimension: int = 1) -> Array:
    r"""Mean time for the loss to first reach ``loss_ratio`` times its minimum, exact radial quadrature (units of t).

    Isotropic quadratic, n equal curvatures, with a = B/(eta h) and :math:`r^2=h|\theta-\theta^*|^2/(2L^*)`:

    .. math:: T=\frac1h\int_0^{\sqrt{c-1}}r^{1-n}(1+r^2)^{a}\int_0^r 2a\,u^{n-1}(1+u^2)^{-a-1}du\,dr

    (derived; Mori et al. 2022 give its slope for c >> 1). Steps: T / (eta/(1-beta)). A chain watched only once a step
    takes longer, 1.2 times at eta h = 0.02 to 1.9 times at 0.1.

    Args:
        sgd: hyperparameters with a batch size; t is counted in eta/(1-beta) a step.
        curvature: h > 0.
        loss_ratio: c > 1, [m] or a number.
        dimension: n >= 1.

    Returns:
        [m].

    Raises:
        DataError: a threshold not above the minimum, or a dimension below 1.
        UnstableError: a curvature that is not positive.

    >>> sgd = SGD(lr=0.1, batch_size=1)
    >>> (mean_first_passage_time(sgd, 1.0, [1.5, 2.0], 1) / 0.1).round(0)  # in steps
    array([ 356., 5741.])
    """
    ratio = _thresholds(loss_ratio)
    if dimension < 1:
        raise DataError(f"dimension is {dimension}", expected="a whole number >= 1")
    a = float(inverse_noise(sgd, float(curvature)))
    times = []
    for c in ratio:
        radius = np.sqrt(c - 1)
        edges = np.linspace(np.log(radius) - 18, np.log(radius), 401)  # in y = log r
        below = np.log(2 * a / dimension) + dimension * edges[0]  # mass nearer than the first edge; its time is 1e-15
        y, half = _panel_nodes(edges)
        growth = np.log1p(np.exp(2 * y))
        log_scale = (2 - dimension) * y + a * growth
        log_speed = np.log(2 * a) + dimension * y - (a + 1) * growth
        times.append(np.exp(_log_double_integral(log_scale, log_speed, half, np.ones(len(half), bool), below)))
    return np.array(times) / float(curvature)


def mean_first_passage_time_asymptotic(sgd: SGD, curvature: float, loss_ratio: ArrayLike, dimension: int = 1) -> Array:
    r"""The limit of :func:`mean_first_passage_time` for a loss ratio c >> 1 (derived, units of t).

    :math:`\frac{a}{h}\frac{\Gamma(n/2)\Gamma(a+1-n/2)}{\Gamma(a+1)}\frac{c^{a+1-n/2}}{2(a+1-n/2)}`, a = B/(eta h).

    Args:
        sgd: hyperparameters with a batch size.
        curvature: h > 0.
        loss_ratio: c > 1, [m] or a number.
        dimension: n, below the critical one.

    Returns:
        [m].

    Raises:
        UnstableError: the dimension is at or above the critical one, where there is no power law.
        DataError: a threshold not above the minimum.

    >>> sgd = SGD(lr=0.1, batch_size=1)
    >>> (mean_first_passage_time_asymptotic(sgd, 1.0, 1e4) / mean_first_passage_time(sgd, 1.0, 1e4)).round(3)
    array([1.])
    """
    ratio = _thresholds(loss_ratio)
    a = float(inverse_noise(sgd, float(curvature)))
    slope = a + 1 - dimension / 2
    if slope <= 0:
        raise UnstableError(
            f"dimension {dimension} is at or above the critical one, {2 * (a + 1):g}",
            expected="fewer directions, so that the density can be normalised",
        )
    logarithm = gammaln(dimension / 2) + gammaln(slope) - gammaln(a + 1) + slope * np.log(ratio)
    return a / float(curvature) * np.exp(logarithm) / (2 * slope)
