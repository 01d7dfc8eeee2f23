"""Predictions as a table and as maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measurement import new_axes
from .predicting import Predictions, predict

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["Map", "columns", "flags", "heading", "maps", "number", "raised", "rows", "sweep"]

_ROWS = (
    ("loss", "mean loss (with weight decay)"),
    ("excess_loss", "excess over the bottom"),
    ("stationary_excess_loss", "loss floor: excess when all is equilibrated"),
    ("equilibration_steps", "steps to equilibrate"),
    ("loss_variance", "variance of the training loss"),
    ("minibatch_loss_variance", "variance of the minibatch loss"),
    ("weight_variance", "weight variance, sharpest mode"),
    ("diffusion_exponent", "diffusion exponent"),
    ("distance", "distance travelled by noise"),
    ("sharpness_margin", "sharpness margin (unstable below 1)"),
    ("noise_gain", "noise gain (unstable above 1)"),
    ("escape_steps", "escape-time scale, steps"),
    ("decay_drop", "drop when the rate is divided by ten"),
    ("critical_batch_size", "critical batch size"),
    ("gradient_noise_scale", "gradient noise scale, samples"),
)
_MAPS = (
    ("excess_loss", "excess loss"),
    ("equilibration_steps", "steps to equilibrate"),
    ("noise_gain", "noise gain"),
)
SWEEP_RATES = np.geomspace(0.1, 10, 9)
SWEEP_BATCHES = (0.25, 0.5, 1, 2, 4, 8)


def number(value: float) -> str:
    """A number with three digits; a dash where there is none.

    >>> number(0.012345), number(1234567.0), number(float("nan")), number(float("inf"))
    ('0.0123', '1.23e+06', '–', '∞')
    """
    if math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.3g}"


def columns(found: xarray.Dataset) -> list[xarray.Dataset]:
    """Each setting of a dataset of predictions, as datasets without the swept dimensions."""
    swept = [name for name in found.dims if name not in ("mode", "batch_factor")]
    if not swept:
        return [found]
    stacked = found.stack(setting=swept)
    return [stacked.isel(setting=i) for i in range(stacked.sizes["setting"])]


def heading(one: xarray.Dataset) -> str:
    """What distinguishes a setting: learning rate, batch size, momentum."""
    return f"lr {float(one['lr']):.3g}, B {int(one['batch_size'])}, β {float(one['momentum']):g}"


def rows(one: xarray.Dataset) -> list[tuple[str, str]]:
    """The table of one setting: label and value, equivalent settings and flags included."""
    table = []
    for name, label in _ROWS:
        values = np.asarray(one[name], float).reshape(-1)
        text = number(values[0]) if len(values) else "–"
        if name == "loss":
            text = f"{values[0]:.5g}" if math.isfinite(values[0]) else number(values[0])
        if f"{name}_stderr" in one and len(values) and math.isfinite(values[0]):
            text += f" ± {number(float(np.asarray(one[f'{name}_stderr'], float).reshape(-1)[0]))}"
        table.append((label, text))
    if "equivalent_lr" in one:
        pairs = [
            f"{max(1, round(int(one['batch_size']) * float(part)))}: {number(float(rate))}"
            for part, rate in zip(one["batch_factor"].values, one["equivalent_lr"].values, strict=True)
            if math.isfinite(rate) and part != 1
        ]
        table.append(("same floor at batch size: rate", ", ".join(pairs) or "–"))
    return table


def flags(one: xarray.Dataset) -> list[str]:
    """The flags of one setting, a sentence each."""
    text = str(one["flags"].values)
    return text.split("; ") if text else []


def raised(settings: list[xarray.Dataset]) -> list[tuple[str, str]]:
    """Each flag that is up in some setting, once: which settings, and the sentence."""
    where: dict[str, list[str]] = {}
    for one in settings:
        for sentence in flags(one):
            where.setdefault(sentence, []).append(heading(one))
    return [
        ("all settings" if len(names) == len(settings) > 1 else "; ".join(names), sentence)
        for sentence, names in where.items()
    ]


def sweep(ready: Predictions) -> xarray.Dataset:
    """Predictions over learning rates x0.1 to x10 and batch sizes x0.25 to x8 of the run's own."""
    sgd, size = ready.sgd, ready.forecast.standing.problem.N
    assert sgd.batch_size is not None
    batches = sorted({int(np.clip(round(sgd.batch_size * part), 1, max(1, size // 2))) for part in SWEEP_BATCHES})
    return predict(
        None, ready.forecast.standing.problem, lr=(sgd.lr * SWEEP_RATES).tolist(), batch_size=batches, measured=ready
    )


@dataclass(frozen=True)
class Map:
    """One quantity over learning rate and batch size; crosses where a flag is up."""

    found: Any
    name: str
    title: str

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the map."""
        from matplotlib.colors import LogNorm

        axes = new_axes(ax)
        values = self.found[self.name].transpose("batch_size", "lr").values.astype(float)
        fine = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        rates, batches = self.found["lr"].values, self.found["batch_size"].values
        if np.isfinite(fine).any():
            low, high = np.nanmin(fine), np.nanmax(fine)
            norm = LogNorm(low, high if high > low else 1.01 * low)
            drawn = axes.pcolormesh(rates, batches, fine, shading="nearest", norm=norm)
            axes.figure.colorbar(drawn, ax=axes)
        x, y = np.meshgrid(rates, batches)
        up = ~self.found["ok"].transpose("batch_size", "lr").values.astype(bool)
        axes.plot(x[up], y[up], "x", ms=4, color="gray", ls="none")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="batch size", title=self.title)
        return axes


def maps(found: xarray.Dataset) -> list[Map]:
    """The maps of a sweep."""
    return [Map(found, name, title) for name, title in _MAPS]
