"""Predictions checked by doing it: frozen to disk first, then the run is branched and really trained on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from ..errors import DivergedError, InputError, StoreError
from ..hyperparameters import SGD
from ..measurement import Measurement, new_axes, quantity
from ..progress import bar
from ..simulate import networks
from ..theory.arrays import Array
from .forecast import WINDOW
from .predicting import LIMITS, Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Validation", "default_settings", "validate"]

_FROZEN = "predictions.json"
_LOOKS = 75  # full losses in the window that is averaged
# learning rate and batch size in units of the run's own, and momentum (None: the run's)
_GRID: tuple[tuple[float, float, float | None], ...] = (
    (1, 1, None), (0.1, 1, None), (0.3, 1, None), (2, 1, None), (3, 1, None), (1, 0.25, None), (1, 0.5, None),
    (1, 2, None), (1, 4, None), (1, 8, None), (1, 1, 0.0), (1, 1, 0.5), (1, 1, 0.99), (0.3, 1, 0.97), (0.3, 0.25, None),
    (0.1, 1, 0.99),
)  # fmt: skip


@dataclass(frozen=True)
class Validation(Measurement):
    """Predicted against observed excess loss, one entry a setting; ``ok`` where no flag was up beforehand."""

    lr: Array = quantity("setting", long_name="learning rate")
    batch_size: Array = quantity("setting", units="samples", long_name="batch size")
    momentum: Array = quantity("setting", long_name="momentum")
    predicted: Array = quantity("setting", units="loss", long_name="predicted excess of the objective")
    predicted_stderr: Array = quantity("setting", units="loss", long_name="its standard error")
    observed: Array = quantity("setting", units="loss", long_name="observed excess, mean over replicas")
    observed_stderr: Array = quantity("setting", units="loss", long_name="its standard error")
    ok: Array = quantity("setting", long_name="no flag was up")
    median_error: float = quantity(long_name="median relative error of the excess, all settings")
    median_error_ok: float = quantity(long_name="the same over settings without a flag")
    rank_correlation: float = quantity(long_name="Spearman's correlation of predicted and observed, all settings")
    flags: tuple[str, ...] = ()
    frozen: str = ""
    _primary = "observed"

    @property
    def relative_error(self) -> Array:
        """Predicted over observed, less one; infinite where one of them alone is, NaN where both are."""
        return _relative(self.predicted, self.observed)

    @property
    def failures(self) -> np.ndarray:
        """Positions of settings that are off by more than 30% and whose flag was not up."""
        return np.flatnonzero((np.abs(self.relative_error) > 0.3) & self.ok.astype(bool))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Predicted against observed on logarithmic axes; hollow where a flag was up."""
        axes = new_axes(ax)
        good = np.isfinite(self.predicted) & np.isfinite(self.observed) & (self.predicted > 0) & (self.observed > 0)
        for chosen, filled, name in (
            (good & self.ok.astype(bool), True, "no flag"), (good & ~self.ok.astype(bool), False, "flag up")
        ):  # fmt: skip
            if chosen.any():
                axes.errorbar(
                    self.observed[chosen], self.predicted[chosen], xerr=self.observed_stderr[chosen],
                    yerr=np.minimum(self.predicted_stderr[chosen], 0.99 * self.predicted[chosen]), fmt="o", ms=5,
                    mfc=None if filled else "none", lw=1, label=name,
                )  # fmt: skip
        if good.any():
            ends = np.array([self.observed[good].min(), self.observed[good].max()])
            axes.plot(ends, ends, lw=1, color="gray")
            axes.fill_between(ends, 0.85 * ends, 1.15 * ends, alpha=0.15, color="gray", lw=0)
            axes.legend()
        axes.set(xscale="log", yscale="log", xlabel="observed excess loss", ylabel="predicted excess loss")
        return axes


def default_settings(sgd: SGD, samples: int) -> list[SGD]:
    """Sixteen settings: learning rate x0.1 to x3, batch x0.25 to x8, momentum 0 to 0.99, and three of them at once.

    Batch sizes are kept between 1 and half the data set; settings that coincide are left out.
    """
    assert sgd.batch_size is not None
    found: list[SGD] = []
    for rate, batch, momentum in _GRID:
        if momentum == 0.0 and sgd.nesterov:
            momentum = 0.1
        size = int(np.clip(round(sgd.batch_size * batch), 1, max(1, samples // 2)))
        setting = sgd.replace(
            lr=sgd.lr * rate, batch_size=size, momentum=sgd.momentum if momentum is None else momentum
        )
        if setting not in found:
            found.append(setting)
    return found


def validate(
    measured: Predictions,
    folder: str | os.PathLike[str],
    *,
    settings: Sequence[SGD] | None = None,
    replicas: int = 4,
    seed: int = 0,
    fresh: bool = False,
) -> Validation:
    """Predict, freeze the predictions, train at every setting, compare.

    The predictions are written to ``predictions.json`` with their SHA-256 before any training, and are used from there
    afterwards. Each setting's result is kept as soon as it is there: an interrupted validation goes on where it
    stopped. Training starts from the run's last weights and momentum buffer, in ``replicas`` copies with minibatches of
    their own; the loss is the mean over the last 30% of the steps, at steps of all phases of an epoch.

    Args:
        measured: the measured run, from :func:`~thermograd.prediction.predictions`.
        folder: where predictions and results are kept.
        settings: hyperparameters to train at; default :func:`default_settings`.
        replicas: trainings of each setting.
        seed: of their minibatches.
        fresh: make predictions and train anew.

    Raises:
        StoreError: the frozen predictions were changed, or are of another run or other settings.
        InputError: fewer than two replicas.

    Example: :func:`thermograd.validate`, which is this.
    """
    if replicas < 2:
        raise InputError(f"replicas is {replicas}", expected="at least 2, to have an error bar")
    standing = measured.forecast.standing
    chosen = list(settings) if settings is not None else default_settings(measured.sgd, standing.problem.N)
    if any(s.weight_decay != measured.sgd.weight_decay for s in chosen):
        raise InputError("settings with another weight decay", expected="the run's: the bottom would be another")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    frozen = _freeze(measured, chosen, place, replicas, seed, fresh)
    with bar("training at the predicted settings", len(chosen)) as progress:
        for number, setting in enumerate(chosen):
            progress.advance(0, f"training at lr {setting.lr:.3g}, batch {setting.batch_size}, "
                                f"momentum {setting.momentum:g}")  # fmt: skip
            _train_once(measured, setting, place, number, frozen, replicas, seed)
            progress.advance()
    return load(place)


def load(folder: str | os.PathLike[str]) -> Validation:
    """A finished (or half finished) validation from its folder; settings not trained yet are left out.

    Raises:
        StoreError: there is none, or the frozen predictions were changed.
    """
    place = Path(folder)
    if not (place / _FROZEN).is_file():
        raise StoreError(f"{place} holds no validation", remedy="make one with `thermograd validate RUN`")
    frozen = _read_frozen(place)
    rows = []
    for number, row in enumerate(frozen["predictions"]):
        path = place / f"setting-{number:02d}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["frozen"] == frozen["sha256"]:
                rows.append((row, result))
    if not rows:
        raise StoreError(f"{place} holds no trained setting yet", remedy="go on with `thermograd validate RUN`")

    def column(which: int, name: str) -> Array:
        return np.array([row[which][name] for row in rows], float)

    predicted, observed = column(0, "excess_loss"), column(1, "excess_loss")
    flags = tuple("; ".join(row["flags"]) for row, _ in rows)
    ok = np.array([not text for text in flags])
    error = np.abs(_relative(predicted, observed))
    good = ~np.isnan(error)
    ranked = np.isfinite(predicted) | np.isfinite(observed)
    return Validation(
        column(0, "lr"), column(0, "batch_size"), column(0, "momentum"), predicted, column(0, "excess_loss_stderr"),
        observed, column(1, "excess_loss_stderr"), ok,
        float(np.median(error[good])) if good.any() else math.nan,
        float(np.median(error[good & ok])) if (good & ok).any() else math.nan,
        float(spearmanr(predicted[ranked], observed[ranked]).statistic) if ranked.sum() > 2 else math.nan,
        flags, frozen["sha256"],
    )  # fmt: skip


def _relative(predicted: Array, observed: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        error = predicted / observed - 1
    error = np.where(np.isinf(observed) & np.isfinite(predicted), -np.inf, error)
    return np.where(np.isinf(predicted) & np.isinf(observed), np.nan, error)


# ---------------------------------------------------------------------- freezing


def _freeze(
    measured: Predictions, settings: Sequence[SGD], place: Path, replicas: int, seed: int, fresh: bool
) -> dict[str, Any]:
    forecast = measured.forecast
    asked = {
        "steps": forecast.steps,
        "bottom": forecast.bottom,
        "run_loss": forecast.standing.loss,
        "weights": hashlib.sha256(forecast.standing.theta.double().cpu().numpy().tobytes()).hexdigest(),
        "settings": [s.to_dict() for s in settings],
        "replicas": replicas,
        "seed": seed,
        "limits": LIMITS,
    }
    path = place / _FROZEN
    if path.is_file() and not fresh:
        frozen = _read_frozen(place)
        if any(frozen["asked"][name] != asked[name] for name in ("steps", "weights", "settings", "replicas", "seed")):
            raise StoreError(
                f"{path} holds predictions of another run, or for other settings",
                remedy="choose another folder, or start anew with fresh=True (--fresh)",
            )
        return frozen
    for old in place.glob("setting-*.json"):
        old.unlink()
    rows = []
    for sgd in settings:
        row = measured.at(sgd)
        rows.append(
            {"lr": sgd.lr, "batch_size": sgd.batch_size, "momentum": sgd.momentum}
            | {name: row[name] for name in ("excess_loss", "excess_loss_stderr", "level", "loss", "flags")}
        )
    content = {"asked": asked, "predictions": rows}
    frozen = {**content, "sha256": _digest(content)}
    _write(path, frozen)
    return _read_frozen(place)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_frozen(place: Path) -> dict[str, Any]:
    try:
        frozen = json.loads((place / _FROZEN).read_text(encoding="utf-8"))
        content = {name: frozen[name] for name in ("asked", "predictions")}
    except (ValueError, KeyError) as error:
        raise StoreError(f"{place / _FROZEN} cannot be read: {error}", remedy="start anew with --fresh") from error
    if _digest(content) != frozen.get("sha256"):
        raise StoreError(
            f"the frozen predictions in {place / _FROZEN} were changed",
            expected="the file as it was written before the training",
            remedy="start anew with --fresh",
        )
    return dict(frozen)


def _write(path: Path, content: dict[str, Any]) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error


# ---------------------------------------------------------------------- training


def _train_once(
    measured: Predictions, sgd: SGD, place: Path, number: int, frozen: dict[str, Any], replicas: int, seed: int
) -> None:
    path = place / f"setting-{number:02d}.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["frozen"] == frozen["sha256"]:
        return
    excess = observe(measured, sgd, replicas, seed + 1000 * (number + 1))
    _write(path, {"frozen": frozen["sha256"], **excess})


def observe(measured: Predictions, sgd: SGD, replicas: int, seed: int) -> dict[str, float]:
    """Train on from the run's last weights and momentum at another setting; the excess as predictions define it."""
    forecast = measured.forecast
    standing, steps = forecast.standing, forecast.steps
    batches = math.ceil(sgd.steps_per_epoch)
    first = int((1 - WINDOW) * steps / batches) * batches  # whole epochs: a new order is drawn after them anyway
    every, looks = looks_at(steps - first, batches)
    theta, velocity = standing.theta, standing.velocity
    try:
        if first:
            before = networks(standing.problem, replicas, first, sgd, start=theta, velocity=velocity, seed=seed)
            if before.partial:
                raise KeyboardInterrupt
            theta, velocity = before.theta, before.velocity
        found = networks(
            standing.problem, replicas, every * looks, sgd, start=theta, velocity=velocity, seed=seed + 500,
            record_every=every,
        )  # fmt: skip
    except DivergedError:
        return {"excess_loss": math.inf, "excess_loss_stderr": math.inf, "training_loss": math.inf}
    if found.partial:
        raise KeyboardInterrupt
    assert found.squared_norm is not None
    losses = found.loss[:, 1:].mean(1)
    objective = losses + sgd.weight_decay / 2 * found.squared_norm[:, 1:].mean(1)
    excess = objective - forecast.bottom
    return {
        "excess_loss": float(excess.mean()),
        "excess_loss_stderr": float(excess.std(ddof=1) / math.sqrt(replicas)),
        "training_loss": float(losses.mean()),
    }


def looks_at(window: int, batches: int) -> tuple[int, int]:
    """Steps between looks at the full loss, and how many: every phase of an epoch as often as any other.

    The loss differs between the phases of a reshuffled epoch. Where an epoch has more steps than there are looks, the
    stride is as near the golden section of an epoch as the window allows, which spreads them evenly.

    >>> looks_at(600, 30), looks_at(600, 80)
    ((19, 30), (7, 75))
    """
    looks = min(_LOOKS, window)
    if batches <= looks:
        choices = []
        for count in range(batches, looks + 1, batches):
            every = window // count
            while math.gcd(every, batches) > 1:
                every -= 1
            choices.append((every, count))
        enough = min(0.9 * window, max(every * count for every, count in choices))
        return [choice for choice in choices if choice[0] * choice[1] >= enough][-1]
    strides = range(max(1, round(0.6 * window / looks)), window // looks + 1)
    golden = (3 - math.sqrt(5)) / 2

    def unevenness(stride: int) -> float:
        part = stride % batches / batches
        return min(abs(part - golden), abs(part - 1 + golden))

    coprime = [stride for stride in strides if math.gcd(stride, batches) == 1]  # or some phases are never seen
    return min(coprime or strides, key=unevenness), looks
