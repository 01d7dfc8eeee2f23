r"""Operators made of operators: sub-blocks of some weights, shifts of the diagonal, projections onto subspaces."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from .operators import Operator, as_operator

__all__ = ["positions", "projected", "shifted", "sub_block"]


def positions(problem: Problem, params: str | Sequence[str]) -> Tensor:
    """Where in theta the parameters of a layer or group lie.

    Args:
        problem: the problem.
        params: name patterns or prefixes, as in :class:`~thermograd.problem.Problem`.

    Returns:
        Ascending positions, int64 ``[m]``.

    Raises:
        InputError: a pattern matches no parameter.

    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.ones(4, 3), torch.zeros(4, 1)))
    >>> positions(problem, "bias")
    tensor([3])
    """
    patterns = [params] if isinstance(params, str) else list(params)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {n for n in problem.names if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        if not found:
            raise InputError(
                f"params={pattern!r} matches no parameter",
                expected=f"a pattern for some of: {', '.join(problem.names)}",
            )
        chosen |= found
    parts, start = [], 0
    for name, size in zip(problem.names, problem._sizes, strict=True):
        if name in chosen:
            parts.append(torch.arange(start, start + size))
        start += size
    return torch.cat(parts)


class _SubBlock(Operator):
    def __init__(self, inner: Operator, where: Tensor):
        super().__init__(len(where), inner.dtype, inner.device)
        self.inner, self.where = inner, where.to(inner.device)

    def _product(self, block: Tensor) -> Tensor:
        whole = block.new_zeros(self.inner.shape[0], block.shape[1])  # [P, k]
        whole[self.where] = block
        return (self.inner @ whole)[self.where]


class _Shifted(Operator):
    def __init__(self, inner: Operator, shift: float):
        super().__init__(inner.shape[0], inner.dtype, inner.device)
        self.inner, self.shift = inner, shift

    def _product(self, block: Tensor) -> Tensor:
        return self.inner @ block + self.shift * block


class _Projected(Operator):
    def __init__(self, inner: Operator, basis: Tensor, complement: bool):
        super().__init__(inner.shape[0], inner.dtype, inner.device)
        self.inner, self.complement = inner, complement
        self.basis = torch.linalg.qr(basis.to(inner.device, torch.float64))[0].to(inner.dtype)  # [P, j]

    def _project(self, block: Tensor) -> Tensor:
        inside = self.basis @ (self.basis.T @ block)
        return block - inside if self.complement else inside

    def _product(self, block: Tensor) -> Tensor:
        return self._project(self.inner @ self._project(block))


def sub_block(A: Any, where: Any) -> Operator:
    r"""The diagonal sub-block of an operator on some of the weights, :math:`A_{SS}`.

    For a layer's own curvature a problem with ``params=`` is cheaper, since it propagates nothing elsewhere.

    Args:
        A: operator or matrix, (P, P).
        where: positions of the weights, ``[m]``, such as :func:`positions` gives; each once.

    Raises:
        InputError: positions out of range or repeated.

    >>> sub_block(torch.diag(torch.tensor([1.0, 2.0, 3.0])), [2, 0]).dense()
    tensor([[3., 0.],
            [0., 1.]])
    """
    operator = as_operator(A)
    chosen = torch.as_tensor(where).flatten()
    size = operator.shape[0]
    whole = chosen.dtype in (torch.int64, torch.int32) and len(chosen) > 0
    if not whole or int(chosen.min()) < 0 or int(chosen.max()) >= size or len(chosen.unique()) < len(chosen):
        raise InputError("the positions do not name weights once each", expected=f"distinct integers 0 to {size - 1}")
    return _SubBlock(operator, chosen.long())


def shifted(A: Any, shift: float) -> Operator:
    r"""An operator with a number added on its diagonal, :math:`A + s I`.

    >>> shifted(torch.zeros(2, 2), 3.0).dense()
    tensor([[3., 0.],
            [0., 3.]])
    """
    if not np.isfinite(shift):
        raise InputError(f"shift is {shift}", expected="a finite number")
    return _Shifted(as_operator(A), float(shift))


def projected(A: Any, directions: Any, complement: bool = False) -> Operator:
    r"""An operator seen from a subspace alone, :math:`Q Q^\top A\, Q Q^\top`, or from what is orthogonal to it.

    Args:
        A: operator or matrix, (P, P).
        directions: ``[P, j]`` that span the subspace, or eigenpairs.
        complement: project the subspace out instead (deflation).

    Raises:
        InputError: the directions do not fit the operator.

    >>> projected(torch.diag(torch.tensor([5.0, 1.0])), torch.tensor([[1.0], [0.0]]), complement=True).dense()
    tensor([[0., 0.],
            [0., 1.]])
    """
    operator = as_operator(A)
    basis = torch.as_tensor(getattr(directions, "eigenvectors", directions)).detach()
    basis = basis[:, None] if basis.ndim == 1 else basis
    if basis.ndim != 2 or basis.shape[0] != operator.shape[0] or not bool(torch.isfinite(basis).all()):
        raise InputError(f"directions have shape {tuple(basis.shape)}", expected=f"finite [{operator.shape[0]}, j]")
    return _Projected(operator, basis, complement)
