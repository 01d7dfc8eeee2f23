r"""The covariance of per-sample gradients: as an operator, its spectrum, trace and diagonal."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, ThermogradWarning
from ..landscape.operators import MatrixOperator, Operator
from ..landscape.spectrum import Eigenpairs, eigenpairs
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..progress import Cost
from .gradients import gradient_blocks, subsample
from .gram import centre, leading
from .perlayer import PerLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Covariance",
    "CovarianceSpectrum",
    "covariance",
    "covariance_eigenpairs",
    "covariance_spectrum",
    "second_moment",
]

_KEEP = 2**24  # per-sample gradients are kept when they are at most so many numbers (128 MiB in float64)
_GRAM = 2000  # samples up to which the Gram matrix is always taken
_GRAM_BYTES = 2**32  # what a Gram matrix may take
_DENSE = 1200  # weights up to which the covariance itself is
_CHECKS = 2  # random combinations of the eigenvectors whose residual is measured


class Covariance(Operator):
    r"""Covariance (or second moment) of per-sample gradients as an operator; see :func:`covariance`.

    Products go through the layers: activations and back-signals of a block of samples are computed once for all
    vectors, and kept where they fit in memory. Per-sample gradients of linear, convolutional, embedding,
    normalisation and attention layers are not formed where that costs more than it saves. Below :data:`_DENSE`
    weights the matrix of per-sample gradients is simply kept.
    """

    def __init__(self, problem: Problem, theta: Any = None, index: Any = None, centered: bool = True):
        super().__init__(problem.P, problem.dtype, problem.device)
        self.problem, self.centered = problem, bool(centered)
        self.theta = problem.as_theta(theta).clone()  # [P]
        self._index = torch.cat(problem._blocks(index))
        self.samples = len(self._index)
        self._rows: Tensor | None = None
        self._order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(0)).to(self._index.device)
        self._layers: PerLayer | None = None
        self._mean: Tensor | None = None

    @property
    def keeps_gradients(self) -> bool:
        """Whether the per-sample gradients are few and short enough to be kept as a matrix."""
        return self.samples * self.problem.P <= _KEEP and (self.problem.P <= _DENSE or self.problem.model is None)

    @property
    def layers(self) -> PerLayer:
        """The per-sample gradients layer by layer, in random order: those done at any moment are a random part."""
        if self._layers is None:
            self._layers = PerLayer(self.problem, self.theta, self._index[self._order])
        return self._layers

    @property
    def mean(self) -> Tensor:
        """The mean gradient ``[P]``."""
        if self._mean is None:
            self._mean = self.layers.mean()
        return self._mean

    def rows(self) -> Tensor:
        """The per-sample gradients ``[N, P]``, their mean subtracted if the operator is centred."""
        if self._rows is None:
            blocks = gradient_blocks(self.problem, self.theta, self._index, "per-sample gradients")
            rows = torch.cat([gradients for _, gradients in blocks])
            self._rows = rows - rows.mean(0) if self.centered else rows
        return self._rows

    def _matrix(self) -> Tensor:
        """The covariance itself ``[P, P]``, for few weights; summed over blocks of samples where these are many."""
        if self.keeps_gradients:
            rows = self.rows()
            return rows.T @ rows / self.samples
        matrix, done = self._matrix_so_far()
        if done < self.samples:
            raise KeyboardInterrupt
        return matrix

    def _matrix_so_far(self) -> tuple[Tensor, int]:
        """The covariance of a random part of the samples, all of them unless interrupted, and how many these are."""
        shift = self.mean if self.centered else torch.zeros_like(self.theta)
        state = torch.zeros(self.problem.P, self.problem.P, dtype=self.dtype, device=self.device), shift * 0, 0
        index = self._index[self._order]
        try:
            for block, gradients in gradient_blocks(self.problem, self.theta, index, "gradient covariance"):
                rows = gradients - shift
                # whole or not at all, should an interrupt fall between
                state = torch.addmm(state[0], rows.T, rows), state[1] + rows.sum(0), state[2] + len(block)
        except KeyboardInterrupt:
            if state[2] < 2:
                raise
        total, sums, done = state
        matrix = total / done
        if self.centered and done < self.samples:
            matrix -= torch.outer(sums / done, sums / done)
        return matrix, done

    def _product(self, block: Tensor) -> Tensor:
        if self.keeps_gradients:
            rows = self.rows()
            return rows.T @ (rows @ block) / self.samples
        return self.layers.product(block.T.contiguous(), self.mean if self.centered else None).T

    def gram(self) -> Tensor:
        """Inner products of the per-sample gradients ``[N, N]``, centred if the operator is, over the sample count."""
        if self.keeps_gradients:
            rows = self.rows()
            return rows @ rows.T / self.samples
        K = self.layers.gram()
        K = (centre(K) if self.centered else K).div_(self.samples)
        back = self._order.argsort()
        return K[back][:, back]

    def _gram_so_far(self) -> tuple[Tensor, Covariance]:
        """Gram matrix in random order and the covariance it belongs to: of the samples done when interrupted."""
        if self.keeps_gradients:
            return self.gram(), self
        K = self.layers.gram_so_far()
        done: Covariance = self
        if len(K) < self.samples:
            done = Covariance(self.problem, self.theta, self.layers.index[: len(K)], self.centered)
            done._layers = self.layers.first(len(K))
            _tell(len(K), self.samples)
        return (centre(K) if self.centered else K).div_(len(K)), done

    def trace(self) -> float:
        """The trace, exactly, from the lengths of the per-sample gradients."""
        if self.keeps_gradients:
            return float(self.rows().square().sum()) / self.samples
        total = float(self.layers.squares().double().mean())
        return total - float(self.mean.double().square().sum()) if self.centered else total

    def diagonal(self) -> Tensor:
        """The diagonal ``[P]``, exactly: the variance of each component of the gradient."""
        if self.keeps_gradients:
            return self.rows().square().mean(0)
        found = self.layers.mean_squares()
        return (found - self.mean.square()).clamp_min(0) if self.centered else found

    def spectrum(self) -> Tensor:
        """All eigenvalues that can differ from zero, ``[min(N, P)]`` descending.

        Raises:
            InputError: both the samples and the weights are too many for a full decomposition.
        """
        if self._few_weights:
            return _descending(self._matrix(), self.problem.P)
        self._refuse_large()
        return _descending(self.gram(), self.problem.P)

    @property
    def _few_weights(self) -> bool:
        return min(_DENSE, self.samples) >= self.problem.P

    def _refuse_large(self) -> None:
        if self._gram_bytes > _GRAM_BYTES:
            raise InputError(
                f"the full spectrum of {self.samples} samples and {self.problem.P} weights",
                expected="a Gram matrix of at most 4 GiB",
                remedy="give index=, or n= to covariance_spectrum, to take fewer samples; or ask for eigenpairs",
            )

    @property
    def _gram_bytes(self) -> int:
        return self.samples**2 * torch.finfo(self.dtype).bits // 8

    def eigenpairs(self, k: int = 10, tol: float = 1e-6, seed: int = 0) -> Eigenpairs:
        """The k largest eigenpairs, by the cheapest exact way; see :func:`covariance_eigenpairs`."""
        if not 1 <= int(k) <= self.problem.P:
            raise InputError(f"k is {k}", expected=f"1 to {self.problem.P}")
        if not 0 < tol < 1:
            raise InputError(f"tol is {tol}", expected="a number between 0 and 1")
        if self.problem.P <= _DENSE:
            return self._by_matrix(int(k), tol, seed)
        if k <= self.samples and self._gram_is_cheaper(int(k)):
            K, done = self._gram_so_far()
            if k > done.samples:
                raise KeyboardInterrupt
            pairs = done._by_gram(K, int(k), tol, seed)
            # float32 that is not converged shows what rounding leaves: products in float32 would do no better
            if bool(pairs.converged.all()) or self.dtype == torch.float32 or done is not self:
                return pairs
        return eigenpairs(self, k, tol=tol, seed=seed)

    def _by_matrix(self, k: int, tol: float, seed: int) -> Eigenpairs:
        if self.keeps_gradients:
            return eigenpairs(MatrixOperator(self._matrix()), k, tol=tol, seed=seed)
        matrix, done = self._matrix_so_far()
        if done < self.samples:
            _tell(done, self.samples)
        return eigenpairs(MatrixOperator(matrix), k, tol=tol, seed=seed)

    def cost(self, k: int = 10) -> Cost:
        """What :meth:`eigenpairs` will take, from timing a few samples, before it starts.

        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 1)))
        >>> covariance(problem).cost(k=2).seconds < 5
        True
        """
        return self.layers.cost(k)

    def _gram_is_cheaper(self, k: int) -> bool:
        """Whether the inner products of all samples cost less than the products that Lanczos would take."""
        if self.samples <= _GRAM:
            return True
        steps = 3 * k + 60
        return (
            self._gram_bytes <= _GRAM_BYTES
            and _GRAM > 0
            and self.layers.gram_operations <= (4.0 * steps * self.samples * self.problem.P)
        )

    def _by_gram(self, K: Tensor, k: int, tol: float, seed: int) -> Eigenpairs:
        """Eigenpairs of G^T G / N from those of G G^T / N.

        The residual of a lifted vector is G^T r / sqrt(N a) for the residual r of the small one, of length
        sqrt(r . K r / a). What rounding adds is measured on random combinations of the lifted vectors.
        """
        values, vectors, rest = leading(K, k, tol, seed)
        small = torch.finfo(self.dtype).tiny
        floor = 50 * torch.finfo(self.dtype).eps * float(values[0].clamp_min(0))
        norms = ((rest * (K @ rest)).sum(0).clamp_min(0) / values.clamp_min(max(floor, small))).sqrt()
        del K
        lifted = self._lift(vectors)  # [k, P]
        lengths = lifted.norm(dim=1)
        regular = bool((values > 1e3 * floor).all())
        if regular:
            V = lifted / lengths[:, None]
            V *= V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        else:  # the small ones have lost orthogonality to rounding
            Q, R = torch.linalg.qr(lifted.T)
            Q = Q * R.diagonal().sign()
            V = (Q * torch.gather(Q, 0, Q.abs().argmax(0, keepdim=True)).sign()).T.contiguous()
        norms = self._with_rounding(values, V, norms, exactly=not regular)
        residuals = norms / values.abs().clamp_min(max(floor, small))
        converged = norms <= torch.clamp(tol * values.abs(), min=floor)
        return Eigenpairs(values, V.T, residuals, converged, self.samples)

    def _lift(self, vectors: Tensor) -> Tensor:
        return vectors.T @ self.rows() if self.keeps_gradients else self.layers.lift(vectors)

    def _with_rounding(self, values: Tensor, V: Tensor, norms: Tensor, exactly: bool) -> Tensor:
        """Residual norms with what the products themselves show, in full or from random signed sums."""
        if exactly:
            return torch.maximum(norms, ((self @ V.T) - V.T * values).norm(dim=0))
        signs = torch.randint(0, 2, (_CHECKS, len(V)), generator=torch.Generator().manual_seed(1))
        signs = (2 * signs - 1).to(V)
        sums = (signs @ V).T  # [P, checks]
        seen = ((self @ sums) - ((signs * values) @ V).T).square().sum() / _CHECKS  # mean is the sum over pairs
        excess = float(seen - norms.square().sum())
        return (norms.square() + max(excess, 0.0) / len(V)).sqrt()


def _tell(done: int, samples: int) -> None:
    message = f"interrupted: the gradient covariance is of {done} of {samples} samples, a random part"
    warnings.warn(message, ThermogradWarning, stacklevel=4)


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

    Exactly, from the N x N Gram matrix of per-sample gradients (made layer by layer, see
    :mod:`thermograd.noise.perlayer`) or from the P x P covariance, whichever is small; by Lanczos on the operator
    otherwise, a block of vectors at a time. In float32 the smaller eigenvalues cannot be had better than the rounding
    of the largest one; their residuals say how well. Ctrl-C while inner products are made leaves the eigenpairs of the
    covariance of the samples that are done, a random part, with a warning.

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
class CovarianceSpectrum(Measurement):
    """The full spectrum of the gradient covariance; see :func:`covariance_spectrum`."""

    eigenvalues: np.ndarray = quantity("mode", units="loss^2", long_name="eigenvalue of the gradient covariance")
    trace: float = quantity(units="loss^2", long_name="Tr C")
    trace_stderr: float = quantity(units="loss^2", long_name="its standard error from subsampling; zero when exact")
    eigenvalues_stderr: np.ndarray = quantity("mode", units="loss^2", long_name="standard error from subsampling")
    eigenvalues_bias: np.ndarray = quantity("mode", units="loss^2", long_name="bias from subsampling, by halving")
    samples: int = quantity(long_name="number of samples used")

    _primary = "eigenvalues"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Eigenvalues against rank, both in logarithms."""
        ax = new_axes(ax)
        kept = self.eigenvalues > 1e-15 * max(float(self.eigenvalues.max()), 1e-300)
        ax.loglog(np.arange(1, len(self.eigenvalues) + 1)[kept], self.eigenvalues[kept], "o-", ms=3)
        ax.set(xlabel="rank", ylabel="eigenvalue")
        return ax


def covariance_spectrum(
    problem: Problem, n: int | None = None, theta: Any = None, index: Any = None, centered: bool = True, seed: int = 0
) -> CovarianceSpectrum:
    r"""All eigenvalues of the per-sample gradient covariance that can differ from zero, from the Gram matrix.

    With ``n`` of N samples, drawn without replacement, the eigenvalues estimate those of all N. With the components
    :math:`z_{ij} = u_i^\top (g_j - \bar g)` of the samples along the eigenvectors, to first order

    .. math:: \operatorname{Var} a_i = \Big(1 - \frac nN\Big) \frac1n
        \Big( \frac1n \sum_j z_{ij}^4 - a_i^2 \Big)

    Finite samples also bias the spectrum, large eigenvalues upwards, small ones downwards by order P_eff/n:
    ``eigenvalues_bias`` is the shift that halving the samples adds, which is as large as the remaining one. The trace
    is unbiased. With all N samples nothing is estimated and all errors are zero. Ctrl-C while inner products are made
    leaves the estimate from the samples that are done, a random part, with a warning.

    Args:
        problem: the problem.
        n: how many samples; default all. The work grows as n squared, and as n cubed for the decomposition.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples to draw from; default all N.
        centered: whether the mean gradient is subtracted.
        seed: of the draw.

    Raises:
        InputError: the Gram matrix does not fit in memory.

    >>> data = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(2), data)
    >>> covariance_spectrum(problem).eigenvalues
    array([2. , 0.5])
    """
    chosen = subsample(problem, index, n, seed)
    population = len(torch.cat(problem._blocks(index)))
    C = Covariance(problem, theta, chosen, centered)
    if len(chosen) == population and C._few_weights:
        return _exact(_float64(C.spectrum()), population)
    C._refuse_large()
    K, done = C._gram_so_far()
    count, part = done.samples, 1 - done.samples / population
    if part == 0:
        return _exact(_float64(_descending(K, problem.P)), population)
    values, errors, lengths = _with_errors(K, problem.P)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(K.device)
    halves = [_float64(_descending(_of_part(K, half, centered), problem.P)) for half in order.chunk(2)]
    both = min(map(len, halves))
    bias = -values * part  # the halves have no such eigenvalue
    bias[:both] = ((halves[0][:both] + halves[1][:both]) / 2 - values[:both]) * part
    trace_error = float(lengths.std()) / math.sqrt(count)
    scale = math.sqrt(part)
    return CovarianceSpectrum(values, float(values.sum()), scale * trace_error, scale * errors, bias, count)


def _float64(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _exact(values: np.ndarray, count: int) -> CovarianceSpectrum:
    return CovarianceSpectrum(values, float(values.sum()), 0.0, np.zeros_like(values), np.zeros_like(values), count)


def _descending(matrix: Tensor, most: int) -> Tensor:
    """Eigenvalues of a positive semidefinite matrix, descending; at most so many."""
    return torch.linalg.eigvalsh(matrix).flip(0)[:most].clamp_min(0)


def _of_part(K: Tensor, part: Tensor, centered: bool) -> Tensor:
    """The Gram matrix of some of the samples from that of all; the mean taken off anew."""
    own = K[part][:, part] * (len(K) / len(part))
    return centre(own) if centered else own


def _with_errors(K: Tensor, P: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues, their standard errors for an infinite population, and the samples' squared lengths."""
    n = len(K)
    count = min(n, P)
    lengths = _float64(K.diagonal()) * n
    values, vectors = torch.linalg.eigh(K)
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    fourth = _float64(vectors.pow(4).sum(0))  # z_ij^2 = n a_i v_ij^2
    found = _float64(values)
    return found, found * np.sqrt(np.maximum(n * fourth - 1, 0) / n), lengths
