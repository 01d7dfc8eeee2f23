r"""The top of the spectrum followed over training: what it shares with its past, the gradient and the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..progress import track
from .curvature import hessian
from .operators import Operator
from .spectrum import Which, eigenpairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TopSubspaceHistory", "top_subspace_history"]


@dataclass(frozen=True)
class TopSubspaceHistory(Measurement):
    """Top eigenvalues and what lies in their space, at each recorded weight; see :func:`top_subspace_history`."""

    eigenvalues: Tensor = quantity("time", "mode", units="loss", long_name="top eigenvalues")
    gradient_share: np.ndarray = quantity("time", long_name="share of the squared gradient in the top space")
    noise_share: np.ndarray = quantity("time", long_name="share of the noise's trace in the top space")
    overlap_with_last: np.ndarray = quantity("time", long_name="overlap with the top space one record before")
    overlap_with_first: np.ndarray = quantity("time", long_name="overlap with the top space of the first record")
    chance: float = quantity(long_name="what a random direction shares with the space, k / P")

    _primary = "gradient_share"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Shares and overlaps against the record."""
        ax = new_axes(ax)
        for name in ("gradient_share", "noise_share", "overlap_with_last", "overlap_with_first"):
            ax.plot(getattr(self, name), label=name.replace("_", " "))
        ax.axhline(self.chance, ls="--", color="gray", label="chance")
        ax.set(xlabel="record", ylabel="share", ylim=(0, 1.05))
        ax.legend()
        return ax


def top_subspace_history(
    problem: Problem,
    thetas: Iterable[Any],
    k: int = 10,
    which: Which = "LA",
    tol: float = 1e-3,
    index: Any = None,
    seed: int = 0,
    operator: Callable[..., Operator] = hessian,
) -> TopSubspaceHistory:
    r"""Overlap of the gradient, of the gradient noise and of the past with the top eigenspace, over training.

    With the orthonormal top eigenvectors U of the curvature at each weight vector,

    .. math::
        s_\mathrm{gradient} = \frac{\|U^\top g\|^2}{\|g\|^2}, \quad
        s_\mathrm{noise} = \frac{\operatorname{Tr} U^\top C\, U}{\operatorname{Tr} C}, \quad
        o = \frac1k \|U^\top U'\|_F^2

    for the mean gradient g and the covariance C of the sample gradients (Gur-Ari, Roberts & Dyer 2018). Each search
    starts from the eigenvectors before it.

    Args:
        problem: the problem.
        thetas: weight vectors ``[P]``, ``[T, P]`` or an iterable of them (a recorded trajectory).
        k: dimension of the top space.
        which: end of the spectrum, see :func:`~thermograd.landscape.spectrum.eigenpairs`.
        tol: relative residual of the eigenpairs.
        index: the samples to measure on; default all N.
        seed: of the searches' random starts.
        operator: makes the curvature of (problem, theta, index=); :func:`hessian` or its kin.

    Returns:
        Arrays over the records; ``noise_share`` is nan where the noise vanishes, ``overlap_with_last`` at the first.

    Raises:
        InputError: no weight vector, or k out of range.

    After Ctrl-C the records measured so far are returned.

    >>> centres = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> problem = Problem.from_function(lambda w, a: ((w - a).square() * a.new([3, 1])).sum(), torch.ones(2), centres)
    >>> top_subspace_history(problem, [[2.0, 0.0], [1.5, 0.0]], k=1).gradient_share
    array([1., 1.])
    """
    if not 1 <= k <= problem.P:
        raise InputError(f"k is {k}", expected=f"1 to {problem.P}")
    values, shares, noises, last, first = [], [], [], [], []
    any_given = False
    bases: list[Tensor] = []  # the first and the latest [P, k]
    memory = 8 * 8 * k * problem.P  # a basis of some 4 k vectors and its image
    for theta in track(thetas, f"top {k} directions over training", bytes=memory):
        any_given = True
        at = problem.as_theta(theta)
        pairs = eigenpairs(operator(problem, at, index=index), k, which, tol, seed, v0=bases[-1] if bases else None)
        U = pairs.eigenvectors
        if U.shape[1] < k:  # interrupted
            break
        try:
            inside, whole, mean = _moments(problem, at, index, U)
        except KeyboardInterrupt:
            break
        spread = float(whole - mean.square().sum())
        within = float(inside - (U.T @ mean).square().sum())
        square = float(mean.square().sum())
        values.append(pairs.eigenvalues)
        shares.append(float((U.T @ mean).square().sum()) / square if square else np.nan)
        noises.append(within / spread if spread > 1e-12 * float(whole) else np.nan)
        last.append(float((bases[-1].T @ U).square().sum()) / k if bases else np.nan)
        first.append(float((bases[0].T @ U).square().sum()) / k if bases else 1.0)
        bases = [bases[0], U] if bases else [U]
    if not values:
        if any_given:
            raise KeyboardInterrupt
        raise InputError("there is no weight vector", expected="at least one [P]")
    return TopSubspaceHistory(
        torch.stack(values), np.array(shares), np.array(noises), np.array(last), np.array(first), k / problem.P
    )


def _moments(problem: Problem, theta: Tensor, index: Any, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over samples of |U^T g_i|^2, of |g_i|^2, and of g_i."""
    chosen = torch.cat(problem._blocks(index))
    inside = whole = torch.zeros((), dtype=U.dtype, device=U.device)
    mean = torch.zeros(problem.P, dtype=U.dtype, device=U.device)
    for part in chosen.split(problem.gradient_chunk):
        rows = problem.sample_gradients(theta, part)  # [b, P]
        inside = inside + (rows @ U).square().sum()
        whole = whole + rows.square().sum()
        mean += rows.sum(0)
    return inside / len(chosen), whole / len(chosen), mean / len(chosen)
