"""Running items: cached by what they are and how they are run, resumable, several at once."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, NotAvailableError
from .item import Bench, Item, Scale, items, keep
from .outcome import Outcome

__all__ = ["find", "is_kept", "reproduce", "reproduce_all", "result_folder"]

RESULT = "result.json"


def find(name: str) -> Item:
    """The item of that name.

    Raises:
        InputError: there is none.

    >>> find("mori/fig3b").paper
    'Mori et al. 2022'
    """
    known = items()
    if name in known:
        return known[name]
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    raise InputError(
        f"there is no item {name!r}" + (f" (did you mean {', '.join(close)}?)" if close else ""),
        expected="one that `thermograd reproduce --list` shows",
    )


def result_folder(
    item: Item, out: str | os.PathLike[str], scale: Scale, seeds: int, seed: int, data_folder: Path | None = None
) -> Path:
    """Where the result of these settings is kept; a changed protocol has a folder of its own."""
    settings = json.dumps([item.name, scale, seeds, seed, _protocol(item.run.__module__)])
    return Path(out) / item.name / f"{scale}-{seeds}x{seed}-{hashlib.sha256(settings.encode()).hexdigest()[:10]}"


def is_kept(item: Item, out: str | os.PathLike[str], scale: Scale, seeds: int, seed: int) -> bool:
    """Whether the result of these settings is there already."""
    return (result_folder(item, out, scale, seeds, seed) / RESULT).exists()


def _protocol(module: str) -> list[str]:
    """What a module and those beside it that it takes from do, without comments, docstrings and entries in the list."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            tree = ast.parse(inspect.getsource(importlib.import_module(name)))
            waiting += [f"{__package__}.{beside}" for beside in _beside(tree)]
            found[name] = ast.dump(_bare(tree))
    return [found[name] for name in sorted(found)]


def _beside(tree: ast.Module) -> list[str]:
    """The modules of this folder that it imports, but for the frame that items run in."""
    taken: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            taken += [node.module] if node.module else [name.name for name in node.names]
    return [name for name in taken if name not in ("item", "outcome")]


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    return tree


def reproduce(
    name: str,
    *,
    full: bool = False,
    seeds: int = 5,
    seed: int = 0,
    out: str | os.PathLike[str] = "reproductions",
    data_folder: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    scale: Scale | None = None,
) -> Outcome:
    """Run one figure or table of a paper and compare it with what was published.

    What was run before with the same settings is read, not run again. An interrupted item goes on with the parts
    that are missing.

    Args:
        name: as in :func:`items`, ``"mori/fig3b"``.
        full: at the paper's scale.
        seeds: how many independent repetitions, at least 2.
        seed: the first source of all random numbers.
        out: folder of the results.
        data_folder: where data sets lie.
        fresh: run again in any case.
        scale: in place of ``full``: ``"reduced"`` is what the tests run.

    Returns:
        ``.rows``, ``.panels``, ``.verdict``, ``.reason``.

    Raises:
        InputError: no such item, or fewer than two seeds.
        StoreError: the folder of the results cannot be written to.
    """
    if seeds < 2:
        raise InputError(f"seeds is {seeds}", expected="at least 2, for an error bar between seeds")
    if seed < 0:
        raise InputError(f"seed is {seed}", expected="a whole number >= 0")
    item, size = find(name), scale or ("full" if full else "default")
    place = None if data_folder is None else Path(data_folder)
    folder = result_folder(item, out, size, seeds, seed)
    if fresh and folder.exists():
        import shutil

        shutil.rmtree(folder)
    if (folder / RESULT).exists():
        return Outcome.from_json((folder / RESULT).read_text(encoding="utf-8"))
    drawn = tuple(int(s) for s in np.random.SeedSequence(seed).generate_state(seeds) >> 1)
    settings: dict[str, Any] = {"scale": size, "seeds": seeds, "seed": seed}
    clock = _Clock(folder / "seconds")
    clock.save()  # so that a folder that cannot be written to is known before hours of work
    try:
        with clock:
            outcome = item.run(Bench(size, drawn, folder, place))
    except NotAvailableError as error:
        return Outcome(unavailable=str(error), settings=settings)
    outcome = replace(outcome, settings=settings | {"seconds": round(clock.seconds, 1)})
    keep(folder / RESULT, lambda file: file.write(outcome.to_json().encode()))
    return outcome


class _Clock:
    """The time that an item took, over all the runs that it was interrupted in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self.began
        self.save()

    def save(self) -> None:
        keep(self.path, lambda file: file.write(str(self.seconds).encode()))


def reproduce_all(
    names: Sequence[str] | None = None, *, workers: int = 1, full: bool = False, seeds: int = 5, seed: int = 0,
    out: str | os.PathLike[str] = "reproductions", data_folder: str | os.PathLike[str] | None = None,
    fresh: bool = False, scale: Scale | None = None,
) -> dict[str, Outcome]:  # fmt: skip
    """Run several items, all by default; see :func:`reproduce`.

    Args:
        names: which; all by default.
        workers: how many at once, each in a process of its own.
        full: as in :func:`reproduce`, like what follows.
        seeds: repetitions.
        seed: of all random numbers.
        out: folder of the results.
        data_folder: where data sets lie.
        fresh: run again in any case.
        scale: in place of ``full``.

    Returns:
        Outcomes by name, in the order of ``names``.

    Raises:
        InputError: no such item, or fewer than one worker.
    """
    wanted = list(items()) if names is None else [find(name).name for name in names]
    if workers < 1:
        raise InputError(f"workers is {workers}", expected="at least 1")
    options = {
        "full": full, "seeds": seeds, "seed": seed, "out": out, "data_folder": data_folder, "fresh": fresh,
        "scale": scale,
    }  # fmt: skip
    if workers == 1 or len(wanted) == 1:
        return {name: reproduce(name, **options) for name in wanted}  # type: ignore[arg-type]
    import multiprocessing

    done: dict[str, Outcome] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(reproduce, name, **options): name for name in wanted}  # type: ignore[arg-type]
        for finished in as_completed(running):
            done[running[finished]] = finished.result()
    return {name: done[name] for name in wanted}
