"""What data and losses a problem refuses, and what it makes of unusual ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import thermograd as tg
from thermograd.errors import DataError, LossError, NonFiniteError, ThermogradError

X, LABELS, Y = torch.randn(20, 4), torch.arange(20) % 3, torch.randn(20, 3)


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(i + 1), 0


class Summed(nn.Module):
    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().sum()


def binary(target: torch.Tensor) -> Callable[[], tg.Problem]:
    return lambda: tg.Problem(nn.Linear(4, 1), nn.BCEWithLogitsLoss(), (X, target))


def linear(loss: Any, data: Any) -> Callable[[], tg.Problem]:
    return lambda: tg.Problem(nn.Linear(4, 3), loss, data)


REFUSED: dict[str, tuple[type[ThermogradError], Callable[[], tg.Problem]]] = {
    "binary labels -1 and 1": (DataError, binary(torch.ones(20, 1) * (-1) ** torch.arange(20)[:, None])),
    "binary labels 1 and 2": (DataError, binary(1.0 + (LABELS > 0)[:, None])),
    "negative class probabilities": (DataError, linear(nn.CrossEntropyLoss(), (X, Y))),
    "every label ignored": (DataError, linear(nn.CrossEntropyLoss(), (X, torch.full((20,), -100)))),
    "empty": (DataError, linear(nn.MSELoss(), (X[:0], Y[:0]))),
    "empty data set": (DataError, linear(nn.MSELoss(), TensorDataset(X[:0], Y[:0]))),
    "unequal lengths": (DataError, linear(nn.MSELoss(), (X, Y[1:]))),
    "samples of several shapes": (DataError, linear(nn.CrossEntropyLoss(), Ragged())),
    "some samples drawn more often": (
        DataError,
        linear(nn.MSELoss(), DataLoader(TensorDataset(X, Y), 5, sampler=WeightedRandomSampler(range(1, 21), 20))),
    ),
    "a loss module that sums": (LossError, linear(Summed(), (X, Y))),
    "a functional loss that sums": (
        LossError,
        linear(lambda o, t: F.cross_entropy(o, t, reduction="sum"), (X, LABELS)),
    ),
    "an elementwise loss": (LossError, linear(lambda o, t: (o - t).square(), (X, Y))),
    "a loss that is NaN": (NonFiniteError, linear(lambda o, t: (-o.square() - 1).log().mean(), (X, Y))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_was_expected_and_what_to_do(case: str) -> None:
    kind, build = REFUSED[case]
    with pytest.raises(kind) as caught:
        build()
    assert caught.value.expected
    assert caught.value.remedy


def test_a_sum_divided_by_the_batch_size_is_a_mean() -> None:
    by_hand = linear(lambda o, t: F.cross_entropy(o, t, reduction="sum") / len(o), (X, LABELS))()
    plain = tg.Problem(by_hand.model, nn.CrossEntropyLoss(), (X, LABELS))
    assert torch.allclose(by_hand.gradient(), plain.gradient())


def test_a_loader_over_a_part_of_its_data_set_gives_that_part() -> None:
    chosen = [3, 1, 7, 12]
    loader = DataLoader(TensorDataset(X, Y), 2, sampler=SubsetRandomSampler(chosen))
    problem = linear(nn.MSELoss(), loader)()
    assert problem.N == 4
    assert problem.sampling == "reshuffle"
    assert torch.equal(problem.inputs, X[sorted(chosen)])


def test_outputs_without_a_dimension_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    flat = tg.Problem(nn.Sequential(model, nn.Flatten(0)), nn.MSELoss(), (X, Y[:, 0]))
    column = tg.Problem(model, nn.MSELoss(), (X, Y[:, :1]))
    assert tg.noise.decoupling(flat).ratio == pytest.approx(tg.noise.decoupling(column).ratio)
    assert torch.allclose(tg.landscape.gauss_newton(flat).dense(), tg.landscape.gauss_newton(column).dense())
