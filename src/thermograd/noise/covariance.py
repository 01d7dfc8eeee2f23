r"""The covariance of per-sample gradients: as an operator, its spectrum, and along given directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..landscape.operators import MatrixOperator, Operator
from ..landscape.spectrum import Eigenpairs, eigenpairs
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from .gradients import gradient_blocks, projections

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BlockCovariance",
    "Covariance",
    "DirectionalVariance",
    "covariance",
    "covariance_eigenpairs",
    "in_basis",
    "in_directions",
    "second_moment",
]

_KEEP = 2**26  # per-sample gradients are kept when they are at most so many numbers (512 MiB in float64)
_GRAM = 2000  # samples up to which the Gram matrix is decomposed in full
_DENSE = 1200  # weights up to which the covariance itself is


class Covariance(Operator):
    r"""Covariance (or second moment) of per-sample gradients as an operator; see :func:`covariance`.

    The matrix of per-sample gradients is kept when it is small, else products are made chunk by chunk with two
    backward passes for each vector and chunk, without forming per-sample gradients.
    """

    def __init__(self, problem: Problem, theta: Any = None, index: Any = None, centered: bool = True):
        super().__init__(problem.P, problem.dtype, problem.device)
        self.problem, self.centered = problem, bool(centered)
        self.theta = problem.as_theta(theta).clone()  # [P]
        self._blocks = problem._blocks(index)
        self.samples = sum(map(len, self._blocks))
        self._index = torch.cat(self._blocks)
        self._rows: Tensor | None = None
        self._mean: Tensor | None = None

    @property
    def keeps_gradients(self) -> bool:
        """Whether the per-sample gradients are small enough to be kept."""
        return self.samples * self.problem.P <= _KEEP

    def rows(self) -> Tensor:
        """The per-sample gradients ``[N, P]``, their mean subtracted if the operator is centred."""
        if self._rows is None:
            blocks = gradient_blocks(self.problem, self.theta, self._index, "per-sample gradients")
            rows = torch.cat([gradients for _, gradients in blocks])
            self._rows = rows - rows.mean(0) if self.centered else rows
        return self._rows

    def _product(self, block: Tensor) -> Tensor:
        if self.keeps_gradients:
            rows = self.rows()
            return rows.T @ (rows @ block) / self.samples
        if self._mean is None:
            self._mean = self.problem.gradient(self.theta, self._index)  # [P]
        shift = self._mean @ block if self.centered else torch.zeros_like(block[0])  # [k]
        total, count = torch.zeros_like(block), torch.zeros_like(shift)
        for index in self._blocks:
            part, mean = self._chunk(index, block, shift)
            total += part
            count += mean
        if self.centered:
            total -= self._mean[:, None] * count
        return total / self.samples

    def _chunk(self, index: Tensor, block: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over a chunk of g_i (g_i . v - shift), and of the bracket alone."""
        leaf = self.theta.clone().requires_grad_()
        losses = self.problem.differentiable_sample_losses(leaf, index)  # [b]
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten()
        if len(bad):
            raise NonFiniteError(f"the loss of sample {int(index[bad[0]])} is {float(losses.detach()[bad[0]])}")
        if not losses.requires_grad:
            return torch.zeros_like(block), torch.zeros_like(shift)
        weights = torch.zeros_like(losses).requires_grad_()
        (pulled,) = torch.autograd.grad(losses, leaf, weights, create_graph=True, materialize_grads=True)
        columns, sums = [], []
        for v, offset in zip(block.T, shift):
            (pushed,) = torch.autograd.grad(pulled, weights, v, retain_graph=True, materialize_grads=True)  # [b]
            pushed = pushed - offset
            (column,) = torch.autograd.grad(losses, leaf, pushed, retain_graph=True, materialize_grads=True)
            columns.append(column)
            sums.append(pushed.sum())
        return torch.stack(columns, dim=1), torch.stack(sums)

    def eigenpairs(self, k: int = 10, tol: float = 1e-6, seed: int = 0) -> Eigenpairs:
        """The k largest eigenpairs, by the cheapest exact way; see :func:`covariance_eigenpairs`."""
        if not 1 <= int(k) <= self.problem.P:
            raise InputError(f"k is {k}", expected=f"1 to {self.problem.P}")
        if not self.keeps_gradients:
            return eigenpairs(self, k, tol=tol, seed=seed)
        rows = self.rows()
        if self.problem.P <= _DENSE:
            return eigenpairs(MatrixOperator(rows.T @ rows / self.samples), k, tol=tol, seed=seed)
        if self.samples <= _GRAM and k <= self.samples:
            pairs = self._by_gram(rows, int(k), tol)
            if bool(pairs.converged.all()):
                return pairs
        return eigenpairs(self, k, tol=tol, seed=seed)

    def _by_gram(self, rows: Tensor, k: int, tol: float) -> Eigenpairs:
        """Eigenpairs of G^T G / N from those of G G^T / N."""
        values, vectors = torch.linalg.eigh(rows @ rows.T / self.samples)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        lifted = rows.T @ vectors  # [P, k], of length sqrt(N a)
        Q, R = torch.linalg.qr(lifted)  # the small ones have lost orthogonality to rounding
        Q = Q * R.diagonal().sign()
        Q = Q * torch.gather(Q, 0, Q.abs().argmax(0, keepdim=True)).sign()
        norms = (rows.T @ (rows @ Q) / self.samples - Q * values).norm(dim=0)
        floor = 50 * torch.finfo(values.dtype).eps * float(values[0].clamp_min(0))
        residuals = norms / values.abs().clamp_min(max(floor, torch.finfo(values.dtype).tiny))
        return Eigenpairs(values, Q, residuals, norms <= torch.clamp(tol * values.abs(), min=floor), self.samples)


def covariance(problem: Problem, theta: Any = None, index: Any = None, centered: bool = True) -> Covariance:
    r"""Covariance of per-sample gradients, matrix-free.

    .. math:: C_0 = \frac1N \sum_i (g_i - \bar g)(g_i - \bar g)^\top, \qquad g_i = \nabla \ell_i(\theta)

    the covariance of the gradient of one sample drawn at random (Mori et al. 2022, Eq. 8, square bracket). That
    of a minibatch is :math:`C_0` times ``SGD(...).minibatch_factor``.

    Args:
        problem: the problem, with P weights and N samples.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples to average over; default all N.
        centered: whether the mean gradient is subtracted.

    Returns:
        An operator of shape (P, P).

    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), torch.tensor([[1.0, 0], [-1, 0]]))
    >>> covariance(problem).dense()
    tensor([[1., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    return Covariance(problem, theta, index, centered)


def second_moment(problem: Problem, theta: Any = None, index: Any = None) -> Covariance:
    r"""Second moment of per-sample gradients, :math:`\frac1N \sum_i g_i g_i^\top` (the empirical Fisher matrix).

    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(1), torch.tensor([[1.0], [3.0]]))
    >>> second_moment(problem).dense(), covariance(problem).dense()
    (tensor([[5.]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """
    return Covariance(problem, theta, index, centered=False)


def covariance_eigenpairs(
    problem: Problem,
    k: int = 10,
    theta: Any = None,
    index: Any = None,
    centered: bool = True,
    tol: float = 1e-6,
    seed: int = 0,
) -> Eigenpairs:
    r"""Largest eigenpairs of the per-sample gradient covariance.

    Exactly, from the N x N Gram matrix of per-sample gradients or from the P x P covariance, whichever is small;
    by Lanczos otherwise.

    Args:
        problem: the problem.
        k: how many.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        centered: whether the mean gradient is subtracted.
        tol: relative residual asked for.
        seed: of the random start.

    Returns:
        :class:`~thermograd.landscape.spectrum.Eigenpairs`.

    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), torch.tensor([[1.0, 0], [-1, 0]]))
    >>> covariance_eigenpairs(problem, k=1).eigenvalues
    tensor([1.], dtype=torch.float64)
    """
    return Covariance(problem, theta, index, centered).eigenpairs(k, tol, seed)


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
    :math:`\sqrt{(m_4 - m_2^2)/N}` with the central moments m.

    Args:
        problem: the problem.
        directions: ``[P, k]``, one direction a column (or ``[P]``, or eigenpairs).
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        centered: whether the mean gradient is subtracted.

    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), torch.tensor([[1.0, 0], [-1, 2]]))
    >>> in_directions(problem, torch.eye(2)).variance
    array([1., 1.])
    """
    slopes = projections(problem, directions, theta, index).double().cpu().numpy()  # [N, k]
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

    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), torch.tensor([[1.0, 1], [-1, -1]]))
    >>> in_basis(problem, torch.eye(2)).covariance
    array([[1., 1.],
           [1., 1.]])
    """
    slopes = projections(problem, directions, theta, index).double().cpu().numpy()  # [N, k]
    slopes = slopes - (slopes.mean(0) if centered else 0)
    count = len(slopes)
    block = slopes.T @ slopes / count
    fourth = (slopes**2).T @ (slopes**2) / count
    return BlockCovariance(block, np.sqrt(np.maximum(fourth - block**2, 0) / count), count)
