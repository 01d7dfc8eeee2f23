"""How far the weights wander: mean squared displacement, its exponent, and the ceiling of noise alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.fft
import scipy.sparse

from ..errors import InputError, TooShortError
from ..hyperparameters import SGD
from ..measurement import Measurement, new_axes, quantity
from .bootstrap import block_means, half_width, resampled
from .selection import Selection, Window, project, select_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Diffusion", "diffusion"]

_SKETCH = 256  # random coordinates that the error bars are computed from when there are more weights
_BLOCKS = 10  # of each replica
_PER_DECADE = 12


@dataclass(frozen=True)
class Diffusion(Measurement):
    """Mean squared displacement over lags, and what can be read off it."""

    lags: np.ndarray = quantity("lags", units="steps", long_name="lag")
    msd: np.ndarray = quantity("lags", units="weight^2", long_name="mean squared displacement")
    msd_stderr: np.ndarray = quantity("lags", units="weight^2", long_name="its standard error")
    local_exponent: np.ndarray = quantity("lags", long_name="logarithmic slope d log MSD / d log t")
    local_exponent_stderr: np.ndarray = quantity("lags", long_name="its standard error")
    exponent: float = quantity(long_name="exponent fitted to log MSD against log t")
    exponent_stderr: float = quantity(long_name="its standard error")
    exponent_low: float = quantity(long_name="lower end of its confidence interval")
    exponent_high: float = quantity(long_name="upper end of its confidence interval")
    fit_low: int = quantity(units="steps", long_name="shortest lag of the fit")
    fit_high: int = quantity(units="steps", long_name="longest lag of the fit")
    drift_squared: float = quantity(
        units="weight^2/step^2", long_name="squared mean displacement a step, estimated without bias (may be negative)"
    )
    drift_squared_stderr: float = quantity(units="weight^2/step^2", long_name="its standard error")
    drift: np.ndarray = quantity("lags", units="weight^2", long_name="part of the MSD that is mean drift")
    noise: np.ndarray = quantity("lags", units="weight^2", long_name="rest of the MSD")
    dof: int = quantity(long_name="degrees of freedom of the standard errors")
    local_displacement: float | None = quantity(
        units="weight^2", long_name="mean squared displacement of one step", default=None
    )
    ceiling_ratios: np.ndarray | None = quantity(
        "lags", long_name="MSD over the most that stationary noise can reach", default=None
    )
    ceiling_ratio: float | None = quantity(long_name="largest of these ratios", default=None)
    ceiling_stderr: float | None = quantity(long_name="its standard error", default=None)
    ceiling_lag: int | None = quantity(units="steps", long_name="lag at which it is reached", default=None)
    msd_along: np.ndarray | None = quantity(
        "lags", "direction", units="weight^2", long_name="mean squared displacement along directions", default=None
    )

    _primary = "exponent"

    def plot(self, ax: Axes | None = None) -> Axes:
        """MSD against lag with the fitted power law, and the noise-only ceiling where it is known."""
        ax = new_axes(ax)
        ax.loglog(self.lags, self.msd, "o", ms=3, label="measured")
        inside = (self.lags >= self.fit_low) & (self.lags <= self.fit_high)
        x = self.lags[inside]
        middle = np.exp(np.mean(np.log(self.msd[inside])) - self.exponent * np.mean(np.log(x)))
        ax.loglog(x, middle * x**self.exponent, "-", lw=1.5, label=f"t^{self.exponent:.2f}")
        if self.ceiling_ratios is not None:
            ax.loglog(self.lags, self.msd / self.ceiling_ratios, "--", lw=1, label="noise-only ceiling")
        ax.set(xlabel="lag (steps)", ylabel="mean squared displacement")
        ax.legend()
        return ax


def diffusion(
    run: Any,
    window: Window = None,
    *,
    lags: Any = None,
    fit_range: tuple[int, int] | None = None,
    directions: Any = None,
    sgd: SGD | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Diffusion:
    r"""Mean squared displacement of the weights and its exponent.

    .. math:: \mathrm{MSD}(t) = \langle \|\theta_{k+t} - \theta_k\|^2 \rangle_k \sim t^c

    over all overlapping origins, exactly (by Fourier transform of each weight). Stationary noise that is uncorrelated
    between steps cannot carry the weights beyond

    .. math:: \mathrm{MSD}(t) \le t\, E\|\delta\|^2\, \frac{1+\beta}{1-\beta}

    (Kunin et al. 2024 give the displacements; the bound follows from the velocity spectrum being largest at
    frequency zero): a ``ceiling_ratio`` above 1 means drift. The drift/noise split assumes one mean drift u across the
    window, whose square is estimated from displacements in separate blocks, sum over i != j of u_i . u_j, so that noise
    does not count as drift. Error bars come from blocks of origins (and replicas), for which more than 256 weights are
    replaced by 256 random sums of them.

    Args:
        run: a run, an array [T, P], or replicas of either.
        window: which rows, as in :func:`~thermograd.trajectory.select`.
        lags: lags in steps; default: about 12 a decade up to a quarter of the window.
        fit_range: shortest and longest lag of the fitted exponent; default 10 / (1 - momentum) steps, after which the
            ballistic start is forgotten, to a tenth of the window, where the window is long enough; see ``fit_low``.
        directions: [P, k]: also the MSD along each.
        sgd: hyperparameters, when they are not those of the run; the ceiling needs the momentum.
        confidence: of the exponent's interval.
        seed: of the block bootstrap.

    Raises:
        TooShortError: too few rows for the fit. DivergedError: weights that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> walk = rng.standard_normal((4000, 50)).cumsum(axis=0)
    >>> result = diffusion(walk)
    >>> bool(abs(result.exponent - 1) < 3 * result.exponent_stderr)
    True
    """
    stretches = select_all(run, window, minimum=40, sgd=sgd)
    first = stretches[0]
    rows = _row_lags(lags, first)
    low, high = fit_range or _fit_range(first)
    steps = rows * first.every
    inside = (steps >= low) & (steps <= high)
    if inside.sum() < 3:
        raise TooShortError(
            f"the window of {first.T} rows has {inside.sum()} of the lags between {low} and {high} steps",
            expected="at least 3 lags to fit an exponent to",
            remedy="record longer, or pass fit_range and lags",
        )
    msd = np.mean([_msd(s, rows) for s in stretches], axis=0)  # [m]
    if not (msd > 0).all():
        raise InputError("the weights do not move in the window", expected="a trajectory that fluctuates")
    sketches = [_sketch(s, seed) for s in stretches]
    blocks = np.concatenate([_block_msd(y, rows) for y in sketches])  # [b, m]
    blocks *= msd / blocks.mean(axis=0)
    fit = _slope_weights(np.log(steps[inside]))

    def exponent(means: np.ndarray) -> np.ndarray:
        return np.log(means[..., inside]) @ fit

    def slopes(means: np.ndarray) -> np.ndarray:
        return np.gradient(np.log(means), np.log(steps), axis=-1) if len(steps) > 1 else np.zeros_like(means)

    # displacements of lag t reach from one block into the next, so that T/(L + t) blocks of length L are separate
    shared = np.sqrt(1 + rows * _BLOCKS / first.T)  # [m]
    value, error = float(exponent(msd)), float(resampled(blocks, exponent, seed) * shared[inside][-1])
    width = half_width(error, len(blocks), confidence)
    squared, squared_error = _drift_squared(stretches)
    drift = max(squared, 0.0) * steps.astype(float) ** 2
    msd_error = resampled(blocks, lambda means: means, seed) * shared
    return Diffusion(
        lags=steps,
        msd=msd,
        msd_stderr=msd_error,
        local_exponent=slopes(msd),
        local_exponent_stderr=resampled(blocks, slopes, seed) * shared,
        exponent=value,
        exponent_stderr=error,
        exponent_low=value - width,
        exponent_high=value + width,
        fit_low=int(steps[inside][0]),
        fit_high=int(steps[inside][-1]),
        drift_squared=squared,
        drift_squared_stderr=squared_error,
        drift=drift,
        noise=msd - drift,
        dof=len(blocks) - 1,
        msd_along=None if directions is None else _msd_along(stretches, rows, directions),
        **_ceiling(stretches, steps, msd, msd_error),
    )


def _row_lags(lags: Any, stretch: Selection) -> np.ndarray:
    """Lags in rows, [m]."""
    if lags is None:
        most = max(2, stretch.T // 4)
        count = max(8, int(_PER_DECADE * np.log10(most)))
        return np.unique(np.geomspace(1, most, count).round().astype(int))
    steps = np.unique(np.atleast_1d(np.asarray(lags)))
    if steps.size == 0 or steps[0] < 1 or np.any(steps % stretch.every) or steps[-1] // stretch.every >= stretch.T:
        raise InputError(
            f"the lags range from {steps.min(initial=0)} to {steps.max(initial=0)} steps",
            expected=f"multiples of {stretch.every} from {stretch.every} to {(stretch.T - 1) * stretch.every}",
        )
    return (steps // stretch.every).astype(int)


def _fit_range(stretch: Selection) -> tuple[int, int]:
    steps = stretch.T * stretch.every
    momentum = stretch.sgd.momentum if stretch.sgd else 0.0
    low = max(1, min(round(10 / (1 - momentum)), steps // 16))
    return low, min(max(steps // 10, 4 * low), steps // 4)


def _msd(stretch: Selection, rows: np.ndarray) -> np.ndarray:
    """MSD at the given lags, summed over weights: one inverse transform for all of them. [m]"""
    length = stretch.T
    size = scipy.fft.next_fast_len(2 * length, real=True)
    power, squares = np.zeros(size // 2 + 1), np.zeros(length)
    for _, slab in stretch.slabs():
        centred = slab - slab.mean(axis=0)  # keeps the difference of large numbers below small
        squares += (centred**2).sum(axis=1)
        power += (np.abs(scipy.fft.rfft(centred, size, axis=0)) ** 2).sum(axis=1)
    products = scipy.fft.irfft(power, size)[:length]  # sum over k of theta_k . theta_{k+m}
    head = np.concatenate([[0.0], np.cumsum(squares)])
    both = head[length - rows] + head[length] - head[rows]  # squares of the first and of the last T - m rows
    return np.maximum(both - 2 * products[rows], 0.0) / (length - rows)


def _sketch(stretch: Selection, seed: int) -> np.ndarray:
    """At most 256 coordinates whose squared distances are those of the weights, up to a few per cent. [T, d]"""
    if stretch.P <= _SKETCH:
        return stretch.theta
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], stretch.P)
    place = rng.integers(0, _SKETCH, stretch.P)
    sums = scipy.sparse.csr_array((signs, (place, np.arange(stretch.P))), shape=(_SKETCH, stretch.P))
    mean = stretch.read(0, 1)[0]
    return np.concatenate([(sums @ (block - mean).T).T for _, block in stretch.blocks()])


def _block_msd(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """MSD over the origins of each block, [b, m]."""
    blocks = []
    for lag in rows:
        squares = ((points[lag:] - points[:-lag]) ** 2).sum(axis=1)
        blocks.append(block_means(squares, min(_BLOCKS, len(squares))))
    if len({len(b) for b in blocks}) > 1:
        raise TooShortError("the longest lag leaves too few origins", remedy="pass shorter lags")
    return np.stack(blocks, axis=1)


def _slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights w such that y @ w is the least-squares slope of y on x."""
    centred = x - x.mean()
    return centred / (centred @ centred)


def _drift_squared(stretches: list[Selection]) -> tuple[float, float]:
    """||u||^2 a step and its standard error, u the mean displacement, from pairs of separate blocks.

    Neighbouring blocks share the noise at their common end, so only pairs further apart count.
    """
    first = stretches[0]
    edges = np.linspace(0, first.T - 1, _BLOCKS + 1).astype(int)
    lengths = np.diff(edges) * first.every
    values = []
    pairs: list[tuple[int, int]] = [(i, j) for i in range(_BLOCKS) for j in range(i + 2, _BLOCKS)]
    products = np.zeros((_BLOCKS, _BLOCKS))
    for stretch in stretches:
        marks = np.stack([stretch.read(edge, edge + 1)[0] for edge in edges])  # [b + 1, P]
        rates = np.diff(marks, axis=0) / lengths[:, None]
        products += rates @ rates.T / len(stretches)
    far = np.array([products[pair] for pair in pairs])
    for left in range(_BLOCKS):  # jackknife over blocks
        values.append(np.mean([p for p, pair in zip(far, pairs) if left not in pair]))
    error = np.sqrt((_BLOCKS - 1) / _BLOCKS * np.sum((values - np.mean(values)) ** 2))
    return float(far.mean()), float(error)


def _msd_along(stretches: list[Selection], rows: np.ndarray, directions: Any) -> np.ndarray:
    """MSD of the coordinates along directions, [m, k]."""
    parts = []
    for stretch in stretches:
        coordinates = project(stretch, directions)
        parts.append(np.stack([((coordinates[m:] - coordinates[:-m]) ** 2).mean(axis=0) for m in rows]))
    return np.mean(parts, axis=0)


def _ceiling(stretches: list[Selection], steps: np.ndarray, msd: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """The noise-only ceiling, where single steps and the momentum are known."""
    known = [_local_displacement(s) for s in stretches]
    if any(value is None for value in known):
        return {}
    local = float(np.mean([value for value in known if value is not None]))
    sgd = stretches[0].sgd
    if sgd is None:
        return {"local_displacement": local}
    ratios = msd / (steps * local * _persistence(sgd))
    # the largest ratio among lags with at least ten separate displacements, so that it is not mere noise
    sound = steps <= max(steps[0], stretches[0].T * stretches[0].every // 10)
    best = int(np.argmax(np.where(sound, ratios, -np.inf)))
    return {
        "local_displacement": local,
        "ceiling_ratios": ratios,
        "ceiling_ratio": float(ratios[best]),
        "ceiling_stderr": float(error[best] * ratios[best] / msd[best]),
        "ceiling_lag": int(steps[best]),
    }


def _persistence(sgd: SGD) -> float:
    """Long-time diffusion of a flat direction over that of single steps: (1 + beta)/(1 - beta) for heavy ball."""
    beta = sgd.momentum
    if not sgd.nesterov:
        return (1 + beta) / (1 - beta)
    return 1 / (1 - beta) ** 2 / ((1 + beta) ** 2 + beta**4 / (1 - beta**2))


def _local_displacement(stretch: Selection) -> float | None:
    """E||theta_k - theta_{k-1}||^2, None when rows skip steps and velocities were not recorded."""
    if stretch.every == 1:
        return float(_msd(stretch, np.array([1]))[0])
    if stretch.velocity is None or stretch.learning_rate is None:
        return None
    return float(np.mean((stretch.velocity**2).sum(axis=1) * stretch.learning_rate**2))
