"""Run a compiled kernel over all replicas: blocks on threads (the kernels release the lock), with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import DataError, DivergedError
from ..progress import bar
from ..theory.arrays import Array

__all__ = ["check_counts", "check_finite", "run_blocks"]


def run_blocks(kernel: Callable[[int, int], None], replicas: int, description: str, threads: int | None) -> None:
    """Call ``kernel(first, last)`` for blocks that cover all replicas.

    The first block runs alone, so that the kernel is compiled once. An interrupt cancels what has not begun.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = threads or cores
    size = max(1, min(64, -(-replicas // (4 * workers))))
    blocks = [(first, min(first + size, replicas)) for first in range(0, replicas, size)]
    with bar(description, replicas) as progress:
        kernel(*blocks[0])
        progress.advance(blocks[0][1])
        with ThreadPoolExecutor(workers) as pool:
            running = [(pool.submit(kernel, *block), block) for block in blocks[1:]]
            try:
                for future, (first, last) in running:
                    future.result()
                    progress.advance(last - first)
            except BaseException:
                for future, _ in running:
                    future.cancel()
                raise


def check_counts(**counts: int) -> None:
    """Refuse counts that are not whole numbers of at least 1 (``burn_in`` and ``seed``: 0).

    Raises:
        DataError: a count is out of range.

    >>> check_counts(steps=10, burn_in=0)
    """
    for name, value in counts.items():
        least = 0 if name in ("burn_in", "seed") else 1
        if not float(value).is_integer() or value < least:
            raise DataError(f"{name} is {value}", expected=f"a whole number >= {least}")


def check_finite(array: Array, what: str) -> None:
    """Refuse a simulation that ran away.

    Raises:
        DivergedError: NaN or infinity in the result.
    """
    if not np.all(np.isfinite(array)):
        replicas = int(np.count_nonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise DivergedError(
            f"{replicas} of {len(array)} replicas of {what} ran away",
            expected="finite weights",
            remedy="lower the learning rate or step size, or raise the batch size; theory.stability gives the bounds",
        )
