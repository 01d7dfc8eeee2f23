"""Losses at many displaced weight vectors, several at once where the model allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..problem import Problem

__all__ = ["DisplacedLosses", "as_directions"]

_EVALUATIONS = 8000  # samples times weight vectors evaluated at once; larger batches gain nothing
_SMALL = 2**24  # samples times weights above which a single evaluation keeps the processor busy by itself


def as_directions(problem: Problem, directions: Any) -> Tensor:
    """Directions in weight space as ``[P, k]`` in the problem's precision.

    Args:
        problem: the problem with P weights.
        directions: ``[P, k]`` or ``[P]``, torch or numpy, or a result with ``.eigenvectors``.

    Raises:
        InputError: wrong shape, or a direction of length zero.
        NonFiniteError: not finite.
    """
    given = getattr(directions, "eigenvectors", directions)
    tensor = torch.as_tensor(given).detach().to(problem.device, problem.dtype)
    tensor = tensor[:, None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or tensor.shape[0] != problem.P or tensor.shape[1] == 0:
        turned = tensor.ndim == 2 and tensor.shape[1] == problem.P
        raise InputError(
            f"directions have shape {tuple(tensor.shape)}",
            expected=f"[P, k] with P = {problem.P}, one direction a column",
            remedy="pass the transpose" if turned else None,
        )
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError("a direction is not finite")
    lengths = tensor.norm(dim=0)
    if not bool((lengths > 0).all()):
        raise InputError(f"direction {int((lengths == 0).nonzero()[0])} has length zero")
    return tensor


class DisplacedLosses:
    """The mean loss over the whole data set at many weight vectors.

    Args:
        problem: the problem.
        weight_decay: adds half of this times the squared length of the weights.
        index: samples to average over, default all.
    """

    def __init__(self, problem: Problem, weight_decay: float = 0.0, index: Any = None):
        self.problem, self.weight_decay = problem, float(weight_decay)
        self._blocks = problem._blocks(index)
        self._count = sum(map(len, self._blocks))
        self._maps = problem._vmap_works and max(map(len, self._blocks)) * problem.P <= _SMALL

    def __call__(self, thetas: Tensor) -> Tensor:
        """Losses ``[m]`` at weights ``[m, P]``; NaN and infinity are returned as they come."""
        largest = max(map(len, self._blocks))
        group = max(1, _EVALUATIONS // largest) if self._maps else 1
        with torch.no_grad():
            losses = torch.cat([self._group(part) for part in thetas.split(group)])  # [m]
        return losses + 0.5 * self.weight_decay * thetas.square().sum(1)

    def _group(self, thetas: Tensor) -> Tensor:
        total = torch.zeros(len(thetas), dtype=thetas.dtype, device=thetas.device)
        for block in self._blocks:
            total += self._sums(thetas, block)
        return total / self._count

    def _sums(self, thetas: Tensor, block: Tensor) -> Tensor:
        def one(theta: Tensor) -> Tensor:
            return self.problem.differentiable_sample_losses(theta, block).sum()

        if self._maps and len(thetas) > 1:
            try:
                return torch.func.vmap(one)(thetas)
            except Exception:  # models may use anything that vmap does not know; the loop below knows it all
                self._maps = False
        return torch.stack([one(theta) for theta in thetas])
