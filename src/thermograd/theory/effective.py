r"""How many directions count in the slope of escape when the outlier curvatures are not equal.

Far out the equation :math:`dz_i=-h_iz_i\,dt+\sqrt{(\eta/B)h_i\,z^THz}\,dW_i` is scale free: the slope of log
first-passage time on log loss is k/2 with :math:`\Lambda(k)=0`, :math:`\Lambda(k)` the growth rate of :math:`E|z|^k`
(derived).
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import BarycentricInterpolator
from scipy.optimize import brentq
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import eigs

from ..errors import DataError, NotAvailableError, UnstableError
from ..hyperparameters import SGD
from .arrays import Array, finite
from .density import inverse_noise

__all__ = [
    "effective_dimension",
    "effective_dimension_exact",
    "entropy_dimension",
    "mixed_curvature_slope",
    "participation_dimension",
    "two_curvature_slope",
]

_LARGEST = 30_000  # monomials


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


def _shares(curvature: ArrayLike) -> Array:
    h = finite(curvature, "curvature")
    if h.size == 0 or np.any(h < 0) or h.max() <= 0:
        raise UnstableError("no curvature is positive", expected="outlier eigenvalues >= 0, one of them > 0")
    return h / h.sum()


def participation_dimension(curvature: ArrayLike) -> float:
    r"""Participation ratio :math:`1/\sum_ip_i^2`, :math:`p_i=h_i/\sum_jh_j`: one candidate for n (Mori et al. 2022,
    Eq. 45).

    It over-counts (:func:`effective_dimension_exact`).

    Args:
        curvature: outlier eigenvalues, [n].

    Returns:
        Between 1 and n.

    Raises:
        UnstableError: no positive curvature.

    >>> round(participation_dimension([1.0, 0.3]), 2)
    1.55
    """
    return float(1 / (_shares(curvature) ** 2).sum())


def entropy_dimension(curvature: ArrayLike) -> float:
    r"""Exponential of the entropy, :math:`\exp(-\sum_ip_i\ln p_i)`: the other candidate for n.

    It over-counts more (:func:`effective_dimension_exact`).

    Args:
        curvature: outlier eigenvalues, [n].

    Returns:
        Between 1 and n.

    Raises:
        UnstableError: no positive curvature.

    >>> round(entropy_dimension([1.0, 0.3]), 2)
    1.72
    """
    p = _shares(curvature)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


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


def _growth_rate(value: Array, count: Array, noise: float, degree: int) -> float:
    r"""Growth rate of :math:`E\,q^\kappa` at a whole kappa: the generator maps homogeneous polynomials onto themselves.

    In :math:`x_j=h_j\sum_{i\in j}z_i^2`, :math:`q=\sum_jx_j`, it is
    :math:`\sum_j[-2h_jx_j+\epsilon m_jh_j^2q]\partial_j+2\epsilon h_j^2qx_j\partial_j^2`; off its diagonal its matrix
    on monomials is positive, so its eigenvalue of largest real part is real and simple (Perron).
    """
    if degree == 0:
        return 0.0
    groups = len(value)
    picks = combinations_with_replacement(range(groups), degree)
    exponents = np.array([np.bincount(pick, minlength=groups) for pick in picks])
    index = {tuple(e): i for i, e in enumerate(exponents)}
    drive = noise * value**2 * exponents * (count + 2 * (exponents - 1))  # [monomial, group]
    size = len(exponents)
    rows, columns = [np.arange(size)], [np.arange(size)]
    entries = [-2 * exponents @ value + drive.sum(axis=1)]
    for j in range(groups):
        some = np.flatnonzero(exponents[:, j])
        for other in range(groups):
            if other != j:
                moved = exponents[some].copy()
                moved[:, j] -= 1
                moved[:, other] += 1
                rows.append(np.array([index[tuple(e)] for e in moved], dtype=int))
                columns.append(some)
                entries.append(drive[some, j])
    matrix = csr_matrix((np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), (size, size))
    if size <= 400:
        return float(np.linalg.eigvals(matrix.toarray()).real.max())
    return float(eigs(matrix, k=1, which="LR", v0=np.ones(size), tol=1e-9, return_eigenvectors=False)[0].real)


def mixed_curvature_slope(sgd: SGD, curvature: ArrayLike) -> float:
    r"""Slope of log first-passage time on log loss ratio >> 1 for any number of unequal curvatures (derived).

    :math:`\Lambda(2\kappa)` is computed exactly at whole :math:`\kappa` (:math:`E|z|^{2\kappa}` closes on itself) and
    interpolated between them; for two curvatures it agrees with :func:`two_curvature_slope` to 1e-4. Equal curvatures
    cost nothing extra; time and memory grow with the number of *different* ones and with B/(eta h).

    Args:
        sgd: hyperparameters with a batch size.
        curvature: outlier eigenvalues, > 0, [n].

    Returns:
        The slope; written :math:`\frac{B}{\eta h_{max}}+1-\frac n2` it defines n (:func:`effective_dimension_exact`).

    Raises:
        UnstableError: a curvature that is not positive, or no stationary density.
        NotAvailableError: too many different curvatures at this B/(eta h).

    >>> round(mixed_curvature_slope(SGD(lr=0.2, batch_size=1), [1.0, 1.0, 1.0]), 6)  # B/(eta h) + 1 - 3/2
    4.5
    """
    a = float(inverse_noise(sgd, curvature).min())  # B / (eta h_max)
    h = np.sort(finite(curvature, "curvature").ravel())[::-1]
    h = h / h[0]
    first = np.concatenate([[True], np.diff(h) < -1e-9])
    value, count = h[first], np.bincount(np.cumsum(first) - 1).astype(float)
    guess = max(int(a + 1 - (h**2).sum() / 2), 0)
    cost = np.prod([(guess + 4 + i) / i for i in range(1, len(value))])
    if cost > _LARGEST:
        raise NotAvailableError(
            f"{len(value)} different curvatures at B/(eta h) = {a:g} need {cost:.1g} moments",
            expected=f"at most {_LARGEST}",
            remedy="merge curvatures that are close, drop the smallest, or use effective_dimension",
        )
    known: dict[int, float] = {}

    def growth(degree: int) -> float:
        if degree not in known:
            known[degree] = _growth_rate(value, count, 1 / a, degree)
        return known[degree]

    low = guess
    while low > 0 and growth(low) > 0:
        low -= 1
    while growth(low + 1) <= 0:
        low += 1
    nodes = np.arange(max(low - 3, 0), max(low - 3, 0) + 8)
    smooth = BarycentricInterpolator(nodes, [growth(int(k)) for k in nodes])
    start = 1e-6 if low == 0 else float(low)
    if smooth(start) > 0:
        raise UnstableError(
            "the weights run away in mean logarithm: there is no stationary density and no power law",
            expected="a lower learning rate, fewer directions or a larger batch",
        )
    return float(brentq(lambda k: float(smooth(k)), start, low + 1.0, rtol=1e-12))


def effective_dimension_exact(sgd: SGD, curvature: ArrayLike) -> float:
    r"""The n that makes :math:`\frac{B}{\eta h_{max}}+1-\frac n2` the exact slope, from :func:`mixed_curvature_slope`.

    Depends weakly on B/(eta h); :func:`effective_dimension` is its rule of thumb.

    Args:
        sgd: hyperparameters with a batch size.
        curvature: outlier eigenvalues, > 0, [n].

    Returns:
        n, between 1 and the number of directions.

    Raises:
        UnstableError: see :func:`mixed_curvature_slope`.

    >>> round(effective_dimension_exact(SGD(lr=0.1, batch_size=1), [1.0, 0.3]), 2)
    1.08
    """
    return 2 * (float(inverse_noise(sgd, curvature).min()) + 1 - mixed_curvature_slope(sgd, curvature))
