"""CIFAR-10 from its binary batches or from a compressed numpy archive. No pickles are opened."""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..errors import DataError
from .dataset import Dataset
from .files import absent, data_folder, digest, download, find

__all__ = ["cifar10"]

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PLACES = ("CIFAR10", "cifar10", "cifar-10", "CIFAR-10")
_BATCHES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_FOLDER = "cifar-10-batches-bin"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_RECORD = 3073  # one label byte, then 3 x 32 x 32 pixel bytes
_LABELS_SHA256 = {
    "train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
_ARCHIVE_PIXELS_SHA256 = {
    "train": "5d78d296514afc215fbac0176ae07bd32c8523eb12470c6f8527f22266e2e197",
    "test": "1fe46ff47f5fb6c1b24f0b5448654cac0e0d3e1e0c16f9cbac842307814b553a",
}


def cifar10(
    folder: str | os.PathLike[str] | None = None,
    split: Literal["train", "test"] = "train",
    *,
    download: bool = False,
    verify: bool = True,
) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): X ``[N, 3, 32, 32]`` in [0, 1], 10 classes.

    Two layouts are read: the authors' binary batches (``cifar-10-batches-bin/data_batch_1.bin``, ...) and a
    compressed archive ``cifar10_train.npz``, ``cifar10_test.npz`` of reversible differences between
    neighbouring pixels (93 of its 60000 images were only to be had as JPEG; their positions are its array
    ``jpeg_index``). The pickled Python batches are not opened, because a pickle can run any code.

    Args:
        folder: where they lie: this folder, ``cifar-10-batches-bin`` or ``CIFAR10`` below it. By default the
            environment variable ``THERMOGRAD_DATA``, else ``data`` in the current folder.
        split: ``"train"`` (N = 50000) or ``"test"`` (N = 10000).
        download: fetch the binary batches (163 MB) if nothing is there; nothing is downloaded otherwise.
        verify: compare the checksums of the labels and, for the archive, of the decoded pixels.

    Raises:
        DataError: a file is absent, damaged, or not the published one.
    """
    if split not in _BATCHES:
        raise DataError(f"split is {split!r}", expected="'train' or 'test'")
    root = data_folder(folder)
    name = f"cifar10_{split}.npz"
    places = (_FOLDER, *_PLACES, *(f"{place}/{_FOLDER}" for place in _PLACES))
    first = find(root, places, (_BATCHES[split][0],))
    archive = None if first else find(root, _PLACES, (name,))
    if first is None and archive is None:
        if not download:
            names = (f"{_FOLDER}/{_BATCHES[split][0]}", name)
            raise absent("CIFAR-10", root, _PLACES, names, chosen=folder is not None, url=_URL)
        first = _fetch(root) / _BATCHES[split][0]
    if first is not None:
        images, labels = _read_batches(first.parent, split)
    else:
        assert archive is not None
        images, labels = _decode(archive)
    if verify:
        _verify(images, labels, split, archive or first)
    X = torch.from_numpy(images).to(torch.float32).div_(255)  # [N, 3, 32, 32]
    return Dataset(X, torch.from_numpy(labels).long(), _CLASSES, f"CIFAR-10 {split}")


def _verify(images: np.ndarray, labels: np.ndarray, split: str, path: Path | None) -> None:
    expected = [("labels", labels, _LABELS_SHA256[split])]
    if path is not None and path.suffix == ".npz":
        expected.append(("decoded pixels", images, _ARCHIVE_PIXELS_SHA256[split]))
    for what, array, checksum in expected:
        found = digest(np.ascontiguousarray(array).reshape(-1).data)
        if found != checksum:
            raise DataError(
                f"the {what} of {path} are not those of CIFAR-10 {split}",
                expected=f"SHA-256 {checksum}; these have {found}",
                remedy="fetch the files again, or pass verify=False if they are meant to differ",
            )


def _read_batches(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for name in _BATCHES[split]:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is not there", expected=f"all of {', '.join(_BATCHES[split])} in {folder}")
        records = np.fromfile(path, np.uint8)
        if len(records) == 0 or len(records) % _RECORD:
            raise DataError(
                f"{path} has {len(records)} bytes", expected=f"a multiple of {_RECORD}", remedy="fetch it again"
            )
        parts.append(records.reshape(-1, _RECORD))
    records = np.concatenate(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].copy()


def _decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Undo the differences: running sums modulo 256 down the rows and along the columns, then add green."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            residual, labels = archive["residual"], archive["labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            expected="a numpy archive with the arrays 'residual' [3, N, 32, 32] and 'labels' [N], both uint8",
            remedy="fetch the file again",
        ) from error
    if residual.dtype != np.uint8 or residual.shape != (3, len(labels), 32, 32):
        raise DataError(
            f"'residual' in {path} is {residual.dtype} {residual.shape}", expected=f"uint8 (3, {len(labels)}, 32, 32)"
        )
    planes = np.cumsum(residual, axis=2, dtype=np.uint8)
    np.cumsum(planes, axis=3, dtype=np.uint8, out=planes)
    planes[0] += planes[1]
    planes[2] += planes[1]
    return np.ascontiguousarray(planes.transpose(1, 0, 2, 3)), labels.astype(np.uint8)


def _fetch(root: Path) -> Path:
    """Download the published archive, unpack its binary batches, return their folder."""
    target = download(_URL, root / Path(_URL).name, _ARCHIVE_MD5)
    wanted = {f"{_FOLDER}/{name}" for names in _BATCHES.values() for name in names}
    with tarfile.open(target) as archive:
        members = [m for m in archive.getmembers() if m.name in wanted and m.isfile()]
        archive.extractall(root, members=members, filter="data")
    target.unlink()
    return root / _FOLDER
