r"""From modes to the loss at other hyperparameters: noise that follows the spread it causes, and where the mean goes.

The excess of the objective :math:`F = L + \frac\lambda2\|\theta\|^2` over its value at the bottom has two parts.

**Fluctuations.** With fixed curvature and noise, :math:`N=\frac12\sum_l(h_l+\lambda)E\theta_l^2`, the moments exact
for the sampling scheme and for T steps from the run's last weights (:mod:`.moments`). Curvature and noise are known
where the noise-free flow leads (giving :math:`N_c`) and among the weights of the run (:math:`N_h`, whose own stationary
value is :math:`N_1`). In between, and to first order beyond, they change in proportion to the spread: with
x the fluctuation in units of the run's,

.. math:: N = (1-x)N_c + xN_h, \quad x = N/N_1 \;\Rightarrow\; x = \frac{N_c}{N_1+N_c-N_h},

which diverges when the noise that the spread causes feeds itself. The run's own fluctuation, measured over predicted,
is kappa. The prediction at the run's setting is scaled by kappa as far as it is known: its mean with 1, weighted by
its standard error and by 10%, which the theory is trusted to. Colder settings are scaled in proportion to x.

**The mean.** Without noise the mean follows the gradient flow (:mod:`.descent`) for a time
:math:`\tau=\eta T/(1-\beta)`; the run's noise holds it at the run's mean instead. Mode by mode, a mean that starts at
:math:`d` and is held at :math:`x\delta` has energy :math:`\frac h2[e^{-h\tau}d+(1-e^{-h\tau})x\delta]^2`; summed over
modes this is expressed by the loss p along the flow at :math:`\tau`, :math:`\tau/2` and 0. Hotter than the run (x > 1)
the held energy grows in proportion to x.

Derived here; checked against linear regression, where all of it is exact, and against training (``thermograd
validate``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnstableError
from ..hyperparameters import SGD
from ..theory import sampling as schemes
from ..theory.arrays import Array
from ..theory.stability import largest_stable_curvature
from .descent import Descent
from .modes import Modes
from .moments import block_moments, epoch_batches
from .standing import Standing

__all__ = ["Excess", "Forecast"]

WINDOW = 0.3  # last part of the steps over which the loss is averaged
_TRUST = 0.1  # how far off the theory itself may be
_FLOOR = 1e-6  # curvature, over the largest, below which a mode has no stationary spread of its own


@dataclass(frozen=True)
class Excess:
    """Excess of the objective over the bottom, its parts, and what they rest on.

    ``fluctuation`` and ``mean`` add up to ``value``; ``stderr`` holds statistical errors and what the closure is known
    not to know; ``level`` is x.
    """

    value: float
    stderr: float
    fluctuation: float
    mean: float
    level: float


@dataclass
class Forecast:
    """What was measured of a run, ready to be asked about other settings.

    ``flows`` maps a weight decay to the noise-free flows from the run's last weights and from its mean.
    """

    standing: Standing
    cold: Modes
    hot: Modes
    flows: dict[float, tuple[Descent, Descent]]
    steps: int
    fits: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cold_bins, self.hot_bins = self.cold.binned(), self.hot.binned()
        sgd, run = self.standing.sgd, self.standing
        mean_flow = self._held = self.flows[sgd.weight_decay][1]
        self.own = self._stationary(sgd, self.hot_bins)
        above = max(run.loss - mean_flow.loss[0], 0.0)
        unresolved = self._unresolved(sgd) if math.isfinite(self.own) else 0.0
        self.measured = above + unresolved  # fluctuation of the run about its mean
        self.kappa = self.measured / self.own if self.own > 0 else math.nan
        self.kappa_stderr = run.loss_stderr / self.own if self.own > 0 else math.nan
        self.scale, self.scale_stderr = _weighted_with_one(self.kappa, self.kappa_stderr)
        static = mean_flow.loss[0] - mean_flow.loss[-1]
        self.static_share = max(static - unresolved, 0.0) / static if static > 0 else 0.0

    # ------------------------------------------------------------------ the bottom and the mean

    @property
    def bottom(self) -> float:
        """Objective that the noise-free flow reaches from the run's last weights in the time of ``steps`` steps."""
        sgd = self.standing.sgd
        return self.flows[sgd.weight_decay][0].at(self.steps * sgd.effective_lr)

    @property
    def top(self) -> float:
        """Largest curvature among the weights of the run, without weight decay."""
        return float(max(self.hot.curvature.max(), self.cold.curvature.max()))

    def bottom_for(self, sgd: SGD) -> float:
        """The bottom under another weight decay: after the same time."""
        return self.flows[sgd.weight_decay][0].at(self.steps * self.standing.sgd.effective_lr)

    def mean_energy(self, sgd: SGD, time: float, level: float) -> float:
        """Excess of the objective at the mean of the weights after some time."""
        here = self.flows[sgd.weight_decay][0]
        mean = self._held  # what noise holds is taken from the run, whatever the weight decay
        left = here.at(time) - self.bottom_for(sgd)
        end, share = mean.loss[-1], self.static_share
        full, half, late = ((mean.at(t) - end) * share for t in (0.0, time / 2, time))
        bounded = min(level, 1.0)
        ratio = math.sqrt(max(left, 0.0) / late) if late > 0 else 0.0
        ratio = ratio if ratio < 3 else 0.0  # the last weights lie elsewhere than the mean
        held = 2 * bounded * ratio * (half - late) + bounded**2 * (full - 2 * half + late)
        return left + held * max(level, 1.0)

    # ------------------------------------------------------------------ fluctuations

    def _curvature(self, sgd: SGD, modes: Modes) -> Array:
        return np.maximum(modes.curvature, -sgd.weight_decay)

    def energies(self, sgd: SGD, modes: Modes) -> Array:
        """What turns mean squares into loss, twice over: curvature with weight decay, none below zero, [n]."""
        return np.maximum(modes.energy + sgd.weight_decay, 0.0)

    def variances(self, sgd: SGD, modes: Modes) -> Array:
        """Stationary variance of the weights along each mode, [n]."""
        if len(epoch_batches(sgd, drop_last=self.standing.drop_last)) == 1 and sgd.sampling != "replacement":
            return np.zeros(len(modes.curvature))
        floor = _FLOOR * self.top - sgd.weight_decay
        curvature, factor = np.maximum(modes.curvature, floor), sgd.minibatch_factor
        white = sgd.replace(sampling="replacement")
        return schemes.weight_variance(
            sgd, curvature, modes.coloured * factor, drop_last=self.standing.drop_last
        ) + schemes.weight_variance(white, curvature, modes.white * factor)

    def _stationary(self, sgd: SGD, modes: Modes) -> float:
        try:
            return 0.5 * float(self.energies(sgd, modes) @ self.variances(sgd, modes))
        except UnstableError:
            return math.inf

    def curve(self, sgd: SGD, modes: Modes, edges: NDArray[np.int64]) -> Array:
        """Fluctuation averaged over blocks of steps from the run's last weights on, [m]."""
        return 0.5 * self.moments(sgd, modes, edges) @ self.energies(sgd, modes)

    def moments(self, sgd: SGD, modes: Modes, edges: NDArray[np.int64], position: Array | float = 0.0) -> Array:
        """Mean square of the position of each mode over blocks of steps, from a given offset at rest, [m, n]."""
        if sgd.sampling == "shuffle-once":  # the average over orders, once it is stationary
            return np.broadcast_to(self.variances(sgd, modes), (len(edges) - 1, len(modes.curvature)))
        found = block_moments(
            sgd, self._curvature(sgd, modes), modes.coloured, edges, white=modes.white,
            position=position, drop_last=self.standing.drop_last,
        )  # fmt: skip
        return found.position

    def _unresolved(self, sgd: SGD) -> float:
        """What the mean of the run's rows still fluctuates by: fluctuation that its loss counts as static."""
        modes, rows = self.hot_bins, self.standing.rows
        floor = _FLOOR * self.top - sgd.weight_decay
        curvature, factor = np.maximum(modes.curvature, floor), sgd.minibatch_factor
        white = sgd.replace(sampling="replacement")
        within = schemes.weight_variance_window(
            sgd, curvature, modes.coloured * factor, rows
        ) + schemes.weight_variance_window(white, curvature, modes.white * factor, rows)
        return 0.5 * float(self.energies(sgd, modes) @ np.maximum(self.variances(sgd, modes) - within, 0))

    def level(self, cold: float, hot: float) -> float:
        """x: the fluctuation in units of the run's, infinite where the noise feeds itself."""
        rest = self.own + cold - hot
        return cold / rest if 0 < rest < math.inf and math.isfinite(cold) else math.inf

    def join(self, cold: float, hot: float) -> tuple[float, float]:
        """Fluctuation between (and beyond) the cold and the hot one, and its level."""
        level = self.level(cold, hot)
        if not math.isfinite(level):
            return math.inf, level
        return (1 + (self.scale - 1) * min(level, 1.0)) * ((1 - level) * cold + level * hot), level

    def excess(self, sgd: SGD, steps: int) -> Excess:
        """Excess averaged over the last part of so many steps from the run's last weights on."""
        edges = np.array([steps - max(1, round(WINDOW * steps)), steps])
        cold, hot = (float(self.curve(sgd, modes, edges)[0]) for modes in (self.cold_bins, self.hot_bins))
        fluctuation, level = self.join(cold, hot)
        if not math.isfinite(level):
            return Excess(math.inf, math.inf, math.inf, math.nan, level)
        mean = self.mean_energy(sgd, (1 - WINDOW / 2) * steps * sgd.effective_lr, level)
        error = self._error(sgd, edges, fluctuation, cold, hot, level, mean)
        return Excess(fluctuation + mean, error, fluctuation, mean, level)

    def _error(
        self, sgd: SGD, edges: NDArray[np.int64], fluctuation: float, cold: float, hot: float, level: float, mean: float
    ) -> float:
        """Statistical errors of the run's loss and of random probes; half of what the closure adds beyond the run."""
        near = min(level, 1.0)
        loss = self.scale_stderr * near * fluctuation / self.scale
        probes = self._probe_error(sgd, edges)
        beyond = abs(level - near) * abs(hot - cold) / 2
        misfit = abs(self.scale - 1) * fluctuation / 2
        return math.hypot(loss, probes, beyond, misfit, mean / 4)

    def _probe_error(self, sgd: SGD, edges: NDArray[np.int64]) -> float:
        modes = self.cold_bins
        if modes.probes < 2:
            return 0.0
        each = 0.5 * self.moments(sgd, modes, edges)[0] * self.energies(sgd, modes)
        sums = np.array([each[modes.probe == p].sum() * modes.probes for p in range(modes.probes)])
        return float(sums.std(ddof=1) / math.sqrt(modes.probes))

    def stationary_excess(self, sgd: SGD) -> float:
        """Excess when all modes have equilibrated and the mean is held by the noise alone: the loss floor."""
        cold, hot = (self._stationary(sgd, modes) for modes in (self.cold_bins, self.hot_bins))
        fluctuation, level = self.join(cold, hot)
        if not math.isfinite(level):
            return math.inf
        mean = self._held
        held = (mean.loss[0] - mean.loss[-1]) * self.static_share
        return fluctuation + held * min(level, 1.0) ** 2 * max(level, 1.0)

    def noise_gain(self, sgd: SGD) -> float:
        """Noise energy that the spread adds, per unit of spread: above 1 the mean square diverges."""
        cold, hot = (self._stationary(sgd, modes) for modes in (self.cold_bins, self.hot_bins))
        if not (math.isfinite(cold) and math.isfinite(hot)):
            return math.inf
        return (hot - cold) / self.own if self.own > 0 else math.nan

    def margin(self, sgd: SGD) -> float:
        """Largest stable curvature over the largest curvature: below 1 the mean diverges."""
        bound = largest_stable_curvature(sgd)
        return bound / self.top if self.top > 0 else math.inf


def _weighted_with_one(value: float, stderr: float) -> tuple[float, float]:
    """Mean of a measured ratio and 1, weighted by the inverse squares of its error and of the trust in theory.

    >>> _weighted_with_one(1.2, 0.1)[0].__round__(6)
    1.1
    """
    if not (math.isfinite(value) and math.isfinite(stderr)):
        return 1.0, _TRUST
    weight, trust = 1 / max(stderr, 1e-9) ** 2, 1 / _TRUST**2
    return max((weight * value + trust) / (weight + trust), 0.05), 1 / math.sqrt(weight + trust)
