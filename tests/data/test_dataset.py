"""The record that loaders return."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import thermograd as tg
from thermograd.errors import DataError, ThermogradWarning


def points(n: int = 10, classes: int = 3) -> tg.data.Dataset:
    X = torch.arange(2.0 * n).reshape(n, 2)
    return tg.data.Dataset(X, torch.arange(n) % classes, tuple("abc"[:classes]), "points")


def test_unpacks_and_feeds_a_dataloader() -> None:
    data = points()
    X, y = data
    assert X is data.X
    assert y is data.y
    batches = list(DataLoader(data, batch_size=5))
    assert torch.equal(torch.cat([b[0] for b in batches]), X)
    assert torch.equal(torch.cat([b[1] for b in batches]), y)


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        points().X = torch.zeros(1)  # type: ignore[misc]


def test_take_first_and_take_at_random() -> None:
    data = points()
    assert torch.equal(data.take(4).X, data.X[:4])
    drawn = data.take(6, seed=1)
    assert len(drawn) == 6
    assert torch.equal(drawn.X, data.take(6, seed=1).X)
    assert not torch.equal(drawn.X, data.take(6, seed=2).X)
    rows = (drawn.X[:, 0] / 2).long()
    assert len(rows.unique()) == 6
    assert torch.equal(drawn.y, data.y[rows])  # labels stay with their inputs


@pytest.mark.parametrize("n", [0, 11, -1, 2.5])
def test_take_refuses_impossible_sizes(n: int) -> None:
    with pytest.raises(DataError, match="from 1 to 10"):
        points().take(n)


def test_take_warns_when_a_class_is_lost() -> None:
    data = points(10)
    in_order = tg.data.Dataset(data.X, data.y.sort().values, data.classes, "sorted")
    with pytest.warns(ThermogradWarning, match="2 of its 3 classes"):
        in_order.take(5)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_label_noise_changes_exactly_the_fraction(fraction: float) -> None:
    data = points()
    noisy = data.with_label_noise(fraction, seed=3)
    assert int((noisy.y != data.y).sum()) == round(fraction * len(data))
    assert int(noisy.y.max()) <= 2
    assert torch.equal(noisy.X, data.X)


def test_label_noise_is_uniform_over_the_other_classes() -> None:
    n = 6000
    data = tg.data.Dataset(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), tuple("abc"), "zeros")
    share = float((data.with_label_noise(1.0, seed=0).y == 1).double().mean())
    # Binomial(6000, 1/2): standard error 0.0065; 4 of them is a false alarm once in 16 000 seeds.
    assert abs(share - 0.5) < 4 * 0.0065


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (torch.zeros(2, 1), torch.tensor([0, 2])),
        (torch.zeros(2, 1), torch.tensor([0, -1])),
        (torch.zeros(3, 1), torch.tensor([0, 1])),
        (torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 1).double(), torch.tensor([0, 1])),
        (torch.zeros(2, 1), torch.tensor([0.0, 1.0])),
    ],
)
def test_refuses_what_does_not_fit(X: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(DataError):
        tg.data.Dataset(X, y, ("a", "b"), "bad")
