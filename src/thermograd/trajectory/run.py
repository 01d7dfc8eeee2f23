"""A run as an xarray.DataTree: opening it, and writing measurements into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import xarray

from ..errors import InputError, StoreError
from .lazy import committed_variable
from .lock import WriterLock
from .store import STORE, ensure_root, read_group_json

__all__ = ["open_run", "write_group"]

_EAGER_BYTES = 64 * 2**20  # groups up to this size are read at once, so that rewriting one does not pull it away


def open_run(path: str | os.PathLike[str] | xarray.DataTree) -> xarray.DataTree:
    """Open a run: its trajectory cut to the committed rows, and every group of measurements.

    Weights are read from disk only when and where they are indexed. A run that is being recorded may be opened; it
    shows the rows that were committed at that moment.

    Args:
        path: the run's folder (or the ``store.zarr`` in it); an open run is returned as it is.

    Returns:
        A tree with the groups ``/trajectory`` (when something was recorded), ``/landscape``, ``/noise``, ``/laws``, ...

    Raises:
        StoreError: nothing is there, it is not a run, or it is damaged.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write_group(folder, "noise", xarray.Dataset({"strength": 0.5}))
    >>> float(open_run(folder)["noise/strength"])
    0.5
    """
    if isinstance(path, xarray.DataTree):
        return path
    folder = _run_folder(path)
    root = folder / STORE
    groups: dict[str, xarray.Dataset] = {"/": xarray.Dataset(attrs={"path": str(folder)})}
    if (root / "trajectory").exists():
        groups["/trajectory"] = _open_trajectory(root / "trajectory")
    for name, place in _group_folders(root).items():
        groups.update(_open_group(f"/{name}", place))
    return xarray.DataTree.from_dict(groups, name=folder.name)


def write_group(path: str | os.PathLike[str], name: str, dataset: Any) -> None:
    """Write (or replace) a group of measurements of a run with all that is in it, at one stroke.

    Args:
        path: the run's folder, made when absent.
        name: the group, such as ``"landscape"`` or ``"laws/summary"``.
        dataset: an :class:`xarray.Dataset`, or a measurement with ``to_xarray()``.

    Raises:
        InputError: the name is not that of a group that may be written.
        StoreError: writing failed; what was there before is kept.
    """
    folder = Path(path)
    parts = name.strip("/").split("/")
    if not all(part and part.isprintable() and part[0] not in "._" for part in parts) or parts[0] == "trajectory":
        raise InputError(
            f"the group name is {name!r}", expected="a name such as 'landscape' or 'laws/summary', not 'trajectory'"
        )
    if not isinstance(dataset, xarray.Dataset):
        dataset = dataset.to_xarray()
    new = folder / f".group-{uuid.uuid4().hex}"
    try:
        ensure_root(folder)
        with warnings.catch_warnings():  # zarr warns of text arrays, whose layout in zarr v3 is not final
            warnings.simplefilter("ignore")
            _plain(dataset).to_zarr(new, mode="w", zarr_format=3, consolidated=False)
        lock = _wait_for(folder / ".groups.lock")
        try:
            _swap(new, folder / STORE, parts)
        finally:
            lock.release()
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"the group {name!r} cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _run_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.name == STORE:
        folder = folder.parent
    if not folder.exists():
        raise StoreError(f"{folder} does not exist", expected="the folder of a run", remedy="check the path")
    if not (folder / STORE / "zarr.json").is_file():
        raise StoreError(
            f"{folder} is not a run",
            expected=f"a folder with a {STORE} that a Recorder or `thermograd run` made",
            remedy="check the path; a run that was killed before its first step holds nothing yet",
        )
    return folder


def _open_trajectory(place: Path) -> xarray.Dataset:
    attrs = read_group_json(place)["attributes"]
    rows = int(attrs["rows"])
    variables = {}
    for file in sorted(place.glob("*/zarr.json")):
        name = file.parent.name
        variables[name] = committed_variable(file.parent, None if name == "theta_initial" else rows)
    if "theta" not in variables or "step" not in variables:
        raise StoreError(f"{place} has no theta or no step", remedy="restore it from a copy, or record anew")
    step = variables.pop("step").load()
    return xarray.Dataset(variables, {"step": step}, attrs)


def _group_folders(root: Path) -> dict[str, Path]:
    """Measurement groups by name. One that a killed writer had just moved aside is found under its old place."""
    found: dict[str, Path] = {}
    for place in sorted(root.iterdir()):
        if place.name.startswith(_ASIDE):
            found.setdefault(place.name[len(_ASIDE) :].rpartition("-")[0], place)
        elif place.name != "trajectory" and not place.name.startswith(".") and (place / "zarr.json").is_file():
            found[place.name] = place
    return found


_ASIDE = ".old-"


def _open_group(name: str, place: Path) -> dict[str, xarray.Dataset]:
    """A group and the groups in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = xarray.open_dataset(
                place, engine="zarr", consolidated=False, decode_times=False, decode_timedelta=False
            )
            if dataset.nbytes <= _EAGER_BYTES:
                dataset.load()
    except Exception as error:  # zarr and xarray raise a different type for each kind of damage
        raise StoreError(
            f"the group {name} in {place} cannot be read: {error}", remedy="measure it anew, or remove that folder"
        ) from error
    groups = {name: dataset}
    arrays = set(dataset.variables)
    for child in sorted(place.iterdir()):
        if child.name not in arrays and not child.name.startswith(".") and (child / "zarr.json").is_file():
            groups.update(_open_group(f"{name}/{child.name}", child))
    return groups


def _plain(dataset: xarray.Dataset) -> xarray.Dataset:
    """A copy without the encoding of the store it may have come from, its attributes fit for JSON."""
    dataset = dataset.drop_encoding()
    dataset.attrs = {key: _plain_value(value) for key, value in dataset.attrs.items()}
    for variable in dataset.variables.values():
        variable.attrs = {key: _plain_value(value) for key, value in variable.attrs.items()}
    return dataset


def _plain_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain_value(item) for item in value]
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)


def _swap(new: Path, root: Path, parts: list[str]) -> None:
    parent = root
    for part in parts[:-1]:
        parent = parent / part
        if not (parent / "zarr.json").exists():
            parent.mkdir(exist_ok=True)
            shutil.copy(root / "zarr.json", parent / "zarr.json")  # an empty group
    target = parent / parts[-1]
    stale = list(parent.glob(f"{_ASIDE}{parts[-1]}-*"))
    if target.exists():
        aside = parent / f"{_ASIDE}{parts[-1]}-{uuid.uuid4().hex}"
        os.rename(target, aside)
        stale.append(aside)
    os.rename(new, target)
    for old in stale:
        shutil.rmtree(old, ignore_errors=True)


def _wait_for(path: Path, seconds: float = 30.0) -> WriterLock:
    """The lock for swapping groups, which nobody holds for more than an instant."""
    import time

    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StoreError):
            return WriterLock(path)
        if time.monotonic() > end:
            return WriterLock(path)
        time.sleep(0.01)
