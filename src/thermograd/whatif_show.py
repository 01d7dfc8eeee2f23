"""Predictions and validations on the terminal, and their page in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .errors import StoreError
from .prediction import Predictions, advise
from .prediction import predict as predict_measured
from .prediction.show import columns, flags, heading, number, raised, rows
from .prediction.show import sweep as sweep_of
from .prediction.validation import Validation, load
from .report import prediction_html
from .report.prediction_page import unflagged
from .trajectory import open_run
from .whatif import VALIDATION, measured_run, validate

if TYPE_CHECKING:
    import xarray

__all__ = ["kept_page", "predict_and_show", "validate_and_show"]

_SIDE_BY_SIDE = 4  # settings shown as columns
_LABEL, _COLUMN = 46, 18  # characters that the labels and a setting take


def predict_and_show(
    console: Console, path: Path, asked: dict[str, Any], *, steps: int | None, sweep: bool, budget: int | None
) -> Path:
    """Predict, print the table, write the page; its path is returned."""
    ready = measured_run(path, steps=steps)
    problem = ready.forecast.standing.problem
    found = predict_measured(path, problem, **asked, steps=steps, measured=ready)
    settings = columns(found)
    console.print()
    if len(settings) <= _SIDE_BY_SIDE:
        fit = max(1, (console.width - _LABEL) // _COLUMN)
        for start in range(0, len(settings), fit):
            console.print(_columns_table(settings[start : start + fit]))
    else:
        console.print(_rows_table(settings))
    for names, sentence in raised(settings):
        console.print(f"[yellow]Flag[/] ({names}): {sentence}", highlight=False)
    console.print(
        f"Excess is over {found.attrs['bottom']:.5g}, what noise-free descent reaches in {found.attrs['steps']} "
        f"steps; the run itself: {found.attrs['run_loss']:.5g}.",
        highlight=False,
    )
    if budget is not None:
        console.print(str(advise(ready, budget)), highlight=False)
    swept = sweep_of(ready) if sweep else None
    return prediction_html(found, path, swept, _kept_validation(path))


def validate_and_show(console: Console, path: Path, *, fresh: bool, **options: Any) -> Path:
    """Validate, print predicted against observed, write the page; its path is returned."""
    found = validate(path, fresh=fresh, **options)
    table = Table(box=None, header_style="bold")
    for name in ("lr", "batch", "momentum", "predicted", "observed", "error", "flag"):
        table.add_column(name, justify="left" if name == "flag" else "right")
    error = found.relative_error
    for i, flag in enumerate(found.flags):
        table.add_row(
            number(found.lr[i]), f"{found.batch_size[i]:.0f}", number(found.momentum[i]),
            f"{number(found.predicted[i])} ± {number(found.predicted_stderr[i])}",
            f"{number(found.observed[i])} ± {number(found.observed_stderr[i])}",
            f"{100 * error[i]:+.0f}%" if np.isfinite(error[i]) else number(error[i]), "up" if flag else "",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Median relative error of the excess: {100 * found.median_error:.1f}% over {len(error)} settings, "
        f"{unflagged(found)}; rank correlation {found.rank_correlation:.3f}; "
        f"{len(found.failures)} settings off by more than 30% without a flag.",
        highlight=False,
    )
    ready = measured_run(path, steps=options.get("steps"), drop_last=False)
    return prediction_html(_own(ready, path), path, None, found)


def kept_page(path: Path) -> Path | None:
    """Write the page of a run whose predictions were measured before, from what is kept; None where none were."""
    if "prediction" not in open_run(path).children:
        return None
    steps = int(open_run(path)["prediction"].attrs["asked_steps"]) or None
    ready = measured_run(path, steps=steps)
    return prediction_html(_own(ready, path), path, sweep_of(ready), _kept_validation(path))


def _own(ready: Predictions, path: Path) -> xarray.Dataset:
    return predict_measured(path, ready.forecast.standing.problem, measured=ready)


def _kept_validation(path: Path) -> Validation | None:
    try:
        return load(path / VALIDATION)
    except StoreError:
        return None


def _columns_table(settings: list[xarray.Dataset]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for one in settings:
        table.add_column(heading(one), justify="right", overflow="fold")
    tables = [dict(rows(one)) for one in settings]
    for label in tables[0]:
        table.add_row(label, *(each.get(label, "–") for each in tables))
    return table


def _rows_table(settings: list[xarray.Dataset]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("setting", "excess", "floor", "steps to equilibrate", "margin", "noise gain", "flag"):
        table.add_column(name, justify="left" if name in ("setting", "flag") else "right")
    for one in settings:
        table.add_row(
            heading(one), f"{number(float(one['excess_loss']))} ± {number(float(one['excess_loss_stderr']))}",
            *(
                number(float(one[name]))
                for name in ("stationary_excess_loss", "equilibration_steps", "sharpness_margin", "noise_gain")
            ),
            "up" if flags(one) else "",
        )  # fmt: skip
    return table
