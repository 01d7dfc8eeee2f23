r"""Eigenpairs of symmetric operators, stopped on their true residuals."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, ThermogradWarning
from ..measurement import Measurement, new_axes, quantity
from .krylov import Krylov, KrylovState, Which, rounding_floor, wanted
from .operators import MatrixOperator, Operator, as_operator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Eigenpairs", "KrylovState", "Which", "all_eigenpairs", "eigenpairs"]

_ROUGH = 3e-2  # relative residual of the pairs that make a start
_DENSE_MATRIX, _DENSE_OPERATOR = 1500, 400  # sizes up to which the full decomposition is cheaper


@dataclass(frozen=True)
class Eigenpairs(Measurement):
    """Eigenvalues with orthonormal eigenvectors and the residual of each.

    ``residuals`` are ``|A v - a v| / |a|``; where ``|a|`` is below the rounding of the operator's norm, that
    rounding stands in for it. ``converged`` tells which pairs met the tolerance. ``products`` counts products with
    single vectors, those of a cheaper operator for the start not included. ``state`` is there when the iteration was
    interrupted or ended early: ``eigenpairs(..., resume=pairs.state)`` goes on from it.
    """

    eigenvalues: Tensor = quantity("mode", units="loss", long_name="eigenvalue")
    eigenvectors: Tensor = quantity("weight", "mode", long_name="eigenvector")
    residuals: Tensor = quantity("mode", long_name="relative residual")
    converged: Tensor = quantity("mode", long_name="whether the residual met the tolerance")
    products: int = 0
    state: KrylovState | None = field(default=None, repr=False, compare=False)

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
    start: Any = None,
    resume: KrylovState | Eigenpairs | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Eigenpairs:
    r"""A few extreme eigenpairs of a symmetric operator.

    Thick-restart Lanczos with full reorthogonalisation (Wu & Simon 2000), opened by a few steps in blocks of two. A
    pair counts as converged when its true residual obeys :math:`\|A v - a v\| \le \mathrm{tol}\,|a|` (or has reached
    the rounding of :math:`\|A\|`, for eigenvalues near zero). Where the residuals fall so slowly that gaps of the size
    of the tolerance are not resolved, as in a bulk, they are brought to a tenth of it, since a neighbour may otherwise
    stand for an extreme eigenvalue. Where a wanted eigenvalue appears twice, which is as often as a Krylov space of
    two start vectors shows it, fresh random vectors look for further copies. Small matrices, and k close to P, are
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
        start: a cheaper operator that resembles A, such as ``A.subsample(1 / 8)`` of a curvature: its eigenpairs are
            found first, roughly, and their sum starts the iteration with A (multi-fidelity start).
        resume: the ``.state`` of an interrupted call with the same operator and options. What it leads to equals the
            uninterrupted result bit for bit.
        checkpoint: a file that the state is written to, once a minute and when interrupted, that is resumed from when
            it exists, and that is removed at the end.

    Returns:
        :class:`Eigenpairs` with ``.eigenvalues`` [k] descending, ``.eigenvectors`` [P, k], ``.residuals`` [k].
        Pairs that did not converge are warned of and marked in ``.converged``. After Ctrl-C only the converged
        pairs are returned, with the ``.state`` to go on from.

    Raises:
        InputError: k, which, tol or maxiter out of range; the operator is not symmetric; the state to resume from
            belongs to something else.
        StoreError: the checkpoint cannot be read.

    >>> pairs = eigenpairs(torch.diag(torch.arange(6.0, dtype=torch.float64)), k=2)
    >>> pairs.eigenvalues
    tensor([5., 4.], dtype=torch.float64)
    """
    operator = as_operator(A)
    size = operator.shape[0]
    _check(k, size, which, tol, maxiter)
    limit = _DENSE_MATRIX if isinstance(operator, MatrixOperator) else _DENSE_OPERATOR
    if size <= limit or 4 * k >= size:
        return _dense_eigenpairs(operator, int(k), which, tol)
    budget = max(5000, 100 * k) if maxiter is None else int(maxiter)
    iteration = Krylov(operator, int(k), which, tol, seed, budget)
    if checkpoint is not None and resume is None and Path(checkpoint).exists():
        resume = KrylovState.load(checkpoint)
    rows = None
    if resume is not None:
        state = resume.state if isinstance(resume, Eigenpairs) else resume
        if state is None:
            raise InputError(
                "these eigenpairs carry no state", expected="pairs of an interrupted call, or their .state"
            )
        iteration.resume(state)
    elif v0 is not None:
        rows = _given(v0, operator)
    elif start is not None:
        rows = _from_cheaper(as_operator(start), operator, int(k), which, tol, seed)
    interrupted = iteration.run(rows, checkpoint)
    result = _finish(iteration, interrupted)
    if checkpoint is not None and result.state is None:
        Path(checkpoint).unlink(missing_ok=True)
    return result


def _check(k: int, size: int, which: str, tol: float, maxiter: int | None) -> None:
    if not 1 <= int(k) <= size:
        raise InputError(f"k is {k}", expected=f"1 to {size}, the operator's size")
    if which not in ("LA", "SA", "LM", "BE"):
        raise InputError(f"which is {which!r}", expected="'LA', 'SA', 'LM' or 'BE'")
    if not 0 < tol < 1:
        raise InputError(f"tol is {tol}", expected="a number between 0 and 1")
    if maxiter is not None and maxiter < 1:
        raise InputError(f"maxiter is {maxiter}", expected="at least 1 product")


def _given(v0: Any, operator: Operator) -> Tensor:
    given = torch.as_tensor(v0).detach().to(operator.device, operator.dtype)
    given = given[:, None] if given.ndim == 1 else given
    size = operator.shape[0]
    if given.ndim != 2 or given.shape[0] != size or not bool(torch.isfinite(given).all()):
        raise InputError(f"v0 has shape {tuple(given.shape)}", expected=f"finite [{size}] or [{size}, j]")
    return given.T.contiguous()


def _from_cheaper(cheap: Operator, operator: Operator, k: int, which: Which, tol: float, seed: int) -> Tensor:
    """One start vector that holds the wanted directions of a cheaper operator and little else, [1, P].

    As a block these would cost k products a step. A single vector keeps one polynomial for all pairs; the weights
    favour the least extreme, which converge last.
    """
    if cheap.shape != operator.shape:
        raise InputError(f"start has shape {cheap.shape}", expected=f"an operator of shape {operator.shape}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThermogradWarning)  # rough pairs do for a start
        rough = eigenpairs(cheap, k, which, max(tol, _ROUGH), seed, maxiter=20 * k + 100)
    weights = 1 / rough.eigenvalues.abs().clamp_min(1e-3 * float(rough.eigenvalues.abs().max()))
    return (rough.eigenvectors @ weights)[None].to(operator.device, operator.dtype)


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
    chosen = wanted(values, k, which)
    chosen = chosen[values[chosen].argsort(descending=True, stable=True)]
    values, vectors = values[chosen], vectors[:, chosen]
    norms = (matrix @ vectors - vectors * values).norm(dim=0)
    floor = rounding_floor(
        torch.linalg.matrix_norm(matrix, 2) if len(chosen) < len(matrix) else values.abs().max(), matrix
    )
    return _result(values, vectors, norms, floor, tol, len(matrix))


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


def _finish(iteration: Krylov, interrupted: bool) -> Eigenpairs:
    """The wanted pairs of the basis as it stands; of an interrupted iteration the converged ones."""
    basis, k = iteration.basis, iteration.k
    if basis is None:  # interrupted before the first product
        raise KeyboardInterrupt
    chosen = wanted(basis.values, k, iteration.which)
    vectors = torch.linalg.qr(basis.vectors(chosen).T)[0]  # takes out the rounding of many restarts
    norms = basis.residuals(chosen).norm(dim=1)
    result = _result(basis.values[chosen], vectors, norms, basis.floor, iteration.tol, iteration.products)
    good = result.converged
    if interrupted:
        kept = (result.eigenvalues[good], result.eigenvectors[:, good], result.residuals[good], good[good])
        _warn(f"interrupted: {int(good.sum())} of {k} eigenpairs had converged and are returned; .state resumes")
        return Eigenpairs(*kept, iteration.products, iteration.state)
    if bool(good.all()) and len(good) == k:
        return result
    _warn(
        f"{int(good.sum())} of {k} eigenpairs reached the relative residual {iteration.tol:g} in "
        f"{iteration.products} products (worst: {float(result.residuals.max()):.2g}). What to do: raise maxiter or "
        "tol, or ask for fewer; .converged tells which did, resume=pairs.state goes on"
    )
    return replace(result, state=iteration.state)


def _warn(message: str) -> None:
    warnings.warn(message, ThermogradWarning, stacklevel=4)  # points at the caller of eigenpairs
