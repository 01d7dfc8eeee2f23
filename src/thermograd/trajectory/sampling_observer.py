"""Finding out from the forward passes alone how many samples a step uses and how they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..hyperparameters import Sampling

__all__ = ["SamplingObserver", "sampling_scheme"]

_EPOCHS = 2.05  # epochs of draws to look at: each sample must have had the time to come back once
_ROUNDING = 1e-11  # two rows whose projections differ by less (relative) are the same row
_MAX_SIZES = 200  # batch sizes to look at


class SamplingObserver:
    """Watches the batches that a model is trained on.

    Each row of a batch is projected on one fixed random vector and found among the projections of the data set's
    rows, which tells the order in which samples are drawn (:func:`sampling_scheme`). Rows that are augmented, or
    converted in the training loop, are not found; the scheme then stays unknown. An observer never raises: whatever
    goes wrong ends the observation.

    Args:
        model: the module whose forward passes are watched; None watches nothing.
        inputs: the data set's inputs [N, ...] when they are one tensor, else None: batch sizes alone are noted.

    >>> model, X = nn.Linear(2, 1), torch.randn(40, 2)
    >>> observer = SamplingObserver(model, X)
    >>> for start in list(range(0, 40, 10)) * 3:
    ...     out = model(X[start : start + 10])
    ...     observer.heard_backward()
    ...     observer.end_step()
    >>> observer.batch_size, observer.conclude()
    (10, 'shuffle-once')
    """

    def __init__(self, model: nn.Module | None, inputs: Any = None):
        self._inputs = inputs if isinstance(inputs, Tensor) and inputs.ndim >= 2 else None
        self._last: tuple[int, Tensor | None] | None = None
        self._pending: list[tuple[int, Tensor | None]] = []
        self._sizes: list[int] = []
        self._keys: list[Tensor] = []
        self._draws = 0
        self._vector: Tensor | None = None
        self._batch_dtype: torch.dtype | None = None
        self._scheme: Sampling | None = None
        self._handle = None if model is None else model.register_forward_pre_hook(self._forward, with_kwargs=True)

    @property
    def active(self) -> bool:
        """Whether forward passes are still watched."""
        return self._handle is not None

    @property
    def batch_size(self) -> int | None:
        """The most frequent number of samples a step, the larger of two that are equally frequent."""
        return max(set(self._sizes), key=lambda size: (self._sizes.count(size), size)) if self._sizes else None

    @property
    def steps(self) -> int:
        """How many steps the batch sizes were taken from."""
        return len(self._sizes)

    @property
    def scheme(self) -> Sampling | None:
        """The sampling scheme, once :meth:`conclude` has found it."""
        return self._scheme

    def _forward(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        try:
            batch = next(leaf for leaf in tree_flatten((args, keywords))[0] if isinstance(leaf, Tensor) and leaf.ndim)
            self._last = (len(batch), self._project(batch) if self._inputs is not None else None)
        except Exception:  # watching must not disturb the training
            self.stop()

    def _project(self, batch: Tensor) -> Tensor:
        """One number a row, on the batch's device."""
        rows = batch.detach().reshape(len(batch), -1).to(torch.float64)
        if self._vector is None or len(self._vector) != rows.shape[1]:
            generator = torch.Generator().manual_seed(0)
            self._vector = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
            self._batch_dtype = batch.dtype
        self._vector = self._vector.to(rows.device)
        return rows @ self._vector

    def heard_backward(self) -> None:
        """The last forward pass was one of training: count its batch."""
        if self._last is not None:
            self._pending.append(self._last)
            self._last = None

    def discard(self) -> None:
        """The gradients of the backward passes since the last step were thrown away."""
        self._pending = []

    def end_step(self) -> None:
        """The batches heard since the last step make up one step."""
        pending, self._pending, self._last = self._pending, [], None
        if not pending or not self.active:
            return
        size = sum(length for length, _ in pending)
        self._draws += size
        if len(self._sizes) < _MAX_SIZES:
            self._sizes.append(size)
        self._keys += [keys for _, keys in pending if keys is not None]
        enough = _EPOCHS * len(self._inputs) if self._inputs is not None else 0
        if self._draws > enough and (self._inputs is not None or len(self._sizes) >= _MAX_SIZES):
            self.conclude()
            self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def conclude(self) -> Sampling | None:
        """The sampling scheme as far as it can be told, else None."""
        if self._scheme is None and self._keys and self._inputs is not None and self.batch_size:
            try:
                drawn = torch.cat([keys.cpu() for keys in self._keys]).numpy()
                self._scheme = sampling_scheme(self._match(drawn), len(self._inputs), self.batch_size)
            except Exception:  # shapes that do not fit the data set's rows, say
                self._scheme = None
            if not self.active or self._draws > _EPOCHS * len(self._inputs):
                self._keys = []
        return self._scheme

    def _match(self, drawn: np.ndarray) -> np.ndarray:
        """Index of the data set's row of each draw: -1 for rows that occur more than once, -2 for unknown rows."""
        assert self._inputs is not None
        blocks = self._inputs.split(4096)
        table = torch.cat([self._project(block.to(self._batch_dtype)).cpu() for block in blocks]).numpy()  # [N]
        order = np.argsort(table)
        ordered = table[order]
        tolerance = _ROUNDING * float(np.abs(ordered).max() + 1e-300)
        near = np.diff(ordered) <= tolerance
        twin = np.append(near, False) | np.append(False, near)
        place = np.clip(np.searchsorted(ordered, drawn - tolerance), 0, len(ordered) - 1)
        found = np.abs(ordered[place] - drawn) <= 2 * tolerance
        return np.where(found, np.where(twin[place], -1, order[place]), -2)


def sampling_scheme(drawn: np.ndarray, dataset_size: int, batch_size: int) -> Sampling | None:
    """Tell from the order of draws how samples are drawn.

    Without replacement the sequence falls into blocks of one epoch in which nothing repeats. So every pair of
    equal draws closer than an epoch must have one of the equally spaced block boundaries between its two members:
    a boundary position common to all pairs exists, which with replacement happens with a probability below 1e-5
    once n^2/2N > 12 for n draws (the expected number of pairs). A sequence in which every sample comes back after
    exactly one epoch has one order throughout.

    Args:
        drawn: index of the sample of each draw, in order; negative for draws that are not known.
        dataset_size: N.
        batch_size: B; with ``drop_last`` an epoch has only B floor(N/B) draws.

    Returns:
        The scheme, or None when the draws do not tell.

    >>> rng = np.random.default_rng(0)
    >>> sampling_scheme(np.concatenate([rng.permutation(50) for _ in range(3)]), 50, 7)
    'reshuffle'
    >>> sampling_scheme(rng.integers(0, 50, 150), 50, 7)
    'replacement'
    """
    known = drawn >= 0
    if np.mean(drawn == -2) > 0.02 or known.mean() < 0.5 or known.sum() ** 2 < 24 * dataset_size:
        return None
    before, after = _repeats(drawn)
    epochs = {dataset_size, dataset_size // batch_size * batch_size} - {0}
    fitting = [epoch for epoch in epochs if _has_boundary(before, after, epoch)]
    if not fitting:
        return "replacement"
    if len(before) < 10:
        return None  # nothing came back yet: the order of the next epoch is not known
    gaps = after - before
    return "shuffle-once" if any(np.all(gaps == epoch) for epoch in fitting) else "reshuffle"


def _repeats(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of each draw's previous occurrence and of the draw."""
    order = np.argsort(drawn, kind="stable")
    same = (np.diff(drawn[order]) == 0) & (drawn[order][1:] >= 0)
    return order[:-1][same], order[1:][same]


def _has_boundary(before: np.ndarray, after: np.ndarray, epoch: int) -> bool:
    """Whether some position modulo the epoch lies in (before, after] for all pairs closer than an epoch."""
    close = after - before < epoch
    low, high = (before[close] + 1) % epoch, (after[close] + 1) % epoch  # half-open, may wrap around
    count = np.zeros(epoch + 1, dtype=np.int64)
    np.add.at(count, low, 1)
    np.add.at(count, high, -1)
    wraps = int((high < low).sum())
    return bool((np.cumsum(count[:-1]) + wraps == close.sum()).any())
