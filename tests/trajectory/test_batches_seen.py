"""What a recorder makes of batches, losses and arguments in loops that are not the plain one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import thermograd as tg
from thermograd.errors import InputError

X, Y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(60, 1)
DATA = TensorDataset(X, Y)


def endless(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def recorded(folder: Path, data: Any, loader: DataLoader[Any], accumulate: int = 1, **options: Any) -> Any:
    model = nn.Linear(4, 1)
    problem, optimizer = tg.Problem(model, nn.MSELoss(), data), torch.optim.SGD(model.parameters(), lr=0.01)
    batches = endless(loader)
    with tg.Recorder(folder, problem, optimizer, **options):
        for _ in range(60):
            optimizer.zero_grad()
            for _ in range(accumulate):
                x, y = next(batches)
                (mse_loss(model(x), y) / accumulate).backward()
            optimizer.step()
    return tg.open_run(folder)["trajectory"].attrs


def test_batches_that_accumulate_make_up_one_step(tmp_path: Path) -> None:
    loader = DataLoader(DATA, 5, shuffle=True)
    attrs = recorded(tmp_path, loader, loader, accumulate=3)
    assert (attrs["batch_size"], attrs["sampling"]) == (15, "reshuffle")


def test_what_training_does_goes_before_the_problems_loader(tmp_path: Path) -> None:
    attrs = recorded(tmp_path, DataLoader(DATA, 60), DataLoader(DATA, 10, shuffle=True))
    assert (attrs["batch_size"], attrs["sampling"], attrs["sampling_source"]) == (10, "reshuffle", "observed")


def test_what_is_declared_goes_before_all(tmp_path: Path) -> None:
    loader = DataLoader(DATA, 10, shuffle=True)
    attrs = recorded(tmp_path, loader, loader, batch_size=20, sampling="replacement")
    assert (attrs["batch_size"], attrs["sampling"], attrs["sampling_source"]) == (20, "replacement", "declared")


def test_a_run_too_short_to_tell_takes_the_loaders_word(tmp_path: Path) -> None:
    loader = DataLoader(DATA, 100, shuffle=True)
    attrs = recorded(tmp_path, loader, loader)
    assert (attrs["batch_size"], attrs["sampling"]) == (60, "reshuffle")


def test_gradients_that_are_thrown_away_do_not_count(tmp_path: Path) -> None:
    model, expected = nn.Linear(4, 1), []
    problem, optimizer = tg.Problem(model, nn.MSELoss(), (X, Y)), torch.optim.SGD(model.parameters(), lr=0.01)
    with tg.Recorder(tmp_path, problem, optimizer):
        for k in range(40):
            if k % 6 == 0:
                mse_loss(model(X), Y).backward()  # how large is the full gradient now?
                optimizer.zero_grad()
            batch = torch.randperm(60)[:10]
            loss = mse_loss(model(X[batch]), Y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    run = tg.open_run(tmp_path)["trajectory"]
    assert np.allclose(run["minibatch_loss"], expected, rtol=1e-6)
    assert run.attrs["batch_size"] == 10


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"sampling": "random"}, {"flush_seconds": -1.0}])
def test_refused_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    model = nn.Linear(4, 1)
    problem = tg.Problem(model, nn.MSELoss(), (X, Y))
    with pytest.raises(InputError):
        tg.Recorder(tmp_path, problem, torch.optim.SGD(model.parameters(), lr=0.1), **options)
