r"""How gradient noise at one point remembers itself from one minibatch to later ones, by the sampling scheme."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..errors import InputError, ThermogradWarning
from ..hyperparameters import Sampling
from ..landscape.displaced import as_directions
from ..measurement import Measurement, new_axes, quantity
from ..problem import Problem
from ..progress import track
from .gradients import projections

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EpochAutocovariance", "epoch_autocovariance"]


@dataclass(frozen=True)
class EpochAutocovariance(Measurement):
    """Autocovariance of minibatch gradient noise over steps; see :func:`epoch_autocovariance`."""

    lags: np.ndarray = quantity("lags", units="steps", long_name="lag")
    autocovariance: np.ndarray = quantity("lags", "direction", units="loss^2", long_name="noise autocovariance")
    stderr: np.ndarray = quantity("lags", "direction", units="loss^2", long_name="standard error over runs of epochs")
    expected: np.ndarray = quantity("lags", "direction", units="loss^2", long_name="in closed form from the samples")
    epoch_sum: np.ndarray = quantity("direction", units="loss^2", long_name="mean square of the epoch's noise sum")
    batch_size: int = quantity(units="samples", long_name="batch size")
    steps_per_epoch: int = quantity(units="steps", long_name="minibatches in an epoch")
    sampling: str = "reshuffle"

    _primary = "autocovariance"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Autocovariance against lag relative to lag zero, the closed form as a line."""
        ax = new_axes(ax)
        for i in range(min(5, self.autocovariance.shape[1])):
            scale = self.autocovariance[0, i] or 1.0
            points = ax.errorbar(
                self.lags, self.autocovariance[:, i] / scale, yerr=self.stderr[:, i] / scale, fmt="o", ms=3
            )
            ax.plot(self.lags, self.expected[:, i] / scale, color=points[0].get_color())
        ax.set(xlabel="lag (steps)", ylabel="noise autocovariance, relative")
        return ax


def epoch_autocovariance(
    problem: Problem,
    directions: Any,
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    epochs: int = 400,
    lags: int | None = None,
    theta: Any = None,
    index: Any = None,
    seed: int = 0,
) -> EpochAutocovariance:
    r"""Autocovariance of the minibatch gradient's noise along directions, with the weights held fixed.

    .. math::
        \Gamma_i(h) = \langle \xi_{t,i}\, \xi_{t+h,i} \rangle_t, \qquad
        \xi_t = \frac1B \sum_{j \in \mathrm{batch}_t} (g_j - \bar g)

    Sampled with replacement the noise is white. An epoch without replacement uses every sample once, so that its noise
    sums to zero and minibatches of the same epoch are anticorrelated (Kuhn & Rosenow 2023, section 3). With M = N/B
    steps an epoch, variance :math:`\Gamma(0) = \frac{C_{ii}}{B} \frac{N-B}{N-1}` and lags 0 < h < M,

    .. math:: \Gamma(h) = -\frac{M-h}{M}\, \frac{C_{ii}}{N-1} \quad \text{(reshuffled)}, \qquad \Gamma(h) = 0
        \quad \text{(replacement)}

    while data shuffled once come back exactly, :math:`\Gamma(h + M) = \Gamma(h)`. The samples' gradients are computed
    once; the minibatches are then drawn from them, M to an epoch (a short last batch is left out).

    Args:
        problem: the problem.
        directions: ``[P, k]``, one direction a column (or ``[P]``, or eigenpairs).
        batch_size: B; default: that of the DataLoader the problem was built from.
        sampling: "replacement", "reshuffle" or "shuffle-once"; default: that of the DataLoader, or "reshuffle".
        epochs: epochs drawn for the measurement.
        lags: largest lag; default 2 M.
        theta: weights ``[P]``; default: where the model stands now.
        index: the samples; default all N.
        seed: of the minibatches.

    Returns:
        Measured values with standard errors from pieces of the series, and the closed form beside them. For
        "shuffle-once" the closed form averages over orders, and the measurement over twenty of them.

    Raises:
        InputError: sizes or sampling out of range.

    >>> import torch
    >>> data = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    >>> problem = Problem.from_function(lambda w, a: (a * w).sum(), torch.ones(1), data)
    >>> result = epoch_autocovariance(problem, torch.ones(1), batch_size=2)
    >>> result.steps_per_epoch, float(result.expected[1, 0])
    (2, -0.166...)
    """
    columns = as_directions(problem, directions)
    slopes = projections(problem, columns, theta, index).double().cpu().numpy()  # [N, k]
    slopes = slopes - slopes.mean(0)
    samples = len(slopes)
    size = problem.batch_size if batch_size is None else batch_size
    if size is None or not 1 <= int(size) <= samples // 2:
        raise InputError(f"batch_size is {size}", expected=f"1 to {samples // 2}, so that an epoch has two steps")
    scheme = sampling or problem.sampling or "reshuffle"
    if scheme not in get_args(Sampling):
        raise InputError(f"sampling is {scheme!r}", expected=f"one of {', '.join(get_args(Sampling))}")
    steps = samples // int(size)  # M
    last = 2 * steps if lags is None else int(lags)
    pieces = 20
    each = max(int(epochs) // pieces, last // steps + 2)
    if epochs < 1 or last < 1:
        raise InputError(f"epochs is {epochs} and lags {last}", expected="both at least 1")
    random = np.random.default_rng(seed)
    found, sums = [], []
    try:
        for _ in track(range(pieces), "noise over epochs", bytes=8 * 3 * each * steps * slopes.shape[1]):
            noise = _series(slopes, int(size), steps, each, scheme, random)  # [T, k]
            found.append([(noise[: len(noise) - h] * noise[h:]).mean(0) for h in range(last + 1)])
            sums.append((noise.reshape(each, steps, -1).sum(1) ** 2).mean(0))
    except KeyboardInterrupt:
        if len(sums) < 2:
            raise
        warnings.warn(f"interrupted: {len(sums)} of {pieces} runs of epochs are used", ThermogradWarning, stacklevel=2)
    pieces, found = len(sums), found[: len(sums)]
    values = np.array(found)  # [pieces, lags + 1, k]
    variance = (slopes**2).mean(0)
    return EpochAutocovariance(
        lags=np.arange(last + 1),
        autocovariance=values.mean(0),
        stderr=values.std(0, ddof=1) / np.sqrt(pieces),
        expected=_expected(variance, samples, int(size), steps, last, scheme),
        epoch_sum=np.mean(sums, axis=0),
        batch_size=int(size),
        steps_per_epoch=steps,
        sampling=scheme,
    )


def _series(
    slopes: np.ndarray, size: int, steps: int, epochs: int, scheme: str, random: np.random.Generator
) -> np.ndarray:
    """Noise of successive minibatches, [epochs * steps, k]."""
    samples, used = len(slopes), steps * size
    rows = []
    order = random.permutation(samples)
    for _ in range(epochs):
        if scheme == "replacement":
            order = random.integers(samples, size=used)
        elif scheme == "reshuffle":
            order = random.permutation(samples)
        rows.append(slopes[order[:used]].reshape(steps, size, -1).mean(1))
    return np.concatenate(rows)


def _expected(variance: np.ndarray, samples: int, size: int, steps: int, last: int, scheme: str) -> np.ndarray:
    """The closed form, [last + 1, k]; mean over all orders of the data."""
    lags = np.arange(last + 1)
    if scheme == "replacement":
        shape = np.where(lags == 0, 1 / size, 0.0)
    else:
        same, other = (samples - size) / (samples - 1) / size, -1 / (samples - 1)
        if scheme == "reshuffle":
            shape = np.where(lags == 0, same, other * np.maximum(steps - lags, 0) / steps)
        else:
            shape = np.where(lags % steps == 0, same, other)
    return shape[:, None] * variance
