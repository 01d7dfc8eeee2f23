"""CSV tables and the bundled digits."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.errors import DataError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "UCI"


def table(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("mark", [",", ";", "\t", "  "])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("header", [True, False])
def test_reads_any_common_spelling(tmp_path: Path, mark: str, name: str, header: bool) -> None:
    rows = ["1,2.5,0", "3,-4e1,1", "5,6,0"]
    text = "\n".join((["a,b,kind"] if header else []) + rows).replace(",", mark) + "\n"
    data = tg.data.csv_table(table(tmp_path, text, name), standardize=False)
    assert data.X.tolist() == [[1, 2.5], [3, -40], [5, 6]]
    assert data.y.tolist() == [0, 1, 0]
    assert data.classes == ("0", "1")
    assert data.name == "t"


def test_label_column_by_position_or_name(tmp_path: Path) -> None:
    path = table(tmp_path, "kind,a\nrose,1\nlily,2\nrose,3\n")
    for label in (0, -2, "kind"):
        data = tg.data.csv_table(path, label=label, standardize=False)
        assert data.classes == ("lily", "rose")
        assert data.y.tolist() == [1, 0, 1]
        assert data.X.tolist() == [[1], [2], [3]]
    with pytest.raises(DataError, match="no column named 'kin'"):
        tg.data.csv_table(path, label="kin")
    with pytest.raises(DataError, match="a column from -2 to 1"):
        tg.data.csv_table(path, label=2)


def test_whole_number_classes_are_sorted_as_numbers(tmp_path: Path) -> None:
    data = tg.data.csv_table(table(tmp_path, "1,10\n2,9\n3,-1\n"))
    assert data.classes == ("-1", "9", "10")
    assert data.y.tolist() == [2, 1, 0]


def test_standardize(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1e3, [1e-3, 50.0], (40, 2))
    text = "\n".join(f"{a!r},{b!r},0.1,{i % 2}" for i, (a, b) in enumerate(values.tolist()))
    X = tg.data.csv_table(table(tmp_path, text)).X.double()
    assert torch.allclose(X[:, :2].mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(X[:, :2].std(0, correction=0), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert bool((X[:, 2] == 0).all())  # a constant column carries nothing


@pytest.mark.parametrize("word", ["", "nan", "NaN", "?", "inf", "x"])
def test_a_bad_number_is_refused_with_its_place(tmp_path: Path, word: str) -> None:
    path = table(tmp_path, f"a,b,kind\n1,2,0\n3,{word},1\n")
    with pytest.raises(DataError, match="line 3, column b"):
        tg.data.csv_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("1,2,0\n1,2\n", "line 2 of .* has 2 columns"),
        ("1\n2\n", "one column only"),
        ("1,0.5\n2,1\n", "line 1, column 2 of .* holds '0.5'"),
        ("1,a\n2,\n", "line 2, column 2 .* holds ''"),
    ],
)
def test_other_faults_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tg.data.csv_table(table(tmp_path, text))


def test_numbers_beyond_float32_are_refused_unless_standardized(tmp_path: Path) -> None:
    path = table(tmp_path, "1e300,0\n2e300,1\n")
    with pytest.raises(DataError, match="float32"):
        tg.data.csv_table(path, standardize=False)


def test_absent_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.csv"):
        tg.data.load("none.csv", tmp_path)


def test_digits_and_load() -> None:
    data = tg.data.load("digits", n=1500)
    assert data.X.shape == (1500, 64)
    assert 0 <= float(data.X.min()) <= float(data.X.max()) == 1
    assert torch.equal(data.X, tg.data.digits().X[:1500])
    with pytest.raises(DataError, match="did you mean 'fashion_mnist'"):
        tg.data.load("fashion_mnst")
    with pytest.raises(DataError, match="no part 'test'"):
        tg.data.load("digits", split="test")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not beside this repository")
def test_real_tables() -> None:
    assert tg.data.load("UCI/banknote.csv.gz", REAL.parent).y.bincount().tolist() == [762, 610]
    data = tg.data.csv_table(REAL / "cardiotocography_nsp3.csv.gz")
    assert data.X.shape == (2126, 21)
    assert data.y.bincount().tolist() == [1655, 295, 176]
