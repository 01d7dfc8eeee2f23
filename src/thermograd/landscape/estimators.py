r"""Traces, diagonals and spectral densities of symmetric operators from random probes, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..measurement import Measurement, new_axes, quantity
from ..progress import bar
from .operators import MatrixOperator, Operator, as_operator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Diagonal", "Estimate", "SpectralDensity", "diagonal", "spectral_density", "trace", "trace_of_square"]

_DENSE_MATRIX = 1500  # size up to which an explicit matrix is decomposed in full
_BLOCK = 16  # probes multiplied at once
_BASIS_NUMBERS = 2**27  # numbers that the Krylov bases of one group of probes may take (1 GiB in float64)


@dataclass(frozen=True)
class Estimate(Measurement):
    """A number with its standard error (zero when it is exact)."""

    value: float = quantity(long_name="value")
    stderr: float = quantity(long_name="standard error")

    _primary = "value"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The value as a point with its error bar."""
        ax = new_axes(ax)
        ax.errorbar([0], [self.value], yerr=[self.stderr], fmt="o", capsize=4)
        ax.set(xticks=[], ylabel="value")
        return ax


@dataclass(frozen=True)
class Diagonal(Measurement):
    """The diagonal of an operator with its standard error (zero when it is exact)."""

    value: Tensor = quantity("weight", long_name="diagonal element")
    stderr: Tensor = quantity("weight", long_name="standard error")

    _primary = "value"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Diagonal elements in descending order."""
        ax = new_axes(ax)
        ax.plot(self.value.detach().cpu().sort(descending=True)[0].numpy())
        ax.set(xlabel="rank", ylabel="diagonal element")
        return ax


def trace(A: Any, probes: int = 60, seed: int = 0) -> Estimate:
    r"""Trace of a symmetric operator, by Hutch++ (Meyer, Musco, Musco & Woodruff 2021).

    A third of the products finds the range Q of the largest eigenvalues, a third gives the trace there exactly,
    and the last third estimates the rest with random signs:

    .. math::
        \operatorname{Tr} A \approx \operatorname{Tr} Q^\top A Q
            + \Big\langle g^\top (I-QQ^\top) A (I-QQ^\top) g \Big\rangle_g

    which is unbiased; the standard error is that of the last mean. Exact, by P products, when ``probes >= P``
    and for explicit matrices.

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, at least 9.
        seed: of the probes.

    Raises:
        InputError: too few probes.

    >>> trace(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    Estimate(value=6.0, stderr=0.0)
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator):
        return Estimate(float(operator.matrix.diagonal().sum()), 0.0)
    if _exact(operator, probes):
        return Estimate(float(operator.dense().diagonal().sum()), 0.0)
    Q, image, rest = _split(operator, probes, seed, "trace")
    known = float((Q * image).sum())
    samples = (rest.probes * rest.images).sum(0)  # [probes / 3]
    return _with_error(known, samples)


def trace_of_square(A: Any, probes: int = 60, seed: int = 0) -> Estimate:
    r"""Trace of the square, :math:`\operatorname{Tr} A^2 = \|A\|_F^2`, with the largest eigenvalues taken out exactly.

    .. math:: \operatorname{Tr} A^2 = \|A Q\|_F^2 + \Big\langle \|A (I-QQ^\top) g\|^2 \Big\rangle_g

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, at least 9.
        seed: of the probes.

    >>> trace_of_square(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).value
    14.0
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator) or _exact(operator, probes):
        return Estimate(float(operator.dense().square().sum()), 0.0)
    _, image, rest = _split(operator, probes, seed, "trace of the square")
    return _with_error(float(image.square().sum()), rest.images.square().sum(0))


def diagonal(A: Any, probes: int = 60, seed: int = 0) -> Diagonal:
    r"""Diagonal of a symmetric operator (Bekas, Kokiopoulou & Saad 2007, after deflation as in Hutch++).

    .. math::
        \operatorname{diag} A = \operatorname{diag}(Q Q^\top A) + \big\langle g \circ (I-QQ^\top) A g \big\rangle_g

    Args:
        A: operator or matrix, (P, P).
        probes: products with single vectors, at least 9.
        seed: of the probes.

    >>> diagonal(torch.diag(torch.tensor([1.0, 2.0]))).value
    tensor([1., 2.])
    """
    operator = as_operator(A)
    if isinstance(operator, MatrixOperator) or _exact(operator, probes):
        exact = operator.dense().diagonal().clone()
        return Diagonal(exact, torch.zeros_like(exact))
    Q, image, rest = _split(operator, probes, seed, "diagonal", project=False)
    known = (Q * image).sum(1)  # [P]
    samples = rest.signs * (rest.images - Q @ (Q.T @ rest.images))  # [P, probes / 3]
    count = samples.shape[1]
    return Diagonal(known + samples.mean(1), samples.std(1) / math.sqrt(count))


@dataclass(frozen=True)
class _Rest:
    signs: Tensor  # [P, j] random signs g
    probes: Tensor  # [P, j] (I - Q Q^T) g, or g
    images: Tensor  # [P, j] A times that


def _exact(operator: Operator, probes: int) -> bool:
    if probes >= operator.shape[0]:
        return True
    if probes < 9:
        raise InputError(f"probes is {probes}", expected="at least 9 (three for each third)")
    return False


def _split(operator: Operator, probes: int, seed: int, what: str, project: bool = True) -> tuple[Tensor, Tensor, _Rest]:
    """Range Q of the largest eigenvalues, A Q, and random signs outside of it with their images."""
    third = probes // 3
    random = torch.Generator().manual_seed(seed)
    signs = _signs(operator, third, random)
    with bar(what, 3 * third) as progress:
        Q = torch.linalg.qr(_multiply(operator, _signs(operator, third, random), progress))[0]  # [P, third]
        image = _multiply(operator, Q, progress)
        outside = signs - Q @ (Q.T @ signs) if project else signs
        return Q, image, _Rest(signs, outside, _multiply(operator, outside, progress))


def _signs(operator: Operator, columns: int, random: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (operator.shape[0], columns), generator=random)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def _multiply(operator: Operator, block: Tensor, progress: bar) -> Tensor:
    parts = []
    for part in block.split(_BLOCK, dim=1):
        parts.append(operator @ part)
        progress.advance(part.shape[1])
    return torch.cat(parts, dim=1)


def _with_error(known: float, samples: Tensor) -> Estimate:
    count = len(samples)
    return Estimate(known + float(samples.mean()), float(samples.std()) / math.sqrt(count))


# ---------------------------------------------------------------------- spectral density


@dataclass(frozen=True)
class SpectralDensity(Measurement):
    """Density of eigenvalues, integrating to one, with the standard error over probes."""

    grid: np.ndarray = quantity("grid", units="loss", long_name="eigenvalue")
    density: np.ndarray = quantity("grid", units="1/loss", long_name="density of eigenvalues")
    stderr: np.ndarray = quantity("grid", units="1/loss", long_name="standard error of the density")
    nodes: np.ndarray = quantity("probe", "node", units="loss", long_name="Ritz value")
    weights: np.ndarray = quantity("probe", "node", long_name="weight of the Ritz value")
    width: float = quantity(units="loss", long_name="standard deviation of the Gaussian broadening")

    _primary = "density"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The density on a logarithmic scale, with a band of two standard errors."""
        ax = new_axes(ax)
        low = np.maximum(self.density.max() * 1e-8, 1e-300)
        ax.fill_between(
            self.grid,
            np.maximum(self.density - 2 * self.stderr, low),
            np.maximum(self.density + 2 * self.stderr, low),
            alpha=0.3,
        )
        ax.semilogy(self.grid, np.maximum(self.density, low))
        ax.set(xlabel="eigenvalue", ylabel="density")
        return ax

    def expectation(self, function: Any) -> Estimate:
        """Mean of ``function(eigenvalue)`` over the spectrum, i.e. Tr f(A) / P, by quadrature without broadening."""
        values = (self.weights * np.asarray(function(self.nodes))).sum(1)  # [probes]
        count = len(values)
        return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0)


def spectral_density(
    A: Any,
    probes: int = 10,
    steps: int = 60,
    seed: int = 0,
    grid: Any = None,
    width: float | None = None,
    points: int = 512,
) -> SpectralDensity:
    r"""Density of eigenvalues by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    .. math::
        \rho(a) = \frac1P \sum_i \delta(a - a_i) \approx
            \Big\langle \sum_j w_j\, \delta(a - t_j) \Big\rangle_\mathrm{probes}

    with Ritz values t and weights w (squared first components) of Lanczos from random vectors, fully
    reorthogonalised, broadened by a Gaussian. When P <= probes * steps the eigenvalues themselves are cheaper and
    are used (standard error zero).

    Args:
        A: operator or matrix, (P, P).
        probes: random start vectors, at least 2.
        steps: Lanczos steps of each.
        seed: of the start vectors.
        grid: eigenvalues ``[m]`` at which to give the density; default: ``points`` over the spectrum's range.
        width: standard deviation of the broadening; default: 1/100 of the range.
        points: length of the default grid.

    Raises:
        InputError: fewer than two probes or one step; a width that is not positive.

    >>> rho = spectral_density(torch.eye(3, dtype=torch.float64))
    >>> round(float(np.trapezoid(rho.density, rho.grid)), 3)
    1.0
    """
    operator = as_operator(A)
    if probes < 2 or steps < 1:
        raise InputError(f"probes={probes}, steps={steps}", expected="at least 2 probes and 1 step")
    if width is not None and not width > 0:
        raise InputError(f"width is {width}", expected="a positive number")
    size = operator.shape[0]
    explicit = isinstance(operator, MatrixOperator) and size <= _DENSE_MATRIX
    if explicit or size <= probes * steps:
        nodes = torch.linalg.eigvalsh(operator.dense())[None].cpu().numpy().astype(float)  # [1, P]
        weights = np.full_like(nodes, 1 / size)
    else:
        nodes, weights = _quadrature(operator, probes, steps, seed)  # [probes, steps]
    low, high = float(nodes.min()), float(nodes.max())
    span = (high - low) or abs(high) or 1.0
    sigma = span / 100 if width is None else float(width)
    where = np.linspace(low - 5 * sigma, high + 5 * sigma, points) if grid is None else np.asarray(grid, dtype=float)
    curves = np.stack([_broadened(where, t, w, sigma) for t, w in zip(nodes, weights)])  # [probes, m]
    count = len(curves)
    stderr = curves.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.zeros_like(where)
    return SpectralDensity(where, curves.mean(0), stderr, nodes, weights, sigma)


def _broadened(where: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    density = np.zeros_like(where)
    for t, w in zip(nodes, weights):
        density += w * np.exp(-0.5 * ((where - t) / sigma) ** 2)
    return density / (sigma * math.sqrt(2 * math.pi))


def _quadrature(operator: Operator, probes: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [probes, steps] of Lanczos from each random vector, run side by side."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.shape[0], probes, generator=random, dtype=torch.float64)  # [P, probes]
    start = (start / start.norm(dim=0)).to(operator.device, operator.dtype)
    group = max(1, min(probes, _BASIS_NUMBERS // (steps * operator.shape[0])))
    with bar("spectral density", probes * steps) as progress:
        pairs = [_lanczos(operator, part, steps, progress) for part in start.split(group, dim=1)]
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def _lanczos(operator: Operator, start: Tensor, steps: int, progress: bar) -> tuple[np.ndarray, np.ndarray]:
    """Independent Lanczos recurrences from the columns of ``start``, with full reorthogonalisation."""
    size, width = start.shape
    basis = torch.zeros(width, steps, size, dtype=start.dtype, device=start.device)  # [probes, steps, P]
    diagonal_ = torch.zeros(width, steps, dtype=torch.float64)
    beside = torch.zeros(width, steps, dtype=torch.float64)
    current = start.T.contiguous()  # [probes, P]
    alive = torch.ones(width, dtype=torch.bool, device=start.device)
    for j in range(steps):
        basis[:, j] = current
        product = (operator @ current.T.contiguous()).T  # [probes, P]
        progress.advance(width)
        diagonal_[:, j] = (product * current).sum(1).double().cpu()
        scale = product.norm(dim=1)
        known = basis[:, : j + 1]
        for _ in range(2):
            product = product - torch.einsum("bjp,bj->bp", known, torch.einsum("bjp,bp->bj", known, product))
        size_left = product.norm(dim=1)
        # an invariant subspace is exhausted: the recurrence of that probe ends, its later nodes get no weight
        alive &= size_left > 1e2 * torch.finfo(start.dtype).eps * scale.clamp_min(torch.finfo(start.dtype).tiny)
        beside[:, j] = torch.where(alive, size_left, 0.0).double().cpu()
        current = torch.where(alive[:, None], product / size_left.clamp_min(torch.finfo(start.dtype).tiny)[:, None], 0)
    tridiagonal = torch.diag_embed(diagonal_)
    if steps > 1:
        tridiagonal = (
            tridiagonal + torch.diag_embed(beside[:, : steps - 1], 1) + torch.diag_embed(beside[:, : steps - 1], -1)
        )
    nodes, vectors = torch.linalg.eigh(tridiagonal)  # [probes, steps]
    return nodes.numpy(), vectors[:, 0].square().numpy()
