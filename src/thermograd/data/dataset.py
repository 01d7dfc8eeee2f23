"""The record that every loader returns."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..errors import DataError, ThermogradWarning

__all__ = ["Dataset", "noisy_labels"]


@dataclass(frozen=True, eq=False)
class Dataset(TensorDataset):
    """A classification data set held in memory.

    It unpacks (``X, y = dataset``), and it is an ordinary torch data set, so that
    ``DataLoader(dataset, batch_size=50, shuffle=True)`` and ``Problem(model, loss, dataset)`` take it as it is.

    Args:
        X: inputs, float32 ``[N, ...]``: images ``[N, C, H, W]`` in [0, 1], tables ``[N, d]``.
        y: class of each sample, int64 ``[N]``, from 0.
        classes: name of each class.
        name: what the data set is called.

    Raises:
        DataError: the shapes or types do not fit together, or a label has no class.

    >>> points = Dataset(torch.zeros(3, 2), torch.tensor([0, 1, 0]), ("cat", "dog"), "pets")
    >>> X, y = points
    >>> len(points), tuple(X.shape), points.classes[y[1]]
    (3, (3, 2), 'dog')
    """

    X: Tensor
    y: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.X.dtype != torch.float32 or self.y.dtype != torch.int64 or self.y.ndim != 1:
            raise DataError(
                f"X is {self.X.dtype} {tuple(self.X.shape)} and y is {self.y.dtype} {tuple(self.y.shape)}",
                expected="X float32 [N, ...] and y int64 [N]",
            )
        if len(self.X) != len(self.y) or len(self.y) == 0:
            raise DataError(
                f"{self.name} has {len(self.X)} inputs and {len(self.y)} labels",
                expected="as many labels as inputs, and at least one",
            )
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{self.name} has labels from {low} to {high}", expected=f"labels from 0 to {len(self.classes) - 1}"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """``(X, y)``, as in ``torch.utils.data.TensorDataset``."""
        return self.X, self.y

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.X, self.y))

    def __repr__(self) -> str:
        return f"Dataset({self.name}: X {list(self.X.shape)}, {len(self.classes)} classes)"

    def take(self, n: int | None, seed: int | None = None) -> Dataset:
        """``n`` of the samples.

        Args:
            n: how many; None keeps all.
            seed: None takes the first ``n`` in the stored order; a number draws ``n`` without replacement.

        Raises:
            DataError: ``n`` is not between 1 and N.

        Warns:
            ThermogradWarning: a class is left without any sample (a file sorted by class, say).
        """
        if n is None:
            return self
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(self):
            raise DataError(f"n is {n!r}", expected=f"a whole number from 1 to {len(self)}, the size of {self.name}")
        if seed is None:
            index = torch.arange(n)
        else:
            index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        chosen = self.y[index]
        kept, had = len(chosen.unique()), len(self.y.unique())
        if kept < had and n >= had:
            warnings.warn(
                f"the {n} samples taken from {self.name} belong to {kept} of its {had} classes; "
                "if the file is sorted by class, draw them at random by passing a seed",
                ThermogradWarning,
                stacklevel=2,
            )
        return dataclasses.replace(self, X=self.X[index], y=chosen)

    def with_label_noise(self, fraction: float, seed: int = 0) -> Dataset:
        """Give a wrong label to a fraction of the samples; see :func:`noisy_labels`."""
        y = noisy_labels(self.y, len(self.classes), fraction, seed)
        return dataclasses.replace(self, y=y)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return self.X[index], self.y[index]

    def __len__(self) -> int:
        return len(self.y)


def noisy_labels(y: Tensor, classes: int, fraction: float, seed: int = 0) -> Tensor:
    """Labels of which a fraction is wrong.

    ``round(fraction * N)`` samples are drawn without replacement; each gets one of the other classes, all equally
    likely.

    Args:
        y: class of each sample, int64 [N].
        classes: number of classes.
        fraction: share of the samples in [0, 1].
        seed: of the draw.

    Raises:
        DataError: the fraction is outside [0, 1], or there is one class only.

    >>> int((noisy_labels(torch.zeros(10, dtype=torch.int64), 3, 0.3) != 0).sum())
    3
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"the label noise is {fraction!r}", expected="a fraction between 0 and 1")
    if classes < 2 and fraction > 0:
        raise DataError(f"there are {classes} classes", expected="two or more to confuse")
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(y), generator=generator)[: round(fraction * len(y))]
    shift = torch.randint(1, max(2, classes), (len(wrong),), generator=generator)
    noisy = y.clone()
    noisy[wrong] = (noisy[wrong] + shift) % classes
    return noisy
