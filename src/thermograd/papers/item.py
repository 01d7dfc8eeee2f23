"""An item: one figure or table of a paper as a function, and the bench that gives it seeds, data and a memory."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np

from ..data import Dataset, load
from ..errors import DataError, InputError, NotAvailableError, StoreError, ThermogradWarning
from ..progress import track
from .outcome import Outcome

__all__ = ["Bench", "Item", "Scale", "expected_warnings", "items", "keep", "register"]

Scale = Literal["reduced", "default", "full"]
_T = TypeVar("_T")
_A = TypeVar("_A")
_ITEMS: dict[str, Item] = {}


@dataclass(frozen=True)
class Item:
    """One figure or table of a paper.

    Args:
        name: ``"paper/figure"``.
        paper: as cited.
        title: what the figure shows, a few words.
        statement: what the paper concludes from it, one sentence.
        data: which data it needs, in words.
        cost: time at the default scale on two cores.
        full_cost: time at the paper's scale.
        run: the protocol.
    """

    name: str
    paper: str
    title: str
    statement: str
    data: str
    cost: str
    full_cost: str
    run: Callable[[Bench], Outcome] = field(compare=False)


def register(**facts: Any) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    """Decorate a protocol: enter it under its name."""

    def enter(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        item = Item(run=run, **facts)
        if item.name in _ITEMS:
            raise InputError(f"there are two items {item.name!r}", expected="names of their own")
        _ITEMS[item.name] = item
        return run

    return enter


def items() -> Mapping[str, Item]:
    """Every item by name, in the order of the papers."""
    # each enters its items
    from . import mori, mori_networks, mori_noise, xie, xie_kramers, xie_styblinski  # noqa: F401, I001
    from . import feng_tu, feng_tu_noise, kunin, kunin_networks, kunin_sweeps, corrections  # noqa: F401

    return _ITEMS


@functools.lru_cache(maxsize=4)  # several items of one process use the same images
def _loaded(name: str, folder: Path | None, split: Literal["train", "test"]) -> Dataset:
    return load(name, folder, split)


def _uninterrupted(make: Callable[[], _T]) -> _T:
    """What ``make`` returns, unless Ctrl-C cut short a simulation or measurement in it, which went on with less."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="interrupted", category=ThermogradWarning)
        try:
            return make()
        except ThermogradWarning as warning:
            if str(warning).startswith("interrupted"):
                raise KeyboardInterrupt(str(warning)) from warning
            raise


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Warnings that a protocol counts on, of thresholds never reached and the like, are not shown; interrupts pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThermogradWarning)
        warnings.filterwarnings("error", message="interrupted", category=ThermogradWarning)
        yield


def keep(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file at one stroke, so that a kill leaves the old one or the new one, and its folder if need be.

    Raises:
        StoreError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as file:
            write(file)
        os.replace(new, path)
    except OSError as error:
        raise StoreError(
            f"results cannot be written to {path.parent}: {error.strerror or error}",
            expected="a folder that can be written to",
            remedy="pass another one with --out, or make room there",
        ) from error


@dataclass(frozen=True)
class Bench:
    """What a protocol runs with.

    Args:
        scale: ``"default"`` fits two cores, ``"full"`` is the paper's, ``"reduced"`` is for tests.
        seeds: one per independent repetition.
        folder: where finished parts are kept, so that an interrupted item goes on from there.
        data_folder: where data sets lie; None as :func:`thermograd.data.load` finds them.
    """

    scale: Scale
    seeds: tuple[int, ...]
    folder: Path
    data_folder: Path | None = None

    def choose(self, reduced: _T, default: _T, full: _T) -> _T:
        """The setting for this scale."""
        return {"reduced": reduced, "default": default, "full": full}[self.scale]

    def part(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The arrays that ``make`` returns, made once and kept; what an interrupt cut short is not kept."""
        path = self.folder / "parts" / f"{re.sub(r'[^A-Za-z0-9.=,_-]+', '_', name)}.npz"
        if path.exists():
            with np.load(path) as kept:
                return dict(kept)
        made = {key: np.asarray(value) for key, value in _uninterrupted(make).items()}
        keep(path, lambda file: np.savez(file, **made))  # type: ignore[arg-type]
        return made

    def each(
        self, name: str, cases: Sequence[_A], make: Callable[[_A], Mapping[str, Any]]
    ) -> list[dict[str, np.ndarray]]:
        """``make`` for every case, each kept as a part."""
        return [self.part(f"{name}-{case}", lambda c=case: make(c)) for case in track(cases, name)]  # type: ignore[misc]

    def each_seed(self, name: str, make: Callable[[int], Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """``make`` for every seed."""
        return self.each(name, self.seeds, make)

    def data(self, name: str, n: int | None = None, split: Literal["train", "test"] = "train") -> Dataset:
        """A data set, the first ``n`` samples of it.

        Raises:
            NotAvailableError: it is not here.
        """
        try:
            return _loaded(name, self.data_folder, split).take(n)
        except DataError as error:
            remedy = f"{error.remedy}; on the command line: --data FOLDER" if error.remedy else None
            raise NotAvailableError(f"no {name}: {error.what}", expected=error.expected, remedy=remedy) from error
