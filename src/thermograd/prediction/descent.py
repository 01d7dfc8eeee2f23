r"""Gradient flow of the training loss from where a run stands: what the weights would do without minibatch noise.

.. math:: \dot\theta = -\nabla L(\theta) - \lambda\theta, \qquad \tau = \eta k / (1 - \beta)

The spectrum of a network spans many decades, so the flow is stiff. It is integrated by the second-order
Runge-Kutta-Chebyshev method (van der Houwen & Sommeijer 1980; coefficients as in Verwer, Hundsdorfer & Sommeijer 1990):
with s gradients a step may be about :math:`\frac23 s^2/h_{max}` long, so that time costs its square root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.polynomial import chebyshev
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from ..errors import ConvergenceError, InputError
from ..progress import bar
from ..theory.arrays import Array

if TYPE_CHECKING:
    from ..hyperparameters import SGD
    from ..problem import Problem

__all__ = ["Descent", "descend", "flow_time", "objective"]

_GROWTH = 0.3  # length of a step over the time since the start
_SAFETY = 1.4  # by how much the curvature along the way may exceed the one given
_RISE = 1e-3  # relative rise of the loss in a step at which it is taken back
_RETRIES = 8
_MOST = 1500  # gradients after which the flow is followed no further


@dataclass(frozen=True)
class Descent:
    """The objective along the flow: ``loss`` [m] at ``time`` [m], and the weights at the end.

    The end may come before the time asked for, where the curvature grows so much on the way that it would take more
    than 1500 gradients.
    """

    time: Array
    loss: Array
    theta: Tensor
    gradient_norm: float

    def at(self, time: float) -> float:
        """The objective at a time: between the points by a monotone cubic in log time; at the end thereafter.

        >>> import torch
        >>> Descent(np.array([0.0, 1.0]), np.array([3.0, 1.0]), torch.zeros(1), 0.0).at(9.0)
        1.0
        """
        first = self.time[1]
        scale = np.log1p(self.time / first)
        return float(PchipInterpolator(scale, self.loss)(min(math.log1p(time / first), scale[-1])))


def flow_time(sgd: SGD, steps: float, before: SGD) -> float:
    r"""How far along the flow the mean of the weights is after some steps, late by the time momentum takes to build up.

    Under a gradient g that hardly changes the buffer is :math:`b_k=\beta^k b_0+(1-\tau)g\frac{1-\beta^k}{1-\beta}`, and
    training before has left :math:`b_0=(1-\tau_0)g/(1-\beta_0)`; the time is :math:`\eta\sum_k b_k/g`. With as much
    momentum as before it is :math:`\eta k(1-\tau)/(1-\beta)`; a rise of momentum to 0.99 costs 90 steps after 0.9.

    Args:
        sgd: hyperparameters of the steps.
        steps: how many, k.
        before: hyperparameters of the training that ended with the buffer.

    >>> from thermograd import SGD
    >>> own = SGD(lr=0.1, momentum=0.9)
    >>> flow_time(own, 50, own).__round__(9), flow_time(SGD(lr=0.01, momentum=0.99), 2000, own).__round__(3)
    (50.0, 1910.9)
    """
    beta, gain = sgd.momentum, 1 - sgd.dampening
    kept = beta * (1 - beta**steps) / (1 - beta)  # sum of beta^k
    sums = gain * (steps - kept) / (1 - beta) + kept * (1 - before.dampening) / (1 - before.momentum)
    return sgd.lr * (gain * steps + beta * sums if sgd.nesterov else sums)


def objective(problem: Problem, weight_decay: float, theta: Tensor) -> float:
    r"""What SGD with coupled weight decay descends: :math:`L(\theta)+\frac\lambda2\|\theta\|^2`."""
    return float(problem.loss(theta)) + weight_decay / 2 * float(theta.double().square().sum())


def descend(problem: Problem, weight_decay: float, theta: Tensor, time: float, curvature: float) -> Descent:
    """Follow the gradient flow of the objective for some time.

    Args:
        problem: model, loss and data.
        weight_decay: coupled, as in torch.
        theta: where to begin, [P].
        time: how long, in units of learning rate times steps over (1 - momentum).
        curvature: largest eigenvalue of the Hessian about there, weight decay included.

    Returns:
        The way down.

    Raises:
        InputError: a time or curvature that is not positive.
        ConvergenceError: the loss rises however short the step.
    """
    if not (time > 0 and curvature > 0 and math.isfinite(time * curvature)):
        raise InputError(f"time is {time} and curvature {curvature}", expected="positive finite numbers")

    def slope(at: Tensor) -> Tensor:
        return -(problem.gradient(at) + weight_decay * at)

    top = _SAFETY * curvature
    now, here, value = 0.0, theta.detach().clone(), objective(problem, weight_decay, theta)
    times, losses, force = [0.0], [value], slope(theta)
    step = 0.5 / top
    with bar("descending without noise", 100) as progress:
        shown, tries, spent = 0, 0, 0
        while now < time and spent < _MOST:
            step = min(step, time - now)
            stages = _stages(step * top)
            spent += stages
            there = _chebyshev_step(slope, here, force, step, stages)
            found = objective(problem, weight_decay, there)
            if not found <= value + _RISE * abs(value):
                tries += 1
                if tries > _RETRIES:
                    raise ConvergenceError(
                        f"the training loss rises along its own gradient at {value:.4g}",
                        remedy="the loss is not smooth there; use float64 (Problem(..., dtype=torch.float64))",
                    )
                top, step = 2 * top, step / 2
                continue
            tries, now, here, value = 0, now + step, there, found
            force = slope(here)
            times.append(now)
            losses.append(value)
            part = int(100 * math.log1p(now * top) / math.log1p(time * top))
            progress.advance(max(0, part - shown))
            shown = max(shown, part)
            step = max(step, _GROWTH * now)
    return Descent(np.array(times), np.array(losses), here, float(force.norm()))


def _stages(reach: float) -> int:
    return max(2, math.ceil(math.sqrt(1.55 * reach + 1)))


@lru_cache(maxsize=256)
def _coefficients(stages: int) -> tuple[Array, Array, float, float]:
    """b_j, a_j = 1 - b_j T_j(w0), w0 and w1 of the damped method."""
    w0 = 1 + 2 / 13 / stages**2
    values = np.empty((stages + 1, 3))  # T_j, T_j', T_j'' at w0
    for j in range(stages + 1):
        basis = np.zeros(j + 1)
        basis[j] = 1
        values[j] = [chebyshev.chebval(w0, chebyshev.chebder(basis, m)) for m in range(3)]
    w1 = values[stages, 1] / values[stages, 2]
    b = np.empty(stages + 1)
    b[2:] = values[2:, 2] / values[2:, 1] ** 2
    b[:2] = b[2]
    return b, 1 - b * values[:, 0], w0, w1


def _chebyshev_step(slope: object, start: Tensor, force: Tensor, step: float, stages: int) -> Tensor:
    assert callable(slope)
    b, a, w0, w1 = _coefficients(stages)
    before, here = start, start + b[1] * w1 * step * force
    for j in range(2, stages + 1):
        mu, nu, push = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1]
        there = (
            (1 - mu - nu) * start + mu * here + nu * before + push * step * slope(here) - a[j - 1] * push * step * force
        )
        before, here = here, there
    return here
