"""First passages: when each replica first reaches each of several thresholds, one trajectory for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike
from scipy.stats import chi2

from ..errors import DataError, DivergedError, ThermogradWarning
from ..hyperparameters import SGD
from ..measurement import Measurement, new_axes, quantity
from ..theory.arrays import Array, finite
from .blocks import check_counts, run_blocks
from .generator import Buffer, normal, seeded
from .langevin import check_noise, diffusion_function, start_points
from .minibatch import SCHEMES, draw, move, regression_gradient, start_order
from .potentials import Potential, compiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FirstPassage", "first_passage", "linear_regression_first_passage"]


@dataclass(frozen=True)
class FirstPassage(Measurement):
    """First-passage times of all replicas over all thresholds, with the exponential estimate of their mean.

    A replica that had not arrived by the end is censored: its time is NaN, its exposure counts. The mean is
    exposure over events (the maximum-likelihood estimate for exponential times, infinite without events);
    ``low`` and ``high`` bound it with 95% confidence (exact chi-square). ``variation`` is the coefficient of
    variation of the arrived, close to 1 when escape is memoryless.
    """

    threshold: Array = quantity("threshold", units="1", long_name="threshold")
    time: Array = quantity("replica", "threshold", units="time", long_name="first-passage time, NaN if censored")
    events: Array = quantity("threshold", units="1", long_name="replicas that arrived")
    censored: Array = quantity("threshold", units="1", long_name="replicas that had not arrived at the end")
    exposure: Array = quantity("threshold", units="time", long_name="total time watched")
    mean: Array = quantity("threshold", units="time", long_name="mean first-passage time")
    low: Array = quantity("threshold", units="time", long_name="lower 95% bound of the mean")
    high: Array = quantity("threshold", units="time", long_name="upper 95% bound of the mean")
    variation: Array = quantity("threshold", units="1", long_name="coefficient of variation of the arrived")
    _primary = "mean"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean first-passage time against the threshold, with its confidence interval."""
        axes = new_axes(ax)
        seen = self.events > 0
        spread = np.stack([self.mean - self.low, self.high - self.mean])[:, seen]
        axes.errorbar(self.threshold[seen], self.mean[seen], spread, fmt="o-", capsize=3)
        axes.set(xlabel="threshold", ylabel="mean first-passage time", yscale="log")
        return axes


def _summary(threshold: Array, steps: np.ndarray, limit: int, unit: float) -> FirstPassage:
    """``steps`` [R, m]: the step of arrival, -1 for censored, -2 for diverged."""
    if np.any(steps == -2):
        raise DivergedError(
            f"{int((steps == -2).any(axis=1).sum())} replicas ran away before the last threshold",
            expected="finite positions",
            remedy="lower the step size or the learning rate",
        )
    arrived = steps >= 0
    time = np.where(arrived, steps * unit, np.nan)
    exposure = np.where(arrived, steps, limit).sum(axis=0) * unit
    events = arrived.sum(axis=0)
    if np.any(events == 0):
        warnings.warn(
            f"no replica reached {int((events == 0).sum())} of {len(threshold)} thresholds within {limit} steps: "
            "their mean is infinite and only its lower bound says something; raise max_steps",
            ThermogradWarning,
            stacklevel=3,
        )
    with np.errstate(divide="ignore"):
        mean = exposure / events
        high = 2 * exposure / np.where(events > 0, chi2.ppf(0.025, 2 * np.maximum(events, 1)), 0)
    low = 2 * exposure / chi2.ppf(0.975, 2 * events + 2)
    variation = np.array([_variation(t[ok]) for t, ok in zip(time.T, arrived.T, strict=True)])
    censored = len(steps) - events
    return FirstPassage(threshold, time, events, censored, exposure, mean, low, high, variation)


def _variation(time: Array) -> float:
    return float(np.std(time, ddof=1) / np.mean(time)) if len(time) > 1 else np.inf


@njit(nogil=True)
def _walk(gradient, diffusion, level, observe, sign, start, dt, thresholds, limit, seed, first, out):  # type: ignore[no-untyped-def]
    d = start.shape[1]
    slope = np.empty(d)
    for r in range(out.shape[0]):
        state = seeded(seed, first + r)
        x = start[r].copy()
        reached = 0
        for k in range(1, limit + 1):
            gradient(x, slope)
            size = np.sqrt(2.0 * diffusion(x, level) * dt)
            for i in range(d):
                x[i] += -slope[i] * dt + size * normal(state)
            seen = sign * observe(x)
            if not np.isfinite(seen):
                out[r, reached:] = -2
                break
            while reached < thresholds.size and seen >= sign * thresholds[reached]:
                out[r, reached] = k
                reached += 1
            if reached == thresholds.size:
                break


@njit(cache=True)
def _first_coordinate(x: Array) -> float:
    return x[0]


def first_passage(
    potential: str | Potential,
    noise: float | Callable[[Array], float],
    thresholds: ArrayLike,
    *,
    start: ArrayLike,
    dt: float,
    max_steps: int,
    replicas: int = 400,
    seed: int = 0,
    observable: Literal["position", "loss"] | Callable[[Array], float] = "position",
    threads: int | None = None,
) -> FirstPassage:
    r"""When replicas of :math:`dx=-\nabla L\,dt+\sqrt{2D(x)}\,dW` (Ito, Euler-Maruyama) first reach each threshold.

    All thresholds come out of the one trajectory. Put the last one well beyond the saddle: a stop at its top halves
    the time.

    Args:
        potential: a name from ``POTENTIALS`` or a :class:`Potential`.
        noise: D, a number, or a function of x [d] that numba can compile.
        thresholds: values of the observable, all above or all below its value at the start, [m].
        start: first position, a number, [d] or [R, d].
        dt: time step.
        max_steps: when a replica is given up (censored).
        replicas: R.
        seed: of all random numbers.
        observable: "position" (the first coordinate), "loss", or a function of x that numba can compile.
        threads: at most this many; the numbers do not depend on it.

    Returns:
        Times in units of the equation's time.

    Raises:
        DataError: an argument out of range, or thresholds on both sides of the start.
        DivergedError: a replica ran away.

    >>> found = first_passage("double-well", 0.2, [0.5, -0.5], start=1.0, dt=0.01, max_steps=100000, replicas=20)
    >>> bool(found.mean[1] > found.mean[0]), int(found.censored.sum())
    (True, 0)
    """
    check_counts(max_steps=max_steps, replicas=replicas, seed=seed)
    check_noise(noise, dt)
    landscape, points = Potential.named(potential), start_points(start, replicas)
    named: dict[str, Callable[[Array], float]] = {"position": _first_coordinate, "loss": landscape.value}
    observe = compiled(observable) if callable(observable) else named.get(observable)
    if observe is None:
        raise DataError(f"observable is {observable!r}", expected="'position', 'loss' or a function of x")
    levels = np.atleast_1d(finite(thresholds, "thresholds"))
    begin = np.array([observe(x) for x in points])
    above = levels.min() > begin.max()
    if not (above or levels.max() < begin.min()):
        raise DataError(
            f"thresholds {levels} are not all beyond the start, where the observable is {begin.min():g}",
            expected="all above or all below the start",
        )
    sign = 1.0 if above else -1.0
    order = np.argsort(sign * levels)
    steps = np.full((replicas, levels.size), -1, dtype=np.int64)
    diffusion, level = diffusion_function(noise), 0.0 if callable(noise) else float(noise)
    ordered = levels[order]

    def block(first: int, last: int) -> None:
        _walk(
            landscape.gradient, diffusion, level, observe, sign, points[first:last], float(dt), ordered, max_steps,
            seed, first, steps[first:last],
        )  # fmt: skip

    run_blocks(block, replicas, "first passages", threads)
    return _summary(levels, steps[:, np.argsort(order)], max_steps, float(dt))


@njit(cache=True, nogil=True)
def _escape(
    X: Buffer, y: Buffer, hessian: Buffer, minimum: Buffer, bottom: float,
    lr: float, beta: float, decay: float, gain: float, nesterov: bool, batch: int, scheme: int,
    ratios: Buffer, limit: int, seed: int, first: int, out: Buffer,
) -> None:  # fmt: skip
    samples, d = X.shape
    chosen, order = np.empty(batch, np.int64), np.empty(samples, np.int64)
    theta, buffer, gradient, before = np.empty(d), np.empty(d), np.empty(d), np.empty(d)
    for r in range(out.shape[0]):
        state = seeded(seed, first + r)
        at = start_order(order, state, scheme, batch, samples, True)
        theta[:] = minimum
        buffer[:] = 0.0
        reached = 0
        for k in range(1, limit + 1):
            size, at = draw(chosen, order, at, state, scheme, batch, samples)
            regression_gradient(X, y, theta, chosen, size, gradient)
            move(theta, buffer, gradient, before, lr, beta, decay, gain, nesterov)
            loss = bottom  # exact for a quadratic, without a pass over the data
            for i in range(d):
                pull = 0.0
                for j in range(d):
                    pull += hessian[i, j] * (theta[j] - minimum[j])
                loss += 0.5 * pull * (theta[i] - minimum[i])
            if not np.isfinite(loss):
                out[r, reached:] = -2
                break
            while reached < ratios.size and loss >= ratios[reached] * bottom:
                out[r, reached] = k
                reached += 1
            if reached == ratios.size:
                break


def linear_regression_first_passage(
    sgd: SGD,
    X: ArrayLike,
    y: ArrayLike,
    loss_ratios: ArrayLike,
    *,
    max_steps: int,
    replicas: int = 400,
    seed: int = 0,
    threads: int | None = None,
) -> FirstPassage:
    """Steps until the full loss of linear regression first reaches given multiples of its minimum.

    The protocol of Mori et al. (2022): start at the minimum, full training loss watched after every step.

    Args:
        sgd: hyperparameters with a batch size.
        X: inputs, [N, d].
        y: targets, [N], not fitted exactly.
        loss_ratios: thresholds over the minimal loss, > 1, [m].
        max_steps: when a replica is given up (censored).
        replicas: R.
        seed: of all random numbers.
        threads: at most this many; the numbers do not depend on it.

    Returns:
        Times in optimizer steps.

    Raises:
        DataError: shapes or counts that make no sense, a threshold not above the minimum, or a loss of zero there.
        DivergedError: a replica ran away before the last threshold.

    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(1000, 1)), rng.normal(size=1000)
    >>> sgd = SGD(lr=0.1, batch_size=1, sampling="replacement")
    >>> found = linear_regression_first_passage(sgd, X, y, [1.1, 1.4], max_steps=100000, replicas=50)
    >>> bool(found.mean[1] > found.mean[0] > 1)
    True
    """
    check_counts(max_steps=max_steps, replicas=replicas, seed=seed)
    inputs, targets = np.ascontiguousarray(finite(X, "X")), np.ascontiguousarray(finite(y, "y").reshape(-1))
    ratios = np.atleast_1d(finite(loss_ratios, "loss_ratios"))
    if inputs.ndim != 2 or len(inputs) != len(targets) or inputs.size == 0:
        raise DataError(f"X has shape {inputs.shape} and y {targets.shape}", expected="X [N, d] and y [N], not empty")
    if np.any(ratios <= 1):
        raise DataError(f"a threshold is {ratios.min():g} times the minimal loss", expected="ratios > 1")
    hessian = inputs.T @ inputs / len(inputs)
    minimum = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    bottom = float(((inputs @ minimum - targets) ** 2).mean() / 2)
    if bottom <= 1e-14 * float((targets**2).mean() + 1e-300):
        raise DataError("the data are fitted exactly, so the minimal loss is zero", expected="targets with noise")
    order = np.argsort(ratios)
    steps = np.full((replicas, ratios.size), -1, dtype=np.int64)
    ordered, batch = ratios[order], sgd._needed("batch_size")

    def block(first: int, last: int) -> None:
        _escape(
            inputs, targets, hessian, minimum, bottom, sgd.lr, sgd.momentum, sgd.weight_decay, 1 - sgd.dampening,
            sgd.nesterov, batch, SCHEMES[sgd.sampling], ordered, max_steps, seed, first, steps[first:last],
        )  # fmt: skip

    run_blocks(block, replicas, "first passages", threads)
    return _summary(ratios, steps[:, np.argsort(order)], max_steps, 1.0)
