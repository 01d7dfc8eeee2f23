r"""Noise that follows the spread it causes: the fluctuation at any setting, from that with none and with the run's.

Fluctuations :math:`N_c` without spread and :math:`N_p` with the curvature and noise found at some weights of the run
are known at a setting. Those weights lie at a mean energy :math:`E_p` above the run's mean, the whole run at
:math:`N_{run}`, and curvature and noise change in proportion to that energy, so that among the run's weights
:math:`N_h = N_c + r(N_p-N_c)` with :math:`r=N_{run}/E_p` (which takes out most of the error of looking at few weights).
With x the fluctuation in units of the run's predicted one :math:`N_1`,

.. math:: N = (1-x)N_c + xN_h, \quad x = N/N_1 \;\Rightarrow\; x = \frac{N_c}{N_1+N_c-N_h}.

Where the spread lowers the fluctuation instead, it is by lowering the curvature: near the stability bound
:math:`N\propto 1/(h_{max}-h)` with h linear in x, so that 1/N is what changes in proportion,

.. math:: \frac1N = \frac{1-x}{N_c} + \frac{x}{N_h} \;\Rightarrow\;
    x^2\Big(\frac1{N_h}-\frac1{N_c}\Big) + \frac x{N_c} = \frac1{N_1}.

To first order in the difference both are the same.

The run's own fluctuation, measured over predicted, is kappa. The prediction at the run's setting is scaled by it as far
as it is known: by its mean with 1, weighted by its standard error and by 10%, which the theory is trusted to. Colder
settings are scaled in proportion to x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TRUST", "Closure"]

TRUST = 0.1  # how far off the theory itself may be


@dataclass(frozen=True)
class Closure:
    """``cold`` and ``seen`` are predicted stationary fluctuations at the run's own setting, ``response`` is r.

    ``measured`` is the run's fluctuation and ``measured_stderr`` its standard error.
    """

    cold: float
    seen: float
    response: float
    measured: float
    measured_stderr: float

    def hot(self, cold: float, seen: float) -> float:
        """Fluctuation with the run's spread from that at the weights looked at."""
        if not math.isfinite(cold):
            return seen
        if 0 < seen < cold:
            return 1 / (1 / cold + self.response * (1 / seen - 1 / cold))
        return cold + self.response * (seen - cold)

    @property
    def own(self) -> float:
        """Predicted stationary fluctuation of the run itself."""
        return max(self.hot(self.cold, self.seen), 0.0)

    @property
    def kappa(self) -> float:
        """The run's fluctuation, measured over predicted."""
        return self.measured / self.own if self.own > 0 else math.nan

    @property
    def kappa_stderr(self) -> float:
        """Its standard error, from the run's loss."""
        return self.measured_stderr / self.own if self.own > 0 else math.nan

    @property
    def scale(self) -> tuple[float, float]:
        """What predictions are multiplied by at the run's own spread, and its standard error."""
        return _weighted_with_one(self.kappa, self.kappa_stderr)

    def level(self, cold: float, seen: float) -> float:
        """x: the fluctuation in units of the run's, infinite where the noise feeds itself."""
        hot = self.hot(cold, seen)
        if not self.own > 0:
            return math.inf
        if 0 < hot < cold:  # the curvature without spread may even be beyond the bound, and 1/cold nothing
            steep, slope = 1 / hot - 1 / cold, 1 / cold
            return 2 / self.own / (math.sqrt(slope**2 + 4 * steep / self.own) + slope)
        rest = self.own + cold - hot
        return cold / rest if 0 < rest < math.inf and math.isfinite(cold) else math.inf

    def join(self, cold: float, seen: float) -> tuple[float, float]:
        """Fluctuation between (and beyond) the cold and the hot one, and its level."""
        level = self.level(cold, seen)
        if not math.isfinite(level):
            return math.inf, level
        return (1 + (self.scale[0] - 1) * min(level, 1.0)) * level * self.own, level

    def gain(self, cold: float, seen: float) -> float:
        """Noise energy that the spread adds, per unit of spread: above 1 the mean square diverges."""
        if not (math.isfinite(cold) and math.isfinite(seen)):
            return math.inf
        return (self.hot(cold, seen) - cold) / self.own if self.own > 0 else math.nan


def _weighted_with_one(value: float, stderr: float) -> tuple[float, float]:
    """Mean of a measured ratio and 1, weighted by the inverse squares of its error and of the trust in theory.

    >>> _weighted_with_one(1.2, 0.1)[0].__round__(6)
    1.1
    """
    if not (math.isfinite(value) and math.isfinite(stderr)):
        return 1.0, TRUST
    weight, trust = 1 / max(stderr, 1e-9) ** 2, 1 / TRUST**2
    return max((weight * value + trust) / (weight + trust), 0.05), 1 / math.sqrt(weight + trust)
