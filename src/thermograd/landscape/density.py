r"""Spectral densities of symmetric operators from random probes, with standard errors."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, ThermogradWarning
from ..measurement import Measurement, new_axes, quantity
from ..progress import bar
from .estimators import Estimate
from .operators import MatrixOperator, Operator, as_operator
from .parts import projected

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LogDensity", "SpectralDensity", "lanczos", "spectral_density"]

_DENSE_MATRIX = 1500  # size up to which an explicit matrix is decomposed in full
_BASIS_NUMBERS = 2**27  # numbers that the Krylov bases of one group of probes may take (1 GiB in float64)


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

    def on_log_scale(self, points: int = 200, width: float = 0.15, smallest: float | None = None) -> LogDensity:
        """The density of ln|a|, of positive and of negative eigenvalues apart: bulk and outliers in one picture.

        Args:
            points: length of the grid.
            width: standard deviation of the Gaussian broadening in ln|a|.
            smallest: least |a| of the grid; default 1e-6 of the largest. What lies below is counted in ``.below``.

        Raises:
            InputError: a width or a least value that is not positive.

        >>> rho = spectral_density(torch.diag(torch.tensor([1.0, 10.0, -1.0, 0.0]))).on_log_scale()
        >>> round(float(np.trapezoid(rho.positive, np.log(rho.grid))), 2), round(rho.below, 2)
        (0.5, 0.25)
        """
        top = float(np.abs(self.nodes).max())
        low = 1e-6 * top if smallest is None else float(smallest)
        if not (width > 0 and low > 0 and low < top):
            raise InputError(
                f"width={width}, smallest={low}", expected="a positive width, and 0 < smallest < the largest |a|"
            )
        grid = np.geomspace(low * math.exp(-4 * width), top * math.exp(4 * width), points)
        sides = []
        for sign in (1, -1):
            curves = []
            for t, w in zip(self.nodes, self.weights):
                kept = sign * t >= low
                curves.append(_broadened(np.log(grid), np.log(sign * t[kept]), w[kept], width))
            sides.append(np.stack(curves))  # [probes, m]
        count = len(self.nodes)
        errors = [s.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.zeros(points) for s in sides]
        below = float((self.weights * (np.abs(self.nodes) < low)).sum(1).mean())
        return LogDensity(grid, sides[0].mean(0), errors[0], sides[1].mean(0), errors[1], below)

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


@dataclass(frozen=True)
class LogDensity(Measurement):
    """Density of the logarithm of the eigenvalues' size; see :meth:`SpectralDensity.on_log_scale`."""

    grid: np.ndarray = quantity("grid", units="loss", long_name="size of the eigenvalue")
    positive: np.ndarray = quantity("grid", long_name="density of ln a, positive eigenvalues")
    positive_stderr: np.ndarray = quantity("grid", long_name="its standard error")
    negative: np.ndarray = quantity("grid", long_name="density of ln |a|, negative eigenvalues")
    negative_stderr: np.ndarray = quantity("grid", long_name="its standard error")
    below: float = quantity(long_name="share of eigenvalues smaller than the grid's least")

    _primary = "positive"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both densities on doubly logarithmic axes, with bands of two standard errors."""
        ax = new_axes(ax)
        low = max(float(max(self.positive.max(), self.negative.max())) * 1e-6, 1e-300)
        for name, curve, error in (
            ("positive", self.positive, self.positive_stderr),
            ("negative", self.negative, self.negative_stderr),
        ):
            if curve.max() > low:
                (line,) = ax.loglog(self.grid, np.maximum(curve, low), label=name)
                band = (np.maximum(curve - 2 * error, low), np.maximum(curve + 2 * error, low))
                ax.fill_between(self.grid, *band, alpha=0.3, color=line.get_color())
        ax.set(xlabel="|eigenvalue|", ylabel="density of ln |a|")
        ax.legend()
        return ax


def spectral_density(
    A: Any,
    probes: int = 10,
    steps: int = 60,
    seed: int = 0,
    grid: Any = None,
    width: float | None = None,
    points: int = 512,
    deflate: Any = None,
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
        deflate: eigenpairs already found (their ``eigenvalues`` and ``eigenvectors``), such as the outliers: they
            enter exactly, without error, and the probes see the rest of the spectrum alone.

    Raises:
        InputError: fewer than two probes or one step; a width that is not positive; pairs that do not fit.

    After Ctrl-C the density of the steps and probes made so far is returned, with a warning.

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
        known = _known(deflate, size)
        inner = operator if known is None else projected(operator, known[1], complement=True)
        nodes, weights = _quadrature(inner, probes, steps, seed, None if known is None else known[1])
        if known is not None:
            count, probes = len(known[0]), len(nodes)
            nodes = np.concatenate([nodes, np.tile(known[0], (probes, 1))], axis=1)  # [probes, steps + count]
            weights = np.concatenate([weights * (1 - count / size), np.full((probes, count), 1 / size)], axis=1)
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


def _known(pairs: Any, size: int) -> tuple[np.ndarray, Tensor] | None:
    """Eigenvalues [k] and orthonormal eigenvectors [P, k] that are given as exact."""
    if pairs is None:
        return None
    values = np.asarray(torch.as_tensor(pairs.eigenvalues).detach().cpu(), dtype=float)
    vectors = torch.as_tensor(pairs.eigenvectors).detach().double()
    if vectors.ndim != 2 or vectors.shape != (size, len(values)) or len(values) >= size:
        raise InputError(
            f"deflate holds eigenvectors of shape {tuple(vectors.shape)} and {len(values)} eigenvalues",
            expected=f"[{size}, k] and [k], with k < {size}",
        )
    return values, torch.linalg.qr(vectors)[0]


def _quadrature(
    operator: Operator, probes: int, steps: int, seed: int, outside: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [probes, steps] of Lanczos from each random vector, run side by side."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.shape[0], probes, generator=random, dtype=torch.float64)  # [P, probes]
    if outside is not None:
        basis = outside.to(start.device, start.dtype)
        start = start - basis @ (basis.T @ start)
    start = (start / start.norm(dim=0)).to(operator.device, operator.dtype)
    group = max(1, min(probes, _BASIS_NUMBERS // (steps * operator.shape[0])))
    memory = 8 * group * steps * operator.shape[0]
    with bar("spectral density", probes * steps, bytes=memory) as progress:
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for part in start.split(group, dim=1):
            try:
                found = lanczos(operator, part, steps, progress)
            except KeyboardInterrupt:
                if sum(len(nodes) for nodes, _ in pairs) < 2:
                    raise
                warnings.warn("interrupted: the density rests on fewer probes", ThermogradWarning, stacklevel=3)
                break
            pairs.append(found)
            if found[0].shape[1] < steps:
                break
    shortest = min(nodes.shape[1] for nodes, _ in pairs)
    if shortest < max(nodes.shape[1] for nodes, _ in pairs):  # the last group was interrupted: whole ones alone count
        pairs = pairs[:-1]
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def lanczos(operator: Operator, start: Tensor, steps: int, progress: bar) -> tuple[np.ndarray, np.ndarray]:
    """Independent Lanczos recurrences from the columns of ``start``, with full reorthogonalisation."""
    size, width = start.shape
    basis = torch.zeros(width, steps, size, dtype=start.dtype, device=start.device)  # [probes, steps, P]
    diagonal_ = torch.zeros(width, steps, dtype=torch.float64)
    beside = torch.zeros(width, steps, dtype=torch.float64)
    current = start.T.contiguous()  # [probes, P]
    alive = torch.ones(width, dtype=torch.bool, device=start.device)
    for j in range(steps):
        basis[:, j] = current
        try:
            product = (operator @ current.T.contiguous()).T  # [probes, P]
        except KeyboardInterrupt:
            if j == 0:
                raise
            warnings.warn(f"interrupted: the density rests on {j} of {steps} steps", ThermogradWarning, stacklevel=4)
            steps = j
            break
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
    diagonal_, beside = diagonal_[:, :steps], beside[:, :steps]
    tridiagonal = torch.diag_embed(diagonal_)
    if steps > 1:
        tridiagonal = (
            tridiagonal + torch.diag_embed(beside[:, : steps - 1], 1) + torch.diag_embed(beside[:, : steps - 1], -1)
        )
    nodes, vectors = torch.linalg.eigh(tridiagonal)  # [probes, steps]
    return nodes.numpy(), vectors[:, 0].square().numpy()
