r"""Variances of per-sample gradients along given directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from .gradients import projections_so_far

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BlockCovariance", "DirectionalVariance", "in_basis", "in_directions"]


@dataclass(frozen=True)
class DirectionalVariance(Measurement):
    """Variance of per-sample gradients along directions, C_ii, with standard errors over samples."""

    variance: np.ndarray = quantity("direction", units="loss^2", long_name="variance of the per-sample gradient")
    stderr: np.ndarray = quantity("direction", units="loss^2", long_name="standard error over samples")
    mean: np.ndarray = quantity("direction", units="loss", long_name="mean gradient along the direction")
    samples: int = quantity(long_name="number of samples")

    _primary = "variance"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Variance against the rank of the direction."""
        ax = new_axes(ax)
        ax.errorbar(np.arange(1, len(self.variance) + 1), self.variance, yerr=self.stderr, fmt="o", ms=3)
        ax.set(xlabel="direction", ylabel="gradient variance", yscale="log")
        return ax


def in_directions(
    problem: Problem, directions: Any, theta: Any = None, index: Any = None, centered: bool = True
) -> DirectionalVariance:
    r"""Variance of per-sample gradients along directions, :math:`C_{ii} = p_i^\top C_0\, p_i`.

    The standard error is that of a variance estimated from N independent samples,
    :math:`\sqrt{(m_4 - m_2^2)/N}` with the central moments m. After Ctrl-C the samples that are done, a random part,
    give the variances, with a warning.

    Args:
        problem: the problem.
        directions: ``[P, k]``, one direction a column (or ``[P]``, or eigenpairs).
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        centered: whether the mean gradient is subtracted.

    >>> import torch
    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), torch.tensor([[1.0, 0], [-1, 2]]))
    >>> in_directions(problem, torch.eye(2)).variance
    array([1., 1.])
    """
    slopes = projections_so_far(problem, directions, theta, index).double().cpu().numpy()  # [N, k]
    mean = slopes.mean(0)
    squares = (slopes - (mean if centered else 0)) ** 2
    stderr = squares.std(0) / np.sqrt(len(slopes))
    return DirectionalVariance(squares.mean(0), stderr, mean, len(slopes))


@dataclass(frozen=True)
class BlockCovariance(Measurement):
    """The covariance of per-sample gradients within a subspace, with standard errors over samples."""

    covariance: np.ndarray = quantity("direction", "direction_2", units="loss^2", long_name="gradient covariance")
    stderr: np.ndarray = quantity("direction", "direction_2", units="loss^2", long_name="standard error")
    samples: int = quantity(long_name="number of samples")

    _primary = "covariance"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The correlation matrix as an image."""
        ax = new_axes(ax)
        size = np.sqrt(np.maximum(np.diag(self.covariance), 1e-300))
        ax.imshow(self.covariance / np.outer(size, size), vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set(xlabel="direction", ylabel="direction")
        return ax


def in_basis(
    problem: Problem, directions: Any, theta: Any = None, index: Any = None, centered: bool = True
) -> BlockCovariance:
    r"""The block :math:`D^\top C_0 D` of the gradient covariance for directions D ``[P, k]``, as ``[k, k]``.

    Args:
        problem: the problem.
        directions: ``[P, k]``, one direction a column.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        centered: whether the mean gradient is subtracted.

    >>> import torch
    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), torch.tensor([[1.0, 1], [-1, -1]]))
    >>> in_basis(problem, torch.eye(2)).covariance
    array([[1., 1.],
           [1., 1.]])
    """
    slopes = projections_so_far(problem, directions, theta, index).double().cpu().numpy()  # [N, k]
    slopes = slopes - (slopes.mean(0) if centered else 0)
    count = len(slopes)
    block = slopes.T @ slopes / count
    fourth = (slopes**2).T @ (slopes**2) / count
    return BlockCovariance(block, np.sqrt(np.maximum(fourth - block**2, 0) / count), count)
