"""The data of a problem: one tensor (or tree of tensors) of inputs and one of targets, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from .errors import DataError
from .hyperparameters import Sampling
from .progress import track

__all__ = ["Samples"]

_KEEP_NUMBERS = 2**26  # data up to this many numbers are converted to the precision of the problem only once


@dataclass(frozen=True)
class Samples:
    """N samples held in memory as a tree of tensors whose first dimension is N.

    Args:
        inputs: a tensor [N, ...] or a tuple, list or dict of such tensors.
        targets: likewise; None when each sample is a single tree (functions of the weights).
        batch_size: what the data loader says, else None.
        sampling: what the data loader says, else None.
        drop_last: whether the data loader drops a short last batch.
    """

    inputs: Any
    targets: Any
    batch_size: int | None = None
    sampling: Sampling | None = None
    drop_last: bool = False
    _converted: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_any(cls, data: Any) -> Samples:
        """Read ``(X, y)``, a ``Dataset`` or a ``DataLoader`` in the order of the data set's own indices.

        Raises:
            DataError: the data are empty, not finite, not repeatable, or of unequal length.
        """
        if isinstance(data, DataLoader):
            inputs, targets = _pair(_from_dataset(_drawn_from(data), data.collate_fn))
            samples = cls(inputs, targets, _batch_size(data), _sampling(data), _drop_last(data))
        elif isinstance(data, Dataset):
            samples = cls(*_pair(_from_dataset(data, default_collate)))
        elif isinstance(data, tuple | list) and len(data) == 2:
            samples = cls(_as_tensors(data[0]), _as_tensors(data[1]))
        else:
            raise DataError(
                f"data is a {type(data).__name__}",
                expected="a pair (X, y), a torch Dataset or a torch DataLoader",
                remedy="pass data=(X, y) with X of shape [N, ...] and y of shape [N, ...]",
            )
        samples.check()
        return samples

    @classmethod
    def from_tree(cls, data: Any) -> Samples:
        """Read a tensor or a tuple of tensors with leading dimension N, for functions of the weights."""
        tree = _as_tensors(tuple(data) if isinstance(data, tuple | list) else (data,))
        samples = cls(tree, None)
        samples.check()
        return samples

    @property
    def leaves(self) -> list[Tensor]:
        """All tensors of the tree."""
        return tree_flatten((self.inputs, self.targets) if self.targets is not None else self.inputs)[0]

    def __len__(self) -> int:
        return len(self.leaves[0])

    def check(self) -> None:
        """Refuse empty, unequal or non-finite data."""
        if not self.leaves:
            raise DataError(
                "the data hold no tensor",
                expected="X of shape [N, ...] and y of shape [N, ...]",
                remedy="pass arrays or tensors",
            )
        if any(leaf.ndim == 0 for leaf in self.leaves):
            raise DataError(
                "a data tensor has no sample dimension",
                expected="tensors of shape [N, ...]",
                remedy="let the first dimension number the samples; a single sample has N = 1",
            )
        lengths = {len(leaf) for leaf in self.leaves}
        if len(lengths) > 1:
            raise DataError(
                f"the data tensors have {' and '.join(map(str, sorted(lengths)))} rows",
                expected="the same number of samples in inputs and targets",
                remedy="check how inputs and targets were split or filtered",
            )
        if lengths == {0}:
            raise _empty("the data are empty")
        parts = [("input", self.inputs)] + ([("target", self.targets)] if self.targets is not None else [])
        for name, tree in parts:
            for leaf in tree_flatten(tree)[0]:
                _check_finite(leaf, name)

    def take(self, index: Tensor | slice, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Inputs and targets at ``index``, floating tensors converted to ``dtype``."""
        inputs, targets = self._trees(device, dtype)

        def pick(leaf: Tensor) -> Tensor:
            part = leaf[index.to(leaf.device) if isinstance(index, Tensor) else index].to(device)
            return part.to(dtype) if part.is_floating_point() else part

        return tree_map(pick, inputs), None if targets is None else tree_map(pick, targets)

    def _trees(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """The trees to pick from: converted once and kept when that is small, else as given."""
        trees = (self.inputs, self.targets)
        if sum(leaf.numel() for leaf in self.leaves) > _KEEP_NUMBERS:
            return trees
        key = (str(device), dtype)
        if key not in self._converted:
            self._converted[key] = tuple(
                None if tree is None else tree_map(_converter(device, dtype), tree) for tree in trees
            )
        kept: tuple[Any, Any] = self._converted[key]
        return kept


def _converter(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda leaf: leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)


def _check_finite(leaf: Tensor, name: str) -> None:
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return
    rows = leaf.reshape(len(leaf), -1)
    if bool(torch.isfinite(rows.sum())) and bool(torch.isfinite(rows.abs().max() if rows.numel() else rows.sum())):
        return
    bad = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(leaf)} samples have NaN or Inf in their {name}; the first is sample {int(bad[0])}",
            expected="finite data",
            remedy="drop or mend those samples",
        )


def _empty(what: str) -> DataError:
    return DataError(
        what, expected="at least one sample", remedy="check the path, the split and the filter of the data"
    )


def _as_tensors(tree: Any) -> Any:
    def convert(leaf: Any) -> Tensor:
        try:
            return torch.as_tensor(leaf).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"a {type(leaf).__name__} in the data is not an array ({error})",
                expected="tensors or numpy arrays of numbers",
                remedy="encode texts and categories as numbers",
            ) from error

    if isinstance(tree, list):  # a list of numbers or rows is one array, not a tree
        return convert(tree)
    return tree_map(convert, tree)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise DataError(
            f"each item of the data set is a {kind}",
            expected="a pair (input, target)",
            remedy="wrap the data set so that it returns (input, target); inputs may be a tuple or a dict of tensors",
        )
    return tuple(batch[0]) if isinstance(batch[0], list) else batch[0], batch[1]


def _from_dataset(dataset: Any, collate: Any) -> Any:
    """All samples of a data set, collated, in the data set's own order."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return _collate_blocks(list(dataset), collate)
    if len(dataset) == 0:
        raise _empty("the data set is empty")
    _check_repeatable(dataset, collate)
    return _collate_blocks((dataset[i] for i in track(range(len(dataset)), "reading the data set")), collate)


def _collate_blocks(items: Iterable[Any], collate: Any, size: int = 4096) -> Any:
    blocks: list[Any] = []
    pending: list[Any] = []
    for item in items:
        pending.append(item)
        if len(pending) == size:
            blocks.append(_collated(pending, collate))
            pending = []
    if pending:
        blocks.append(_collated(pending, collate))
    if not blocks:
        raise _empty("the data set is empty")
    try:
        return tree_map(lambda *leaves: torch.cat(leaves), *blocks)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _unequal(error) from error


def _collated(items: list[Any], collate: Any) -> Any:
    try:
        return collate(items)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _unequal(error) from error


def _unequal(error: Exception) -> DataError:
    return DataError(
        f"the samples cannot be stacked into one tensor ({error})",
        expected="samples of one shape",
        remedy="pad or crop them to one shape, or give the DataLoader a collate_fn that does",
    )


def _check_repeatable(dataset: Any, collate: Any) -> None:
    indices = sorted({0, len(dataset) // 2, len(dataset) - 1})
    first, second = (tree_flatten(_collated([dataset[i] for i in indices], collate))[0] for _ in range(2))
    same = len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(first, second)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )
    if not same:
        raise DataError(
            "the data set returns something else each time the same sample is read (random augmentation?)",
            expected="a repeatable data set, so that the loss is one fixed function of the weights",
            remedy="measure on the data set without its random transforms",
        )


def _batch_size(loader: DataLoader[Any]) -> int | None:
    size = loader.batch_size
    if size is None and isinstance(loader.batch_sampler, BatchSampler):
        size = loader.batch_sampler.batch_size
    return size


def _drop_last(loader: DataLoader[Any]) -> bool:
    return bool(loader.drop_last or getattr(loader.batch_sampler, "drop_last", False))


def _sampler(loader: DataLoader[Any]) -> Any:
    return loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else loader.sampler


def _drawn_from(loader: DataLoader[Any]) -> Any:
    """The samples that the loader draws from, which may be a part of its data set.

    Raises:
        DataError: some are drawn more often than others, so that the loss is no plain mean.
    """
    sampler = _sampler(loader)
    if isinstance(sampler, WeightedRandomSampler) and float(sampler.weights.max() - sampler.weights.min()) > 0:
        raise DataError(
            "the data loader draws some samples more often than others (WeightedRandomSampler)",
            expected="a loader that draws every sample equally often, so that the loss is the mean over the samples",
            remedy="pass loader.dataset to measure the plain mean, or put the weights into the loss",
        )
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, sorted({int(i) for i in sampler.indices}))
    return loader.dataset


def _sampling(loader: DataLoader[Any]) -> Sampling | None:
    """The loader's sampling scheme, or None when its sampler is not one of torch's plain ones."""
    sampler = _sampler(loader)
    if type(sampler) is RandomSampler:
        return "replacement" if sampler.replacement else "reshuffle"
    if type(sampler) is SubsetRandomSampler:
        return "reshuffle"
    if type(sampler) is WeightedRandomSampler and sampler.replacement:
        return "replacement"
    if type(sampler) is SequentialSampler:
        return "shuffle-once"
    return None


def as_index(index: Any, size: int) -> Tensor | slice:
    """Validate sample indices: None (all), a slice, or integers in [0, size)."""
    if index is None:
        return slice(None)
    if isinstance(index, slice):
        return index
    if isinstance(index, int):
        index = [index]
    tensor = torch.as_tensor(index if isinstance(index, Sequence | Tensor) or hasattr(index, "__array__") else [*index])
    if tensor.dtype == torch.bool:
        tensor = tensor.nonzero().flatten()
    if tensor.numel() == 0:
        raise DataError("the sample index is empty", expected="at least one sample")
    if tensor.is_floating_point() or tensor.ndim != 1:
        raise DataError(
            f"the sample index has dtype {tensor.dtype} and shape {tuple(tensor.shape)}",
            expected="one-dimensional whole numbers",
        )
    tensor = tensor.long()
    low, high = int(tensor.min()), int(tensor.max())
    if low < -size or high >= size:
        raise DataError(f"sample index {high if high >= size else low} is out of range", expected=f"0 to {size - 1}")
    return tensor
