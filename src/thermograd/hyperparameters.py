"""The hyperparameters of SGD that the theory speaks about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import HyperparameterError

if TYPE_CHECKING:
    import torch

__all__ = ["SGD", "Sampling"]

Sampling = Literal["replacement", "reshuffle", "shuffle-once"]


@dataclass(frozen=True)
class SGD:
    r"""Hyperparameters of stochastic gradient descent in the convention of ``torch.optim.SGD``.

    .. math::
        b_{k+1} = \beta b_k + (1-\tau) (g_B(\theta_k) + \lambda\theta_k), \qquad
        \theta_{k+1} = \theta_k - \eta b_{k+1}, \qquad v_k = (\theta_k - \theta_{k-1})/\eta = -b_k

    Args:
        lr: learning rate :math:`\eta > 0`.
        momentum: :math:`\beta` in [0, 1).
        weight_decay: :math:`\lambda \ge 0`, coupled (L2) as in torch.
        batch_size: samples per step, :math:`B`. Needed by whatever depends on the noise.
        dataset_size: samples in the data set, :math:`N`.
        sampling: ``"replacement"`` (each step draws B samples independently), ``"reshuffle"`` (a fresh
            permutation every epoch, what ``DataLoader(shuffle=True)`` does) or ``"shuffle-once"``
            (one order, repeated every epoch).
        nesterov: Nesterov momentum as torch does it.
        dampening: :math:`\tau` in [0, 1).

    Raises:
        HyperparameterError: a value is outside its range.

    >>> sgd = SGD(lr=0.1, momentum=0.9, batch_size=50, dataset_size=1500)
    >>> sgd.steps_per_epoch, round(sgd.effective_lr, 6), round(sgd.minibatch_factor, 6)
    (30.0, 1.0, 0.019346)
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = None
    dataset_size: int | None = None
    sampling: Sampling = "reshuffle"
    nesterov: bool = False
    dampening: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr > 0, "lr", self.lr, "a positive finite number")
        _check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        _check(0 <= self.dampening < 1, "dampening", self.dampening, "a number in [0, 1)")
        for name in ("batch_size", "dataset_size"):
            value = getattr(self, name)
            if value is not None:
                _check(value >= 1 and float(value).is_integer(), name, value, "a whole number >= 1")
        if self.sampling not in get_args(Sampling):
            raise HyperparameterError(
                f"sampling is {self.sampling!r}", expected=f"one of {', '.join(map(repr, get_args(Sampling)))}"
            )
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise HyperparameterError(
                "nesterov=True with zero momentum or with dampening",
                expected="momentum > 0 and dampening = 0, as torch demands",
            )
        if (
            self.sampling != "replacement"
            and self.batch_size is not None
            and self.dataset_size is not None
            and self.batch_size > self.dataset_size
        ):
            raise HyperparameterError(
                f"batch_size {self.batch_size} is larger than dataset_size {self.dataset_size}",
                expected="a batch no larger than the data set when sampling without replacement",
            )

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        sampling: Sampling = "reshuffle",
    ) -> SGD:
        """Read the hyperparameters off a ``torch.optim.SGD`` (its first parameter group).

        Raises:
            HyperparameterError: the optimizer is not plain SGD, maximises, or its groups differ.
        """
        kind = type(optimizer).__name__
        if kind != "SGD":
            raise HyperparameterError(
                f"the optimizer is {kind}",
                expected="torch.optim.SGD, which is what the theory describes",
                remedy="pass the hyperparameters of an equivalent SGD by hand, or train with SGD",
            )
        groups = optimizer.param_groups
        names = ("lr", "momentum", "weight_decay", "nesterov", "dampening")
        first = {name: groups[0][name] for name in names}
        if any(group[name] != first[name] for group in groups for name in names):
            raise HyperparameterError(
                "the optimizer's parameter groups have different hyperparameters",
                expected="one set of hyperparameters for all weights",
            )
        if groups[0].get("maximize"):
            raise HyperparameterError("the optimizer maximises", expected="maximize=False")
        numbers = {name: float(v) for name, v in first.items() if name != "nesterov"}
        nesterov = bool(first["nesterov"])
        return cls(**numbers, nesterov=nesterov, batch_size=batch_size, dataset_size=dataset_size, sampling=sampling)

    def replace(self, **changes: Any) -> SGD:
        """A copy with some hyperparameters changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The hyperparameters as a plain dictionary (for attrs and JSON)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SGD:
        """The inverse of :meth:`to_dict`; unknown keys are refused by the constructor."""
        return cls(**values)

    def _needed(self, name: str) -> int:
        value = getattr(self, name)
        if value is None:
            raise HyperparameterError(f"{name} is not set", remedy=f"pass SGD(..., {name}=...)")
        return int(value)

    @property
    def steps_per_epoch(self) -> float:
        """M = N/B."""
        return self._needed("dataset_size") / self._needed("batch_size")

    @property
    def effective_lr(self) -> float:
        """Effective step eta (1 - dampening) / (1 - beta), what a constant gradient settles to."""
        return self.lr * (1 - self.dampening) / (1 - self.momentum)

    @property
    def minibatch_factor(self) -> float:
        """Ratio of the minibatch to the per-sample gradient covariance.

        1/B with replacement, (1/B)(N - B)/(N - 1) without (Mori et al. 2022, Eq. 8).
        """
        batch = self._needed("batch_size")
        if self.sampling == "replacement":
            return 1 / batch
        size = self._needed("dataset_size")
        return (size - batch) / (batch * (size - 1)) if size > 1 else 0.0


def _check(ok: bool, name: str, value: Any, expected: str) -> None:
    if not (ok and math.isfinite(value)):
        raise HyperparameterError(f"{name} is {value}", expected=expected)
