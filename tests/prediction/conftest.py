"""A linear regression with known truth, trained by an ordinary loop and recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import thermograd as tg
from thermograd.minibatches import Minibatches


class Line(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.w = torch.nn.Parameter(weights)

    def forward(self, x):
        return x @ self.w


def half_square(output, target):
    return 0.5 * (output - target) ** 2


@dataclass(frozen=True)
class Regression:
    folder: Path
    problem: tg.Problem
    X: np.ndarray
    y: np.ndarray
    sgd: tg.SGD


@pytest.fixture(scope="session")
def regression(tmp_path_factory):
    rng = np.random.default_rng(4)
    N, d = 160, 5
    X = rng.standard_normal((N, d)) * np.geomspace(1, 0.3, d)
    y = X @ rng.standard_normal(d) + 0.5 * rng.standard_normal(N)
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    sgd = tg.SGD(lr=0.05, momentum=0.6, weight_decay=0.02, batch_size=8, dataset_size=N, sampling="reshuffle")
    start = torch.linalg.solve(inputs.T @ inputs / N + 0.02 * torch.eye(d), inputs.T @ targets / N)
    model = Line(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.6, weight_decay=0.02)
    problem = tg.Problem(model, half_square, (inputs, targets))
    folder = tmp_path_factory.mktemp("regression") / "run"
    batches = Minibatches(N, 8, "reshuffle", 1)
    with tg.Recorder(folder, problem, optimizer, batch_size=8, sampling="reshuffle"):
        for _ in range(4000):
            index = next(batches)
            optimizer.zero_grad()
            half_square(model(inputs[index]), targets[index]).mean().backward()
            optimizer.step()
    return Regression(folder, problem, X, y, sgd)
