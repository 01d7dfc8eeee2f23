r"""Whether a run in progress has equilibrated, from a stream: fluctuation-dissipation and drift of the loss.

Since the start (or since the learning rate was last changed), steps are divided into windows whose lengths grow with
the steps before them, so that each window is a fixed part of all steps taken at this learning rate. Windows overlap:
several are open at a time, their starts spaced evenly in the logarithm, so that the last of the steps are never far
from the end of a window. At the end of a window two numbers are tested:

* the share of the motion that wanders off,

  .. math:: w = \frac{(1-\beta)\,\Delta D}{(1+\beta)\,\sum_k\|\theta_k-\theta_{k-1}\|^2},
      \qquad D = \|\theta - c\|^2,

  which is what the two sides of the fluctuation-dissipation identity of a stationary state (Yaida 2018; with momentum
  as in :func:`thermograd.trajectory.stationarity`) differ by, one side over the other. c is the mean of the window's
  first quarter; both sides telescope, so that D at a few times and a sample of squared steps are enough;
* the change of the minibatch loss across the window, relative to its mean.

Both are tests of *equivalence*: the run counts as equilibrated when both are shown to lie within their tolerances, not
when a drift merely cannot be seen. Slopes are fitted to ten block means, and a confidence bound (Student's t, 8
degrees of freedom) has to lie within the tolerance. Of the loss it is a *fall* that has to be excluded: a rise beyond
the tolerance must not be shown, but need not be excluded too, as it gives no reason to go on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from ..errors import InputError, StoreError

__all__ = ["Equilibration", "WatchesEquilibrium"]

_BLOCKS = 10
_SAMPLES = 400  # weights looked at in a window


class _Window:
    """Steps ``start`` + 1 to ``end``: the mean weights of their first quarter, distances from it, moves and losses."""

    def __init__(self, start: int, end: int):
        self.start, self.end = start, end
        self.centre: Tensor | None = None
        self.centred = 0
        self.distance: list[tuple[int, float]] = []
        self.moves: list[float] = []
        self.losses: list[float] = []

    @property
    def stride(self) -> int:
        """Steps between looks at the weights: a power of two, so that windows look at the same steps."""
        return 1 << max(1, (self.end - self.start) // _SAMPLES).bit_length() - 1

    def look(self, step: int, after: Tensor, squared_move: float) -> None:
        """Take the weights after a step into account."""
        if self.centre is None or step <= self.start + (self.end - self.start) // 4:
            self.centred += 1
            if self.centre is None:
                self.centre = after.detach().clone()
            else:
                self.centre += (after.detach() - self.centre) / self.centred
            return
        self.distance.append((step, float((after - self.centre).double().square().sum())))
        self.moves.append(squared_move)

    def wander(self, momentum: float, quantile: float) -> tuple[float, float] | None:
        """The share of the motion that wanders off, and its bound."""
        if len(self.distance) < 2 * _BLOCKS:
            return None
        change, error = _change(np.array([d for _, d in self.distance]))
        length = self.distance[-1][0] - self.distance[0][0] + self.stride
        scale = length * float(np.mean(self.moves)) * (1 + momentum)
        if not scale > 0:
            return None
        value, error = ((1 - momentum) * x / scale for x in (change, error))
        return _bounded(value, error, quantile)

    def drift(self, quantile: float) -> tuple[float, float] | None:
        """The relative change of the loss, and its bound; None where the loss is not known at every step."""
        if len(self.losses) < self.end - self.start:
            return None
        losses = np.array(self.losses)
        change, error = _change(losses)
        mean = abs(float(losses.mean()))
        return _not_falling(change / mean, error / mean, quantile) if mean > 0 else (0.0, 0.0)


class Equilibration:
    """Streaming test of whether training at the present learning rate has equilibrated.

    It holds a vector of P numbers for each open window and one more, and a number for each step of a window. Weights
    are looked at in 400 to 800 steps of each window, the same for most of them, the loss at each step.

    Args:
        least: steps of the shortest window.
        growth: length of a window over all steps before it, since the last reset.
        overlap: windows that are open at a time.
        tolerance: largest fall of the loss across a window, relative to its mean, that still counts as none.
        wander_tolerance: the same for the share of the motion that wanders off.
        false_alarm: probability that one window of a run whose drift is as large as the tolerance is called
            equilibrated: the level of each of the two tests, both of which have to pass.

    Raises:
        InputError: a setting out of range.

    >>> meter, rng, theta = Equilibration(least=400), np.random.default_rng(0), np.zeros(50)
    >>> for k in range(4000):
    ...     before, theta = theta, 0.9 * theta + rng.standard_normal(50)
    ...     meter.add(torch.tensor(before), torch.tensor(theta), loss=1 + 0.001 * float(theta @ theta), momentum=0.0)
    >>> meter.equilibrated
    True
    """

    def __init__(
        self,
        *,
        least: int = 400,
        growth: float = 1.0,
        overlap: int = 4,
        tolerance: float = 0.1,
        wander_tolerance: float = 0.1,
        false_alarm: float = 0.05,
    ):
        for name, value, fine in (
            ("least", least, least >= 40),
            ("growth", growth, growth > 0),
            ("overlap", overlap, overlap >= 1 and overlap == int(overlap)),
            ("tolerance", tolerance, tolerance > 0),
            ("wander_tolerance", wander_tolerance, wander_tolerance > 0),
            ("false_alarm", false_alarm, 0 < false_alarm < 0.5),
        ):
            if not (fine and math.isfinite(value)):
                raise InputError(
                    f"{name} is {value}",
                    expected="least >= 40, tolerances > 0, 0 < false_alarm < 0.5, growth > 0, overlap a whole number",
                )
        self.least, self.growth, self.overlap = int(least), float(growth), int(overlap)
        self.tolerance = float(tolerance)
        self.wander_tolerance, self.false_alarm = float(wander_tolerance), float(false_alarm)
        self.reset()

    def reset(self) -> None:
        """Begin anew, as after a change of the learning rate."""
        self.steps = 0
        self.equilibrated = False
        self.windows = 0
        self.window: tuple[int, int] | None = None  # steps of the last whole window, and its results
        self.wander: tuple[float, float] | None = None
        self.drift: tuple[float, float] | None = None
        self._open = [_Window(0, self.least)]
        self._opened = 0
        self._next = self._start_of(0)

    def _start_of(self, number: int) -> int:
        """Where the window of a number begins; the length of the first is ``least`` or a little more."""
        first = max(self.least / self.growth, 1.0)
        return math.ceil(first * (1 + self.growth) ** (number / self.overlap))

    @property
    def wants_weights(self) -> bool:
        """Whether the weights before and after the coming step are looked at."""
        return any(self.steps % window.stride == 0 for window in self._open)

    def add(self, before: Tensor | None, after: Tensor | None, loss: float | None, momentum: float) -> None:
        """Take one step into account.

        Args:
            before: weights before the step [P], where :attr:`wants_weights`; else None.
            after: weights after it.
            loss: minibatch loss of the step, None where it is not known (then the weights alone decide).
            momentum: of the step.
        """
        step = self.steps
        if before is not None and after is not None:
            moved = float((after - before).double().square().sum())
            for window in self._open:
                if step % window.stride == 0:
                    window.look(step + 1, after, moved)
        self.steps += 1
        for window in self._open:
            if loss is not None:
                window.losses.append(float(loss))
            if window.end == self.steps:
                self._close(window, float(momentum))
        self._open = [window for window in self._open if window.end > self.steps]
        while self._next <= self.steps:
            if self._next == self.steps:
                self._open.append(_Window(self._next, self._next + round(self.growth * self._next)))
            self._opened += 1
            self._next = self._start_of(self._opened)

    def _close(self, window: _Window, momentum: float) -> None:
        self.windows += 1
        self.window = (window.start, window.end)
        quantile = float(stdtrit(_BLOCKS - 2, 1 - self.false_alarm))
        self.wander = window.wander(momentum, quantile)
        self.drift = window.drift(quantile)
        within = self.wander is not None and self.wander[1] <= self.wander_tolerance
        self.equilibrated = within and (self.drift is None or self.drift[1] <= self.tolerance)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, for a checkpoint."""
        return copy.deepcopy({**self.__dict__, "_open": [dict(window.__dict__) for window in self._open]})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            StoreError: the state is of something else.
        """
        if set(state) != set(self.__dict__):
            raise StoreError("the state is not that of an equilibration test", expected="what state_dict() returned")
        found = copy.deepcopy(dict(state))
        windows = []
        for kept in found.pop("_open"):
            window = _Window(0, 0)
            window.__dict__.update(kept)
            windows.append(window)
        self.__dict__.update(found, _open=windows)


def _change(series: np.ndarray) -> tuple[float, float]:
    """Change of a series from end to end along the line through ten block means, and its standard error."""
    blocks = np.array([part.mean() for part in np.array_split(series, _BLOCKS)])
    time = (np.arange(_BLOCKS) - (_BLOCKS - 1) / 2) / _BLOCKS
    slope = time @ blocks / (time @ time)
    rest = blocks - blocks.mean() - slope * time
    return float(slope), float(np.sqrt(rest @ rest / (_BLOCKS - 2) / (time @ time)))


def _bounded(value: float, error: float, quantile: float) -> tuple[float, float]:
    """A number and the bound on its size; a number that is not finite is bounded by nothing."""
    bound = float(abs(value) + quantile * error)
    return float(value), bound if math.isfinite(bound) else math.inf


def _not_falling(value: float, error: float, quantile: float) -> tuple[float, float]:
    """A change, and the largest fall that is not excluded, or the smallest rise that is shown, if that is larger.

    >>> _not_falling(-0.01, 0.02, 2.0), _not_falling(0.03, 0.02, 2.0), _not_falling(0.3, 0.02, 2.0)
    ((-0.01, 0.05), (0.03, 0.010000000000000002), (0.3, 0.26))
    """
    bound = float(max(quantile * error - value, value - quantile * error))
    return float(value), bound if math.isfinite(bound) else math.inf


class WatchesEquilibrium:
    """What a recorder needs to say live whether training has equilibrated."""

    optimizer: torch.optim.Optimizer
    _weights: Callable[[], Tensor]
    _equilibration: Equilibration | None = None
    _weights_before: Tensor | None = None
    _rates_watched: list[float] | None = None

    @property
    def equilibration(self) -> Equilibration:
        """The streaming test of equilibrium, begun when first asked for."""
        if self._equilibration is None:
            self._equilibration = Equilibration()
        return self._equilibration

    @equilibration.setter
    def equilibration(self, test: Equilibration) -> None:
        self._equilibration = test

    @property
    def equilibrated(self) -> bool:
        """Whether training at the present learning rate has equilibrated, as of the last whole window of steps.

        False until a window has shown it, and again when a learning rate changes, whoever changes it. Every step within
        the recorder's ``with`` is looked at, whichever are recorded. Any optimizer will do; what counts as its momentum
        is the smallest of its groups' (for Adam and its kin the first of the ``betas``). A checkpoint keeps the test by
        ``recorder.equilibration.state_dict()`` (:class:`thermograd.EquilibrationLR` does); without, it begins anew.
        Asking for it begins the test (see
        :class:`~thermograd.trajectory.Equilibration`; assign one with other settings to ``recorder.equilibration``): a
        window whose loss still changes by the tolerance (10%) is called equilibrated with a probability of about 5%
        (4 to 6% in simulations, docs/predict.md).
        """
        return self.equilibration.equilibrated

    def _watch_before(self) -> None:
        if self._equilibration is None:
            return
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if self._rates_watched is not None and rates != self._rates_watched:
            self._equilibration.reset()
        self._rates_watched = rates
        self._weights_before = self._weights() if self._equilibration.wants_weights else None

    def _watch_after(self, loss: Any) -> None:
        if self._equilibration is None:
            return
        before, self._weights_before = self._weights_before, None
        after = None if before is None else self._weights()
        momentum = min(_momentum(group) for group in self.optimizer.param_groups)
        value = None if loss is None else float(loss)
        self._equilibration.add(before, after, value, momentum)


def _momentum(group: Mapping[str, Any]) -> float:
    """How much of a move goes into the next one: that of SGD and RMSprop, the first beta of Adam and its kin."""
    if "momentum" in group:
        return float(group["momentum"] or 0.0)
    return float(group["betas"][0]) if "betas" in group else 0.0
