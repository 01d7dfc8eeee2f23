r"""The underdamped Langevin model of SGD with momentum (Kunin et al. 2024), per Hessian mode.

Time is :math:`t=\eta' k` with :math:`\eta'=\eta(1-\tau)`; the velocity is :math:`d\theta/dt`. Mass
:math:`\eta'(1+\beta)/2`, friction :math:`1-\beta`. First order in the learning rate: where it differs from
:mod:`~thermograd.theory.limiting`, that module is exact. Heavy ball only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import NotAvailableError, UnstableError
from ..hyperparameters import SGD
from ..measurement import Measurement, quantity
from .arrays import Array, as_modes, as_steps, finite
from .moments import StationaryMoments

__all__ = [
    "LangevinCoefficients",
    "ModifiedLoss",
    "OrnsteinUhlenbeckMoments",
    "langevin_coefficients",
    "modified_loss",
    "ornstein_uhlenbeck_moments",
    "ornstein_uhlenbeck_msd",
    "ornstein_uhlenbeck_stationary",
    "propagator",
    "published_msd",
]


@dataclass(frozen=True)
class LangevinCoefficients(Measurement):
    """Friction and frequency of each mode, in inverse units of t = eta' k."""

    gamma: float = quantity(units="1/time", long_name="friction rate")
    omega: Array = quantity("mode", units="1/time", long_name="undamped frequency")
    noise: Array = quantity("mode", units="gradient^2/time", long_name="diffusion of the velocity, d<v^2>/dt")
    underdamped: NDArray[np.bool_] = quantity("mode", units="1", long_name="whether the mode oscillates")
    _primary = "omega"


def _step(sgd: SGD) -> float:
    if sgd.nesterov:
        raise NotAvailableError(
            "the Langevin model is for heavy ball",
            remedy="use limiting.stationary_moments, which treats Nesterov exactly",
        )
    return sgd.lr * (1 - sgd.dampening)


def langevin_coefficients(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike = 1.0) -> LangevinCoefficients:
    r"""Friction :math:`\gamma=\frac{1-\beta}{\eta(1+\beta)}` and frequency :math:`\omega=\sqrt{2h/(\eta(1+\beta))}`.

    Kunin et al. (2024). The velocity diffuses at rate :math:`4s/(\eta(1+\beta)^2)`. A mode oscillates when
    :math:`\gamma<\omega`, that is :math:`\eta h>(1-\beta)^2/(2(1+\beta))`.

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n]; curvature + weight decay >= 0.
        noise_variance: variance of the minibatch gradient, [n].

    Returns:
        ``.gamma`` and, [n] each, ``.omega``, ``.noise``, ``.underdamped``.

    Raises:
        UnstableError: curvature plus weight decay is negative.
        NotAvailableError: Nesterov momentum.

    >>> found = langevin_coefficients(SGD(lr=0.1, momentum=0.9), [1.0])
    >>> round(found.gamma, 8), found.omega.round(8)
    (0.52631579, array([3.24442842]))
    """
    step = _step(sgd)
    h, s = as_modes(curvature, noise_variance)
    h = h + sgd.weight_decay
    if np.any(h < 0):
        raise UnstableError("curvature plus weight decay is negative", expected="curvature + weight_decay >= 0")
    gamma = (1 - sgd.momentum) / (step * (1 + sgd.momentum))
    omega = np.sqrt(2 * h / (step * (1 + sgd.momentum)))
    return LangevinCoefficients(gamma, omega, 4 * s / (step * (1 + sgd.momentum) ** 2), omega > gamma)


def ornstein_uhlenbeck_stationary(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike) -> StationaryMoments:
    r"""Stationary variances of the Langevin model: :math:`\frac{\eta s}{2(1-\beta)h}`, :math:`\frac{s}{1-\beta^2}`, 0.

    Kunin et al. (2024); first order in the learning rate.

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n].
        noise_variance: variance of the minibatch gradient, [n].

    Returns:
        Variances of position and of :math:`d\theta/dt`, and their covariance (zero), [n].

    Raises:
        UnstableError: curvature plus weight decay is not positive.

    >>> ornstein_uhlenbeck_stationary(SGD(lr=0.1, momentum=0.9), [1.0], [1.0]).position.round(8)
    array([0.5])
    """
    step = _step(sgd)
    h, s = as_modes(curvature, noise_variance)
    h = h + sgd.weight_decay
    if np.any(h <= 0):
        raise UnstableError("curvature plus weight decay is not positive", expected="curvature + weight_decay > 0")
    return StationaryMoments(step * s / (2 * (1 - sgd.momentum) * h), s / (1 - sgd.momentum**2), np.zeros_like(h))


def _kernels(gamma: float, omega: Array, time: Array) -> tuple[Array, Array]:
    """e^{-gamma t} cos(dt) and e^{-gamma t} sin(dt)/d for real or imaginary d, without overflow, [t, n]."""
    t = time[:, None]
    root = np.sqrt((omega**2 - gamma**2).astype(complex))
    near = np.abs(root) * np.max(np.abs(time), initial=0.0) < 1e-4
    safe = np.where(near, 1.0, root)
    plus, minus = np.exp((-gamma + 1j * root) * t), np.exp((-gamma - 1j * root) * t)
    decay = np.exp(-gamma * t)
    square = (omega**2 - gamma**2) * t**2
    cos = np.where(near, decay * (1 - square / 2), ((plus + minus) / 2).real)
    sin = np.where(near, decay * t * (1 - square / 6), ((plus - minus) / (2j * safe)).real)
    return cos, sin


def propagator(sgd: SGD, curvature: ArrayLike, time: ArrayLike) -> Array:
    r"""The matrix :math:`e^{-A_l t}` that carries the mean (offset, velocity) of each mode over time t.

    :math:`e^{-\gamma t}\begin{pmatrix}C+\gamma S&S\\-\omega^2S&C-\gamma S\end{pmatrix}`,
    :math:`C=\cos dt, S=\sin(dt)/d, d=\sqrt{\omega^2-\gamma^2}`, in all damping regimes (Kunin et al. 2024).

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n].
        time: t = eta' k >= 0, [t].

    Returns:
        [t, n, 2, 2].

    Raises:
        UnstableError: curvature plus weight decay is negative.

    >>> propagator(SGD(lr=0.1, momentum=0.9), [1.0], [0.7])[0, 0].round(8)
    array([[-0.34060154,  0.16935209],
           [-1.78265358, -0.5188669 ]])
    """
    found = langevin_coefficients(sgd, curvature)
    cos, sin = _kernels(found.gamma, found.omega, np.atleast_1d(finite(time, "time")))
    first = np.stack([cos + found.gamma * sin, sin], axis=-1)
    second = np.stack([-(found.omega**2) * sin, cos - found.gamma * sin], axis=-1)
    return np.stack([first, second], axis=-2)


@dataclass(frozen=True)
class OrnsteinUhlenbeckMoments(Measurement):
    """Mean and covariance of (offset, velocity) of the Langevin model at given times, per mode."""

    time: Array = quantity("time", units="time", long_name="t = eta' k")
    mean: Array = quantity("time", "mode", "component", units="1", long_name="mean (offset, velocity)")
    covariance: Array = quantity("time", "mode", "component", "component_", units="1", long_name="covariance")
    _primary = "covariance"


def ornstein_uhlenbeck_moments(
    sgd: SGD,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    time: ArrayLike,
    *,
    position: ArrayLike = 0.0,
    velocity: ArrayLike = 0.0,
) -> OrnsteinUhlenbeckMoments:
    r"""Mean and covariance of the Langevin model at any time from a sharp start, closed form.

    :math:`m(t)=e^{-At}m(0)`, :math:`P(t)=B-e^{-At}Be^{-A^Tt}` (Kunin et al. 2024). To compare with discrete SGD started
    at rest, take the position of step k at :math:`t=\eta(k+\frac12)` and the velocity at :math:`t=\eta k`.

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n], curvature + weight decay > 0.
        noise_variance: variance of the minibatch gradient, [n].
        time: t = eta' k, [t].
        position: offset from the minimum at t = 0, scalar or [n].
        velocity: velocity at t = 0, scalar or [n].

    Returns:
        ``.mean`` [t, n, 2] and ``.covariance`` [t, n, 2, 2].

    Raises:
        UnstableError: curvature plus weight decay is not positive.

    >>> moments = ornstein_uhlenbeck_moments(SGD(lr=0.1, momentum=0.9), [1.0], [1.0], [0.0, 100.0], position=1.0)
    >>> moments.mean[0, 0], moments.covariance[1, 0].round(6)
    (array([1., 0.]), array([[0.5     , 0.      ],
           [0.      , 5.263158]]))
    """
    t = np.atleast_1d(finite(time, "time"))
    carry = propagator(sgd, curvature, t)  # [t, n, 2, 2]
    final = ornstein_uhlenbeck_stationary(sgd, curvature, noise_variance)
    n = final.position.size
    start = np.stack([np.broadcast_to(finite(x, "start"), (n,)) for x in (position, velocity)], axis=1)
    stationary = np.zeros((n, 2, 2))
    stationary[:, 0, 0], stationary[:, 1, 1] = final.position, final.velocity
    covariance = stationary - np.einsum("tnij,njk,tnlk->tnil", carry, stationary, carry)
    return OrnsteinUhlenbeckMoments(t, np.einsum("tnij,nj->tni", carry, start), covariance)


def ornstein_uhlenbeck_msd(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike, steps: ArrayLike) -> Array:
    r"""Mean-squared displacement of the stationary Langevin model, :math:`2\mathrm{Var}\theta(1-c_\theta(\eta k))`.

    :math:`c_\theta(t)=e^{-\gamma t}(\cos dt+\frac{\gamma}{d}\sin dt)` (from Kunin et al. 2024 without the error of
    their sum). First order in the learning rate: ``limiting.mean_squared_displacement`` is exact.

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n], curvature + weight decay > 0.
        noise_variance: variance of the minibatch gradient, [n].
        steps: lags in optimizer steps, [t].

    Returns:
        [t, n], in squared weights.

    Raises:
        UnstableError: curvature plus weight decay is not positive.

    >>> ornstein_uhlenbeck_msd(SGD(lr=0.1, momentum=0.9), [1.0], [1.0], [7]).round(8)
    array([[1.34060154]])
    """
    variance = ornstein_uhlenbeck_stationary(sgd, curvature, noise_variance).position
    carry = propagator(sgd, curvature, _step(sgd) * as_steps(steps))
    return 2 * variance * (1 - carry[:, :, 0, 0])


def published_msd(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike, steps: ArrayLike) -> Array:
    r"""Mean-squared displacement **as published** (Kunin et al. 2024): a Riemann sum over velocity correlations.

    :math:`\frac{\eta^2s}{1-\beta^2}[t+2\sum_{k=1}^{t-1}(t-k)c_v(\eta k)]`. It samples a continuous correlation at
    whole steps, which leaves a spurious diffusion :math:`(1-\beta)/(3(1+\beta))` in every confined mode. Kept to
    reproduce the paper; use :func:`~thermograd.theory.limiting.mean_squared_displacement`.

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n].
        noise_variance: variance of the minibatch gradient, [n].
        steps: lags in optimizer steps, [t].

    Returns:
        [t, n], in squared weights.

    Raises:
        UnstableError: curvature plus weight decay is negative.

    >>> published_msd(SGD(lr=0.1, momentum=0.9), [1.0], [1.0], [7]).round(8)
    array([[1.36048126]])
    """
    h, s = as_modes(curvature, noise_variance)
    lags, step = as_steps(steps), _step(sgd)
    times = step * np.arange(1, max(int(lags.max(initial=1)), 2))
    correlation = propagator(sgd, h, times)[:, :, 1, 1]  # c_v at steps 1, 2, ..., [k, n]
    single = np.vstack([np.zeros((1, h.size)), np.cumsum(correlation, axis=0)])  # sum_{k<=m} c_v(k)
    double = np.vstack([np.zeros((1, h.size)), np.cumsum(single, axis=0)])  # sum_{k<t} (t - k) c_v(k)
    return step**2 * s / (1 - sgd.momentum**2) * (lags[:, None] + 2 * double[lags])


@dataclass(frozen=True)
class ModifiedLoss(Measurement):
    """Curvatures of the potential whose Gibbs density exp(-Psi) is the stationary one, and its current."""

    position: Array = quantity("mode", units="1/weight^2", long_name="curvature of the modified loss")
    velocity: Array = quantity("mode", units="1/gradient^2", long_name="curvature of the velocity regulariser")
    temperature: Array = quantity("mode", units="loss", long_name="temperature of the original loss, h Var theta")
    circulation: Array = quantity("mode", units="gradient^2", long_name="antisymmetric part, Q_v,theta")
    frequency: Array = quantity("mode", units="1/time", long_name="frequency of the stationary current")


def modified_loss(sgd: SGD, curvature: ArrayLike, noise_variance: ArrayLike) -> ModifiedLoss:
    r"""Modified loss, velocity regulariser and stationary current of each mode (Kunin et al. 2024).

    :math:`p_{ss}\propto\exp(-\Psi)`, :math:`\Psi=\frac12\sum_l[U_\theta(\theta_l-\mu_l)^2+U_vv_l^2]` with
    :math:`U_\theta=2(1-\beta)h/(\eta s)`, :math:`U_v=(1-\beta^2)/s`; the current is
    :math:`J/p=(v,-\omega^2(\theta-\mu))` and :math:`Q=\mathrm{Var}v\,\begin{pmatrix}0&-1\\1&0\end{pmatrix}`.
    With noise proportional to curvature, s = sigma^2 h / B, the modified loss is isotropic.

    Args:
        sgd: hyperparameters (heavy ball).
        curvature: Hessian eigenvalues without weight decay, [n], curvature + weight decay > 0.
        noise_variance: variance of the minibatch gradient, [n], > 0.

    Returns:
        ``.position``, ``.velocity``, ``.temperature``, ``.circulation``, ``.frequency``, [n] each.

    Raises:
        UnstableError: curvature plus weight decay is not positive.

    >>> modified_loss(SGD(lr=0.1, momentum=0.9), [1.0, 4.0], [1.0, 4.0]).position.round(6)
    array([2., 2.])
    """
    moments = ornstein_uhlenbeck_stationary(sgd, curvature, noise_variance)
    h, _ = as_modes(curvature, noise_variance)
    omega = langevin_coefficients(sgd, curvature).omega * np.ones_like(h)
    temperature = (h + sgd.weight_decay) * moments.position
    return ModifiedLoss(1 / moments.position, 1 / moments.velocity, temperature, moments.velocity, omega)
