"""How long fluctuations remember: autocorrelation functions and correlation times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.fft

from ..errors import InputError, TooShortError
from ..hyperparameters import SGD
from ..measurement import Measurement, new_axes, quantity
from .detrend import Detrend, detrended
from .selection import Selection, Window, as_directions, select_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Autocorrelation", "autocorrelation"]

_WINDOW = 5.0  # the sum over lags ends where the lag exceeds this many correlation times (Sokal)


@dataclass(frozen=True)
class Autocorrelation(Measurement):
    """Autocorrelation functions of coordinates and their correlation times, in steps.

    ``kuhn_rosenow_time`` is 2 Var(position) / Var(step), which for a coordinate that relaxes exponentially exceeds the
    integrated time by one half.
    """

    lags: np.ndarray = quantity("lags", units="steps", long_name="lag")
    autocorrelation: np.ndarray = quantity("lags", "direction", long_name="autocorrelation")
    variance: np.ndarray = quantity("direction", long_name="variance of the coordinate")
    correlation_time: np.ndarray = quantity("direction", units="steps", long_name="integrated correlation time")
    correlation_time_stderr: np.ndarray = quantity("direction", units="steps", long_name="its standard error")
    summation_window: np.ndarray = quantity("direction", units="steps", long_name="lag at which the sum ends")
    kuhn_rosenow_time: np.ndarray | None = quantity(
        "direction", units="steps", long_name="2 Var(position) / Var(step)", default=None
    )
    of: str = "position"

    _primary = "correlation_time"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Autocorrelation against lag, one line a direction (ten at most)."""
        ax = new_axes(ax)
        last = max(2, int(np.searchsorted(self.lags, 2 * self.summation_window.max())))
        for i in range(min(10, self.autocorrelation.shape[1])):
            ax.plot(self.lags[:last], self.autocorrelation[:last, i], lw=1, label=f"{self.correlation_time[i]:.3g}")
        ax.axhline(0, lw=0.5, color="0.5")
        ax.set(xlabel="lag (steps)", ylabel=f"autocorrelation of {self.of}")
        ax.legend(title="correlation time")
        return ax


def autocorrelation(
    run: Any,
    directions: Any = None,
    window: Window = None,
    *,
    of: Literal["position", "velocity"] = "position",
    detrend: Detrend = "linear",
    least: float = 20.0,
    sgd: SGD | None = None,
) -> Autocorrelation:
    r"""Autocorrelation and correlation time of the weights along directions.

    .. math::
        \rho(m) = \frac{\langle a_k a_{k+m}\rangle}{\langle a_k^2\rangle}, \qquad
        \tau_{int} = \tfrac12 + \sum_{m=1}^{W} \rho(m), \qquad \tau = \frac{2\sigma^2}{\sigma_v^2}

    with W the first lag above 5 tau_int (Sokal 1997), the standard error tau_int sqrt(2 (2W + 1) / T) and the bias of
    subtracting the sample's own mean (and line) added back (Wolff 2004, Eqs. 42 and 49); tau is that of Kuhn &
    Rosenow (arXiv 2306.05300), with the variance of single steps.

    Args:
        run: a run, an array [T, P], or replicas of either (their covariances are averaged).
        directions: [P, k], or anything with ``eigenvectors``; default: all weights together, weighted by variance.
        window: which rows, as in :func:`~thermograd.trajectory.select`.
        of: "position", or "velocity" (differences of successive rows over the learning rate, where that is known).
        detrend: what is taken out of each coordinate first: "linear" (drift would look like a long memory) or
            "constant".
        least: refuse windows shorter than this many correlation times; 0 never refuses.
        sgd: hyperparameters, when they are not those of the run.

    Raises:
        TooShortError: the window is too short for the correlation time that it seems to have.
        InputError: rows that skip steps, for velocities. DivergedError: weights that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> x = np.zeros(20_000)
    >>> for k in range(1, len(x)):
    ...     x[k] = 0.8 * x[k - 1] + rng.standard_normal()
    >>> result = autocorrelation(x)
    >>> bool(abs(result.correlation_time[0] - 4.5) < 3 * result.correlation_time_stderr[0])
    True
    """
    if of not in ("position", "velocity"):
        raise InputError(f"of is {of!r}", expected="'position' or 'velocity'")
    stretches = select_all(run, window, minimum=8, sgd=sgd)
    first = stretches[0]
    if of == "velocity":
        first.need_every_step("the velocity's autocorrelation")
    basis = None if directions is None else as_directions(directions, first.P)
    covariances, steps = zip(*[_covariance(s, basis, of, detrend) for s in stretches])
    covariance = np.mean(covariances, axis=0)  # [T, k]
    if not (covariance[0] > 0).all():
        raise InputError("a coordinate does not move in the window", expected="coordinates that fluctuate")
    length, total = len(covariance), len(covariance) * len(stretches)
    ends = np.array([_window_end(column / column[0]) for column in covariance.T])
    removed = 2 if detrend == "linear" else 1
    for i, end in enumerate(ends):  # the part that the fitted mean and line have taken away
        covariance[:, i] += removed * (covariance[0, i] + 2 * covariance[1 : end + 1, i].sum()) / length
    rho = covariance / covariance[0]
    times = np.array([0.5 + rho[1 : end + 1, i].sum() for i, end in enumerate(ends)])
    _refuse_short(times, ends, length, least, first)
    errors = np.abs(times) * np.sqrt(2 * (2 * ends + 1) / total)
    shown = min(length, max(int(4 * ends.max()) + 1, 16))
    every = first.every
    return Autocorrelation(
        lags=np.arange(shown) * every,
        autocorrelation=rho[:shown],
        variance=covariance[0],
        correlation_time=times * every,
        correlation_time_stderr=errors * every,
        summation_window=ends * every,
        kuhn_rosenow_time=None if of == "velocity" or every != 1 else 2 * covariance[0] / np.mean(steps, axis=0),
        of=of,
    )


def _covariance(
    stretch: Selection, basis: np.ndarray | None, of: str, detrend: Detrend
) -> tuple[np.ndarray, np.ndarray]:
    """Autocovariance at all lags [T, k] and variance of single steps [k]."""
    if basis is not None:
        coordinates = np.concatenate([block @ basis for _, block in stretch.blocks()])
        return _of_coordinates(coordinates, stretch, of, detrend)
    total, steps = None, 0.0
    for _, slab in stretch.slabs():
        part, step = _of_coordinates(slab, stretch, of, detrend, summed=True)
        total, steps = part if total is None else total + part, steps + step[0]
    assert total is not None
    return total, np.array([steps])


def _of_coordinates(
    coordinates: np.ndarray, stretch: Selection, of: str, detrend: Detrend, summed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    moves = np.diff(coordinates, axis=0)
    steps = moves.var(axis=0)
    if of == "velocity":
        coordinates = moves
        if stretch.learning_rate is not None and (stretch.learning_rate[1:] > 0).all():
            coordinates = moves / stretch.learning_rate[1:, None]
    coordinates = detrended(coordinates, detrend)
    length = len(coordinates)
    size = scipy.fft.next_fast_len(2 * length, real=True)
    power = np.abs(scipy.fft.rfft(coordinates, size, axis=0)) ** 2
    if summed:
        power, steps = power.sum(axis=1, keepdims=True), steps.sum(keepdims=True)
    products = scipy.fft.irfft(power, size, axis=0)[:length]
    return products / (length - np.arange(length))[:, None], steps


def _window_end(rho: np.ndarray) -> int:
    """First lag W that is at least five times the correlation time summed up to it (Sokal's window)."""
    times = 0.5 + np.cumsum(rho[1:])
    lags = np.arange(1, len(rho))
    enough = lags >= _WINDOW * np.maximum(times, 0.5)
    return int(lags[np.argmax(enough)]) if enough.any() else len(rho) - 1


def _refuse_short(times: np.ndarray, ends: np.ndarray, length: int, least: float, stretch: Selection) -> None:
    worst = int(np.argmax(times))
    if least > 0 and (length < least * times[worst] or ends.max() >= length // 2):
        raise TooShortError(
            f"the window of {length * stretch.every} steps is {length / max(times[worst], 0.5):.1f} correlation times "
            f"long ({times[worst] * stretch.every:.3g} steps, direction {worst})",
            expected=f"at least {least:g} correlation times ({least * times[worst] * stretch.every:.0f} steps)",
            remedy="record longer, leave out the flattest directions, or pass least=0 to take the numbers as they are",
        )
