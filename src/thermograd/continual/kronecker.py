r"""A quadratic form on one layer's weight matrix whose directions are outer products: many, for little memory.

.. math:: Q(W) = \tfrac12 \sum_{ij} h_{ij}\,(u_i^\top W v_j - a_{ij})^2

with orthonormal :math:`u_i` over the layer's outputs and :math:`v_j` over its inputs (a bias counts as one more
input that is always 1). q times r directions take q out + r in + 2 q r numbers, where as many directions of their own
would take q r out in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .forms import Form, Rate, _refuse, _scattered, _share

__all__ = ["Kronecker", "principal", "principal_of"]


@dataclass(frozen=True)
class Kronecker(Form):
    """Curvatures along the outer products of two orthonormal bases of a layer.

    The vector that it acts on holds the weight [out, in] row by row, then the bias [out] where there is one. A sum
    takes as its bases the principal directions of what both forms curve, and keeps of each form the curvature along
    them; curvature between two of the new directions is left out.

    Args:
        left: [out, q], orthonormal columns; None for the outputs' own axes, which need not be stored.
        right: [in (+ 1), r], orthonormal columns.
        curvature: [q, r].
        target: [q, r].
        bias: whether the last row of ``right`` belongs to the bias.
    """

    left: Tensor | None
    right: Tensor
    curvature: Tensor
    target: Tensor
    bias: bool

    def __post_init__(self) -> None:
        _refuse("a curvature", self.curvature)

    @property
    def P(self) -> int:  # type: ignore[override]
        """Number of weights of the layer, bias included."""
        return self.outputs * self.right.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs of the layer."""
        return len(self.curvature) if self.left is None else len(self.left)

    @property
    def memory(self) -> int:
        rotation = 0 if self.left is None else self.left.numel()
        return rotation + self.right.numel() + self.curvature.numel() + self.target.numel()

    def _matrix(self, vector: Tensor) -> Tensor:
        """Weight and bias side by side, [out, in + 1]."""
        out = self.outputs
        if not self.bias:
            return vector.view(out, -1)
        return torch.cat([vector[:-out].view(out, -1), vector[-out:, None]], dim=1)

    def _vector(self, matrix: Tensor) -> Tensor:
        if not self.bias:
            return matrix.reshape(-1)
        return torch.cat([matrix[:, :-1].reshape(-1), matrix[:, -1]])

    def _coordinates(self, vector: Tensor) -> Tensor:
        along = self._matrix(vector) @ self.right  # [out, r]
        return along if self.left is None else self.left.T @ along  # [q, r]

    def value(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.curvature * (self._coordinates(theta) - self.target).square()).sum()

    def proximal(self, v: Tensor, rate: Rate) -> Tensor:
        if isinstance(rate, Tensor):
            raise InputError(
                "the weights of one layer have different learning rates",
                expected="one learning rate for the weight and the bias of a layer",
                remedy="add penalty(model) to the loss instead, or use another constraint",
            )
        move = _share(rate * self.curvature) * (self.target - self._coordinates(v))  # [q, r]
        return v + self._vector((move if self.left is None else self.left @ move) @ self.right.T)

    def plus(self, other: Kronecker) -> Kronecker:
        left = None
        if self.left is not None and other.left is not None:
            left = _joint(self.left, self.curvature.sum(1), other.left, other.curvature.sum(1))
        right = _joint(self.right, self.curvature.sum(0), other.right, other.curvature.sum(0))
        return self.rebased(left, right, other)

    def rebased(self, left: Tensor | None, right: Tensor, other: Kronecker) -> Kronecker:
        """The sum with another form, along given bases."""
        axes = torch.eye(self.outputs, dtype=right.dtype, device=right.device)
        target_basis = axes if left is None else left  # [out, q']
        curvature = right.new_zeros(target_basis.shape[1], right.shape[1])
        pull = torch.zeros_like(curvature)
        for form in (self, other):
            turn_left = target_basis.T @ (axes if form.left is None else form.left)  # [q', q]
            turn_right = form.right.T @ right  # [r, r']
            curvature += turn_left.square() @ form.curvature @ turn_right.square()
            pull += turn_left @ (form.curvature * form.target) @ turn_right
        positive = curvature > 0
        target = torch.where(positive, pull / curvature.where(positive, torch.ones_like(pull)), torch.zeros_like(pull))
        return Kronecker(left, right, curvature, target, self.bias)

    def centred(self, theta: Tensor) -> Kronecker:
        return replace(self, target=self._coordinates(theta))

    def grown(self, size: int, positions: Tensor) -> Kronecker:
        """A layer with more outputs (a growing head): the form does not feel them."""
        rows, columns = self.outputs, self.right.shape[0]
        new_rows = size // columns
        if new_rows * columns != size:
            raise InputError("a layer has got more inputs", expected="layers that grow in their outputs only")
        places = torch.arange(rows)
        if self.left is not None:
            return replace(self, left=_scattered(self.left, new_rows, places))
        curvature, target = (_scattered(x, new_rows, places) for x in (self.curvature, self.target))
        return replace(self, curvature=curvature, target=target)

    def state(self) -> dict[str, Any]:
        names = ("left", "right", "curvature", "target")
        return {"form": "kronecker", "bias": self.bias, **{name: getattr(self, name) for name in names}}

    def to(self, like: Tensor) -> Kronecker:
        left = None if self.left is None else self.left.to(like)
        moved = {name: getattr(self, name).to(like) for name in ("right", "curvature", "target")}
        return replace(self, left=left, **moved)


def principal(moment: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a symmetric matrix [d, d], as columns [d, rank]."""
    # in float64 and of order one: of a sure network the moments are so small that float32 does not converge
    scaled = moment.double() / moment.abs().max().clamp_min(torch.finfo(moment.dtype).tiny)
    vectors = torch.linalg.eigh(scaled).eigenvectors.flip(1)[:, :rank]
    return vectors.to(moment.dtype).contiguous()


def principal_of(rows: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of the sum of x x^T over rows x, [n, d] to [d, rank]; cheaper where rows are few."""
    n, d = rows.shape
    rows = rows / rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)  # or small squares would vanish
    if rank > n or 2 * n > d:
        return principal(rows.T @ rows, rank)
    exact = rows.double()
    across = torch.linalg.eigh(exact @ exact.T).eigenvectors.flip(1)[:, :rank]  # [n, rank]
    found = nn.functional.normalize(exact.T @ across, dim=0, eps=torch.finfo(torch.float64).tiny)
    # small ones are mixed with large ones by rounding, and come after them: QR takes that off again
    return torch.linalg.qr(found).Q.to(rows.dtype).contiguous()


def _joint(mine: Tensor, my_curvature: Tensor, its: Tensor, its_curvature: Tensor) -> Tensor:
    """Principal directions of two bases [d, k] with curvatures [k] along them, as many as the larger has."""
    columns = torch.cat([mine * my_curvature.sqrt(), its * its_curvature.sqrt()], dim=1)
    return principal_of(columns.T, max(mine.shape[1], its.shape[1]))
