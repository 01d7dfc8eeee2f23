r"""Quadratic forms in the weights: their value, their exact proximal step, their sum with bounded memory.

.. math:: Q(\theta) = \tfrac12 \sum_i h_i\,(u_i \cdot \theta - a_i)^2, \qquad h_i \ge 0

with orthonormal :math:`u_i`. Its proximal step of rate r,
:math:`\operatorname{argmin}_\theta \tfrac12|\theta - v|^2 + r\,Q(\theta)`, moves each coordinate
:math:`u_i \cdot v` the share :math:`r h_i / (1 + r h_i) < 1` of its way to :math:`a_i`, and so is bounded for any rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError

__all__ = ["Blocks", "Diagonal", "Form", "LowRank"]

Rate = float | Tensor  # one for all weights, or one for each [P]


class Form(ABC):
    """A quadratic form on a vector of P weights."""

    P: int

    @property
    @abstractmethod
    def memory(self) -> int:
        """Numbers that are stored."""

    @abstractmethod
    def value(self, theta: Tensor) -> Tensor:
        """Q at theta [P], differentiable in it; a 0-dim tensor."""

    @abstractmethod
    def proximal(self, v: Tensor, rate: Rate) -> Tensor:
        """The argmin of |theta - v|^2 / 2 + rate Q; with a rate for each weight, |.|^2 is weighted by 1 / rate."""

    @abstractmethod
    def plus(self, other: Any) -> Self:
        """The sum with a form of the same kind."""

    @abstractmethod
    def centred(self, theta: Tensor) -> Self:
        """The form with the same curvature and its minimum at theta."""

    @abstractmethod
    def grown(self, size: int, positions: Tensor) -> Self:
        """The form on ``size`` weights that does not feel those outside ``positions`` [P]."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain containers and tensors that :func:`from_state` reads."""

    @abstractmethod
    def to(self, like: Tensor) -> Self:
        """The form in the dtype and on the device of a tensor."""


@dataclass(frozen=True)
class Diagonal(Form):
    """h_i along each weight's own axis: ``curvature`` [P] and ``centre`` [P], 2 P numbers."""

    curvature: Tensor
    centre: Tensor

    def __post_init__(self) -> None:
        _refuse("an importance", self.curvature)

    @property
    def P(self) -> int:  # type: ignore[override]
        """Number of weights."""
        return len(self.curvature)

    @property
    def memory(self) -> int:
        return 2 * self.P

    def value(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.curvature * (theta - self.centre).square()).sum()

    def proximal(self, v: Tensor, rate: Rate) -> Tensor:
        return v + _share(rate * self.curvature) * (self.centre - v)

    def plus(self, other: Diagonal) -> Diagonal:
        total = self.curvature + other.curvature
        pull = self.curvature * self.centre + other.curvature * other.centre
        positive = total > 0
        centre = torch.where(positive, pull / total.where(positive, torch.ones_like(total)), other.centre)
        return Diagonal(total, centre)

    def centred(self, theta: Tensor) -> Diagonal:
        return replace(self, centre=theta)

    def grown(self, size: int, positions: Tensor) -> Diagonal:
        return Diagonal(*(_scattered(x, size, positions) for x in (self.curvature, self.centre)))

    def state(self) -> dict[str, Any]:
        return {"form": "diagonal", "curvature": self.curvature, "centre": self.centre}

    def to(self, like: Tensor) -> Diagonal:
        return Diagonal(*(x.to(like) for x in (self.curvature, self.centre)))


@dataclass(frozen=True)
class LowRank(Form):
    r"""h_i along at most ``capacity`` orthonormal directions: k (P + 2) numbers; no anchor is stored.

    A sum keeps the ``capacity`` largest eigenvalues of the summed curvature. What it leaves out is positive and at
    most ``dropped``: :math:`0 \preceq A - \hat A \preceq \mathrm{dropped}\cdot 1` over all sums so far.

    Args:
        directions: [P, k], orthonormal columns.
        curvature: [k].
        target: [k], coordinates of the minimum along the directions.
        capacity: how many directions a sum keeps.
        dropped: bound on the curvature that sums have left out along any direction.
    """

    directions: Tensor
    curvature: Tensor
    target: Tensor
    capacity: int
    dropped: float = 0.0

    def __post_init__(self) -> None:
        _refuse("a curvature", self.curvature)

    @property
    def P(self) -> int:  # type: ignore[override]
        """Number of weights."""
        return self.directions.shape[0]

    @property
    def memory(self) -> int:
        return self.directions.numel() + 2 * len(self.curvature)

    def value(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.curvature * (self.directions.T @ theta - self.target).square()).sum()

    def proximal(self, v: Tensor, rate: Rate) -> Tensor:
        gap = self.target - self.directions.T @ v  # [k]
        if not isinstance(rate, Tensor):
            return v + self.directions @ (_share(rate * self.curvature) * gap)
        # Woodbury in the form R U (H^-1 + U^T R U)^-1, which stays finite where rates are huge
        used = (self.curvature > 0).nonzero().flatten()
        largest = rate.max().double()
        if not len(used) or not float(largest) > 0:
            return v
        directions = self.directions[:, used]
        moved = (rate.double() / largest).to(v.dtype)[:, None] * directions  # [P, k]
        inner = (directions.T @ moved).double() + torch.diag(1 / (largest * self.curvature[used].double()))  # [k, k]
        return v + moved @ torch.linalg.solve(inner, gap[used].double()).to(v.dtype)

    def plus(self, other: LowRank) -> LowRank:
        # columns B = U sqrt(H) and their targets c: Q = |B^T theta - c|^2 / 2, and B = W S Z^T turns it into
        # |S W^T theta - Z^T c|^2 / 2 up to a constant
        roots = [form.curvature.sqrt() for form in (self, other)]
        columns = torch.cat([f.directions * r for f, r in zip((self, other), roots)], dim=1)  # [P, k + k']
        targets = torch.cat([f.target * r for f, r in zip((self, other), roots)])
        exact = torch.linalg.svd(columns.double(), full_matrices=False)
        left, size, right = (part.to(columns.dtype) for part in exact)
        floor = size.max() * max(columns.shape) * torch.finfo(size.dtype).eps if len(size) else 0.0
        kept = min(max(self.capacity, other.capacity), int((size > floor).sum()))
        left_out = float(size[kept].square()) if kept < len(size) else 0.0
        along = (right @ targets)[:kept] / size[:kept]
        capacity = max(self.capacity, other.capacity)
        dropped = self.dropped + other.dropped + left_out
        return LowRank(left[:, :kept].contiguous(), size[:kept].square(), along, capacity, dropped)

    def centred(self, theta: Tensor) -> LowRank:
        return replace(self, target=self.directions.T @ theta)

    def grown(self, size: int, positions: Tensor) -> LowRank:
        return replace(self, directions=_scattered(self.directions, size, positions))

    def state(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("directions", "curvature", "target")}
        return {"form": "low rank", **tensors, "capacity": self.capacity, "dropped": self.dropped}

    def to(self, like: Tensor) -> LowRank:
        return replace(self, **{n: getattr(self, n).to(like) for n in ("directions", "curvature", "target")})


@dataclass(frozen=True)
class Blocks(Form):
    """Forms on parts of the weights that do not overlap; weights in no part are free.

    Args:
        P: number of weights in all.
        parts: by name, the positions [p] of a part's weights and the form on them.
    """

    P: int
    parts: Mapping[str, tuple[Tensor, Form]]

    @property
    def memory(self) -> int:
        return sum(form.memory for _, form in self.parts.values())

    def value(self, theta: Tensor) -> Tensor:
        return torch.stack([theta.new_zeros(()), *(f.value(theta[_slice(at)]) for at, f in self.parts.values())]).sum()

    def proximal(self, v: Tensor, rate: Rate) -> Tensor:
        out = v.clone()
        for at, form in self.parts.values():
            where = _slice(at)
            out[where] = form.proximal(v[where], _common(rate, where))
        return out

    def plus(self, other: Blocks) -> Blocks:
        parts = dict(self.parts)
        for name, (at, form) in other.parts.items():
            if name in parts:
                before, old = parts[name]
                if len(before) < len(at):  # a layer that has grown since
                    order = at.argsort()
                    old = old.grown(len(at), order[torch.searchsorted(at[order], before)])
                form = old.plus(form)
            parts[name] = at, form
        return Blocks(other.P, parts)

    def centred(self, theta: Tensor) -> Blocks:
        return Blocks(self.P, {n: (at, form.centred(theta[_slice(at)])) for n, (at, form) in self.parts.items()})

    def grown(self, size: int, positions: Tensor) -> Blocks:
        return Blocks(size, {n: (positions[at], form) for n, (at, form) in self.parts.items()})

    def state(self) -> dict[str, Any]:
        parts = {name: {"positions": at, **form.state()} for name, (at, form) in self.parts.items()}
        return {"form": "blocks", "P": self.P, "parts": parts}

    def to(self, like: Tensor) -> Blocks:
        return Blocks(self.P, {n: (at.to(like.device), form.to(like)) for n, (at, form) in self.parts.items()})


def _slice(positions: Tensor) -> slice | Tensor:
    """Positions as a slice where they are one stretch, so that taking them makes a view."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def _common(rate: Rate, where: slice | Tensor) -> Rate:
    """The rate of some of the weights, as one number where they share it."""
    if not isinstance(rate, Tensor):
        return rate
    part = rate[where]
    return float(part[0]) if bool((part == part[0]).all()) else part


def _share(stiffness: Tensor) -> Tensor:
    """Shares x / (1 + x), 1 for infinite x."""
    return 1 - 1 / (1 + stiffness)


def _scattered(x: Tensor, size: int, positions: Tensor) -> Tensor:
    out = x.new_zeros(size, *x.shape[1:])
    out[positions.to(x.device)] = x
    return out


def _refuse(what: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{what} of the finished task is not finite", remedy="check its loss and its weights")
    if values.numel() and float(values.min()) < 0:
        raise InputError(f"{what} is {float(values.min()):g}", expected="numbers >= 0")
