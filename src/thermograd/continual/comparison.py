"""What a comparison found: accuracies, forgetting, cost, trade-off curves, and a paired test against the baseline."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ..measurement import Measurement, new_axes, quantity

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

    from .learning import Cell

__all__ = ["Comparison", "Trial", "compare", "mean_interval", "paired"]

_LEGEND_INSIDE = 8  # so many methods have room in the axes


@dataclass(frozen=True)
class Trial:
    """One setting of a method as the selection seeds saw it.

    Args:
        method: its name.
        strength: of the constraint.
        options: the other arguments, in words.
        validation: average accuracy on the validation parts after the last task, the mean over seeds.
        old_error: epsilon_1, test error averaged over all tasks but the last, after the last; one for each seed.
        new_error: epsilon_2, test error on the last task; one for each seed.
    """

    method: str
    strength: float
    options: str
    validation: float
    old_error: tuple[float, ...]
    new_error: tuple[float, ...]


@dataclass(frozen=True)
class Comparison(Measurement):
    """Methods on one sequence of tasks, each with the hyperparameters that did best on validation data.

    Average accuracy is the mean over tasks of the test accuracy after the last; forgetting is the mean over all tasks
    but the last of the highest accuracy the task ever had, less its accuracy after the last. ``p_value`` is that of
    a paired t test of the average accuracies against the baseline's, seed by seed, both sides.
    """

    method: np.ndarray = quantity("method", long_name="method")
    seed: np.ndarray = quantity("seed", long_name="seed")
    accuracy: np.ndarray = quantity("method", "seed", "after", "task", long_name="test accuracy; NaN for tasks to come")
    average_accuracy: np.ndarray = quantity("method", "seed", long_name="average test accuracy after the last task")
    forgetting: np.ndarray = quantity("method", "seed", long_name="forgetting")
    memory: np.ndarray = quantity("method", long_name="numbers stored between tasks")
    weights: int = quantity(long_name="numbers of weights, P")
    fit_seconds: np.ndarray = quantity("method", units="s", long_name="time to measure finished tasks")
    hold_seconds: np.ndarray = quantity("method", units="s", long_name="time of proximal steps")
    train_seconds: np.ndarray = quantity("method", units="s", long_name="time of all else in training")
    difference: np.ndarray = quantity("method", long_name="average accuracy less the baseline's")
    difference_halfwidth: np.ndarray = quantity("method", long_name="half width of its 95 % interval, paired by seed")
    p_value: np.ndarray = quantity("method", long_name="of the paired t test against the baseline")
    settings: tuple[str, ...] = ()
    at_edge: tuple[bool, ...] = ()
    diverged: tuple[int, ...] = ()  # runs of the method whose weights stopped being finite; they count as accuracy 0
    trials: tuple[Trial, ...] = ()
    baseline: str = ""
    title: str = ""

    _primary = "average_accuracy"

    def to_xarray(self) -> xarray.Dataset:
        """All arrays, and the trade-off curves along ``trial``."""
        found = super().to_xarray().drop_attrs()
        found.attrs = {"measurement": "Comparison", "baseline": self.baseline, "title": self.title}
        found["setting"] = ("method", np.array(self.settings, dtype=object).astype(str))
        found["at_edge"] = ("method", np.array(self.at_edge, dtype=int))
        if self.trials:
            found["trial_method"] = ("trial", np.array([t.method for t in self.trials]))
            found["trial_strength"] = ("trial", np.array([t.strength for t in self.trials]))
            found["trial_options"] = ("trial", np.array([t.options for t in self.trials]))
            found["trial_validation"] = ("trial", np.array([t.validation for t in self.trials]))
            for name in ("old_error", "new_error"):
                values = np.array([getattr(t, name) for t in self.trials])
                found[f"trial_{name}"] = (("trial", "selection_seed"), values)
        return found

    @property
    def columns(self) -> list[str]:
        """Headings of :meth:`rows`; the test against the baseline only where there is one."""
        tested = [f"less {self.baseline}", "p"] if self.baseline in self.method else []
        cost = ["memory / P", "fit s", "hold s", "train s"]
        return ["method", "average accuracy", "forgetting", *tested, *cost, "chosen on validation"]

    def rows(self) -> list[list[str]]:
        """The table as text, a row for each method: mean ± half width of the 95 % t interval over seeds."""
        found = []
        for i, name in enumerate(self.method):
            accuracy, forgetting = (mean_interval(a[i]) for a in (self.average_accuracy, self.forgetting))
            tested = [f"{self.difference[i]:+.3f} ± {self.difference_halfwidth[i]:.3f}", _p(self.p_value[i])]
            if self.baseline not in self.method:
                tested = []
            elif name == self.baseline:
                tested = ["", ""]
            found.append([
                str(name),
                _pm(*accuracy),
                _pm(*forgetting),
                *tested,
                f"{self.memory[i] / self.weights:.2f}",
                f"{self.fit_seconds[i]:.2f}",
                f"{self.hold_seconds[i]:.2f}",
                f"{self.train_seconds[i]:.2f}",
                self._remarks(i),
            ])  # fmt: skip
        return found

    def _remarks(self, i: int) -> str:
        remarks = [self.settings[i] + (" (edge of its grid)" if self.at_edge[i] else "")]
        if self.diverged and self.diverged[i]:
            remarks.append(f"{self.diverged[i]} of {len(self.seed)} runs diverged")
        return "; ".join(remark for remark in remarks if remark)

    def to_markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def to_json(self) -> str:
        """Means, intervals, tests and trials as JSON."""
        methods = {}
        for i, name in enumerate(self.method):
            methods[str(name)] = {
                "average_accuracy": _numbers(self.average_accuracy[i]),
                "forgetting": _numbers(self.forgetting[i]),
                "difference": _number(self.difference[i]),
                "difference_halfwidth": _number(self.difference_halfwidth[i]),
                "p_value": _number(self.p_value[i]),
                "memory": int(self.memory[i]),
                "fit_seconds": float(self.fit_seconds[i]),
                "hold_seconds": float(self.hold_seconds[i]),
                "train_seconds": float(self.train_seconds[i]),
                "setting": self.settings[i],
                "at_edge": self.at_edge[i],
                "diverged": self.diverged[i] if self.diverged else 0,
            }
        trials = [dict(vars(trial)) for trial in self.trials]
        whole = {
            "title": self.title, "baseline": self.baseline, "weights": self.weights, "seeds": self.seed.tolist(),
            "methods": methods, "trials": trials,
        }  # fmt: skip
        return json.dumps(whole, indent=1, allow_nan=False)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The trade-off of Feng & Tu: error on the last task against error on earlier ones, along the strengths."""
        ax = new_axes(ax)
        curves: dict[tuple[str, str], list[Trial]] = {}
        for trial in self.trials:
            curves.setdefault((trial.method, trial.options), []).append(trial)
        looks = {str(name): (f"C{i % 10}", "os^D"[i // 10 % 4]) for i, name in enumerate(self.method)}
        named: set[str] = set()
        for (name, _), trials in curves.items():
            old, new = ([mean_interval(getattr(t, f"{w}_error")) for t in trials] for w in ("old", "new"))
            label = None if name in named else name
            named.add(name)
            ax.errorbar(
                [o[0] for o in old], [n[0] for n in new], [_bar(n[1]) for n in new], [_bar(o[1]) for o in old],
                fmt="-", color=looks[name][0], marker=looks[name][1], ms=3, lw=1, elinewidth=0.5, label=label,
            )  # fmt: skip
        for i, name in enumerate(self.method):
            if str(name) not in named:  # methods with nothing to choose: one point
                last = self.accuracy[i, :, -1]
                ax.plot(
                    1 - last[:, :-1].mean(), 1 - last[:, -1].mean(), "k*" if name == "joint" else "kx", label=str(name)
                )
        ax.set(xlabel=r"error on earlier tasks $\epsilon_1$", ylabel=r"error on the last task $\epsilon_2$")
        # the view is that of the means: intervals from two or three seeds reach far beyond what an error can be
        points = [mean_interval(values)[0] for t in self.trials for values in (t.old_error, t.new_error)]
        top = min(1.0, 1.1 * max([0.05, *points, float(1 - self.accuracy[:, :, -1].min())]))
        ax.set(xlim=(0, top), ylim=(0, top))
        ax.set_title(self.title, fontsize="medium")
        many: dict[str, Any] = (
            {"bbox_to_anchor": (1.0, 1.0), "loc": "upper left"} if len(self.method) > _LEGEND_INSIDE else {}
        )
        ax.legend(frameon=False, fontsize="x-small", **many)
        return ax

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``comparison.json``, ``comparison.nc``, ``table.md`` and ``figure.svg``."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / "comparison.json").write_text(self.to_json(), encoding="utf-8")
        (place / "table.md").write_text(self.to_markdown(), encoding="utf-8")
        self.to_xarray().to_netcdf(place / "comparison.nc", engine="scipy")
        figure = self.plot().figure
        figure.savefig(place / "figure.svg", bbox_inches="tight")  # type: ignore[union-attr]


def compare(
    cells: Mapping[str, Sequence[Cell]],
    settings: Mapping[str, str],
    at_edge: Mapping[str, bool],
    trials: Sequence[Trial],
    seeds: Sequence[int],
    baseline: str,
    title: str,
) -> Comparison:
    """Put the cells of the reported seeds together, method by method."""
    names = list(cells)
    accuracy = np.array([[cell.test for cell in cells[name]] for name in names], dtype=float)  # [m, s, T, T]
    average = accuracy[:, :, -1].mean(-1)
    best = np.nanmax(accuracy[..., :-1], axis=2)
    forgetting = (best - accuracy[:, :, -1, :-1]).mean(-1)
    tests = [paired(average[i], average[names.index(baseline)]) if baseline in names else (math.nan,) * 3
             for i in range(len(names))]  # fmt: skip
    seconds = {
        what: np.array([np.mean([getattr(cell, f"{what}_seconds") for cell in cells[name]]) for name in names])
        for what in ("fit", "hold", "train")
    }
    return Comparison(
        method=np.array(names),
        seed=np.array(seeds),
        accuracy=accuracy,
        average_accuracy=average,
        forgetting=forgetting,
        memory=np.array([max(cell.memory for cell in cells[name]) for name in names]),
        weights=max(cell.weights for name in names for cell in cells[name]),
        fit_seconds=seconds["fit"],
        hold_seconds=seconds["hold"],
        train_seconds=seconds["train"],
        difference=np.array([t[0] for t in tests]),
        difference_halfwidth=np.array([t[1] for t in tests]),
        p_value=np.array([t[2] for t in tests]),
        settings=tuple(settings[name] for name in names),
        at_edge=tuple(at_edge[name] for name in names),
        diverged=tuple(sum(cell.diverged for cell in cells[name]) for name in names),
        trials=tuple(trials),
        baseline=baseline,
        title=title,
    )


def mean_interval(values: Any) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval; NaN for the latter from fewer than two values.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    array = np.asarray(values, float)
    if len(array) < 2:
        return float(array.mean()), math.nan
    width = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean()), float(width)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean difference, half width of its 95 % t interval, and p of the paired t test, both sides.

    >>> difference, half, p = paired(np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.5, 2.5]))
    >>> difference, round(p, 3)
    (1.0, 0.074)
    """
    mean, half = mean_interval(a - b)
    if len(a) < 2 or float(np.ptp(a - b)) == 0:
        return mean, half, math.nan  # no spread, no test
    return mean, half, float(stats.ttest_rel(a, b).pvalue)


def _pm(mean: float, half: float) -> str:
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _bar(half: float) -> float:
    return 0.0 if math.isnan(half) else half


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def _numbers(values: np.ndarray) -> dict[str, Any]:
    mean, half = mean_interval(values)
    return {"mean": mean, "halfwidth95": _number(half), "seeds": [float(v) for v in values]}
