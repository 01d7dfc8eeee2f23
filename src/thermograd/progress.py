"""Progress bars for anything that takes longer than two seconds.

A bar shows on an interactive standard error only, and only once a second has passed, so that quick work
stays quiet and logs stay clean.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Cost", "bar", "track"]

_DELAY = 1.0  # seconds before a bar appears
_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """What a computation will take, as estimated before it starts.

    >>> str(Cost(seconds=90, bytes=3 * 2**29))
    'about 1.5 min, 1.5 GiB'
    """

    seconds: float
    bytes: float

    def __str__(self) -> str:
        time = f"{self.seconds / 60:.2g} min" if self.seconds >= 60 else f"{self.seconds:.2g} s"
        size = f"{self.bytes / 2**30:.2g} GiB" if self.bytes >= 2**30 else f"{self.bytes / 2**20:.3g} MiB"
        return f"about {time}, {size}"


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s")


class bar(AbstractContextManager["bar"]):
    """A progress bar as a context manager.

    Args:
        description: what is being done, a few words.
        total: how many steps in all; None when unknown.
        bytes: memory that the work takes; with it the text tells time and memory, from timing the first step.

    >>> with bar("counting", total=3) as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    >>> progress.done
    3
    """

    def __init__(self, description: str, total: int | None = None, bytes: float | None = None):
        self.description, self.total, self.done = description, total, 0
        self.bytes = bytes
        self.cost: Cost | None = None
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, steps: int = 1, description: str | None = None) -> None:
        """Count ``steps`` more as done; optionally change the text."""
        self.done += steps
        self.description = description or self.description
        if self.cost is None and self.bytes is not None and self.total and self.done:
            self.cost = Cost((time.monotonic() - self._started) / self.done * self.total, self.bytes)
            self.description += f", {self.cost}"
        if self._progress is None and time.monotonic() - self._started > _DELAY:
            self._show()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.done, description=self.description)

    def _show(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(self.description, total=self.total)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def track(
    iterable: Iterable[_T], description: str, total: int | None = None, bytes: float | None = None
) -> Iterator[_T]:
    """Iterate with a bar; ``bytes`` as there.

    >>> sum(track(range(4), "adding"))
    6
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, bytes) as progress:
        for item in iterable:
            yield item
            progress.advance()
