r"""From modes to the loss at other hyperparameters: noise that follows the spread it causes, and where the mean goes.

The excess of the objective :math:`F = L + \frac\lambda2\|\theta\|^2` over its value at the bottom has two parts.

**Fluctuations.** With fixed curvature and noise, :math:`N=\frac12\sum_l(h_l+\lambda)E\theta_l^2`, the moments exact
for the sampling scheme and for T steps from the run's last weights (:mod:`.moments`). Curvature and noise are known
where the noise-free flow leads and at weights of the run; in between, and to first order beyond, they change in
proportion to the spread (:mod:`.closure`). What the spread adds to the noise is correlated over the epoch as far as
the weights stand still meanwhile (:mod:`.memory`).

**The mean.** Without noise the mean follows the gradient flow (:mod:`.descent`) for a time
:math:`\tau=\eta T/(1-\beta)`; the run's noise holds it at the run's mean instead. Mode by mode, a mean that starts at
:math:`d` and is held at :math:`x\delta` has energy :math:`\frac h2[e^{-h\tau}d+(1-e^{-h\tau})x\delta]^2`; summed over
modes this is expressed by the loss p along the flow at :math:`\tau`, :math:`\tau/2` and 0. Hotter than the run (x > 1)
the held energy grows in proportion to x.

Derived here; checked against linear regression, where all of it is exact, and against training (``thermograd
validate``).
"""

from __future__ import annotations

import dataclasses
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
from .closure import TRUST, Closure
from .descent import Descent, flow_time
from .memory import repeated_share
from .modes import Modes
from .moments import block_moments, epoch_batches, epoch_profile
from .standing import Standing

__all__ = ["Excess", "Forecast"]

WINDOW = 0.3  # last part of the steps over which the loss is averaged
_ADRIFT = 0.5  # change of the loss across the record, over its excess, above which descent and not noise is seen
_RESPONSES = (1 / 3, 3.0)  # what the energy of the weights looked at may be off by
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
        self._shares: dict[SGD, float] = {}
        self.cold_bins, self.hot_bins = self.cold.binned(), self.hot.binned()
        sgd, run = self.standing.sgd, self.standing
        mean_flow = self._held = self.flows[sgd.weight_decay][1]
        cold, seen = (self._stationary(sgd, modes) for modes in (self.cold_bins, self.hot_bins))
        unresolved = self._unresolved(sgd) if math.isfinite(seen) else 0.0
        self.measured = max(run.loss - mean_flow.loss[0], 0.0) + unresolved  # fluctuation of the run about its mean
        self.unseen = unresolved / self.measured if self.measured > 0 else 0.0  # share that is slower than the record
        there = float(run.point_losses.mean()) - mean_flow.loss[0] + unresolved  # and at the weights looked at
        response = float(np.clip(self.measured / there, *_RESPONSES)) if there > 0 else 1.0
        self.adrift = run.drifts(mean_flow.loss[0] - self.bottom + self.measured, _ADRIFT)
        if self.adrift:  # what the record shows is the way down, not what noise does
            self.closure = Closure(cold, seen, 0.0, self.measured, math.inf)
        else:
            self.closure = Closure(cold, seen, response, self.measured, run.loss_stderr)
        self.kappa, self.kappa_stderr = self.closure.kappa, self.closure.kappa_stderr
        static = mean_flow.loss[0] - mean_flow.loss[-1]
        held = static > 0 and not self.adrift
        self.static_share = max(static - unresolved, 0.0) / static if held else 0.0

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
        return self._spread(sgd, modes, *self.noise(sgd, modes))

    def _spread(self, sgd: SGD, modes: Modes, coloured: Array, white: Array) -> Array:
        """Stationary variances under noise that is correlated over the epoch, and noise that is not, [n]."""
        if len(epoch_batches(sgd, drop_last=self.standing.drop_last)) == 1 and sgd.sampling != "replacement":
            return np.zeros(len(modes.curvature))
        curvature, factor = self._bounded(sgd, modes), sgd.minibatch_factor
        anew = sgd.replace(sampling="replacement")
        return schemes.weight_variance(
            sgd, curvature, coloured * factor, drop_last=self.standing.drop_last
        ) + schemes.weight_variance(anew, curvature, white * factor)

    def _bounded(self, sgd: SGD, modes: Modes) -> Array:
        """Curvatures, none so small that its mode has no stationary spread, [n]."""
        return np.maximum(modes.curvature, _FLOOR * self.top - sgd.weight_decay)

    def noise(self, sgd: SGD, modes: Modes) -> tuple[Array, Array]:
        """Variance over samples that stays the same over an epoch, and that is drawn anew each step, [n] each."""
        share = self.repeated(sgd, modes)
        return modes.coloured + share * modes.white, (1 - share) * modes.white

    def repeated(self, sgd: SGD, modes: Modes) -> float:
        """Share of the spread's noise that stays the same over an epoch (:mod:`.memory`)."""
        if not modes.white.any():
            return 0.0
        modes = self.hot_bins  # all that has such noise
        if sgd not in self._shares:
            try:
                self._shares[sgd] = repeated_share(
                    sgd, self._bounded(sgd, modes), self.energies(sgd, modes), modes.coloured, modes.white,
                    len(epoch_batches(sgd, drop_last=self.standing.drop_last)), drop_last=self.standing.drop_last,
                )  # fmt: skip
            except UnstableError:
                self._shares[sgd] = 0.0
        return self._shares[sgd]

    def _stationary(self, sgd: SGD, modes: Modes) -> float:
        try:
            return 0.5 * float(self.energies(sgd, modes) @ self.variances(sgd, modes))
        except UnstableError:
            return math.inf

    def curve(self, sgd: SGD, modes: Modes, edges: NDArray[np.int64]) -> Array:
        """Fluctuation averaged over blocks of steps from the run's last weights on, [m]."""
        with np.errstate(invalid="ignore"):
            found = 0.5 * self.moments(sgd, modes, edges) @ self.energies(sgd, modes)
        return np.where(np.isnan(found), np.inf, found)  # infinite in a mode without energy

    def moments(self, sgd: SGD, modes: Modes, edges: NDArray[np.int64], position: Array | float = 0.0) -> Array:
        """Mean square of the position of each mode over blocks of steps, from a given offset at rest, [m, n]."""
        if sgd.sampling == "shuffle-once":  # the average over orders, once it is stationary
            return np.broadcast_to(self.variances(sgd, modes), (len(edges) - 1, len(modes.curvature)))
        coloured, white = self.noise(sgd, modes)
        found = block_moments(
            sgd, self._curvature(sgd, modes), coloured, edges, white=white,
            position=position, drop_last=self.standing.drop_last,
        )  # fmt: skip
        return found.position

    def phases(self, sgd: SGD, modes: Modes) -> Array:
        """Stationary mean square of each mode after every step of an epoch, [batches, n]."""
        batches = epoch_batches(sgd, drop_last=self.standing.drop_last)
        if sgd.sampling == "shuffle-once" or (len(batches) == 1 and sgd.sampling != "replacement"):
            return self.variances(sgd, modes)[None]  # averages over orders, or no noise at all
        coloured, white = self.noise(sgd, modes)
        return epoch_profile(
            sgd, self._bounded(sgd, modes), coloured, white=white, drop_last=self.standing.drop_last
        )  # fmt: skip

    def _unresolved(self, sgd: SGD) -> float:
        """What the mean of the run's rows still fluctuates by: fluctuation that its loss counts as static."""
        modes, rows = self.hot_bins, self.standing.rows
        curvature, factor = self._bounded(sgd, modes), sgd.minibatch_factor
        coloured, white = self.noise(sgd, modes)
        anew = sgd.replace(sampling="replacement")
        within = schemes.weight_variance_window(
            sgd, curvature, coloured * factor, rows, drop_last=self.standing.drop_last
        ) + schemes.weight_variance_window(anew, curvature, white * factor, rows)
        return 0.5 * float(self.energies(sgd, modes) @ np.maximum(self.variances(sgd, modes) - within, 0))

    def excess(self, sgd: SGD, steps: int) -> Excess:
        """Excess averaged over the last part of so many steps from the run's last weights on."""
        edges = np.array([steps - max(1, round(WINDOW * steps)), steps])
        cold, hot = (float(self.curve(sgd, modes, edges)[0]) for modes in (self.cold_bins, self.hot_bins))
        fluctuation, level = self.closure.join(cold, hot)
        if not math.isfinite(level):
            return Excess(math.inf, math.inf, math.inf, math.nan, level)
        time = flow_time(sgd, (1 - WINDOW / 2) * steps, self.standing.sgd)
        mean = self.mean_energy(sgd, time, level)
        modes = self.cold_bins if math.isfinite(cold) else self.hot_bins
        error = self._error(sgd, self.moments(sgd, modes, edges)[0], modes, fluctuation, cold, hot, level)
        return Excess(fluctuation + mean, math.hypot(error, mean / 4), fluctuation, mean, level)

    def _error(
        self, sgd: SGD, squares: Array, modes: Modes, fluctuation: float, cold: float, hot: float, level: float
    ) -> float:
        """Statistical errors of the run's loss, of its response and of random probes, and the trust in the theory.

        Where the fluctuation is far below the run's, that is 10%; at the run's own, as far as its loss does not say it.
        Half of what the closure adds beyond the run and half the misfit of kappa count as errors, and a quarter of the
        range between noise of the spread that is, and is not, the same over an epoch.
        """
        closure, near = self.closure, min(level, 1.0)
        scale, stderr = closure.scale
        loss = fluctuation * math.hypot(near * stderr / scale, (1 - near) * TRUST)
        response = abs(self._with_more_response(sgd, cold, hot) - fluctuation)
        probes = self._probe_error(sgd, squares, modes)
        beyond = abs(level - near) * abs(closure.hot(cold, hot) - cold) / 2 if hot > cold else 0.0
        if hot < cold:  # between the curvatures: half of what it differs by from that with the run's curvature
            beyond = abs(fluctuation - scale * hot) / 2
        misfit = abs(scale - 1) * fluctuation / 2
        memory = level * closure.response * self._memory_range(sgd) / 4
        return math.hypot(loss, response, probes, beyond, misfit, memory)

    def _with_more_response(self, sgd: SGD, cold: float, hot: float) -> float:
        """Fluctuation if the spread added more noise, by the standard error of what was found that it adds."""
        modes, off = self.hot_bins, self.hot.white_error
        share, noise = self.repeated(sgd, modes), modes.coloured + modes.white
        at, own = (
            0.5 * off * float(self.energies(s, modes) @ self._spread(s, modes, share * noise, (1 - share) * noise))
            for s in (sgd, self.standing.sgd)
        )
        other = dataclasses.replace(self.closure, seen=self.closure.seen + own)
        found = other.join(cold, hot + at)[0]
        return found if math.isfinite(found) else 2 * self.closure.join(cold, hot)[0]

    def _memory_range(self, sgd: SGD) -> float:
        """Stationary fluctuation with the spread's noise drawn anew each step, less that with it fixed for an epoch."""
        modes = self.hot_bins
        ends = [dataclasses.replace(modes, coloured=modes.coloured + s * modes.white, white=(1 - s) * modes.white)
                for s in (0.0, 1.0)]  # fmt: skip
        if sgd.sampling == "replacement" or self.repeated(sgd, modes) == 0:
            return 0.0
        new, fixed = (0.5 * float(self.energies(sgd, m) @ self._spread(sgd, m, m.coloured, m.white)) for m in ends)
        return abs(new - fixed)

    def _probe_error(self, sgd: SGD, squares: Array, modes: Modes) -> float:
        if modes.probes < 2:
            return 0.0
        each = 0.5 * squares * self.energies(sgd, modes)
        sums = np.array([each[modes.probe == p].sum() * modes.probes for p in range(modes.probes)])
        return float(sums.std(ddof=1) / math.sqrt(modes.probes))

    def stationary_excess(self, sgd: SGD) -> float:
        """Excess when all modes have equilibrated and the mean is held by the noise alone: the loss floor."""
        cold, hot = (self._stationary(sgd, modes) for modes in (self.cold_bins, self.hot_bins))
        fluctuation, level = self.closure.join(cold, hot)
        return fluctuation + self._held_up(level) if math.isfinite(level) else math.inf

    def stationary_errors(self, sgd: SGD) -> tuple[float, float]:
        """Standard error of the loss floor, and of the stationary fluctuation over its size."""
        cold, hot = (self._stationary(sgd, modes) for modes in (self.cold_bins, self.hot_bins))
        fluctuation, level = self.closure.join(cold, hot)
        if not math.isfinite(level):
            return math.inf, math.inf
        modes = self.cold_bins if math.isfinite(cold) else self.hot_bins
        error = self._error(sgd, self.variances(sgd, modes), modes, fluctuation, cold, hot, level)
        share = error / fluctuation if fluctuation > 0 else 0.0
        return math.hypot(error, self._held_up(level) / 4), share

    def _held_up(self, level: float) -> float:
        """Excess at the mean of the weights where the noise alone holds it."""
        mean = self._held
        return (mean.loss[0] - mean.loss[-1]) * self.static_share * min(level, 1.0) ** 2 * max(level, 1.0)

    def noise_gain(self, sgd: SGD) -> float:
        """Noise energy that the spread adds, per unit of spread: above 1 the mean square diverges."""
        return self.closure.gain(*(self._stationary(sgd, modes) for modes in (self.cold_bins, self.hot_bins)))

    def holds(self, sgd: SGD) -> bool:
        """Whether the curvature among the weights of the run is below the stability bound."""
        return largest_stable_curvature(sgd) > float(self.hot.curvature.max())

    def margin(self, sgd: SGD) -> float:
        """Largest stable curvature over the largest curvature: below 1 the mean diverges."""
        bound = largest_stable_curvature(sgd)
        return bound / self.top if self.top > 0 else math.inf
