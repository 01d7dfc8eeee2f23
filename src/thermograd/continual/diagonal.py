"""Constraints that hold each weight by itself: elastic weight consolidation, and all weights alike."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from .constraint import Constraint
from .curvature import check_temperature, pulled_back
from .forms import Diagonal

__all__ = ["EWC", "L2ToAnchor"]


class EWC(Constraint):
    r"""Elastic weight consolidation (Kirkpatrick et al. 2017): each weight held by its Fisher information.

    .. math::
        R(\theta) = \mathrm{strength} \sum_t \tfrac12 \sum_k F_k^{(t)} (\theta_k - \theta_{t,k})^2, \quad
        F_k = \frac1N \sum_i \mathbb{E}_{\hat y \sim p(\cdot | f_i)}
              \bigl[\partial_k \ell(f_i, \hat y)\bigr]^2

    Labels are the model's own, not those of the data, whose gradients vanish at a small loss (the empirical Fisher
    matrix is another matrix, Kunstner et al. 2019). It stores 2 P numbers, however many tasks.

    Args:
        strength: see :class:`Constraint`; Kirkpatrick's lambda.
        draws: labels drawn for each sample; None takes the expectation over all labels, without sampling error, at a
            backward pass for each label.
        temperature: of the model's own labels, see :mod:`.curvature`; 1 is EWC as published.
        anchors: "own" as published; "latest" makes it online EWC (Schwarz et al. 2018) without forgetting.
        options: ``params``, ``samples``, ``seed``, see :class:`Constraint`.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> ewc = EWC(strength=3.0).fit(model, torch.nn.MSELoss(), data)
    >>> ewc.form.curvature, ewc.memory
    (tensor([5.]), 2)
    """

    name: ClassVar[str] = "ewc"

    def __init__(
        self, strength: float = 1.0, *, draws: int | None = None, temperature: float = 1.0, anchors: Any = "own",
        **options: Any,
    ):  # fmt: skip
        super().__init__(strength, anchors=anchors, **options)
        if draws is not None and not (isinstance(draws, int) and draws >= 1):
            raise InputError(f"draws is {draws!r}", expected="a whole number >= 1, or None for all labels")
        self.draws, self.temperature = draws, check_temperature(temperature)

    def _measure(self, problem: Problem, index: Tensor, **measured_on: Any) -> Diagonal:
        squares = torch.zeros_like(problem.theta)
        for layers, _ in pulled_back(problem, index, self.temperature, self.draws, self.seed + self.tasks):
            squares += layers.mean_squares() * len(layers)
        return Diagonal(squares / len(index), problem.theta)


class L2ToAnchor(Constraint):
    r"""All weights held alike, the plainest baseline: :math:`R = \mathrm{strength}\,\tfrac12 |\theta - \theta_t|^2`.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> l2 = L2ToAnchor(strength=2.0).fit(model, torch.nn.MSELoss(), (torch.zeros(4, 2), torch.zeros(4, 1)))
    >>> with torch.no_grad():
    ...     _ = model.bias.add_(1.0)
    >>> round(l2.penalty(model).item(), 4)
    1.0
    """

    name: ClassVar[str] = "l2"

    def _measure(self, problem: Problem, index: Tensor, **measured_on: Any) -> Diagonal:
        return Diagonal(torch.ones_like(problem.theta), problem.theta)
