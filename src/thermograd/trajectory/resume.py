"""Where a recording that is opened again goes on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import StoreError
from .store import TrajectoryStore

__all__ = ["Start", "digest", "find_start", "refuse_other_recording"]


@dataclass(frozen=True)
class Start:
    """How recording begins: steps taken so far, the segment of the new rows, and the rows to keep."""

    step: int
    segment: int
    rows: int
    gap: str | None = None


def digest(theta: np.ndarray) -> str:
    """A fingerprint of weights, bit by bit."""
    return hashlib.blake2b(np.ascontiguousarray(theta).tobytes(), digest_size=16).hexdigest()


def find_start(store: TrajectoryStore, theta: np.ndarray, start_step: int | None) -> Start:
    """Decide from the present weights where in a recorded trajectory training stands.

    * With ``start_step`` (training was restored from a checkpoint taken at that step): when the row recorded at that
      step holds the present weights, later rows are to be dropped and the same segment goes on, as if nothing had
      happened. Otherwise nothing is dropped and a new segment begins.
    * Without: when the present weights are those at the end of the recording, it goes on. When they are those of an
      earlier row, a new segment begins at that step. When they were never recorded, a new segment begins and
      :attr:`Start.gap` says so.
    """
    if store.rows == 0:
        return Start(start_step or 0, 0, 0)
    steps, segments = store.read("step"), store.read("segment")
    last, fresh = int(steps[-1]), int(segments.max()) + 1
    if start_step is not None:
        return _at_step(store, theta, start_step, steps, segments)
    end = store.attrs.get("end") or {}
    if end.get("rows") == store.rows and end.get("weights") == digest(theta):
        return Start(int(end["step"]), int(segments[-1]), store.rows)
    row = _find_row(store, theta)
    if row == store.rows - 1:
        return Start(last, int(segments[-1]), store.rows)
    if row is not None:
        return Start(int(steps[row]) if row >= 0 else 0, fresh, store.rows)
    gap = f"the present weights are none of those recorded in {store.folder}; the new rows begin segment {fresh}"
    return Start(last, fresh, store.rows, gap)


def _at_step(
    store: TrajectoryStore, theta: np.ndarray, start_step: int, steps: np.ndarray, segments: np.ndarray
) -> Start:
    every = int(store.attrs["every"])
    recorded = start_step - start_step % every  # the last step up to start_step of which there should be a row
    found = np.flatnonzero(steps == recorded)
    if len(found):
        row = int(found[-1])
        if recorded < start_step or _same(store.read("theta", row, row + 1)[0], theta):
            return Start(start_step, int(segments[row]), row + 1)
    elif recorded == 0 and int(segments[-1]) == 0 and (start_step or _same(store.theta_initial, theta)):
        return Start(start_step, 0, 0)
    fresh = int(segments.max()) + 1
    gap = (
        f"the present weights (step {start_step}) are not those that {store.folder} holds for that step "
        f"(its last is {int(steps[-1])}); nothing is dropped and the new rows begin segment {fresh}"
    )
    return Start(start_step, fresh, store.rows, gap)


def _find_row(store: TrajectoryStore, theta: np.ndarray, block: int | None = None) -> int | None:
    """The last row that holds these weights; -1 for those before the first step; None."""
    block = block or max(1, 2**25 // max(1, theta.nbytes))
    for stop in range(store.rows, 0, -block):
        start = max(0, stop - block)
        rows = store.read("theta", start, stop)  # [b, P]
        hits = np.flatnonzero((rows == theta).all(axis=1))
        if len(hits):
            return start + int(hits[-1])
    return -1 if _same(store.theta_initial, theta) else None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def refuse_other_recording(store: TrajectoryStore, wanted: dict[str, Any], theta: np.ndarray) -> None:
    """Refuse to append rows of another kind than those that are there.

    Raises:
        StoreError: other weights, another interval, another precision; both values are named.
    """
    present = {**store.attrs, "dtype": str(store._arrays["theta"].dtype), "velocity": "velocity" in store._arrays}
    asked = {**wanted, "dtype": str(theta.dtype)}
    words = {
        "P": "weights",
        "names": "parameters",
        "shapes": "shapes of parameters",
        "every": "steps between rows",
        "dtype": "as precision of the weights",
        "velocity": "as whether velocities are recorded",
    }
    for key, word in words.items():
        if present.get(key) != asked[key]:
            raise StoreError(
                f"{store.folder} was recorded with {present.get(key)} {word}, this recorder has {asked[key]}",
                expected="the same, to append to that run",
                remedy="record into another folder, or pass overwrite=True to replace the run",
            )
