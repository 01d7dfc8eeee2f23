"""What a run would do at other hyperparameters: the table of predictions, with error bars and flags."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HyperparameterError, InputError
from ..hyperparameters import SGD
from ..progress import track
from ..theory import sampling as schemes
from ..theory.arrays import Array
from ..theory.kramers import escape_time_momentum
from ..theory.stability import largest_stable_curvature
from .descent import flow_time
from .forecast import Excess, Forecast
from .measuring import flows_for, measure
from .modes import Modes
from .moments import epoch_batches
from .quantities import QUANTITIES

if TYPE_CHECKING:
    import xarray

    from ..problem import Problem

__all__ = ["LIMITS", "Predictions", "predict", "predictions"]

# Fixed before any of the runs that the documentation reports was looked at.
LIMITS = {
    "level": 4.0,  # fluctuation over that of the run
    "misfit": 0.25,  # |kappa - 1|
    "drift": 0.2,  # change of the run's loss across its record, over its excess
    "descending": 0.25,  # further descent in four times the time, over the predicted excess
    "mean": 0.5,  # share of the excess that is where the mean stands
    "width": 1.0,  # standard deviation over the width of the quadratic region
    "error": 0.5,  # standard error over the excess
    "unseen": 0.5,  # share of the run's fluctuation that is slower than its record; after the others
    "moved": 1.0,  # by how much another weight decay moves the bottom, over the excess
}
_WITHOUT_REST = (  # infinite where there is no stationary state
    "stationary_excess_loss", "loss_variance", "minibatch_loss_variance", "equilibration_steps", "decay_drop",
)  # fmt: skip
_SWEPT = ("lr", "batch_size", "momentum", "weight_decay", "sampling")
_MODES = 10
_PAIRS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_FEW = 32  # settings up to which equivalent pairs are looked for


class Predictions:
    """A measured run that answers what-if questions; made by :func:`predictions`.

    Attributes:
        forecast: what was measured.
    """

    def __init__(self, forecast: Forecast):
        self.forecast = forecast

    @property
    def sgd(self) -> SGD:
        """The run's own hyperparameters."""
        return self.forecast.standing.sgd

    def at(self, sgd: SGD, steps: int | None = None) -> dict[str, Any]:
        """All quantities of one setting, by name; flags as a list of sentences under ``"flags"``."""
        forecast = self.forecast
        ahead = int(steps or forecast.steps)
        if ahead < 20:
            raise InputError(f"steps is {ahead}", expected="at least 20")
        if sgd.weight_decay not in forecast.flows:
            forecast.flows[sgd.weight_decay] = flows_for(forecast.standing, sgd.weight_decay, forecast.steps)
        row: dict[str, Any] = dict.fromkeys(QUANTITIES, math.nan)
        row["sharpness_margin"] = forecast.margin(sgd)
        row["gradient_noise_scale"] = forecast.fits["gradient_noise_scale"]
        row["weight_variance"] = row["weight_variance_stderr"] = np.full(_MODES, np.nan)
        row["noise_gain"] = forecast.noise_gain(sgd)
        excess = Excess(math.inf, math.inf, math.inf, math.nan, math.inf)
        if forecast.holds(sgd):
            excess = forecast.excess(sgd, ahead)
        row |= {
            "loss": excess.value + forecast.bottom_for(sgd), "excess_loss": excess.value,
            "excess_loss_stderr": excess.stderr, "fluctuation": excess.fluctuation, "mean_excess": excess.mean,
            "level": excess.level,
        }  # fmt: skip
        if math.isfinite(excess.value):
            self._add_stationary(row, sgd, ahead, excess)
        row["flags"] = self._flags(row, sgd, excess)
        return row

    # ------------------------------------------------------------------ what is stationary

    def _base(self, level: float) -> Modes:
        return self.forecast.hot if level > 0.5 else self.forecast.cold

    def _add_stationary(self, row: dict[str, Any], sgd: SGD, ahead: int, excess: Excess) -> None:
        forecast = self.forecast
        stable = math.isfinite(forecast._stationary(sgd, forecast.cold_bins))
        modes = self._base(excess.level if stable else math.inf)
        floor = forecast.stationary_excess(sgd)
        variances = forecast.variances(sgd, modes)
        plain = forecast._stationary(sgd, modes)
        cold, hot = (forecast._stationary(sgd, m) for m in (forecast.cold_bins, forecast.hot_bins))
        scale = forecast.closure.join(cold, hot)[0] / plain if plain > 0 else 1.0
        if not math.isfinite(scale):  # stable for these steps only
            row |= dict.fromkeys(_WITHOUT_REST, math.inf)
            return
        error, share = forecast.stationary_errors(sgd)  # of the floor, and of whatever goes as the fluctuation
        row["stationary_excess_loss"], row["stationary_excess_loss_stderr"] = floor, error
        row["weight_variance"] = _padded(variances[modes.exact][:_MODES] * scale)
        row["weight_variance_stderr"] = share * row["weight_variance"]
        row |= self._loss_variances(sgd, modes, variances, scale, share)
        row["diffusion_exponent"], row["distance"] = self._diffusion(sgd, modes, ahead, scale)
        row["distance_stderr"] = share / 2 * row["distance"]
        row["equilibration_steps"] = self._equilibration(sgd, ahead)
        row["escape_steps"] = self._escape(sgd, modes, variances * scale)
        lower = sgd.replace(lr=sgd.lr / 10)
        row["decay_drop"] = floor - forecast.stationary_excess(lower)
        row["decay_drop_stderr"] = math.hypot(error, forecast.stationary_errors(lower)[0])
        gain = row["noise_gain"]
        if gain > 0 and sgd.batch_size is not None and forecast.top > 0:
            fastest = sgd.lr * (largest_stable_curvature(sgd) + sgd.weight_decay) / (forecast.top + sgd.weight_decay)
            row["critical_batch_size"] = sgd.batch_size * gain * fastest / sgd.lr

    def _loss_variances(self, sgd: SGD, modes: Modes, variances: Array, scale: float, share: float) -> dict[str, float]:
        r"""Variance in time of the loss over all samples, and of the minibatch loss from step to step.

        With s the mean squares at a step of an epoch and modes that are independent and Gaussian,
        :math:`\frac12\sum_l(h_ls_l)^2` averaged over the epoch, and the variance over it of the mean
        :math:`\frac12\sum_l h_ls_l`. What a minibatch adds is the variance of the samples' losses,
        :math:`\mathrm{Var}\,\ell+\sum_l c_ls_l` with c that of their gradients, over its size. ``share`` is the
        relative error of s, which enters the first twice over.
        """
        forecast, exact, bins = self.forecast, modes.exact, modes.binned()
        phases = forecast.phases(sgd, bins)  # [batches, bins]
        total, single = 0.5 * phases @ forecast.energies(sgd, bins), np.flatnonzero(bins.probe < 0)
        order = single[np.argsort(bins.curvature[single])]
        with np.errstate(invalid="ignore"):
            uneven = np.nan_to_num((phases**2).mean(0) / phases.mean(0) ** 2, nan=1.0)
        uneven = np.interp(modes.curvature[exact], bins.curvature[order], uneven[order])
        energy = forecast.energies(sgd, modes)[exact] * variances[exact]
        whole = scale**2 * float(0.5 * (energy**2 * uneven).sum() + total.var())
        sizes = epoch_batches(sgd, drop_last=forecast.standing.drop_last)
        factor = float(np.mean([sgd.replace(batch_size=int(n)).minibatch_factor for n in sizes]))
        spread = scale * float((modes.coloured + modes.white)[exact] @ variances[exact])
        return {
            "loss_variance": whole,
            "loss_variance_stderr": 2 * share * whole,
            "minibatch_loss_variance": factor * (forecast.fits["sample_loss_variance"] + spread) + whole,
            "minibatch_loss_variance_stderr": share * (factor * spread + 2 * whole),
        }

    def _diffusion(self, sgd: SGD, modes: Modes, ahead: int, scale: float) -> tuple[float, float]:
        bins = modes.binned()
        lags, factor = np.array([max(1, ahead // 10), ahead]), sgd.minibatch_factor
        if factor <= 0:
            return math.nan, 0.0
        curvature = np.maximum(bins.curvature, -sgd.weight_decay)
        coloured, white = self.forecast.noise(sgd, bins)
        anew = sgd.replace(sampling="replacement")
        moved = schemes.mean_squared_displacement(
            sgd, curvature, coloured * factor, lags, drop_last=self.forecast.standing.drop_last
        ).sum(1) + schemes.mean_squared_displacement(anew, curvature, white * factor, lags).sum(1)
        if not moved[0] > 0:
            return math.nan, 0.0
        return float(np.log(moved[1] / moved[0]) / np.log(lags[1] / lags[0])), math.sqrt(moved[1] * scale)

    def _equilibration(self, sgd: SGD, ahead: int) -> float:
        forecast = self.forecast
        first = max(5, len(epoch_batches(sgd, drop_last=forecast.standing.drop_last)))
        edges = np.unique(np.geomspace(first, max(4 * ahead, 8 * first), 24).round().astype(np.int64))
        edges = np.concatenate([[0], edges])
        cold, hot = (forecast.curve(sgd, modes, edges) for modes in (forecast.cold_bins, forecast.hot_bins))
        values = []
        for i, (c, h) in enumerate(zip(cold, hot, strict=True)):
            fluctuation, level = forecast.closure.join(float(c), float(h))
            time = flow_time(sgd, (edges[i] + edges[i + 1]) / 2, self.sgd)
            values.append(fluctuation + forecast.mean_energy(sgd, time, level) if math.isfinite(level) else math.inf)
        off = np.abs(np.array(values) / values[-1] - 1) > 0.1
        if not np.isfinite(values[-1]) or values[-1] <= 0 or off[-2]:
            return math.inf
        return float(edges[np.flatnonzero(off).max() + 2] if off.any() else edges[1])

    def _escape(self, sgd: SGD, modes: Modes, variances: Array) -> float:
        """Kramers time over the edge of the quadratic region, the shortest of the directions looked at."""
        fits = self.forecast.fits
        exact = modes.exact[: len(fits["quadratic_width"])]
        times = []
        for width, variance, curvature in zip(
            fits["quadratic_width"], variances[exact], fits["quadratic_curvature"], strict=False
        ):
            if not (width > 0 and variance > 0 and curvature > 0):
                continue
            temperature = curvature * variance
            barrier = curvature * width**2 / 2
            if barrier > 500 * temperature:
                times.append(math.inf)
                continue
            heavy = sgd.replace(nesterov=False)
            found = escape_time_momentum(heavy, barrier, curvature, -curvature, 2 * temperature / heavy.effective_lr)
            times.append(float(found) / sgd.lr)
        return min(times) if times else math.nan

    # ------------------------------------------------------------------ flags

    def _flags(self, row: dict[str, Any], sgd: SGD, excess: Excess) -> list[str]:
        forecast, limits = self.forecast, LIMITS
        own, standing, flags = self.sgd, forecast.standing, []

        def flag(broken: bool, sentence: str) -> None:
            if broken:
                flags.append(sentence)

        flag(row["sharpness_margin"] <= 1, f"the largest curvature {forecast.top:.3g} is beyond the stability bound")
        flag(
            not math.isfinite(excess.level) and row["sharpness_margin"] > 1,
            "the noise grows with the spread it causes: the mean square diverges",
        )
        level = excess.level
        flag(
            limits["level"] < level < math.inf,
            f"the fluctuation is {level:.1f} times the run's: curvature and noise were not measured that far out",
        )
        flag(
            not abs(forecast.kappa - 1) <= limits["misfit"],
            f"the run's own fluctuation is {forecast.kappa:.2f} of what its curvature and noise give",
        )
        flag(
            forecast.unseen > limits["unseen"],
            f"{100 * forecast.unseen:.0f}% of the run's fluctuation is predicted in modes slower than its record: the "
            "record cannot confirm it",
        )
        value = excess.value
        flag(
            math.isfinite(value) and not math.isfinite(row["stationary_excess_loss"]),
            "nothing is stationary at this setting: given more steps, the noise grows with the spread it causes",
        )
        if math.isfinite(value):
            size = max(abs(value), 1e-300)
            flag(
                standing.drifts(max(standing.loss - forecast.bottom, 1e-300), limits["drift"]),
                f"the run is not stationary: its loss changed by {standing.drift[0]:+.2g} across the record",
            )
            here = forecast.flows[sgd.weight_decay][0]
            wanted = forecast.steps * own.effective_lr
            flag(
                here.time[-1] < 0.99 * wanted,
                "the noise-free flow was not followed to the end: the curvature grows on the way",
            )
            further = forecast.bottom_for(sgd) - here.loss[-1]
            flag(
                further > limits["descending"] * size,
                "flat modes have not equilibrated: without noise the loss would go on falling by as much as "
                f"{further:.2g}",
            )
            flag(abs(excess.mean) > limits["mean"] * size, "most of the excess is where the mean stands, not noise")
            flag(value <= 0, "the loss falls below the bottom that the run reaches in the same time")
            flag(
                excess.stderr > limits["error"] * size,
                f"the error bar is {100 * excess.stderr / size:.0f}% of the excess",
            )
            widths, spread = (
                forecast.fits["quadratic_width"],
                np.sqrt(row["weight_variance"][: len(forecast.fits["quadratic_width"])]),
            )
            over = spread / widths
            flag(
                bool((over[np.isfinite(over)] > limits["width"]).any()),
                "the weights spread beyond the region where the loss is a parabola",
            )
            if sgd.weight_decay != own.weight_decay:
                moved = abs(here.loss[0] - here.at(forecast.steps * own.effective_lr))
                flag(
                    moved > limits["moved"] * size,
                    "another weight decay moves the bottom away from where it was measured",
                )
        flag(sgd.sampling == "shuffle-once", "one order repeated every epoch: a single run depends on its order")
        return flags

    # ------------------------------------------------------------------ equivalent settings

    def equivalent(self, sgd: SGD, batch_size: int) -> float:
        """Learning rate at which another batch size has the same loss floor; NaN where there is none."""
        forecast = self.forecast
        target = forecast.stationary_excess(sgd)
        if not (math.isfinite(target) and target > 0):  # unstable, or without noise
            return math.nan

        def above(log_lr: float) -> float:
            other = sgd.replace(lr=math.exp(log_lr), batch_size=batch_size)
            value = forecast.stationary_excess(other)
            return math.log(value / target) if value > 0 else -math.inf

        low, high = math.log(sgd.lr) - 7, math.log(sgd.lr) + 7
        if above(low) > 0 or above(high) < 0:
            return math.nan
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) < 0 else (low, middle)
        middle = (low + high) / 2
        return math.exp(middle) if abs(above(middle)) < 0.05 else math.nan


def _padded(values: Array) -> Array:
    out = np.full(_MODES, np.nan)
    out[: len(values)] = values
    return out


def predictions(run: Any, problem: Problem, **options: Any) -> Predictions:
    """Measure a run (or read what was measured before) and be ready to answer.

    Args:
        run: the run's folder or its open tree.
        problem: the network with all trained weights, its loss and data.
        options: ``theta``, ``velocity``, ``sgd``, ``steps``, ``drop_last``, ``seed``, as in
            :func:`~thermograd.prediction.measuring.measure`.

    Raises:
        InputError, TooShortError, DivergedError: the run cannot be predicted from; the message says why.

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
    >>> ready = predictions(folder, problem, steps=200)
    >>> row = ready.at(ready.sgd.replace(lr=0.01))  # curvature 2, so that 1.0 is the largest stable rate
    >>> round(float(row["sharpness_margin"]), 3), bool(row["excess_loss"] > 0)
    (100.0, True)
    """
    return Predictions(measure(run, problem, **options))


def predict(
    run: Any,
    problem: Problem,
    *,
    lr: Any = None,
    batch_size: Any = None,
    momentum: Any = None,
    weight_decay: Any = None,
    sampling: Any = None,
    steps: int | None = None,
    options: dict[str, Any] | None = None,
    measured: Predictions | None = None,
) -> xarray.Dataset:
    """Predict what the run would do at other hyperparameters, trained on from where it ended.

    The loss is the objective that SGD descends, training loss plus half the weight decay times the squared norm of the
    weights (without weight decay: the training loss), its mean over the last 30% of ``steps`` further steps. The
    *excess* is over the bottom: what noise-free descent from the run's last weights reaches in the time that ``steps``
    take at the run's own learning rate. Formulas: :mod:`thermograd.prediction.forecast`.

    Args:
        run: the run's folder or its open tree.
        problem: the network with all trained weights, its loss and data.
        lr: learning rate, or several; default the run's own, as for the others.
        batch_size: batch size, or several.
        momentum: momentum, or several.
        weight_decay: weight decay, or several.
        sampling: "replacement", "reshuffle" or "shuffle-once", or several.
        steps: how many steps after the change; default 2000 or 25 epochs, at most the recorded steps.
        options: further options of :func:`~thermograd.prediction.measuring.measure`.
        measured: predictions already at hand for this run.

    Returns:
        A dataset with a dimension for each argument that is a list, and the variables listed in its attributes'
        units and long names: losses, times, variances, exponents, margins, ``flags`` (sentences, empty where no
        assumption is seen to be broken) and ``ok``.

    Raises:
        InputError: arguments that are no hyperparameters; a run that cannot be predicted from.

    Example: :func:`thermograd.predict`, which is this.
    """
    ready = measured or predictions(run, problem, **(options or {}), steps=steps)
    given = dict(zip(_SWEPT, (lr, batch_size, momentum, weight_decay, sampling), strict=True))
    axes = {name: _axis(name, value) for name, value in given.items() if value is not None}
    base = ready.sgd
    if axes.get("momentum") is not None and base.nesterov and 0.0 in axes["momentum"][0]:
        raise HyperparameterError("momentum 0 with Nesterov", expected="momentum > 0, as torch demands")
    names = list(axes)
    combinations = list(itertools.product(*(axes[name][0] for name in names)))
    settings = [base.replace(**dict(zip(names, values, strict=True))) for values in combinations]
    rows = [ready.at(sgd, steps) for sgd in track(settings, "predicting")]
    if len(settings) <= _FEW:
        _add_pairs(ready, settings, rows)
    return _dataset(ready, axes, settings, rows, int(steps or ready.forecast.steps))


def _axis(name: str, value: Any) -> tuple[list[Any], bool]:
    """The values of one argument, and whether it is a dimension."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    values = (value.tolist() if isinstance(value, np.ndarray) else list(value)) if several else [value]
    nested = any(isinstance(one, Sequence | np.ndarray) and not isinstance(one, str) for one in values)
    if nested or not values:
        raise InputError(f"{name} is {value!r}", expected="a number, or a list of numbers")
    if len(set(values)) != len(values):
        raise InputError(f"{name} has a value twice", expected="different values")
    for one in values:
        if name == "sampling" and not isinstance(one, str):
            raise InputError(f"sampling is {one!r}", expected="the name of a sampling scheme")
        if name != "sampling" and (isinstance(one, bool | str) or not isinstance(one, int | float | np.number)):
            raise InputError(f"{name} is {one!r}", expected="a number, or a list of numbers")
        if name == "batch_size" and not (math.isfinite(one) and float(one) == int(one)):
            raise InputError(f"batch_size is {one}", expected="a whole number")
    if name == "batch_size":
        values = [int(one) for one in values]
    return values, several


def _add_pairs(ready: Predictions, settings: list[SGD], rows: list[dict[str, Any]]) -> None:
    for sgd, row in zip(settings, rows, strict=True):
        assert sgd.batch_size is not None
        found = []
        for part in _PAIRS:
            batch = max(1, round(sgd.batch_size * part))
            full = sgd.sampling != "replacement" and batch >= ready.forecast.standing.problem.N
            found.append(math.nan if full else ready.equivalent(sgd, batch))
        row["equivalent_lr"] = np.array(found)


def _dataset(
    ready: Predictions, axes: dict[str, tuple[list[Any], bool]], settings: list[SGD], rows: list[dict[str, Any]],
    steps: int,
) -> xarray.Dataset:  # fmt: skip
    import xarray

    dims = [name for name, (_, several) in axes.items() if several]
    shape = [len(axes[name][0]) for name in dims]
    forecast = ready.forecast

    def shaped(values: list[Any]) -> np.ndarray:
        array = np.array(values)
        return array.reshape(shape + list(array.shape[1:]))

    variables: dict[str, Any] = {
        name: (dims, shaped([row[name] for row in rows]), {"units": units, "long_name": long})
        for name, (units, long) in QUANTITIES.items()
    }
    for name, long in (
        ("weight_variance", "stationary variance of the weights along the sharpest modes"),
        ("weight_variance_stderr", "its standard error"),
    ):
        values = shaped([row[name] for row in rows])
        variables[name] = ([*dims, "mode"], values, {"units": "weight^2", "long_name": long})
    if "equivalent_lr" in rows[0]:
        variables["equivalent_lr"] = (
            [*dims, "batch_factor"],
            shaped([row["equivalent_lr"] for row in rows]),
            {"units": "1", "long_name": "learning rate with the same loss floor at batch_factor times the batch size"},
        )
    variables["flags"] = (dims, shaped(["; ".join(row["flags"]) for row in rows]), {"long_name": "broken assumptions"})
    variables["ok"] = (dims, shaped([not row["flags"] for row in rows]), {"long_name": "no flag is up"})
    coords: dict[str, Any] = {name: (name, axes[name][0]) for name in dims}
    scalars = settings[0].to_dict()
    coords |= {name: scalars[name] for name in _SWEPT if name not in dims}
    coords["batch_factor"] = ("batch_factor", list(_PAIRS))
    exact = forecast.hot.exact[:_MODES]
    coords["mode_curvature"] = ("mode", _padded(forecast.hot.curvature[exact]))
    attrs = {
        "steps": steps,
        "bottom": forecast.bottom,
        "run_loss": forecast.standing.loss,
        "run_loss_stderr": forecast.standing.loss_stderr,
        "kappa": forecast.kappa,
        "kappa_stderr": forecast.kappa_stderr,
        "description": "predicted from one measured run; excess is over the bottom",
    }
    return xarray.Dataset(variables, coords, attrs)
