"""Real data sets, read from a folder. Nothing is downloaded unless ``download=True``.

>>> import thermograd as tg
>>> X, y = tg.data.load("digits", n=1500)
>>> X.shape, y.dtype
(torch.Size([1500, 64]), torch.int64)
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .cifar import cifar10
from .dataset import Dataset, noisy_labels
from .files import data_folder
from .idx import fashion_mnist, mnist
from .tables import csv_table, digits

__all__ = ["NAMES", "Dataset", "cifar10", "csv_table", "digits", "fashion_mnist", "load", "mnist", "noisy_labels"]

_IMAGES = {"mnist": mnist, "fashion_mnist": fashion_mnist, "cifar10": cifar10}
_ALIASES = {"fashionmnist": "fashion_mnist", "cifar_10": "cifar10"}
NAMES = ("digits", *_IMAGES)


def load(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    split: Literal["train", "test"] = "train",
    download: bool = False,
    n: int | None = None,
    *,
    seed: int | None = None,
) -> Dataset:
    """A data set by name.

    Args:
        name: ``"digits"`` (bundled), ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"``, or the path of a table
            ending in ``.csv`` or ``.csv.gz`` (relative to ``folder``; class in the last column).
        folder: where the files lie. By default the environment variable ``THERMOGRAD_DATA``, else ``data`` in
            the current folder.
        split: ``"train"`` or ``"test"``; digits and tables have no test part.
        download: fetch absent files; nothing is downloaded otherwise.
        n: keep this many samples; None keeps all.
        seed: None keeps the first ``n``; a number draws them at random.

    Raises:
        DataError: the name is unknown, or a file is absent, damaged, or not the published one.

    >>> load("digits", n=100)
    Dataset(digits: X [100, 64], 10 classes)
    """
    key = name.lower().replace("-", "_").replace(" ", "_")
    key = _ALIASES.get(key, key)
    if key in _IMAGES:
        return _IMAGES[key](folder, split, download=download).take(n, seed)
    is_table = key.endswith((".csv", ".csv.gz"))
    if key != "digits" and not is_table:
        close = difflib.get_close_matches(key, NAMES, n=1)
        raise DataError(
            f"there is no data set named {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""),
            expected=f"one of {', '.join(map(repr, NAMES))}, or the path of a .csv or .csv.gz table",
        )
    if split != "train":
        raise DataError(f"{name} has no part {split!r}", expected="split='train', which is all of it")
    dataset = csv_table(Path(name) if folder is None else data_folder(folder) / name) if is_table else digits()
    return dataset.take(n, seed)
