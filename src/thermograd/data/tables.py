"""Tables: any CSV file, and scikit-learn's bundled digits."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .dataset import Dataset
from .files import read_bytes

__all__ = ["csv_table", "digits"]


def digits() -> Dataset:
    """The 1797 handwritten digits that come with scikit-learn (8 x 8 pixels): X ``[1797, 64]`` in [0, 1].

    >>> digits()
    Dataset(digits: X [1797, 64], 10 classes)
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    X = torch.from_numpy(bunch.data / 16).to(torch.float32)  # [N, 64]
    return Dataset(X, torch.from_numpy(bunch.target).long(), tuple("0123456789"), "digits")


def csv_table(path: str | os.PathLike[str], label: int | str = -1, standardize: bool = True) -> Dataset:
    r"""A table of numbers, one row a sample, gzipped or not, with or without a header line.

    Args:
        path: the file; columns separated by comma, semicolon, tab or blanks.
        label: the column that holds the class, by position (-1 is the last) or by its name in the header.
            Classes may be whole numbers or words; they are numbered from 0 in sorted order.
        standardize: give every feature mean 0 and standard deviation 1 (a constant feature becomes 0).

    Returns:
        X ``[N, d]`` and y ``[N]``.

    Raises:
        DataError: the file is absent or empty, a row is too short or too long, or a value is missing, not a
            number or not finite (its row and column are named).

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "flowers.csv"
    >>> _ = path.write_text("length,width,kind\n1,2,rose\n3,2,lily\n")
    >>> table = csv_table(path, label="kind")
    >>> table.classes, table.X.tolist()
    (('lily', 'rose'), [[-1.0, 0.0], [1.0, 0.0]])
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no file {path.absolute()}", expected="a CSV table, gzipped or not", remedy="check the path"
        )
    header, rows = _rows(path)
    names = header or [str(i + 1) for i in range(len(rows[0][1]))]
    column = _label_column(label, names, header is not None, path)
    features = np.array(
        [[_number(text, names[j], line, path) for j, text in enumerate(row) if j != column] for line, row in rows],
        dtype=np.float64,
    )  # [N, d]
    if features.shape[1] == 0:
        raise DataError(f"{path} has one column only", expected="one label column and at least one feature")
    classes, y = _classes([(line, row[column]) for line, row in rows], names[column], path)
    if standardize:
        features = _standardized(features)
    X = torch.from_numpy(features).to(torch.float32)
    if not bool(torch.isfinite(X).all()):
        raise DataError(f"{path} holds numbers beyond the range of float32", remedy="pass standardize=True")
    return Dataset(X, y, classes, path.name.removesuffix(".gz").removesuffix(".csv"))


def _rows(path: Path) -> tuple[list[str] | None, list[tuple[int, list[str]]]]:
    """The header, if the first line is one, and the other lines as (line number, cells)."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}", expected="a CSV table") from error
    first = next((line for line in lines if line.strip()), "")
    mark = next((m for m in ",;\t" if m in first), None)
    split = csv.reader(lines, delimiter=mark) if mark else (line.split() for line in lines)
    rows = [(i, [cell.strip() for cell in row]) for i, row in enumerate(split, 1) if any(c.strip() for c in row)]
    header = None
    if rows and not any(_is_number(cell) for cell in rows[0][1]):
        header = rows.pop(0)[1]
    if not rows:
        raise DataError(f"{path} holds no rows of data", expected="one row a sample")
    width = len(header or rows[0][1])
    for line, row in rows:
        if len(row) != width:
            raise DataError(f"line {line} of {path} has {len(row)} columns", expected=f"{width}, like the first line")
    return header, rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, name: str, line: int, path: Path) -> float:
    value = float(text) if _is_number(text) else math.nan
    if not math.isfinite(value):
        raise DataError(
            f"line {line}, column {name} of {path} holds {text!r}",
            expected="a finite number",
            remedy="fill in or remove rows with missing values, or name another label column",
        )
    return value


def _label_column(label: int | str, names: Sequence[str], has_header: bool, path: Path) -> int:
    if isinstance(label, str):
        if not has_header or label not in names:
            known = f"one of {', '.join(names)}" if has_header else "a position, since the file has no header"
            raise DataError(f"{path} has no column named {label!r}", expected=known)
        return names.index(label)
    if not -len(names) <= label < len(names):
        raise DataError(f"label is {label}", expected=f"a column from {-len(names)} to {len(names) - 1}")
    return label % len(names)


def _classes(cells: Sequence[tuple[int, str]], name: str, path: Path) -> tuple[tuple[str, ...], torch.Tensor]:
    for line, text in cells:
        if text.lower() in ("", "nan", "na", "?"):
            raise DataError(f"line {line}, column {name} of {path} holds {text!r}", expected="a class")
    words = [text for _, text in cells]
    if all(map(_is_number, words)):
        numbers = [float(word) for word in words]
        wrong = next(((line, text) for (line, text), x in zip(cells, numbers) if not x.is_integer()), None)
        if wrong is not None:
            raise DataError(
                f"line {wrong[0]}, column {name} of {path} holds {wrong[1]!r}",
                expected="a class (a whole number or a word) in the label column",
                remedy="name the label column by label=...",
            )
        words = [str(int(x)) for x in numbers]
        kinds = sorted(set(words), key=int)
    else:
        kinds = sorted(set(words))
    number = {kind: i for i, kind in enumerate(kinds)}
    return tuple(kinds), torch.tensor([number[word] for word in words], dtype=torch.int64)


def _standardized(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(0)
    scale = features.std(0)
    constant = np.ptp(features, axis=0) == 0  # std of equal numbers is rounding, not exactly 0
    centred[:, constant] = 0
    return centred / np.where(constant, 1.0, scale)
