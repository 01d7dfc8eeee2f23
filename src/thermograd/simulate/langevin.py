"""Replicas of a Langevin equation in any potential and any isotropic noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from ..errors import DataError
from ..measurement import Measurement, new_axes, quantity
from ..theory.arrays import Array, finite
from .blocks import check_counts, check_finite, run_blocks
from .generator import normal, seeded
from .potentials import Potential, compiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Trajectories", "diffusion_function", "langevin", "start_points"]


@dataclass(frozen=True)
class Trajectories(Measurement):
    """Positions of all replicas at the recorded times."""

    time: Array = quantity("time", units="time", long_name="time since the start")
    position: Array = quantity("replica", "time", "coordinate", units="position", long_name="position")
    _primary = "position"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The first coordinate of the first replicas against time."""
        axes = new_axes(ax)
        axes.plot(self.time, self.position[:10, :, 0].T, lw=0.8)
        axes.set(xlabel="time", ylabel="first coordinate")
        return axes


def diffusion_function(noise: float | Callable[[Array], float]) -> Callable[[Array, float], float]:
    """D(x) as a numba function of (x, level): a constant needs no new compilation when its value changes."""
    if not callable(noise):
        return _constant
    inner = compiled(noise)

    @njit
    def evaluate(x: Array, level: float) -> float:
        return inner(x)

    return evaluate


@njit(cache=True)
def _constant(x: Array, level: float) -> float:
    return level


def start_points(start: ArrayLike, replicas: int) -> Array:
    """First positions of all replicas, [R, d]; a number means one dimension.

    Raises:
        DataError: a shape that does not fit.
    """
    points = np.atleast_1d(finite(start, "start"))
    if points.ndim == 1:
        points = np.broadcast_to(points, (replicas, points.size))
    if points.ndim != 2 or len(points) != replicas:
        raise DataError(f"start has shape {points.shape}", expected="a number, [d] or [replicas, d]")
    return np.ascontiguousarray(points)


@njit(nogil=True)
def _run(gradient, diffusion, level, start, dt, every, heun, seed, first, out):  # type: ignore[no-untyped-def]
    d = start.shape[1]
    slope, ahead, kick, there = np.empty(d), np.empty(d), np.empty(d), np.empty(d)
    for r in range(out.shape[0]):
        state = seeded(seed, first + r)
        x = start[r].copy()
        for k in range(every * (out.shape[1] - 1) + 1):
            if k % every == 0:
                out[r, k // every] = x
            if k == every * (out.shape[1] - 1):
                break
            gradient(x, slope)
            size = np.sqrt(2.0 * diffusion(x, level) * dt)
            for i in range(d):
                kick[i] = normal(state)
            if heun:
                for i in range(d):
                    there[i] = x[i] - slope[i] * dt + size * kick[i]
                gradient(there, ahead)
                size = 0.5 * (size + np.sqrt(2.0 * diffusion(there, level) * dt))
                for i in range(d):
                    x[i] += -0.5 * (slope[i] + ahead[i]) * dt + size * kick[i]
            else:
                for i in range(d):
                    x[i] += -slope[i] * dt + size * kick[i]


def langevin(
    potential: str | Potential,
    noise: float | Callable[[Array], float],
    *,
    start: ArrayLike,
    dt: float,
    steps: int,
    replicas: int = 100,
    seed: int = 0,
    record_every: int = 1,
    scheme: Literal["euler", "heun"] = "euler",
    threads: int | None = None,
) -> Trajectories:
    r"""Replicas of :math:`dx=-\nabla L\,dt+\sqrt{2D(x)}\,dW`.

    Euler-Maruyama (the Ito reading, what SGD is) or stochastic Heun (the Stratonovich reading).

    Args:
        potential: a name from ``POTENTIALS`` or a :class:`Potential`.
        noise: D, a number, or a function of x [d] that numba can compile.
        start: first position, a number, [d] or [R, d].
        dt: time step.
        steps: number of time steps.
        replicas: R.
        seed: of all random numbers.
        record_every: time steps between recorded rows.
        scheme: "euler" or "heun".
        threads: at most this many; the numbers do not depend on it.

    Returns:
        ``.time`` [T] and ``.position`` [R, T, d].

    Raises:
        DataError: an argument out of range.
        DivergedError: a replica ran away.

    >>> langevin("double-well", 0.1, start=[1.0], dt=0.01, steps=100, replicas=3, record_every=50).position.shape
    (3, 3, 1)
    """
    check_counts(steps=steps, replicas=replicas, record_every=record_every, seed=seed)
    check_noise(noise, dt)
    if scheme not in ("euler", "heun"):
        raise DataError(f"scheme is {scheme!r}", expected="'euler' (Ito) or 'heun' (Stratonovich)")
    landscape, points = Potential.named(potential), start_points(start, replicas)
    diffusion, level = diffusion_function(noise), 0.0 if callable(noise) else float(noise)
    rows = steps // record_every + 1
    out = np.empty((replicas, rows, points.shape[1]))

    def block(first: int, last: int) -> None:
        _run(
            landscape.gradient, diffusion, level, points[first:last], float(dt), record_every, scheme == "heun",
            seed, first, out[first:last],
        )  # fmt: skip

    run_blocks(block, replicas, "Langevin replicas", threads)
    check_finite(out, "the Langevin equation")
    return Trajectories(finite(dt * record_every * np.arange(rows), "time"), out)


def check_noise(noise: float | Callable[[Array], float], dt: float) -> None:
    """Refuse a negative or non-finite diffusion or time step.

    Raises:
        DataError: out of range.
    """
    if not callable(noise) and not float(finite(noise, "noise")) >= 0:
        raise DataError(f"the noise is {noise}", expected="a diffusion constant >= 0 or a function of x")
    if not float(finite(dt, "dt")) > 0:
        raise DataError(f"dt is {dt}", expected="a time step > 0")
