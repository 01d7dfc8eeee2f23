"""A comparison of constraints on a sequence of tasks: choose on validation data, then repeat with other seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DivergedError, InputError, NonFiniteError
from ..progress import bar
from .comparison import Comparison, Trial, compare
from .learning import Cell, constraint_of, learn, path_rows
from .settings import MethodSettings, Settings, load
from .streams import Stream, stream

__all__ = ["Choice", "run"]

_SELECTION = 500_000  # selection seeds lie so far from those that are reported
_VERSION = 1  # of what a cell means: a change makes kept cells void


@dataclass(frozen=True)
class Choice:
    """One setting of a method's hyperparameters."""

    method: str
    kind: str
    strength: float
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """The constraint's keyword arguments."""
        return dict(self.options)


def run(
    config: Settings | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    fresh: bool = False,
) -> Comparison:
    """Run a comparison that a configuration describes.

    Every setting of every method learns the stream with ``selection_seeds`` seeds; the setting whose average accuracy
    on the validation parts is highest after the last task is repeated with ``seeds`` other seeds, and these are
    reported on the test parts. What is finished is kept in ``out``: an interrupted comparison goes on from there.

    Args:
        config: settings, nested dictionaries of them, or the path of a TOML file.
        out: folder of the results; default: that of the configuration; None and none there keeps nothing.
        fresh: run again what was run before.

    Returns:
        The :class:`~thermograd.continual.Comparison`, written to ``out`` as ``comparison.json``,
        ``comparison.nc`` (netCDF, for ``xarray.open_dataset``), ``table.md`` and ``figure.svg``.

    Raises:
        ConfigError, InputError: a bad configuration; DataError: the data are absent.
    """
    if isinstance(config, Settings):
        settings = config
    else:
        settings = Settings.from_dict(config) if isinstance(config, Mapping) else load(config)
    place = out or settings.protocol.out
    bench = _Bench(settings, None if place is None else Path(place), fresh)
    found = bench.compare()
    if place is not None:
        found.save(place)
    return found


class _Bench:
    """Cells of one comparison: made once, kept in files."""

    def __init__(self, settings: Settings, folder: Path | None, fresh: bool):
        self.settings, self.folder, self.fresh = settings, folder, fresh
        if folder is not None:
            _make(folder / "cells")
        part = settings.stream
        self.stream: Stream = stream(
            part.data, part.scenario, part.tasks, folder=part.folder, n=part.n, n_test=part.n_test,
            validation=part.validation, standardise=part.standardise,
        )  # fmt: skip
        self.choices = {name: _choices(name, method) for name, method in settings.methods.items()}
        for choices in self.choices.values():
            for choice in choices:  # refuse a bad option now, not after an hour
                path_rows(
                    constraint_of(choice.kind, choice.strength, choice.arguments, None, 0),
                    self.stream,
                    settings.training,
                )
        kept = settings.model_dump(
            exclude={"methods": True, "protocol": {"seeds", "selection_seeds", "seed", "baseline", "out"}}
        )
        kept["stream"].pop("folder")
        if not part.standardise:  # cells are older than this key
            kept["stream"].pop("standardise")
        self.common = json.dumps([_VERSION, kept], sort_keys=True)

    def compare(self) -> Comparison:
        protocol = self.settings.protocol
        seeds = [protocol.seed + i for i in range(protocol.seeds)]
        choosing = [protocol.seed + _SELECTION + i for i in range(protocol.selection_seeds)]
        cells = sum(len(c) * len(choosing) for c in self.choices.values() if len(c) > 1) + len(self.choices) * len(
            seeds
        )
        trials: list[Trial] = []
        chosen: dict[str, Choice] = {}
        reported: dict[str, list[Cell]] = {}
        with bar("continual learning", cells) as progress:
            for name, choices in self.choices.items():
                if len(choices) > 1:
                    tried = []
                    for choice in choices:
                        found = []
                        for seed in choosing:
                            found.append(self.cell(choice, seed))
                            progress.advance(1, f"{name}, choosing")
                        tried.append(_trial(choice, found))
                    trials += tried
                    chosen[name] = choices[int(np.argmax([trial.validation for trial in tried]))]
                else:
                    chosen[name] = choices[0]
            for name, choice in chosen.items():
                reported[name] = []
                for seed in seeds:
                    reported[name].append(self.cell(choice, seed))
                    progress.advance(1, f"{name}, seeds that count")
        if all(cell.diverged for cells in reported.values() for cell in cells):
            raise DivergedError(
                "the weights stopped being finite in every run",
                remedy=f"lower training.lr = {self.settings.training.lr:g}",
            )
        at_edge = {name: _at_edge(chosen[name], self.choices[name]) for name in chosen}
        described = {name: _described(choice) for name, choice in chosen.items()}
        return compare(reported, described, at_edge, trials, seeds, protocol.baseline, self.title)

    @property
    def title(self) -> str:
        """The stream in words."""
        part = self.settings.stream
        return f"{part.data}, {part.tasks} tasks, {part.scenario}"

    def cell(self, choice: Choice, seed: int) -> Cell:
        """One run, from its file where there is one."""
        path = self._path(choice, seed)
        kept = None if path is None or self.fresh else _kept(path)
        if kept is not None:
            return kept
        try:
            cell = learn(self.stream, self.settings, choice.kind, choice.strength, choice.arguments, seed)
        except NonFiniteError:  # a setting that diverges is one that is not chosen
            empty = [[0.0] * len(self.stream.tasks) for _ in self.stream.tasks]
            cell = Cell(test=empty, validation=empty)
        if path is not None:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(asdict(cell)), encoding="utf-8")
            os.replace(new, path)
        return cell

    def _path(self, choice: Choice, seed: int) -> Path | None:
        if self.folder is None:
            return None
        plain = [choice.kind, choice.strength, [[k, repr(v)] for k, v in choice.options], seed]
        digest = hashlib.sha256((self.common + json.dumps(plain)).encode()).hexdigest()[:16]
        return self.folder / "cells" / f"{choice.kind}-{choice.strength:g}-{seed}-{digest}.json"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"results cannot be kept in {folder.parent}: {error.strerror or error}",
            expected="a folder, or a place where one can be made",
        ) from None


def _kept(path: Path) -> Cell | None:
    """The cell in a file; None where there is none, or none that can be read."""
    try:
        return Cell(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _choices(name: str, method: MethodSettings) -> list[Choice]:
    """Every setting of a method, in the order of the strengths for each of the other arguments."""
    kind = method.kind
    assert kind is not None
    for key, values in method.grid.items():
        if not values:
            raise InputError(f"methods.{name}.grid.{key} is empty", expected="the values to choose from")
    found = []
    for combination in itertools.product(*method.grid.values()):
        options = {**method.options, **dict(zip(method.grid, combination))}
        frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(options.items()))
        found += [Choice(name, kind, strength, frozen) for strength in method.strengths or [0.0]]
    return found


def _trial(choice: Choice, cells: list[Cell]) -> Trial:
    validation = float(np.mean([np.nanmean(cell.validation[-1]) for cell in cells]))
    old = [1 - float(np.mean(cell.test[-1][:-1])) for cell in cells]
    new = [1 - cell.test[-1][-1] for cell in cells]
    options = ", ".join(f"{k}={v}" for k, v in choice.options)
    return Trial(choice.method, choice.strength, options, validation, tuple(old), tuple(new))


def _at_edge(choice: Choice, choices: list[Choice]) -> bool:
    """Whether a larger or smaller strength than any in the grid might have been better."""
    strengths = [c.strength for c in choices]
    return len(set(strengths)) > 1 and choice.strength in (min(strengths), max(strengths))


def _described(choice: Choice) -> str:
    if choice.kind in ("none", "joint"):
        return ""
    text = [f"strength={choice.strength:g}"]
    return ", ".join(text + [f"{k}={'inf' if v == math.inf else v}" for k, v in choice.options])
