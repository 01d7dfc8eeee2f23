"""Given a budget of steps: how long the present learning rate still buys anything, and when to lower it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..measurement import Measurement, new_axes, quantity
from ..theory.arrays import Array
from .forecast import Forecast
from .moments import epoch_batches
from .predicting import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..hyperparameters import SGD

__all__ = ["Advice", "advise"]

_CHOICES = 21
_END = 0.05  # last part of the budget over which the final loss is averaged


@dataclass(frozen=True)
class Advice(Measurement):
    """Predicted final excess for each step at which the learning rate could be lowered once."""

    decay_step: Array = quantity(
        "decay_step", units="steps", long_name="steps at the present rate before it is lowered"
    )
    excess: Array = quantity("decay_step", units="loss", long_name="predicted excess at the end of the budget")
    best_step: int = quantity(units="steps", long_name="when lowering the rate leaves the smallest excess")
    best_excess: float = quantity(units="loss", long_name="the excess then")
    constant_excess: float = quantity(units="loss", long_name="the excess without lowering the rate")
    equilibration_steps: float = quantity(
        units="steps", long_name="steps after which the present rate buys nothing more: within 10% of the last value"
    )
    budget: int = quantity(units="steps", long_name="steps in all")
    factor: float = quantity(long_name="what the rate is multiplied by")
    _primary = "excess"

    def __str__(self) -> str:
        rest = (
            f"further steps at this learning rate buy nothing after {self.equilibration_steps:.0f} steps"
            if self.equilibration_steps < self.budget
            else "the loss is not yet equilibrated at the end of the budget"
        )
        return (
            f"Of {self.budget} steps: {rest}. Multiplying the rate by {self.factor:g} at step {self.best_step} leaves "
            f"an excess of {self.best_excess:.3g} over the bottom, never lowering it {self.constant_excess:.3g}."
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The final excess against the step of the decay."""
        axes = new_axes(ax)
        axes.semilogy(self.decay_step, self.excess, "o-", ms=3)
        axes.axhline(self.constant_excess, ls="--", lw=1, label="never lowered")
        axes.axvline(self.best_step, lw=1, color="gray")
        axes.set(xlabel="steps before the rate is lowered", ylabel="excess loss at the end")
        axes.legend()
        return axes


def advise(measured: Predictions, budget: int, *, sgd: SGD | None = None, factor: float = 0.1) -> Advice:
    """When to lower the learning rate, of a budget of steps taken on from the run's last weights.

    The second moments of each mode go on through the change of the rate exactly; the mean follows the noise-free flow.
    Curvature and noise are those among the weights of the run, so that the advice is for rates not far from it.

    Args:
        measured: the measured run, from :func:`~thermograd.prediction.predictions`.
        budget: steps in all.
        sgd: the hyperparameters before the change; default the run's own.
        factor: what the learning rate is multiplied by.

    Raises:
        InputError: a budget of less than five epochs or 100 steps, or a factor outside (0, 1).

    >>> import tempfile, torch, thermograd as tg
    >>> _, weights = torch.manual_seed(0), torch.zeros(2, requires_grad=True)
    >>> points, folder = torch.randn(64, 2), tempfile.mkdtemp()
    >>> problem = tg.Problem.from_function(lambda w, a: (w - a).square().sum(), weights, points)
    >>> optimizer = torch.optim.SGD([weights], lr=0.05)
    >>> with tg.Recorder(folder, problem, optimizer, batch_size=8, sampling="replacement"):
    ...     for _ in range(400):
    ...         optimizer.zero_grad()
    ...         (weights - points[torch.randint(64, (8,))]).square().sum(1).mean().backward()
    ...         _ = optimizer.step()
    >>> advice = advise(tg.prediction.predictions(folder, problem, steps=200), 400)
    >>> 0 <= advice.best_step < 400, bool(advice.best_excess < advice.constant_excess)
    (True, True)
    """
    own, drop_last = sgd or measured.sgd, measured.forecast.standing.drop_last
    epoch = len(epoch_batches(own, drop_last=drop_last))
    least = max(100, 5 * epoch)
    if not least <= budget < math.inf or int(budget) != budget:
        raise InputError(f"budget is {budget}", expected=f"a whole number of steps, at least {least}")
    if not 0 < factor < 1:
        raise InputError(f"factor is {factor}", expected="a number between 0 and 1")
    forecast = measured.forecast
    low = own.replace(lr=own.lr * factor)
    choices = np.unique((np.linspace(0, 1 - 2 * _END, _CHOICES) * budget / epoch).round().astype(int) * epoch)
    excess = np.array([_final(forecast, own, low, int(step), int(budget)) for step in choices])
    constant = _final(forecast, own, own, 0, int(budget))
    best = int(np.argmin(excess))
    return Advice(
        choices.astype(float), excess, int(choices[best]), float(excess[best]), constant,
        float(measured.at(own)["equilibration_steps"]), int(budget), factor,
    )  # fmt: skip


def _final(forecast: Forecast, high: SGD, low: SGD, change: int, budget: int) -> float:
    """Excess over the last part of the budget when the rate is lowered after ``change`` steps."""
    modes = forecast.hot_bins
    spread = np.zeros(len(modes.curvature))
    if change:
        epoch = len(epoch_batches(high, drop_last=forecast.standing.drop_last))
        spread = forecast.moments(high, modes, np.array([max(0, change - epoch), change]))[0]
    left = budget - change
    edges = np.array([left - max(1, math.ceil(_END * budget)), left])
    after = forecast.moments(low, modes, edges, position=np.sqrt(spread))[0]
    fluctuation = forecast.closure.scale[0] * 0.5 * float(after @ forecast.energies(low, modes))
    time = change * high.effective_lr + (1 - _END / 2) * left * low.effective_lr
    level = fluctuation / forecast.measured if forecast.measured > 0 else 0.0
    return fluctuation + forecast.mean_energy(low, time, level)
