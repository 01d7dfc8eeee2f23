"""A small training that the recorder's tests share; run as a script it trains until it is killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import thermograd as tg

N, BATCH = 60, 12


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 5, generator=generator), torch.randn(N, 2, generator=generator)


def setting(lr: float = 0.05, momentum: float = 0.9, **keywords: Any) -> tuple[nn.Module, tg.Problem, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    problem = tg.Problem(model, nn.MSELoss(), data())
    return model, problem, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, **keywords)


def batches(seed: int = 3) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(N, generator=generator).split(BATCH)


def train(model: nn.Module, optimizer: Any, steps: int | None, order: Iterator[torch.Tensor]) -> list[float]:
    X, y = data()
    losses = []
    while steps is None or len(losses) < steps:
        index = next(order)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X[index]), y[index])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    the_model, the_problem, the_optimizer = setting()
    with tg.Recorder(sys.argv[1], the_problem, the_optimizer, flush_seconds=0.02) as recorder:
        print("recording", flush=True)
        for _ in iter(int, 1):
            train(the_model, the_optimizer, 20, batches(recorder.step))
