r"""One Hessian mode under SGD as a linear filter of the gradient noise.

With :math:`\eta' = \eta(1-\tau)` (dampening), :math:`h` the curvature plus weight decay and :math:`a = \eta' h`, the
position along a Hessian eigenvector obeys

.. math::
    \theta_k = p\,\theta_{k-1} - b\,\theta_{k-2} - \eta'(c_0\,\xi_{k-1} + c_1\,\xi_{k-2}), \qquad p = 1 + b - a,

with :math:`b=\beta, c_0=1, c_1=0` for heavy ball and :math:`b=\beta(1-a), c_0=1+\beta, c_1=-\beta` for Nesterov as
torch does it. Everything exact and discrete in :mod:`~thermograd.theory.limiting` and
:mod:`~thermograd.theory.sampling` follows from the structure function of this filter under white noise,

.. math::
    D(m) = E(\theta_{k+m}-\theta_k)^2, \quad D(m+1) = D(m) + d(m+1), \quad d(m+1) = b\,d(m) - a\,D(m) + K,

with :math:`K = 2aR(0)`, which stays finite, and free of cancellation, down to zero curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UnstableError
from ..hyperparameters import SGD
from .arrays import Array, as_modes

__all__ = ["Mode", "advance", "mode"]


@dataclass(frozen=True)
class Mode:
    """The filter of each mode; arrays of shape ``[n]`` (see the module's formulas).

    Args:
        pull: a = eta' h, the fraction of a displacement that one plain step removes.
        feedback: b, the product of the two poles.
        lead: c_0, weight of the newest noise.
        lag: c_1, weight of the noise before it.
        step: eta' = eta (1 - dampening).
        lr: eta.
        noise: variance of the minibatch gradient along the mode.
    """

    pull: Array
    feedback: Array
    lead: float
    lag: float
    step: float
    lr: float
    noise: Array

    @property
    def sum_of_poles(self) -> Array:
        """P = 1 + b - a."""
        return 1 + self.feedback - self.pull

    @property
    def drive(self) -> Array:
        """K = 2 a R(0): the constant that drives the structure function, [n]."""
        b, p, c0, c1 = self.feedback, self.sum_of_poles, self.lead, self.lag
        power = (1 + b) * (c0**2 + c1**2) + 2 * p * c0 * c1
        return 2 * self.step**2 * self.noise * power / ((1 - b) * (1 + b + p))

    @property
    def displacement(self) -> Array:
        """D(1) = E(theta_{k+1} - theta_k)^2 under white noise, [n]."""
        return (self.drive - 2 * self.step**2 * self.noise * self.lead * self.lag) / (1 + self.feedback)

    @property
    def variance(self) -> Array:
        """R(0): stationary variance of the position under white noise, [n]; needs a > 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.drive / (2 * self.pull)

    def structure(self, last: int) -> Iterator[tuple[int, Array]]:
        """Yield (m, D(m)) for m = 1 ... last under white noise, without storing them."""
        drive, total = self.drive, self.displacement.copy()
        change = total.copy()
        for lag in range(1, last + 1):
            yield lag, total
            change = self.feedback * change - self.pull * total + drive
            total = total + change

    def structure_at(self, lags: NDArray[np.int64]) -> tuple[Array, Array]:
        r"""D(m) and its double sum G(m) = sum_{j<m} (m-j) D(j) at any lags, [t, n] each, in log(m) products."""
        n = self.pull.size
        step = np.zeros((n, 5, 5))  # [n, 5, 5] acting on (D, d, 1, G(m), G(m+1) - G(m))
        step[:, 1] = np.stack([-self.pull, self.feedback, self.drive, *np.zeros((2, n))], axis=1)
        step[:, 0] = step[:, 1]
        step[:, 0, 0] += 1
        step[:, 2, 2] = 1
        step[:, 3, 3] = step[:, 3, 4] = 1
        step[:, 4] = step[:, 0]
        step[:, 4, 4] += 1
        first = np.zeros((n, 5))
        first[:, 0] = first[:, 1] = first[:, 4] = self.displacement
        first[:, 2] = 1
        states = advance(step, first, np.maximum(lags, 1) - 1)  # [t, n, 5]
        states[lags == 0] = 0
        return states[:, :, 0], states[:, :, 3]

    def transfer(self, frequency: Array) -> Array:
        """Squared gain from gradient noise to position at angular frequencies [f] per step, [f, n]."""
        z = np.exp(-1j * frequency)[:, None]
        rise = (2j * np.sin(frequency / 2) * np.exp(-0.5j * frequency))[:, None]  # 1 - z without cancellation
        pole = rise * (1 - self.feedback * z) + self.pull * z
        return np.abs(self.step * (self.lead + self.lag * z) / pole) ** 2


def mode(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike = 1.0, *, bounded: bool = True) -> Mode:
    """The filter of each mode at these hyperparameters.

    Args:
        sgd: hyperparameters.
        curvature: Hessian eigenvalues of the loss without weight decay, [n].
        noise_variance: variance of the minibatch gradient along each mode, [n].
        bounded: whether a stationary position is needed (curvature + weight decay > 0); else zero is allowed.

    Returns:
        The filter.

    Raises:
        UnstableError: a mode diverges, or has no stationary position and ``bounded`` asks for one.

    >>> mode(SGD(lr=0.1, momentum=0.9), [1.0]).variance.round(8)
    array([0.51351351])
    """
    h, s = as_modes(curvature, noise_variance)
    step = sgd.lr * (1 - sgd.dampening)
    pull = step * (h + sgd.weight_decay)
    beta = sgd.momentum
    _check_stable(sgd, h, pull, bounded)
    if sgd.nesterov:
        return Mode(pull, beta * (1 - pull), 1 + beta, -beta, step, sgd.lr, s)
    return Mode(pull, np.full_like(pull, beta), 1.0, 0.0, step, sgd.lr, s)


def _check_stable(sgd: SGD, curvature: Array, pull: Array, bounded: bool) -> None:
    bound = 2 * (1 + sgd.momentum) / (1 + 2 * sgd.momentum if sgd.nesterov else 1)
    if np.any(pull >= bound):
        worst = float(curvature.max())
        limit = bound / (sgd.lr * (1 - sgd.dampening)) - sgd.weight_decay
        raise UnstableError(
            f"curvature {worst:g} diverges at lr {sgd.lr:g} and momentum {sgd.momentum:g}",
            expected=f"curvature below {limit:g} (2(1+momentum)/lr less weight decay for heavy ball)",
            remedy="lower the learning rate",
        )
    worst = float((curvature + sgd.weight_decay).min()) if curvature.size else 1.0
    if worst < 0:
        raise UnstableError(
            f"curvature plus weight decay is negative ({worst:g}): the mode runs away and nothing is stationary",
            expected="curvature + weight_decay > 0",
            remedy="drop these modes, or use limiting.propagate, which follows them for a given number of steps",
        )
    if bounded and worst == 0:
        raise UnstableError(
            "curvature plus weight decay is zero: the mode diffuses without limit and has no stationary variance",
            expected="curvature + weight_decay > 0",
            remedy="use mean_squared_displacement or sampling.weight_variance_window, which stay finite",
        )


def advance(step: Array, start: Array, steps: NDArray[np.int64]) -> Array:
    """Iterate x -> step x for each mode, by repeated squaring: the states after ``steps``, [t, n, k].

    Args:
        step: [n, k, k].
        start: [n, k].
        steps: whole numbers >= 0 in any order, [t].

    >>> advance(np.array([[[2.0]]]), np.array([[1.0]]), np.array([5, 0, 3])).ravel()
    array([32.,  1.,  8.])
    """
    out = np.empty((len(steps), *start.shape))  # [t, n, k]
    powers = [step]
    state, at = start, 0
    for index in np.argsort(steps, kind="stable"):
        gap, bit = int(steps[index]) - at, 0
        while gap:
            if bit == len(powers):
                powers.append(powers[-1] @ powers[-1])
            if gap & 1:
                state = np.einsum("nij,nj->ni", powers[bit], state)
            gap, bit = gap >> 1, bit + 1
        at = int(steps[index])
        out[index] = state
    return out
