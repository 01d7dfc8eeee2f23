"""MNIST and Fashion-MNIST: images and labels in idx files."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..errors import DataError
from .dataset import Dataset
from .files import absent, data_folder, digest, download, find, read_bytes

__all__ = ["fashion_mnist", "mnist"]

Split = Literal["train", "test"]
_PREFIX = {"train": "train", "test": "t10k"}
_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


@dataclass(frozen=True)
class _Source:
    title: str
    places: tuple[str, ...]
    classes: tuple[str, ...]
    url: str
    content_sha256: dict[str, str]  # of the unpacked files, so that any compression will do
    archive_md5: dict[str, str]  # of the published .gz files


_MNIST = _Source(
    title="MNIST",
    places=("raw", "MNIST/raw", "MNIST", "mnist/raw", "mnist"),
    classes=tuple("0123456789"),
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    content_sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    archive_md5={
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
_FASHION = _Source(
    title="Fashion-MNIST",
    places=("raw", "FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "fashion-mnist", "data/fashion"),
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    content_sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    archive_md5={
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)


def mnist(
    folder: str | os.PathLike[str] | None = None,
    split: Split = "train",
    *,
    download: bool = False,
    verify: bool = True,
) -> Dataset:
    """MNIST handwritten digits (LeCun, Cortes, Burges 1998): X ``[N, 1, 28, 28]`` in [0, 1], 10 classes.

    Args:
        folder: where the four idx files lie, gzipped or not: this folder or ``raw``, ``MNIST/raw``, ... below it.
            By default the environment variable ``THERMOGRAD_DATA``, else ``data`` in the current folder.
        split: ``"train"`` (N = 60000) or ``"test"`` (N = 10000).
        download: fetch absent files into ``folder/MNIST/raw``; nothing is downloaded otherwise.
        verify: compare the files with the published checksums. Pass False to read idx files of your own.

    Raises:
        DataError: a file is absent, damaged, or not the published one.
    """
    return _load(_MNIST, folder, split, fetch=download, verify=verify)


def fashion_mnist(
    folder: str | os.PathLike[str] | None = None,
    split: Split = "train",
    *,
    download: bool = False,
    verify: bool = True,
) -> Dataset:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): X ``[N, 1, 28, 28]`` in [0, 1], 10 classes of clothes.

    Args:
        folder: where the four idx files lie, gzipped or not: this folder or ``raw``, ``FashionMNIST/raw``, ...
            below it. By default the environment variable ``THERMOGRAD_DATA``, else ``data`` in the current folder.
        split: ``"train"`` (N = 60000) or ``"test"`` (N = 10000).
        download: fetch absent files into ``folder/FashionMNIST/raw``; nothing is downloaded otherwise.
        verify: compare the files with the published checksums. Pass False to read idx files of your own.

    Raises:
        DataError: a file is absent, damaged, or not the published one.
    """
    return _load(_FASHION, folder, split, fetch=download, verify=verify)


def _load(
    source: _Source, folder: str | os.PathLike[str] | None, split: Split, *, fetch: bool, verify: bool
) -> Dataset:
    if split not in _PREFIX:
        raise DataError(f"split is {split!r}", expected="'train' or 'test'")
    root = data_folder(folder)
    images, labels = (
        _array(
            _locate(source, root, f"{_PREFIX[split]}-{kind}", chosen=folder is not None, fetch=fetch), source, verify
        )
        for kind in _KINDS
    )
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(f"{source.title} has arrays of {images.ndim} and {labels.ndim} dimensions", expected="3 and 1")
    X = torch.from_numpy(images).to(torch.float32).div_(255).unsqueeze(1)  # [N, 1, 28, 28]
    return Dataset(X, torch.from_numpy(labels).long(), source.classes, f"{source.title} {split}")


def _locate(source: _Source, root: Path, name: str, *, chosen: bool, fetch: bool) -> Path:
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"))  # the last is how some unpackers spell it
    path = find(root, source.places, names)
    if path is not None:
        return path
    if not fetch:
        raise absent(source.title, root, source.places, names[:2], chosen=chosen, url=source.url)
    target = root / next(p for p in source.places if p.endswith("/raw")) / f"{name}.gz"
    return download(f"{source.url}{name}.gz", target, source.archive_md5[name])


def _array(path: Path, source: _Source, verify: bool) -> np.ndarray:
    content = read_bytes(path)
    name = path.name.removesuffix(".gz").replace(".idx", "-idx")
    if verify and digest(content) != source.content_sha256[name]:
        other = next((s.title for s in (_MNIST, _FASHION) if digest(content) in s.content_sha256.values()), None)
        raise DataError(
            f"{path} is not the {name} of {source.title}" + (f" but belongs to {other}" if other else ""),
            expected=f"a file whose unpacked content has SHA-256 {source.content_sha256[name]}; "
            f"this one has {digest(content)}",
            remedy="delete it and fetch it again, or pass verify=False if it is meant to differ",
        )
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> np.ndarray:
    """Unsigned bytes in idx form: 0, 0, 8, ndim, then ndim big-endian sizes, then the data."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} does not start like an idx file of unsigned bytes", expected="bytes 0, 0, 8")
    ndim = content[3]
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", content[4:start]) if len(content) >= start else ()
    if not shape or len(content) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{path} holds {max(0, len(content) - start)} bytes of data",
            expected=f"{int(np.prod(shape, dtype=np.int64))} for the shape {shape} in its header",
            remedy="fetch the file again, it is cut off",
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)
