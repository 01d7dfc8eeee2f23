r"""How gradient noise lies in the Hessian's eigenbasis."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import ThermogradWarning, TooShortError
from ..landscape.curvature import hessian
from ..landscape.estimators import trace_of_square
from ..landscape.operators import Operator, as_operator
from ..landscape.spectrum import Eigenpairs, eigenpairs
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..statistics import bootstrap_weights, power_law, slopes
from .covariance import covariance
from .gradients import combinations, projections_so_far, sample_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Alignment", "alignment"]

_RESAMPLES = 200
_DENSE = 400  # weights up to which the cosine is exact
_PROBES = 48


@dataclass(frozen=True)
class Alignment(Measurement):
    """Gradient noise against curvature, mode by mode; see :func:`alignment`."""

    curvature: np.ndarray = quantity("mode", units="loss", long_name="curvature H_ii, eigenvalue of the Hessian")
    variance: np.ndarray = quantity("mode", units="loss^2", long_name="per-sample gradient variance C_ii")
    variance_stderr: np.ndarray = quantity("mode", units="loss^2", long_name="standard error over samples")
    used: np.ndarray = quantity("mode", long_name="whether the mode enters the fit")
    exponent: float = quantity(long_name="exponent of C_ii against H_ii")
    exponent_stderr: float = quantity(long_name="its standard error: scatter of modes and of samples")
    exponent_sample_stderr: float = quantity(long_name="its standard error by bootstrap over samples alone")
    prefactor: float = quantity(long_name="C_ii at unit curvature on the fitted line")
    correlation: float = quantity(long_name="correlation of log C_ii with log H_ii")
    cosine: float = quantity(long_name="Tr(CH) / (|C| |H|)")
    cosine_stderr: float = quantity(long_name="its standard error; zero when exact")

    _primary = "variance"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Noise against curvature in logarithms, with the fitted power."""
        ax = new_axes(ax)
        x, y = self.curvature[self.used], self.variance[self.used]
        ax.errorbar(x, y, yerr=self.variance_stderr[self.used], fmt="o", ms=3)
        ends = np.array([x.min(), x.max()])
        label = f"exponent {self.exponent:.2f} ± {self.exponent_stderr:.2f}"
        ax.plot(ends, self.prefactor * ends**self.exponent, label=label)
        ax.set(xscale="log", yscale="log", xlabel="curvature H_ii", ylabel="gradient variance C_ii")
        ax.legend()
        return ax


def alignment(
    problem: Problem, theta: Any = None, H: Any = None, k: int = 40, index: Any = None, seed: int = 0
) -> Alignment:
    r"""Noise and curvature in the Hessian's eigenbasis, :math:`C_{ii}` against :math:`H_{ii}`.

    .. math::
        C_{ii} = u_i^\top C_0\, u_i, \quad H u_i = H_{ii} u_i, \quad C_{ii} \propto H_{ii}^\gamma, \qquad
        \cos = \frac{\operatorname{Tr}(C_0 H)}{\|C_0\|_F \|H\|_F}

    The exponent is that of least squares in logarithms over the modes of positive curvature. Theory: 1 where noise
    is proportional to curvature (Xie et al. 2021; Mori et al. 2022), 1 to 2 by Zhang, Yang & Tu 2026. Its
    error joins the scatter of modes about the line with a bootstrap over samples at fixed eigenvectors.

    Args:
        problem: the problem.
        theta: weights ``[P]``; default: where the model stands now.
        H: the Hessian's eigenpairs, or an operator to find them of (Hessian, Gauss-Newton); default: the Hessian.
            The cosine is taken with the operator, or with the Hessian when only eigenpairs are given.
        k: how many of the largest eigenpairs, when they are not given.
        index: the samples; default all N.
        seed: of the eigenpairs' start, the bootstrap and the cosine's probes.

    Raises:
        TooShortError: fewer than three modes of positive curvature and noise.

    >>> import torch
    >>> scale = torch.tensor([1.0, 2.0, 4.0])
    >>> a = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]])
    >>> problem = Problem.from_function(lambda w, a: (scale * (w - a)**2).sum() / 2, torch.zeros(3), a)
    >>> result = alignment(problem, k=3)
    >>> round(result.exponent, 6), round(result.cosine, 3)
    (2.0, 0.964)
    """
    theta = problem.as_theta(theta)
    operator = hessian(problem, theta, index) if H is None or isinstance(H, Eigenpairs) else as_operator(H)
    pairs = H if isinstance(H, Eigenpairs) else eigenpairs(operator, min(k, problem.P), seed=seed)
    curvature = pairs.eigenvalues.double().cpu().numpy()  # [k]
    along = projections_so_far(problem, pairs.eigenvectors, theta, index).double().cpu().numpy()  # [N, k]
    along = along - along.mean(0)
    squares = along**2
    variance = squares.mean(0)
    used = (curvature > 1e-10 * np.abs(curvature).max()) & (variance > 1e-24 * max(float(variance.max()), 1e-300))
    if used.sum() < 3:
        raise TooShortError(
            f"{int(used.sum())} modes of positive curvature and noise", expected="at least 3", remedy="raise k"
        )
    fit = power_law(curvature[used], variance[used])
    sampling = _sample_error(along[:, used], np.log(curvature[used]), seed)
    cosine, cosine_error = _cosine(problem, operator, theta, index, seed)
    return Alignment(
        curvature=curvature,
        variance=variance,
        variance_stderr=squares.std(0) / math.sqrt(len(squares)),
        used=used,
        exponent=fit.exponent,
        exponent_stderr=math.hypot(fit.stderr, sampling),
        exponent_sample_stderr=sampling,
        prefactor=fit.prefactor,
        correlation=fit.correlation,
        cosine=cosine,
        cosine_stderr=cosine_error,
    )


def _sample_error(along: np.ndarray, log_curvature: np.ndarray, seed: int) -> float:
    """Standard deviation of the fitted exponent over resamplings of the data."""
    weights = bootstrap_weights(len(along), _RESAMPLES, seed)  # [resamples, N]
    variance = weights @ along**2 - (weights @ along) ** 2  # [resamples, k]
    return float(slopes(log_curvature, np.log(np.maximum(variance, 1e-300))).std(ddof=1))


def _cosine(problem: Problem, operator: Operator, theta: Tensor, index: Any, seed: int) -> tuple[float, float]:
    """Cosine between C and H as matrices, exactly for few weights, else from random combinations.

    NaN, with a warning, after Ctrl-C.
    """
    try:
        return _cosine_of(problem, operator, theta, index, seed)
    except KeyboardInterrupt:
        warnings.warn("interrupted: the cosine of noise and curvature is NaN", ThermogradWarning, stacklevel=3)
        return math.nan, math.nan


def _cosine_of(problem: Problem, operator: Operator, theta: Tensor, index: Any, seed: int) -> tuple[float, float]:
    C = covariance(problem, theta, index)
    if problem.P <= _DENSE:
        dense_c, dense_h = C.dense(), operator.dense().to(C.device, C.dtype)
        size = float(dense_c.norm() * dense_h.norm())
        return (float((dense_c * dense_h).sum()) / size if size > 0 else 0.0), 0.0
    noise = _noise_vectors(problem, theta, index, seed)  # [P, q] with covariance C
    forms = (noise * (operator @ noise)).sum(0).double()  # each with mean Tr(CH)
    square_h = trace_of_square(operator, _PROBES, seed)
    square_c = trace_of_square(C, _PROBES, seed)
    top, top_error = float(forms.mean()), float(forms.std()) / math.sqrt(len(forms))
    size = math.sqrt(square_h.value * square_c.value)
    if not size > 0:
        return 0.0, 0.0
    errors = (top_error / top if top else 0.0, *(s.stderr / s.value / 2 for s in (square_h, square_c)))
    return top / size, abs(top / size) * math.hypot(*errors)


def _noise_vectors(problem: Problem, theta: Tensor, index: Any, seed: int) -> Tensor:
    """Random signed sums of per-sample gradients, [P, q], whose covariance is C_0."""
    return combinations(problem, theta, sample_index(problem, index), _PROBES, seed)
