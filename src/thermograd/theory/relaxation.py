r"""How a mode of the discrete dynamics relaxes: poles, oscillation, decay per step (heavy ball and Nesterov).

The mean of a mode obeys :math:`\theta_k=p\,\theta_{k-1}-b\,\theta_{k-2}` (:mod:`~thermograd.theory.mode`); its poles
are the roots of :math:`z^2-pz+b`. All derived; exact for a quadratic loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import NotAvailableError
from ..hyperparameters import SGD
from .arrays import Array
from .mode import mode

__all__ = ["oscillation_window", "phase_per_step", "poles", "relaxation_steps"]


def poles(sgd: SGD, curvature: ArrayLike) -> NDArray[np.complex128]:
    r"""Both poles of each mode, slow one first, [n, 2].

    Heavy ball: :math:`z^2-(1+\beta-\eta h)z+\beta`. Equal at critical damping.

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n]; zero is allowed.

    Returns:
        Complex, [n, 2]; the first has the larger modulus, or the positive phase.

    Raises:
        UnstableError: a mode diverges.

    >>> poles(SGD(lr=0.1, momentum=0.5), [0.0]).real.round(12)
    array([[1. , 0.5]])
    """
    filters = mode(sgd, curvature, bounded=False)
    p, b, a = filters.sum_of_poles, filters.feedback, filters.pull
    square = (1 - b) ** 2 - 2 * a * (1 + b) + a**2  # p^2 - 4b without cancellation of 1 + b
    root = np.sqrt(square.astype(complex))
    larger = (p + np.where(p < 0, -1, 1) * root) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        other = np.where(larger == 0, 0, b / larger)
    return np.stack([larger, other], axis=1)


def relaxation_steps(sgd: SGD, curvature: ArrayLike) -> Array:
    r"""Steps in which the mean of a mode falls by e at long times, :math:`-1/\ln\max|z|`.

    Overdamped: about :math:`(1-\beta)/(\eta h)`; oscillating: :math:`-2/\ln\beta` for heavy ball, whatever the
    curvature (the Langevin model says :math:`1/(\gamma\eta)=(1+\beta)/(1-\beta)`, of which it is the exact form).

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n].

    Returns:
        [n], in optimizer steps; infinite for a flat mode.

    Raises:
        UnstableError: a mode diverges.

    >>> relaxation_steps(SGD(lr=0.1, momentum=0.9), [0.0001, 1.0, 3.0]).round(1)
    array([9990.5,   19. ,   19. ])
    """
    filters = mode(sgd, curvature, bounded=False)
    p, b, a = filters.sum_of_poles, filters.feedback, filters.pull
    square = (1 - b) ** 2 - 2 * a * (1 + b) + a**2
    root = np.sqrt(np.maximum(square, 0))
    # 1 - z = 2a / (1 - b + a + root) for the pole near 1, which keeps its digits as a -> 0
    gap = 2 * a / (1 - b + a + root)
    with np.errstate(divide="ignore"):
        real = np.where(p >= 0, np.log1p(-np.minimum(gap, 1.0)), np.log(np.maximum(np.abs(p) + root, 1e-300) / 2))
        turning = np.log(np.abs(b)) / 2
        rate = np.where(square >= 0, real, turning)
        return 1 / np.abs(rate)


def phase_per_step(sgd: SGD, curvature: ArrayLike) -> Array:
    r"""Angle by which an oscillating mode turns each step, :math:`\cos\phi=\frac{1+\beta-\eta h}{2\sqrt\beta}`.

    The Langevin model's :math:`\eta\sqrt{\omega^2-\gamma^2}` is its limit at small learning rate. Zero for modes that
    do not oscillate; pi for those that flip sign every step.

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues without weight decay, [n]; zero is allowed.

    Returns:
        Radians, [n].

    Raises:
        UnstableError: a mode diverges.

    >>> phase_per_step(SGD(lr=0.1, momentum=0.9), [0.0, 1.0, 38.0 - 1e-9]).round(4)
    array([0.    , 0.3218, 3.1416])
    """
    return np.abs(np.angle(poles(sgd, curvature)[:, 0]))


def oscillation_window(sgd: SGD) -> tuple[float, float]:
    r"""Curvatures between which heavy ball oscillates, :math:`(1\mp\sqrt\beta)^2/\eta` less weight decay.

    Args:
        sgd: hyperparameters.

    Returns:
        Lower and upper end. Below, modes creep; above, up to :math:`2(1+\beta)/\eta`, they flip sign every step.

    Raises:
        NotAvailableError: Nesterov momentum.

    >>> low, high = oscillation_window(SGD(lr=0.1, momentum=0.25))
    >>> round(low, 6), round(high, 6)
    (2.5, 22.5)
    """
    if sgd.nesterov:
        raise NotAvailableError("the window is for heavy ball", remedy="look at phase_per_step")
    step, root = sgd.lr * (1 - sgd.dampening), np.sqrt(sgd.momentum)
    return float((1 - root) ** 2 / step - sgd.weight_decay), float((1 + root) ** 2 / step - sgd.weight_decay)
