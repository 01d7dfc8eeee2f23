"""Which samples make up each minibatch: the three sampling schemes, seeded and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import StoreError
from .hyperparameters import SGD, Sampling

__all__ = ["Minibatches"]


class Minibatches:
    """An endless stream of minibatch indices from a generator of its own.

    Args:
        dataset_size: samples in the data set, N.
        batch_size: samples in a minibatch, B.
        sampling: ``"replacement"`` (B independent draws a step), ``"reshuffle"`` (a new permutation every epoch) or
            ``"shuffle-once"`` (one permutation, repeated every epoch).
        seed: of the draws.
        drop_last: leave out the smaller batch at the end of an epoch when B does not divide N.

    Raises:
        HyperparameterError: B is larger than N without replacement, or a size is below 1.

    >>> batches = Minibatches(6, 2, seed=1)
    >>> epoch = torch.cat([next(batches) for _ in range(3)])
    >>> sorted(epoch.tolist())
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        sampling: Sampling = "reshuffle",
        seed: int = 0,
        drop_last: bool = False,
    ):
        SGD(lr=1.0, batch_size=batch_size, dataset_size=dataset_size, sampling=sampling)  # checks the sizes
        self.dataset_size, self.batch_size, self.sampling = dataset_size, batch_size, sampling
        self._end = dataset_size - dataset_size % batch_size if drop_last else dataset_size
        self._generator = torch.Generator().manual_seed(seed)
        self._order: Tensor | None = None  # [N], the permutation in use
        self._position = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.sampling == "replacement":
            return torch.randint(self.dataset_size, (self.batch_size,), generator=self._generator)
        if self._order is None or self._position >= self._end:
            if self._order is None or self.sampling == "reshuffle":
                self._order = torch.randperm(self.dataset_size, generator=self._generator)
            self._position = 0
        start, self._position = self._position, min(self._position + self.batch_size, self._end)
        return self._order[start : self._position]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the same batches."""
        return {"order": self._order, "position": self._position, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            StoreError: the state belongs to another data set.
        """
        order = state["order"]
        if order is not None and len(order) != self.dataset_size:
            raise StoreError(f"the saved order has {len(order)} samples", expected=f"{self.dataset_size}")
        self._order, self._position = order, int(state["position"])
        self._generator.set_state(state["generator"])
