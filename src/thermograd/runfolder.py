"""The folder of a configured run: whose it is, its checkpoint, and the problem rebuilt from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import config as configuration
from .building import build
from .config import Config
from .errors import ConfigError, StoreError
from .problem import Problem
from .trajectory.lock import WriterLock

__all__ = [
    "CONFIG",
    "claim",
    "is_complete",
    "read_checkpoint",
    "rebuild",
    "refuse_other_run",
    "total_steps",
    "write_checkpoint",
    "write_config",
]

CONFIG, CHECKPOINT = "config.toml", "checkpoint.pt"
_MADE_HERE = (CONFIG, CHECKPOINT, "report.html")
_FORMAT = 1


def total_steps(config: Config) -> int:
    """Steps trained in all: burn-in and recorded."""
    return config.training.burn_in_steps + config.training.steps


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Whether the run in this folder was made from a configuration and trained to its end."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        return False
    saved = read_checkpoint(folder)
    return saved is not None and saved["step"] == total_steps(configuration.load(folder / CONFIG))


def of_configuration(path: str | os.PathLike[str], own_loop: str) -> Path:
    """The folder of a run made from a configuration; ``own_loop`` is what to do with another.

    Raises:
        StoreError: the folder is not such a run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise StoreError(f"{folder} does not exist", expected="the folder of a run", remedy="check the path")
    if not (folder / CONFIG).is_file():
        raise StoreError(
            f"{folder} has no {CONFIG}",
            expected="a run made by `thermograd run` or `thermograd demo`",
            remedy=f"for a run of your own loop, {own_loop}",
        )
    return folder


def rebuild(path: str | os.PathLike[str]) -> Problem:
    """The problem of a run made from a configuration, its model at the last checkpoint.

    Raises:
        StoreError: the folder is not such a run.
    """
    folder = of_configuration(path, "call thermograd.check(path, problem) in Python")
    saved = read_checkpoint(folder)
    if saved is None:
        raise StoreError(f"{folder} has no {CHECKPOINT}", remedy="start the run again to resume it")
    problem = build(configuration.load(folder / CONFIG)).problem
    assert problem.model is not None
    problem.model.load_state_dict(saved["model"])
    return problem


def refuse_other_run(folder: Path, config: Config) -> None:
    """Refuse a folder that holds something else than a run of this configuration.

    Raises:
        ConfigError: it holds a run of another configuration; the differences are named.
        StoreError: it holds a run that was not made from a configuration.
    """
    if not (folder / CONFIG).is_file():
        if (folder / "store.zarr").exists():
            raise StoreError(
                f"{folder} holds a run that was not made from a configuration",
                expected="a new folder or an interrupted run of the same configuration",
                remedy="choose another folder, or overwrite it",
            )
        return
    present = configuration.load(folder / CONFIG)
    if not config.trains_like(present):
        theirs, mine = (c.replace("run", out=None, path=[]) for c in (present, config))
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(theirs.differences(mine)[:5])})",
            expected="the configuration that the run was started with",
            remedy="choose another folder with --out, or pass --overwrite to start anew",
        )


def claim(folder: Path, config: Config, overwrite: bool) -> None:
    """Make the folder this configuration's; clear another run away if asked. What to measure may have changed."""
    if overwrite:
        for name in _MADE_HERE:
            (folder / name).unlink(missing_ok=True)
        _remove_store(folder)
    refuse_other_run(folder, config)
    write_config(folder, config)


def _remove_store(folder: Path) -> None:
    if (folder / "store.zarr").exists():
        lock = WriterLock(folder / ".recording.lock")  # refuses while somebody records into it
        try:
            shutil.rmtree(folder / "store.zarr")
        finally:
            lock.release()


def write_config(folder: Path, config: Config) -> None:
    """Replace the configuration kept in the folder, every default filled in."""
    text = config.replace("run", out=None).to_toml()
    new = folder / f".{CONFIG}.new"
    new.write_text(f"# every setting of this run, defaults included\n{text}", encoding="utf-8")
    os.replace(new, folder / CONFIG)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, None where there is none yet.

    Raises:
        StoreError: it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["format"] != _FORMAT:
            raise ValueError(f"format {saved['format']}")
    except Exception as error:  # torch raises a different type for each kind of damage
        raise StoreError(
            f"{path} cannot be read: {error}",
            expected="a checkpoint of this version of thermograd",
            remedy="delete it and start the run again, with --overwrite",
        ) from error
    return saved


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace the checkpoint at one stroke, so that a kill leaves the old or the new one.

    Raises:
        StoreError: writing failed (a full disk, say); the old checkpoint is kept.
    """
    new = folder / f".{CHECKPOINT}.new"
    try:
        with open(new, "wb") as file:
            torch.save({**content, "format": _FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / CHECKPOINT)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        raise StoreError(f"the checkpoint cannot be written to {folder}: {error}") from error
