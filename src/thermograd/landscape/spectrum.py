r"""Eigenpairs of symmetric operators, stopped on their true residuals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConvergenceError, InputError, ThermogradWarning
from ..measurement import Measurement, new_axes, quantity
from ..progress import bar
from .operators import MatrixOperator, Operator, as_operator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Eigenpairs", "Which", "all_eigenpairs", "eigenpairs"]

Which = Literal["LA", "SA", "LM", "BE"]

_BLOCK = 4  # vectors multiplied at once: what finds a cluster of equal eigenvalues in one go
_DENSE_MATRIX, _DENSE_OPERATOR = 1500, 400  # sizes up to which the full decomposition is cheaper
_CHECKS = 5  # block steps from fresh random vectors, to find copies of an eigenvalue that were missed
_ROUNDING = 50  # residuals below this many units of rounding of the norm cannot be lowered


@dataclass(frozen=True)
class Eigenpairs(Measurement):
    """Eigenvalues with orthonormal eigenvectors and the residual of each.

    ``residuals`` are ``|A v - a v| / |a|``; where ``|a|`` is below the rounding of the operator's norm, that
    rounding stands in for it. ``converged`` tells which pairs met the tolerance.
    """

    eigenvalues: Tensor = quantity("mode", units="loss", long_name="eigenvalue")
    eigenvectors: Tensor = quantity("weight", "mode", long_name="eigenvector")
    residuals: Tensor = quantity("mode", long_name="relative residual")
    converged: Tensor = quantity("mode", long_name="whether the residual met the tolerance")
    products: int = 0

    _primary = "eigenvalues"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Absolute eigenvalues against rank, on a logarithmic scale; negative ones as open circles."""
        ax = new_axes(ax)
        values = np.asarray(self)
        values = values[np.argsort(-np.abs(values))]
        rank = np.arange(1, len(values) + 1)
        ax.semilogy(rank[values > 0], values[values > 0], "o", label="positive")
        if (values < 0).any():
            ax.semilogy(rank[values < 0], -values[values < 0], "o", mfc="none", label="negative (absolute value)")
            ax.legend()
        ax.set(xlabel="rank", ylabel="|eigenvalue|")
        return ax


def eigenpairs(
    A: Any,
    k: int = 10,
    which: Which = "LA",
    tol: float = 1e-6,
    seed: int = 0,
    maxiter: int | None = None,
    v0: Any = None,
) -> Eigenpairs:
    r"""A few extreme eigenpairs of a symmetric operator.

    Thick-restart block Lanczos with full reorthogonalisation (Wu & Simon 2000). A pair counts as converged when
    its true residual obeys :math:`\|A v - a v\| \le \mathrm{tol}\,|a|` (or has reached the rounding of
    :math:`\|A\|`, for eigenvalues near zero). Before returning, a few steps from fresh random vectors look for
    copies of degenerate eigenvalues that the Krylov space could not see. Small matrices, and k close to P, are
    decomposed in full.

    Args:
        A: an operator or a matrix, see :func:`~thermograd.landscape.operators.as_operator`; (P, P).
        k: how many pairs, 1 to P.
        which: "LA" the algebraically largest, "SA" the smallest, "LM" the largest in magnitude, "BE" half from
            either end (one more from the top when k is odd).
        tol: relative residual asked for.
        seed: of the random start.
        maxiter: most products with single vectors; default ``max(5000, 100 k)``.
        v0: start vectors ``[P]`` or ``[P, j]``, such as the eigenvectors at nearby weights.

    Returns:
        :class:`Eigenpairs` with ``.eigenvalues`` [k] descending, ``.eigenvectors`` [P, k], ``.residuals`` [k].
        Pairs that did not converge are warned of and marked in ``.converged``. After Ctrl-C only the converged
        pairs are returned.

    Raises:
        InputError: k, which, tol or maxiter out of range; the operator is not symmetric.

    >>> pairs = eigenpairs(torch.diag(torch.arange(6.0, dtype=torch.float64)), k=2)
    >>> pairs.eigenvalues
    tensor([5., 4.], dtype=torch.float64)
    """
    operator = as_operator(A)
    size = operator.shape[0]
    if not 1 <= int(k) <= size:
        raise InputError(f"k is {k}", expected=f"1 to {size}, the operator's size")
    if which not in ("LA", "SA", "LM", "BE"):
        raise InputError(f"which is {which!r}", expected="'LA', 'SA', 'LM' or 'BE'")
    if not 0 < tol < 1:
        raise InputError(f"tol is {tol}", expected="a number between 0 and 1")
    if maxiter is not None and maxiter < 1:
        raise InputError(f"maxiter is {maxiter}", expected="at least 1 product")
    limit = _DENSE_MATRIX if isinstance(operator, MatrixOperator) else _DENSE_OPERATOR
    if size <= limit or 4 * k >= size:
        return _dense_eigenpairs(operator, int(k), which, tol)
    budget = max(5000, 100 * k) if maxiter is None else int(maxiter)
    return _Lanczos(operator, int(k), which, tol, seed, budget).run(v0)


def all_eigenpairs(A: Any) -> Eigenpairs:
    """The full spectrum by dense decomposition, P products and P^3 work: for P up to some thousands.

    >>> all_eigenpairs(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).eigenvalues
    tensor([ 1., -1.])
    """
    operator = as_operator(A)
    return _dense_eigenpairs(operator, operator.shape[0], "LA", tol=1e-6)


def _dense_eigenpairs(operator: Operator, k: int, which: Which, tol: float) -> Eigenpairs:
    matrix = operator.dense()
    values, vectors = torch.linalg.eigh(matrix)
    chosen = _wanted(values, k, which)
    chosen = chosen[values[chosen].argsort(descending=True, stable=True)]
    values, vectors = values[chosen], vectors[:, chosen]
    norms = (matrix @ vectors - vectors * values).norm(dim=0)
    floor = _floor(torch.linalg.matrix_norm(matrix, 2) if len(chosen) < len(matrix) else values.abs().max(), matrix)
    return _result(values, vectors, norms, float(floor), tol, len(matrix))


def _floor(norm: Any, like: Tensor) -> float:
    return _ROUNDING * torch.finfo(like.dtype).eps * float(norm)


def _result(values: Tensor, vectors: Tensor, norms: Tensor, floor: float, tol: float, products: int) -> Eigenpairs:
    """Pack pairs in descending order with a fixed sign: the largest component of each vector is positive."""
    order = values.argsort(descending=True, stable=True)
    values, vectors, norms = values[order], vectors[:, order], norms[order]
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    sign = torch.gather(vectors, 0, largest).sign()
    tiny = torch.finfo(values.dtype).tiny
    residuals = norms / values.abs().clamp_min(max(floor, tiny))
    converged = norms <= torch.clamp(tol * values.abs(), min=floor)
    return Eigenpairs(values, vectors * sign, residuals, converged, products)


def _wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """Positions of the k wanted among ``values``, the most extreme first."""
    k = min(k, len(values))
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)[:k]
    descending = values.argsort(descending=True, stable=True)
    if which == "LA":
        return descending[:k]
    if which == "SA":
        return descending.flip(0)[:k]
    top, bottom = descending[: (k + 1) // 2], descending.flip(0)[: k // 2]
    merged = [p for pair in zip(top, bottom) for p in pair] + list(top[len(bottom) :])
    return torch.stack(merged)


@dataclass(frozen=True)
class _Basis:
    """An orthonormal basis, its image under the operator, and the eigendecomposition of the projection.

    Replaced as a whole, so that an interrupt never finds it half changed.
    """

    V: Tensor  # [P, m]
    AV: Tensor  # [P, m]
    T: Tensor  # [m, m] = V^T A V
    values: Tensor  # [m] Ritz values, ascending
    coefficients: Tensor  # [m, m]

    @classmethod
    def of(cls, V: Tensor, AV: Tensor, T: Tensor) -> _Basis:
        return cls(V, AV, T, *torch.linalg.eigh(T))

    @property
    def width(self) -> int:
        return self.V.shape[1]

    @property
    def floor(self) -> float:
        """The residual below which rounding rules, with the operator's norm taken from the Ritz values."""
        return _floor(self.values.abs().max(), self.values)

    def residuals(self, chosen: Tensor) -> Tensor:
        """A v - a v of the Ritz pairs at positions ``chosen``, [P, j]."""
        turn = self.coefficients[:, chosen]
        return self.AV @ turn - (self.V @ turn) * self.values[chosen]

    def compressed(self, chosen: Tensor) -> _Basis:
        """The span of the Ritz vectors at positions ``chosen``."""
        turn = self.coefficients[:, chosen]
        return _Basis.of(self.V @ turn, self.AV @ turn, torch.diag(self.values[chosen]))


class _Lanczos:
    """One run of thick-restart block Lanczos.

    The basis is kept together with its image, so that residuals are the true ones at any moment, whatever was
    injected. It grows by the residuals of the first unconverged pairs (which, without injections, span the next
    Krylov block) and is compressed to the wanted Ritz vectors and some more when full.
    """

    def __init__(self, operator: Operator, k: int, which: Which, tol: float, seed: int, budget: int):
        self.operator, self.k, self.which, self.tol, self.budget = operator, k, which, tol, budget
        self.size = operator.shape[0]
        self.block = min(_BLOCK, max(k, 2))
        self.keep = k + max(self.block, k // 2)
        self.most = max(2 * k + 6 * self.block, self.keep + (_CHECKS + 1) * self.block, 40)
        self.random = torch.Generator().manual_seed(seed)
        self.products = 0
        self.basis: _Basis | None = None
        self.settled: Tensor | None = None  # [k] Ritz values found converged; NaN where not yet

    def run(self, v0: Any) -> Eigenpairs:
        interrupted = False
        try:
            with bar(f"eigenpairs, {self.k} wanted") as progress:
                self.progress = progress
                self._iterate(v0)
        except KeyboardInterrupt:
            interrupted = True
        return self._finish(interrupted)

    def _iterate(self, v0: Any) -> None:
        self._expand(self._start(v0))
        while self.products < self.budget:
            directions = self._unconverged()
            if directions is None and not self._found_more():
                return
            if directions is not None:
                self._make_room()
                self._expand(directions)

    # ------------------------------------------------------------------ the pieces of a step

    def _start(self, v0: Any) -> Tensor:
        start = self._normal(self.block)
        if v0 is None:
            return start
        given = torch.as_tensor(v0).detach().to(start.device, start.dtype)
        given = given[:, None] if given.ndim == 1 else given
        if given.ndim != 2 or given.shape[0] != self.size or not bool(torch.isfinite(given).all()):
            raise InputError(f"v0 has shape {tuple(given.shape)}", expected=f"finite [{self.size}] or [{self.size}, j]")
        # a random vector beside the given ones, since these may miss a wanted direction altogether
        return torch.cat([given[:, : self.keep], start[:, :1]], dim=1)

    def _normal(self, columns: int) -> Tensor:
        sample = torch.randn(self.size, columns, generator=self.random, dtype=torch.float64)
        return sample.to(self.operator.device, self.operator.dtype)

    def _unconverged(self) -> Tensor | None:
        """Residual directions of the first unconverged wanted pairs, a block of them; None when all converged."""
        basis = self._now()
        chosen = _wanted(basis.values, self.k, self.which)
        values = basis.values[chosen]
        bound = torch.clamp(self.tol * values.abs(), min=basis.floor)
        if self.settled is None or len(self.settled) != len(values):
            self.settled = torch.full_like(values, torch.nan)
        open_ = ~((values - self.settled).abs() <= bound)
        found: list[Tensor] = []
        for part in open_.nonzero().flatten().split(self.block):
            residual = basis.residuals(chosen[part])
            norms = residual.norm(dim=0)
            bad = norms > bound[part]
            self.settled[part] = torch.where(bad, torch.nan, values[part])
            found += list((residual[:, bad] / norms[bad]).T)
            if len(found) >= self.block:
                break
        if not found and len(values) == self.k:
            return None
        columns = [torch.stack(found[: self.block], dim=1)] if found else []
        missing = self.block - min(len(found), self.block)
        if missing:
            # pairs just outside the wanted ones: with their residuals the block stays the next Krylov block
            guard = basis.residuals(_wanted(basis.values, self.k + missing, self.which)[self.k :])
            columns += [guard, self._normal(missing - guard.shape[1])]
        return torch.cat(columns, dim=1)

    def _found_more(self) -> bool:
        """Look from random vectors, outside of what is known, for wanted eigenvalues that were missed."""
        self._make_room(fresh=True)
        basis = self._now()
        before = basis.values[_wanted(basis.values, self.k, self.which)]
        directions = self._normal(self.block)
        for _ in range(_CHECKS):
            self._expand(directions)
            directions = self._now().AV[:, -self.block :]  # on along the Krylov space of the random vectors
        basis = self._now()
        after = basis.values[_wanted(basis.values, self.k, self.which)]
        changed = (after - before).abs() > torch.clamp(self.tol * before.abs(), min=basis.floor)
        self.settled = None  # every pair is looked at once more
        return bool(changed.any()) or self._unconverged() is not None

    def _make_room(self, fresh: bool = False) -> None:
        """Compress the basis when it is full, or when room is needed for a ``fresh`` Krylov space."""
        basis = self._now()
        if basis.width + self.block > self.most or (fresh and basis.width > self.keep):
            self.basis = basis.compressed(_wanted(basis.values, self.keep, self.which))

    def _expand(self, directions: Tensor) -> None:
        old = self.basis
        V = old.V if old else directions[:, :0]
        new = self._orthonormal(V, directions)
        product = self.operator @ new
        self.products += new.shape[1]
        self.progress.advance(new.shape[1])
        corner = new.T @ product
        if old is None:
            _refuse_asymmetric(corner, product)
            self.basis = _Basis.of(new, product, (corner + corner.T) / 2)
            return
        side = V.T @ product
        T = torch.cat([torch.cat([old.T, side], 1), torch.cat([side.T, (corner + corner.T) / 2], 1)], 0)
        self.basis = _Basis.of(torch.cat([V, new], 1), torch.cat([old.AV, product], 1), T)

    def _orthonormal(self, V: Tensor, directions: Tensor) -> Tensor:
        """Orthonormal columns orthogonal to the basis; directions that vanish are replaced by random ones."""
        tiny = torch.finfo(directions.dtype).tiny
        lost = 1e3 * torch.finfo(directions.dtype).eps
        for _attempt in range(10):
            unit = directions / directions.norm(dim=0).clamp_min(tiny)
            Q, R = torch.linalg.qr(unit - V @ (V.T @ unit))
            gone = R.diagonal().abs() < lost
            if not bool(gone.any()):
                for _ in range(2):  # projecting once leaves rounding of the size of what was taken out
                    Q = torch.linalg.qr(Q - V @ (V.T @ Q))[0]
                return Q
            directions = torch.where(gone, self._normal(directions.shape[1]), directions)
        raise ConvergenceError("no direction orthogonal to the basis was found", remedy="ask for fewer eigenpairs")

    def _now(self) -> _Basis:
        if self.basis is None:
            raise ConvergenceError("no product was made")
        return self.basis

    # ------------------------------------------------------------------ the end

    def _finish(self, interrupted: bool) -> Eigenpairs:
        if interrupted and self.basis is None:
            raise KeyboardInterrupt
        basis = self._now()
        chosen = _wanted(basis.values, self.k, self.which)
        vectors = basis.V @ basis.coefficients[:, chosen]
        vectors = torch.linalg.qr(vectors)[0]  # takes out the rounding of many restarts
        norms = basis.residuals(chosen).norm(dim=0)
        result = _result(basis.values[chosen], vectors, norms, basis.floor, self.tol, self.products)
        good = result.converged
        if interrupted:
            if not bool(good.any()):
                raise KeyboardInterrupt
            kept = (result.eigenvalues[good], result.eigenvectors[:, good], result.residuals[good], good[good])
            result = Eigenpairs(*kept, self.products)
            _warn(f"interrupted: {int(good.sum())} of {self.k} eigenpairs had converged and are returned")
        elif not bool(good.all()) or len(good) < self.k:
            _warn(
                f"{int(good.sum())} of {self.k} eigenpairs reached the relative residual {self.tol:g} in "
                f"{self.products} products (worst: {float(result.residuals.max()):.2g}). What to do: raise maxiter or "
                "tol, or ask for fewer; .converged tells which did"
            )
        return result


def _warn(message: str) -> None:
    warnings.warn(message, ThermogradWarning, stacklevel=5)  # points at the caller of eigenpairs


def _refuse_asymmetric(corner: Tensor, product: Tensor) -> None:
    """Compare v.A w with w.A v on the random start vectors."""
    difference = float((corner - corner.T).abs().max())
    if difference > 3 * torch.finfo(corner.dtype).eps ** 0.5 * float(product.norm(dim=0).max()):
        raise InputError(
            f"the operator is not symmetric: v.A w and w.A v differ by {difference:.2g}",
            expected="a symmetric operator",
        )
